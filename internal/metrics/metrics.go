// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package metrics holds the agent's Prometheus metrics: kube-proxy's own under
// their names, so that dashboards go on working, and fairlead_ ones for what
// kube-proxy does not have.
package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics are all metrics of one agent. The fields may be used from any
// goroutine.
type Metrics struct {
	registry *prometheus.Registry

	// As kube-proxy has them.
	SyncDuration     prometheus.Histogram // seconds from the first event of a batch to the last write
	SyncTimestamp    prometheus.Gauge     // Unix time of the last apply
	QueuedTimestamp  prometheus.Gauge     // Unix time a change last arrived
	ServiceChanges   prometheus.Counter
	EndpointChanges  prometheus.Counter
	FullSyncDuration prometheus.Histogram // seconds

	// Ours.
	FailedServices    prometheus.Gauge   // Services that are not in the kernel as they should be
	RepairedRows      prometheus.Counter // rows a repair pass found missing or wrong
	Warnings          prometheus.Counter // objects or fields left out because they are invalid
	SocketsEnded      *prometheus.CounterVec
	SocketWalksFailed prometheus.Counter
}

// Labels of SocketsEnded.
const (
	ReasonBackendGone = "backend_gone" // connected to a backend that has left
	ReasonBackendCame = "backend_came" // connected to a VIP that leads somewhere now
)

// Kernel tells what the kernel's maps hold, at the time of a scrape.
type Kernel interface {
	// Writes returns rows written and deleted by this process, by table.
	Writes() map[string]uint64
	// Events returns the datapath's counters by name; they outlive the agent.
	Events() (map[string]uint64, error)
}

// Buckets of kube-proxy's sync histograms: 1 ms to 16 s.
var syncBuckets = prometheus.ExponentialBuckets(0.001, 2, 15)

// New returns metrics that are registered with a registry of their own.
func New(version string, kernel Kernel) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		SyncDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kubeproxy_sync_proxy_rules_duration_seconds", Buckets: syncBuckets,
			Help: "Time to bring the kernel up to date after a batch of changes.",
		}),
		FullSyncDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kubeproxy_sync_full_proxy_rules_duration_seconds", Buckets: syncBuckets,
			Help: "Time of a pass over everything: the first sync and repairs.",
		}),
		SyncTimestamp: gauge("kubeproxy_sync_proxy_rules_last_timestamp_seconds",
			"Unix time at which the kernel was last brought up to date."),
		QueuedTimestamp: gauge("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
			"Unix time at which a change last arrived."),
		ServiceChanges: counter("kubeproxy_sync_proxy_rules_service_changes_total",
			"Changes of Services that arrived."),
		EndpointChanges: counter("kubeproxy_sync_proxy_rules_endpoint_changes_total",
			"Changes of EndpointSlices that arrived."),
		FailedServices: gauge("fairlead_services_failed",
			"Services that are not in the kernel as they should be; fairlead inspect services says why."),
		RepairedRows: counter("fairlead_repaired_rows_total",
			"Rows that a repair pass found missing or wrong in the kernel. More than 0 means a defect or a second writer."),
		Warnings: counter("fairlead_invalid_objects_total",
			"Warnings about objects or fields that were left out because they are invalid."),
		SocketsEnded: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_udp_sockets_ended_total",
			Help: "Connected UDP sockets that were ended so that they connect anew.",
		}, []string{"reason"}),
		SocketWalksFailed: counter("fairlead_udp_socket_walks_failed_total",
			"Searches for stale UDP sockets that failed wholly or in some namespace."),
	}
	// Series that exist from the start can be alerted on.
	m.SocketsEnded.WithLabelValues(ReasonBackendGone)
	m.SocketsEnded.WithLabelValues(ReasonBackendCame)
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "fairlead_build_info", Help: "1, labelled with the version.",
	}, []string{"version"})
	info.WithLabelValues(version).Set(1)
	m.registry.MustRegister(m.SyncDuration, m.FullSyncDuration, m.SyncTimestamp, m.QueuedTimestamp,
		m.ServiceChanges, m.EndpointChanges, m.FailedServices, m.RepairedRows, m.Warnings,
		m.SocketsEnded, m.SocketWalksFailed, info, kernelCollector{kernel},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func gauge(name, help string) prometheus.Gauge {
	return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
}

func counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
}

// Synced records an apply that began at start.
func (m *Metrics) Synced(start time.Time, full bool) {
	took := time.Since(start).Seconds()
	m.SyncDuration.Observe(took)
	if full {
		m.FullSyncDuration.Observe(took)
	}
	m.SyncTimestamp.SetToCurrentTime()
}

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// kernelCollector asks the kernel at each scrape; nothing is kept twice.
type kernelCollector struct{ kernel Kernel }

var (
	writesDesc = prometheus.NewDesc("fairlead_table_writes_total",
		"Rows written to or deleted from the kernel's tables by this process.", []string{"table"}, nil)
	eventsDesc = prometheus.NewDesc("fairlead_datapath_events_total",
		"Outcomes counted by the BPF programs since the maps were made; fairlead inspect counters shows the same.",
		[]string{"event"}, nil)
)

// Describe implements prometheus.Collector.
func (c kernelCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- writesDesc
	ch <- eventsDesc
}

// Collect implements prometheus.Collector.
func (c kernelCollector) Collect(ch chan<- prometheus.Metric) {
	for table, n := range c.kernel.Writes() {
		ch <- prometheus.MustNewConstMetric(writesDesc, prometheus.CounterValue, float64(n), table)
	}
	events, err := c.kernel.Events()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(eventsDesc, err)
		return
	}
	for name, n := range events {
		ch <- prometheus.MustNewConstMetric(eventsDesc, prometheus.CounterValue, float64(n), name)
	}
}
