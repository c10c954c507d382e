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
)

// kernel is a Kernel with fixed numbers.
type kernel struct {
	writes, events map[string]uint64
	err            error
}

func (k kernel) Writes() map[string]uint64          { return k.writes }
func (k kernel) Events() (map[string]uint64, error) { return k.events, k.err }

func scrape(m *Metrics) (code int, page string) {
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	return rec.Code, rec.Body.String()
}

func TestPage(t *testing.T) {
	m := New("v1.2.3", kernel{
		writes: map[string]uint64{"frontends": 3},
		events: map[string]uint64{"connect_tcp_translate": 5},
	})
	m.Synced(time.Now(), true)
	m.SocketsEnded.WithLabelValues(ReasonBackendGone).Add(2)
	code, page := scrape(m)
	if code != 200 {
		t.Fatalf("code %d: %s", code, page)
	}
	for _, line := range []string{
		`fairlead_build_info{version="v1.2.3"} 1`,
		`fairlead_table_writes_total{table="frontends"} 3`,
		`fairlead_datapath_events_total{event="connect_tcp_translate"} 5`,
		`fairlead_udp_sockets_ended_total{reason="backend_gone"} 2`,
		// There from the start, so that a first increase can be alerted on.
		`fairlead_udp_sockets_ended_total{reason="backend_came"} 0`,
		`fairlead_repaired_rows_total 0`,
		`fairlead_services_failed 0`,
		`kubeproxy_sync_proxy_rules_service_changes_total 0`,
		`kubeproxy_sync_proxy_rules_endpoint_changes_total 0`,
	} {
		if !strings.Contains(page, "\n"+line+"\n") {
			t.Errorf("the page has no line %s", line)
		}
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
