// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package metrics holds the agent's Prometheus metrics: kube-proxy's own under
// their names, so that dashboards go on working, and fairlead_ ones for what
// kube-proxy does not have.
package metrics

import (
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Metrics are all metrics of one agent. The methods and fields may be used from
// any goroutine.
type Metrics struct {
	registry *prometheus.Registry

	kubeProxy

	FailedServices    prometheus.Gauge       // Services that are not in the kernel as they should be
	RefusedFrontends  prometheus.Gauge       // addresses and ports that Services ask for and nobody gets
	RepairedRows      *prometheus.CounterVec // rows a repair pass found missing or wrong, by table
	Warnings          prometheus.Counter     // objects or fields left out because they are invalid
	SocketsEnded      *prometheus.CounterVec
	SocketWalksFailed prometheus.Counter
	ProgramsRestored  prometheus.Counter // programs on devices that somebody else had removed
	GuardHeld         prometheus.Gauge   // 1 while a list is held that would leave too much without backends
	GuardHolds        prometheus.Counter // how often that began

	AttachmentsRestored *prometheus.CounterVec // what somebody else had done to hooks and pins
	ProbeFailures       prometheus.Counter     // connections of our own that were not translated

	flows     *prometheus.GaugeVec
	snatPorts prometheus.Gauge
}

// Labels of SocketsEnded.
const (
	ReasonBackendGone = "backend_gone" // connected to a backend that has left
	ReasonBackendCame = "backend_came" // connected to a VIP that leads somewhere now
)

// Labels of AttachmentsRestored, beside the faults of hooks in package attach.
const (
	FaultMapUnpinned = "map_unpinned"   // a map's pin was gone or led to something else
	FaultCgroup      = "cgroup_changed" // the cgroup to attach to has become another one
)

// Kernel tells what the kernel's maps hold, at the time of a scrape.
type Kernel interface {
	// Writes returns rows written and deleted by this process, by table.
	Writes() map[string]uint64
	// Events returns the datapath's counters by name; they outlive the agent.
	Events() (map[string]uint64, error)
	// Tables returns how full the tables are that can grow.
	Tables() map[string]Fill
}

// Fill is how full a table is: its rows, how many there is room for now, and at most.
type Fill struct{ Rows, Size, Max uint32 }

// New returns metrics that are registered with a registry of their own.
func New(version string, kernel Kernel) *Metrics {
	m := &Metrics{
		registry:  prometheus.NewRegistry(),
		kubeProxy: newKubeProxy(),
		FailedServices: gauge("fairlead_services_failed",
			"Services that are not in the kernel as they should be; fairlead inspect services says why."),
		RefusedFrontends: gauge("fairlead_frontends_refused",
			"Addresses and ports that Services ask for and do not get because they are reserved or outside the ranges allowed."),
		RepairedRows: counters("fairlead_repaired_rows_total",
			"Rows that a repair pass found missing or wrong in the kernel. More than 0 means a defect or a second writer.", "table"),
		Warnings: counter("fairlead_invalid_objects_total",
			"Warnings about objects or fields that were left out because they are invalid."),
		SocketsEnded: counters("fairlead_udp_sockets_ended_total",
			"Connected UDP sockets that were ended so that they connect anew.", "reason"),
		SocketWalksFailed: counter("fairlead_udp_socket_walks_failed_total",
			"Searches for stale UDP sockets that failed wholly or in some namespace."),
		ProgramsRestored: counter("fairlead_tc_programs_restored_total",
			"Programs on network devices that somebody else had removed and that are back."),
		GuardHeld: gauge("fairlead_guard_held",
			"1 while a list is held that would take the last endpoints of many Services at once, until the source has said it again."),
		GuardHolds: counter("fairlead_guard_held_total",
			"Lists that were held because they would take the last endpoints of many Services at once."),
		AttachmentsRestored: counters("fairlead_attachments_restored_total",
			"Hooks and pins of the socket path that somebody else had changed and that are as they should be again.", "fault"),
		ProbeFailures: counter("fairlead_probe_failures_total",
			"Probes that found connections to a Service not to be translated; /healthz and fairlead status say why."),
		flows: gauges("fairlead_flows",
			"Flows of the packet path, as of a few seconds ago; fairlead inspect flows shows them.", "protocol"),
		snatPorts: gauge("fairlead_snat_ports_in_use",
			"Flows among these that have a source port of the node's."),
	}
	// Series that exist from the start can be alerted on.
	m.SocketsEnded.WithLabelValues(ReasonBackendGone)
	m.SocketsEnded.WithLabelValues(ReasonBackendCame)
	for _, table := range []string{
		"frontends", "services", "slots", "members", "source_ranges", "node_addresses", "service_cidrs", "names", "problems",
		"devices", "cluster_cidrs", "frontend_gate",
	} {
		m.RepairedRows.WithLabelValues(table)
	}
	for _, fault := range []string{"detached", "moved", "replaced", "unpinned", FaultMapUnpinned, FaultCgroup} {
		m.AttachmentsRestored.WithLabelValues(fault)
	}
	m.SetFlows(nil, 0)
	info := gauges("fairlead_build_info", "1, labelled with the version.", "version")
	info.WithLabelValues(version).Set(1)
	m.kubeProxy.register(m.registry)
	m.registry.MustRegister(m.FailedServices, m.RefusedFrontends, m.RepairedRows, m.Warnings,
		m.SocketsEnded, m.SocketWalksFailed, m.ProgramsRestored, m.GuardHeld, m.GuardHolds, m.AttachmentsRestored, m.ProbeFailures,
		m.flows, m.snatPorts, info, kernelCollector{kernel},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// SetFlows records how many flows there are by protocol, and how many of them have a
// source port of the node's.
func (m *Metrics) SetFlows(flows map[lb.Protocol]int, snatPorts int) {
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP} {
		m.flows.WithLabelValues(p.String()).Set(float64(flows[p]))
	}
	m.snatPorts.Set(float64(snatPorts))
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
	rowsDesc = prometheus.NewDesc("fairlead_table_rows", "Rows in the kernel's tables that can grow.", []string{"table"}, nil)
	sizeDesc = prometheus.NewDesc("fairlead_table_size_rows", "Rows that these tables have room for; they grow by themselves.", []string{"table"}, nil)
	maxDesc  = prometheus.NewDesc("fairlead_table_max_rows", "Rows up to which they grow, as the --max- flags say.", []string{"table"}, nil)
)

// What the packet path counts has metrics of its own as well, since alerts are made
// of it.
var (
	collisionsDesc = prometheus.NewDesc("fairlead_snat_collisions_total",
		"Source ports that were tried for a flow and were taken.", nil, nil)
	exhaustedDesc = prometheus.NewDesc("fairlead_snat_exhausted_total",
		"Packets dropped because no source port was free for their flow; widen --snat-ports.", nil, nil)
	droppedDesc = prometheus.NewDesc("fairlead_packets_dropped_total",
		"Packets that the packet path dropped or refused, by reason.", []string{"reason"}, nil)
)

// dropReason returns the reason in the name of an event that is a dropped packet.
func dropReason(event string) (reason string, dropped bool) {
	if event == "packet_pass" || event == "packet_translate" {
		return "", false
	}
	if reason, dropped = strings.CutPrefix(event, "packet_"); dropped {
		return reason, true
	}
	return strings.CutPrefix(event, "drop_")
}

// Describe implements prometheus.Collector.
func (c kernelCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{writesDesc, rowsDesc, sizeDesc, maxDesc, eventsDesc, collisionsDesc, exhaustedDesc, droppedDesc} {
		ch <- desc
	}
}

// Collect implements prometheus.Collector.
func (c kernelCollector) Collect(ch chan<- prometheus.Metric) {
	send := func(desc *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n), labels...)
	}
	for table, n := range c.kernel.Writes() {
		send(writesDesc, n, table)
	}
	for table, f := range c.kernel.Tables() {
		for desc, n := range map[*prometheus.Desc]uint32{rowsDesc: f.Rows, sizeDesc: f.Size, maxDesc: f.Max} {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(n), table)
		}
	}
	events, err := c.kernel.Events()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(eventsDesc, err)
		return
	}
	for name, n := range events {
		send(eventsDesc, n, name)
		if reason, dropped := dropReason(name); dropped {
			send(droppedDesc, n, reason)
		}
	}
	send(collisionsDesc, events["snat_collision"])
	send(exhaustedDesc, events["drop_snat_exhausted"])
}
