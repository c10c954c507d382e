// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package metrics

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// kernel is a Kernel with fixed numbers.
type kernel struct {
	writes, events map[string]uint64
	err            error
}

func (k kernel) Writes() map[string]uint64          { return k.writes }
func (k kernel) Events() (map[string]uint64, error) { return k.events, k.err }
func (k kernel) Tables() map[string]Fill            { return map[string]Fill{"slots": {Rows: 1, Size: 2, Max: 4}} }

func scrape(m *Metrics) (code int, page string) {
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	return rec.Code, rec.Body.String()
}

func TestPage(t *testing.T) {
	m := New("v1.2.3", kernel{
		writes: map[string]uint64{"frontends": 3},
		events: map[string]uint64{
			"connect_tcp_translate": 5, "packet_pass": 6, "packet_translate": 7, "packet_no_backend": 8,
			"snat_collision": 9, "drop_snat_exhausted": 10, "flow_request": 11,
		},
	})
	m.SetFlows(map[lb.Protocol]int{lb.TCP: 3, lb.UDP: 4}, 2)
	m.Synced(time.Now(), true)
	m.SocketsEnded.WithLabelValues(ReasonBackendGone).Add(2)
	code, page := scrape(m)
	if code != 200 {
		t.Fatalf("code %d: %s", code, page)
	}
	for _, line := range []string{
		`fairlead_build_info{version="v1.2.3"} 1`,
		`fairlead_table_writes_total{table="frontends"} 3`,
		`fairlead_table_rows{table="slots"} 1`,
		`fairlead_table_size_rows{table="slots"} 2`,
		`fairlead_table_max_rows{table="slots"} 4`,
		`fairlead_datapath_events_total{event="connect_tcp_translate"} 5`,
		`fairlead_udp_sockets_ended_total{reason="backend_gone"} 2`,
		// There from the start, so that a first increase can be alerted on.
		`fairlead_udp_sockets_ended_total{reason="backend_came"} 0`,
		`fairlead_repaired_rows_total{table="frontends"} 0`,
		`fairlead_repaired_rows_total{table="devices"} 0`,
		`fairlead_attachments_restored_total{fault="detached"} 0`,
		`fairlead_attachments_restored_total{fault="map_unpinned"} 0`,
		`fairlead_probe_failures_total 0`,
		`fairlead_services_failed 0`,
		`fairlead_flows{protocol="TCP"} 3`,
		`fairlead_flows{protocol="UDP"} 4`,
		`fairlead_flows{protocol="SCTP"} 0`,
		`fairlead_snat_ports_in_use 2`,
		`fairlead_snat_collisions_total 9`,
		`fairlead_snat_exhausted_total 10`,
		`fairlead_datapath_events_total{event="drop_snat_exhausted"} 10`,
		`fairlead_packets_dropped_total{reason="snat_exhausted"} 10`,
		`fairlead_packets_dropped_total{reason="no_backend"} 8`,
		`kubeproxy_sync_proxy_rules_service_changes_total 0`,
		`kubeproxy_sync_proxy_rules_endpoint_changes_total 0`,
	} {
		if !strings.Contains(page, "\n"+line+"\n") {
			t.Errorf("the page has no line %s", line)
		}
	}
	if n := strings.Count(page, "\nfairlead_packets_dropped_total{"); n != 2 {
		t.Errorf("%d reasons for dropping a packet, want 2", n)
	}
}

func TestNamesOfOursFollowConventions(t *testing.T) {
	m := New("v1", kernel{
		writes: map[string]uint64{"frontends": 3}, events: map[string]uint64{"connect_tcp_translate": 5},
	})
	all, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(all).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		// The others' names are not ours to choose.
		if strings.HasPrefix(p.Metric, "fairlead_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

func TestCountersThatCannotBeReadAreNotPassedOver(t *testing.T) {
	code, page := scrape(New("v1", kernel{err: errors.New("map is gone")}))
	if code == 200 || !strings.Contains(page, "map is gone") {
		t.Errorf("code %d, page %q: a scrape without the kernel's counters looks complete", code, page)
	}
}
