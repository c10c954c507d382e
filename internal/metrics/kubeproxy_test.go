// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package metrics

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// TestNamesAreKubeProxys compares name, type, help, labels and buckets with what
// kube-proxy 1.36.3 registers in its nftables mode, every label with every value.
func TestNamesAreKubeProxys(t *testing.T) {
	golden, err := os.ReadFile("testdata/kube-proxy-v1.36.3.txt")
	if err != nil {
		t.Fatal(err)
	}
	absent := map[string]string{
		"kubeproxy_conntrack_reconciler_deleted_entries_total":       "no flow of ours is in kernel conntrack",
		"kubeproxy_conntrack_reconciler_sync_duration_seconds":       "no flow of ours is in kernel conntrack",
		"kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total": "no nftables",
		"kubeproxy_sync_proxy_rules_nftables_sync_failures_total":    "no nftables",
	}
	var want []string
	for _, block := range strings.Split(strings.TrimSpace(string(golden)), "\n\n") {
		name, _, _ := strings.Cut(block, " ")
		if absent[name] != "" {
			delete(absent, name)
			continue
		}
		want = append(want, block)
	}
	if len(absent) != 0 {
		t.Errorf("not in kube-proxy: %v", absent)
	}
	m := New("v1", kernel{})
	m.Synced(time.Now(), true)
	if diff := cmp.Diff(want, described(t, m.registry, "kubeproxy_")); diff != "" {
		t.Errorf("-kube-proxy +ours:\n%s", diff)
	}
}

// described returns a block of lines for each metric whose name begins with
// prefix: all of it but the values.
func described(t *testing.T, g prometheus.Gatherer, prefix string) (blocks []string) {
	all, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if !strings.HasPrefix(m.GetName(), prefix) {
			continue
		}
		lines := []string{
			m.GetName() + " " + strings.ToLower(m.GetType().String()),
			"\thelp: " + m.GetHelp(),
		}
		for _, series := range m.GetMetric() {
			line := "\tseries:"
			for _, l := range series.GetLabel() {
				line += fmt.Sprintf(" %s=%s", l.GetName(), l.GetValue())
			}
			lines = append(lines, line)
		}
		if h := m.GetMetric()[0].GetHistogram(); h != nil {
			line := "\tbuckets:"
			for _, b := range h.GetBucket() {
				line += fmt.Sprintf(" %v", b.GetUpperBound())
			}
			lines = append(lines, line)
		}
		blocks = append(blocks, strings.Join(lines, "\n"))
	}
	return blocks
}

func TestKubeProxyValues(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(*Metrics)
		want map[string]string // value by series
	}{
		{"changes are pending until they are settled", func(m *Metrics) {
			m.ServiceChanges(3)
			m.EndpointChanges(5)
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_service_changes_pending":  "3",
			"kubeproxy_sync_proxy_rules_service_changes_total":    "3",
			"kubeproxy_sync_proxy_rules_endpoint_changes_pending": "5",
			"kubeproxy_sync_proxy_rules_endpoint_changes_total":   "5",
		}},
		{"a sync settles changes and does not take back their total", func(m *Metrics) {
			m.ServiceChanges(3)
			m.EndpointChanges(5)
			m.Synced(time.Now(), false)
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_service_changes_pending":  "0",
			"kubeproxy_sync_proxy_rules_service_changes_total":    "3",
			"kubeproxy_sync_proxy_rules_endpoint_changes_pending": "0",
			"kubeproxy_sync_proxy_rules_endpoint_changes_total":   "5",
		}},
		{"changes without an effect are settled without a sync", func(m *Metrics) {
			m.ServiceChanges(1)
			m.EndpointChanges(1)
			m.Settled()
		}, map[string]string{
			"kubeproxy_sync_proxy_rules_service_changes_pending":                  "0",
			"kubeproxy_sync_proxy_rules_endpoint_changes_pending":                 "0",
			`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"}`: "0",
		}},
		{"a partial sync is in the whole and the partial histogram", func(m *Metrics) {
			m.Synced(time.Now(), false)
		}, map[string]string{
			`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"}`:         "1",
			`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"}`:         "1",
			`kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family="IPv4"}`: "1",
			`kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"}`:    "0",
		}},
		{"a full sync is in the whole and the full histogram", func(m *Metrics) {
			m.Synced(time.Now(), true)
		}, map[string]string{
			`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"}`:         "1",
			`kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family="IPv6"}`: "0",
			`kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv6"}`:    "1",
		}},
		{"endpoints that are missing here are counted by policy and family", func(m *Metrics) {
			m.NoLocalEndpoints(PolicyExternal, lb.IPv6, 4)
		}, map[string]string{
			`kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="external"}`: "4",
			`kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="external"}`: "0",
			`kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="internal"}`: "0",
		}},
		{"answers are counted by code", func(m *Metrics) {
			m.Healthz(503)
			m.Livez(200)
		}, map[string]string{
			`kubeproxy_proxy_healthz_total{code="503"}`: "1",
			`kubeproxy_proxy_healthz_total{code="200"}`: "0",
			`kubeproxy_proxy_livez_total{code="200"}`:   "1",
		}},
		{"programming counts by the family of the slice", func(m *Metrics) {
			m.NetworkProgramming(lb.IPv4, m.start.Add(time.Nanosecond))
		}, map[string]string{
			`kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}`: "1",
			`kubeproxy_network_programming_duration_seconds_count{ip_family="IPv6"}`: "0",
		}},
		{"a change before the agent's start was not late because of it", func(m *Metrics) {
			m.NetworkProgramming(lb.IPv4, m.start)
			m.NetworkProgramming(lb.IPv4, time.Time{})
		}, map[string]string{
			`kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}`: "0",
		}},
		{"a clock ahead of ours does not make the sum shrink", func(m *Metrics) {
			m.NetworkProgramming(lb.IPv4, time.Now().Add(time.Hour))
		}, map[string]string{
			`kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}`: "1",
			`kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv4"}`:   "0",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := New("v1", kernel{})
			tt.do(m)
			_, page := scrape(m)
			for series, value := range tt.want {
				if !strings.Contains(page, "\n"+series+" "+value+"\n") {
					t.Errorf("%s is not %s", series, value)
				}
			}
		})
	}
}

func TestTimestamps(t *testing.T) {
	m := New("v1", kernel{})
	_, page := scrape(m)
	if strings.Contains(page, "\nkubeproxy_sync_proxy_rules_last_timestamp_seconds") {
		t.Error("there is a time of the last sync before the first one")
	}
	const queued = `kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv6"} `
	if !strings.Contains(page, "\n"+queued) || strings.Contains(page, queued+"0\n") {
		t.Error("the first sync is queued with the start and has no time")
	}
	before := time.Now().Unix()
	m.Synced(time.Now(), true)
	for _, f := range families {
		got := value(t, m.registry, "kubeproxy_sync_proxy_rules_last_timestamp_seconds", f.String())
		if got < float64(before) || got > float64(time.Now().Unix()+1) {
			t.Errorf("%v: last sync at %v, want about %v", f, got, before)
		}
	}
}

// value returns the gauge name of a family.
func value(t *testing.T, g prometheus.Gatherer, name, family string) float64 {
	all, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		for _, series := range m.GetMetric() {
			if m.GetName() == name && series.GetLabel()[0].GetValue() == family {
				return series.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no %s of %s", name, family)
	return 0
}
