// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package config reads the configuration file of kube-proxy, so that a cluster's
// own file (or its whole ConfigMap) configures Fairlead without a change.
//
// What means something to Fairlead becomes a field of Config. What does not is
// named once in a Warning when it is set. A value nobody can follow is replaced
// by the safest meaning and costs a Warning as well: kube-proxy would refuse to
// start, but the node is better served with the rest of the file. Only a file
// that is no KubeProxyConfiguration at all is an error.
//
//	Load, Parse  file or text → Config, warnings
//	Watch        tells that the file has changed
//
// A new field upstream belongs either into Config or into the table in
// ignored.go; a test fails until it is in one of them.
package config

import (
	"net/netip"
	"time"
)

// Config is what a KubeProxyConfiguration says, complete: what the file leaves
// out has kube-proxy's default. Every value is in the range its comment names.
type Config struct {
	// HostnameOverride is the name of this node in the API, in lower case.
	// Empty: the host's name.
	HostnameOverride string
	// BindAddress is the node's own address in its primary family, as a source
	// range may name it; nothing listens there. Unspecified (0.0.0.0 or ::): the
	// addresses of the Node object. It is valid and never ::ffff:a.b.c.d.
	BindAddress netip.Addr
	// HealthzBindAddress and MetricsBindAddress are an IP address and a port
	// each. A file cannot turn either off: empty is the default, which is in the
	// family of BindAddress.
	HealthzBindAddress string
	MetricsBindAddress string
	// BindAddressHardFail: end when one of the two addresses cannot be had,
	// rather than trying again.
	BindAddressHardFail bool
	// EnableProfiling: serve /debug/pprof beside the metrics.
	EnableProfiling bool

	Client Client

	// NodePortAddresses says on which of its addresses the node accepts
	// NodePorts: one or more CIDRs, masked, or the single word "primary". A
	// family that no CIDR is of accepts on all its addresses. It is nil when the
	// file does not say; then NodePortAllAddresses counts.
	NodePortAddresses []string
	// NodePortAllAddresses tells what nil NodePortAddresses mean in the file's
	// mode: every local address (iptables, ipvs, none named), or when false the
	// primary ones (nftables). It is false when NodePortAddresses are given.
	NodePortAllAddresses bool
	// LocalhostNodePorts: processes on the node reach NodePorts on 127.0.0.1.
	LocalhostNodePorts bool
	// AllowExternalIPs: spec.externalIPs of Services are served (feature gate
	// AllowServiceExternalIPs).
	AllowExternalIPs bool

	DetectLocal DetectLocal
	Conntrack   Conntrack

	// SyncPeriod is that of the file's mode, at least a second. Fairlead applies
	// changes as they come and needs none, but /healthz fails when a change has
	// waited for twice this long. (minSyncPeriod means nothing here.)
	SyncPeriod time.Duration
	// OOMScoreAdj is the agent's own oom_score_adj, -1000 to 1000.
	OOMScoreAdj int

	// LogLevel is "debug" from logging.verbosity 4 on, where klog starts to
	// debug, and otherwise empty: the file does not say.
	LogLevel string
	// LogFormat is "console" or "json", or empty when the file does not say.
	LogFormat string
}

// Client says how to talk to the API server.
type Client struct {
	// Kubeconfig is a path as the file gives it. Empty: the pod's credentials.
	Kubeconfig string
	// QPS bounds requests per second; below zero there is no bound. Never zero.
	QPS float32
	// Burst is how many requests may exceed QPS for a moment, above zero.
	Burst int
}

// LocalMode is a way to tell who is inside the cluster.
type LocalMode string

// The ways there are. All but the first are ways to tell the pods of this node,
// which Fairlead knows by their links: they are inside in any case. Who else is,
// Inside says.
const (
	LocalModeClusterCIDR         LocalMode = "ClusterCIDR"         // sources in ClusterCIDRs
	LocalModeNodeCIDR            LocalMode = "NodeCIDR"            // sources in the Node's spec.podCIDRs
	LocalModeBridgeInterface     LocalMode = "BridgeInterface"     // what comes in on one bridge
	LocalModeInterfaceNamePrefix LocalMode = "InterfaceNamePrefix" // what comes in on interfaces named like this
)

// DetectLocal says who is inside. It concerns packets on the wire alone: a
// process whose socket is seen is inside, whatever its address.
type DetectLocal struct {
	// Mode is one of the four constants. The field it needs is filled, but for
	// ClusterCIDRs, which may be empty: no address is inside by itself then.
	Mode LocalMode
	// ClusterCIDRs are masked, of either family, in the file's order.
	ClusterCIDRs        []netip.Prefix
	BridgeInterface     string
	InterfaceNamePrefix string
}

// Inside returns whose packets are inside wherever they arrive: the cluster's
// CIDRs in mode ClusterCIDR, and nobody's in the others, in which kube-proxy does
// not look at them either.
func (d DetectLocal) Inside() []netip.Prefix {
	if d.Mode != LocalModeClusterCIDR {
		return nil
	}
	return d.ClusterCIDRs
}

// Conntrack holds what to set in net.netfilter of the node, and how long flows of
// the packet path last. A timeout of zero leaves the kernel's value, and that of
// flows, alone; the others are between a second and what the kernel takes.
type Conntrack struct {
	// MaxPerCore and Min are not negative.
	MaxPerCore int
	Min        int
	// TCPBeLiberal: set nf_conntrack_tcp_be_liberal to 1. When false the
	// kernel's value is left alone.
	TCPBeLiberal          bool
	TCPEstablishedTimeout time.Duration
	TCPCloseWaitTimeout   time.Duration
	UDPTimeout            time.Duration
	UDPStreamTimeout      time.Duration
}

// Default returns what kube-proxy does without a file, the same as a file that
// sets nothing. Its NodePortAllAddresses is true, as in kube-proxy's default
// mode; this is not what Fairlead does without a file, which is "primary".
func Default() Config {
	bind := netip.IPv4Unspecified()
	return Config{
		BindAddress:        bind,
		HealthzBindAddress: defaultHealthz(bind),
		MetricsBindAddress: defaultMetrics(bind),

		Client: Client{QPS: 5, Burst: 10},

		NodePortAllAddresses: true,
		LocalhostNodePorts:   true,
		AllowExternalIPs:     true,

		DetectLocal: DetectLocal{Mode: LocalModeClusterCIDR},
		Conntrack: Conntrack{
			MaxPerCore:            32 * 1024,
			Min:                   128 * 1024,
			TCPEstablishedTimeout: 24 * time.Hour,
			TCPCloseWaitTimeout:   time.Hour,
		},

		SyncPeriod:  30 * time.Second,
		OOMScoreAdj: -999,
	}
}

// The ports kube-proxy serves on unless told otherwise.
const (
	healthzPort = 10256
	metricsPort = 10249
)

// defaultHealthz returns the health address of a node with this primary address.
func defaultHealthz(bind netip.Addr) string {
	host := netip.IPv4Unspecified()
	if bind.Is6() {
		host = netip.IPv6Unspecified()
	}
	return netip.AddrPortFrom(host, healthzPort).String()
}

// defaultMetrics returns the metrics address of a node with this primary address.
func defaultMetrics(bind netip.Addr) string {
	host := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if bind.Is6() {
		host = netip.IPv6Loopback()
	}
	return netip.AddrPortFrom(host, metricsPort).String()
}
