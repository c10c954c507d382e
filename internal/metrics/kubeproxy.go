// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package metrics

import (
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Policy is a value of the label traffic_policy.
type Policy string

// The traffic policies of a Service.
const (
	PolicyInternal Policy = "internal"
	PolicyExternal Policy = "external"
)

var (
	policies = []Policy{PolicyInternal, PolicyExternal}
	families = []lb.Family{lb.IPv4, lb.IPv6}

	// Buckets of kube-proxy's sync histograms: 1 ms to 16 s.
	syncBuckets = prometheus.ExponentialBuckets(0.001, 2, 15)

	// Buckets of the SLO "network programming latency": fine up to a minute,
	// then coarser, up to five. The first holds what seems to take no time, since
	// the clock of another machine is ahead.
	programmingBuckets = slices.Concat(
		[]float64{0, 0.25, 0.5},
		prometheus.LinearBuckets(1, 1, 59),
		prometheus.LinearBuckets(60, 5, 12),
		prometheus.LinearBuckets(120, 30, 7),
	)
)

// kubeProxy are the metrics that kube-proxy has in its nftables mode, but for
// those about nftables and kernel conntrack. Name, type, labels, buckets and help
// are an interface: dashboards and alerts depend on them. Where kube-proxy has one
// proxy for each family, one agent keeps both here, and what it does counts for
// each.
type kubeProxy struct {
	start time.Time

	sync        *prometheus.HistogramVec
	syncFull    *prometheus.HistogramVec
	syncPartial *prometheus.HistogramVec
	programming *prometheus.HistogramVec
	lastSync    *prometheus.GaugeVec
	lastQueued  *prometheus.GaugeVec
	noLocal     *prometheus.GaugeVec

	servicesPending  prometheus.Gauge
	servicesTotal    prometheus.Counter
	endpointsPending prometheus.Gauge
	endpointsTotal   prometheus.Counter

	healthz *prometheus.CounterVec
	livez   *prometheus.CounterVec
}

func newKubeProxy() kubeProxy {
	const family = "ip_family"
	return kubeProxy{
		start: time.Now(),
		sync: histograms("kubeproxy_sync_proxy_rules_duration_seconds",
			alpha+"SyncProxyRules latency in seconds", syncBuckets, family),
		syncFull: histograms("kubeproxy_sync_full_proxy_rules_duration_seconds",
			alpha+"SyncProxyRules latency in seconds for full resyncs", syncBuckets, family),
		syncPartial: histograms("kubeproxy_sync_partial_proxy_rules_duration_seconds",
			alpha+"SyncProxyRules latency in seconds for partial resyncs", syncBuckets, family),
		programming: histograms("kubeproxy_network_programming_duration_seconds",
			alpha+"In Cluster Network Programming Latency in seconds", programmingBuckets, family),
		lastSync: gauges("kubeproxy_sync_proxy_rules_last_timestamp_seconds",
			alpha+"The last time proxy rules were successfully synced", family),
		lastQueued: gauges("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
			alpha+"The last time a sync of proxy rules was queued", family),
		noLocal: gauges("kubeproxy_sync_proxy_rules_no_local_endpoints_total",
			alpha+"Number of services with a Local traffic policy and no endpoints", "traffic_policy", family),
		servicesPending: gauge("kubeproxy_sync_proxy_rules_service_changes_pending",
			alpha+"Pending proxy rules Service changes"),
		servicesTotal: counter("kubeproxy_sync_proxy_rules_service_changes_total",
			alpha+"Cumulative proxy rules Service changes"),
		endpointsPending: gauge("kubeproxy_sync_proxy_rules_endpoint_changes_pending",
			alpha+"Pending proxy rules Endpoint changes"),
		endpointsTotal: counter("kubeproxy_sync_proxy_rules_endpoint_changes_total",
			alpha+"Cumulative proxy rules Endpoint changes"),
		healthz: counters("kubeproxy_proxy_healthz_total", alpha+"Cumulative proxy healthz HTTP status", "code"),
		livez:   counters("kubeproxy_proxy_livez_total", alpha+"Cumulative proxy livez HTTP status", "code"),
	}
}

// register registers all with r and makes the series that exist from the start,
// so that a first increase can be seen. The time of the last sync is none of them:
// until there was one, 0 would be 1970.
func (k *kubeProxy) register(r prometheus.Registerer) {
	r.MustRegister(k.sync, k.syncFull, k.syncPartial, k.programming, k.lastSync, k.lastQueued, k.noLocal,
		k.servicesPending, k.servicesTotal, k.endpointsPending, k.endpointsTotal, k.healthz, k.livez)
	for _, f := range families {
		for _, h := range []*prometheus.HistogramVec{k.sync, k.syncFull, k.syncPartial, k.programming} {
			h.WithLabelValues(f.String())
		}
		for _, p := range policies {
			k.noLocal.WithLabelValues(string(p), f.String())
		}
	}
	for _, code := range []string{"200", "503"} {
		k.healthz.WithLabelValues(code)
		k.livez.WithLabelValues(code)
	}
	k.Queued()
}

// ServiceChanges records n changes of Services that have arrived.
func (k *kubeProxy) ServiceChanges(n int) {
	k.servicesTotal.Add(float64(n))
	k.servicesPending.Add(float64(n))
}

// EndpointChanges records n changes of EndpointSlices that have arrived.
func (k *kubeProxy) EndpointChanges(n int) {
	k.endpointsTotal.Add(float64(n))
	k.endpointsPending.Add(float64(n))
}

// Queued records that there is something to apply, as of now.
func (k *kubeProxy) Queued() {
	for _, f := range families {
		k.lastQueued.WithLabelValues(f.String()).SetToCurrentTime()
	}
}

// Settled records that no change is pending: all that have arrived have been
// looked at and, where they mattered, applied.
func (k *kubeProxy) Settled() {
	k.servicesPending.Set(0)
	k.endpointsPending.Set(0)
}

// Synced records an apply that began at start and has ended now, and that no
// change is pending. A full one is the first and every repair.
func (k *kubeProxy) Synced(start time.Time, full bool) {
	took := time.Since(start).Seconds()
	kind := k.syncPartial
	if full {
		kind = k.syncFull
	}
	for _, f := range families {
		k.sync.WithLabelValues(f.String()).Observe(took)
		kind.WithLabelValues(f.String()).Observe(took)
		k.lastSync.WithLabelValues(f.String()).SetToCurrentTime()
	}
	k.Settled()
}

// NetworkProgramming records that a change of endpoints is in the kernel now;
// trigger is when it happened, as the annotation
// endpoints.kubernetes.io/last-change-trigger-time of the EndpointSlice says. A
// time before the agent's start, the zero time among them, does not count: it was
// not the agent that let it wait.
func (k *kubeProxy) NetworkProgramming(family lb.Family, trigger time.Time) {
	if !trigger.After(k.start) {
		return
	}
	// The time comes from another machine, whose clock may be ahead of ours.
	took := max(0, time.Since(trigger).Seconds())
	k.programming.WithLabelValues(family.String()).Observe(took)
}

// NoLocalEndpoints records that n service ports of a family have usable endpoints,
// but none on this node where their policy is Local.
func (k *kubeProxy) NoLocalEndpoints(policy Policy, family lb.Family, n int) {
	k.noLocal.WithLabelValues(string(policy), family.String()).Set(float64(n))
}

// Healthz records an answer of /healthz.
func (k *kubeProxy) Healthz(code int) { k.healthz.WithLabelValues(strconv.Itoa(code)).Inc() }

// Livez records an answer of /livez.
func (k *kubeProxy) Livez(code int) { k.livez.WithLabelValues(strconv.Itoa(code)).Inc() }
