// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"math"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
)

// kube-proxy's modes. None named is iptables.
const (
	modeIPTables v1alpha1.ProxyMode = "iptables"
	modeIPVS     v1alpha1.ProxyMode = "ipvs"
	modeNFTables v1alpha1.ProxyMode = "nftables"
)

// primary is the word for the node's primary addresses among NodePortAddresses.
const primary = "primary"

// externalIPsGate is the feature gate that has a meaning here.
const externalIPsGate = "AllowServiceExternalIPs"

// debugVerbosity is where Kubernetes starts to log what only helps to debug.
const debugVerbosity = 4

// config says what a file means.
func (p *parser) config(in *v1alpha1.KubeProxyConfiguration) Config {
	c := Default()
	p.mode(in)
	p.addresses(in, &c)
	p.client(in, &c.Client)
	p.nodePorts(in, &c)
	p.detectLocal(in, &c.DetectLocal)
	p.conntrack(&in.Conntrack, &c.Conntrack)
	p.gates(in.FeatureGates, &c)
	p.logging(in, &c)
	p.masquerade(in)

	c.HostnameOverride = strings.ToLower(strings.TrimSpace(in.HostnameOverride))
	if in.HostnameOverride != "" && c.HostnameOverride == "" {
		p.warn("hostnameOverride: nothing but blanks: the host's name is used")
	}
	c.BindAddressHardFail = in.BindAddressHardFail
	c.EnableProfiling = in.EnableProfiling
	c.SyncPeriod = p.period(syncPeriodPath(in.Mode), syncPeriod(in), c.SyncPeriod)
	if n := in.OOMScoreAdj; n != nil {
		if *n < -1000 || *n > 1000 {
			p.warn("oomScoreAdj: %d is not from -1000 to 1000: %d, the default, is used", *n, c.OOMScoreAdj)
		} else {
			c.OOMScoreAdj = int(*n)
		}
	}
	p.unread()
	p.meaningless(in)
	return c
}

// mode makes a mode nobody knows the default one.
func (p *parser) mode(in *v1alpha1.KubeProxyConfiguration) {
	switch in.Mode {
	case "", modeIPTables, modeIPVS, modeNFTables:
	default:
		p.warn("mode: %s is none of iptables, ipvs, nftables: read as iptables", quote(string(in.Mode)))
		in.Mode = modeIPTables
	}
}

// syncPeriod returns the period of the mode in use.
func syncPeriod(in *v1alpha1.KubeProxyConfiguration) metav1.Duration {
	switch in.Mode {
	case modeIPVS:
		return in.IPVS.SyncPeriod
	case modeNFTables:
		return in.NFTables.SyncPeriod
	default:
		return in.IPTables.SyncPeriod
	}
}

// syncPeriodPath returns where the period of a mode is.
func syncPeriodPath(mode v1alpha1.ProxyMode) string {
	if mode == "" {
		mode = modeIPTables
	}
	return string(mode) + ".syncPeriod"
}

// addresses reads the node's address and those of our servers, whose family
// follows it.
func (p *parser) addresses(in *v1alpha1.KubeProxyConfiguration, c *Config) {
	if in.BindAddress != "" {
		if address, ok := parseAddress(in.BindAddress); ok {
			c.BindAddress = address
		} else {
			p.warn("bindAddress: %s is not an IP address: %v, the default, is used", quote(in.BindAddress), c.BindAddress)
		}
	}
	c.HealthzBindAddress = p.listen("healthzBindAddress", in.HealthzBindAddress, healthzPort, defaultHealthz(c.BindAddress))
	c.MetricsBindAddress = p.listen("metricsBindAddress", in.MetricsBindAddress, metricsPort, defaultMetrics(c.BindAddress))
}

// listen reads an address to listen on. An address without a port gets ours.
func (p *parser) listen(path, value string, port uint16, usual string) string {
	if value == "" {
		return usual
	}
	address, ok := parseListen(value, port)
	if !ok {
		p.warn("%s: %s is not an IP address and a port, such as 127.0.0.1:%d or [::1]:%d: %s, the default, is used",
			path, quote(value), port, port, usual)
		return usual
	}
	return address.String()
}

func (p *parser) client(in *v1alpha1.KubeProxyConfiguration, c *Client) {
	from := in.ClientConnection
	c.Kubeconfig = from.Kubeconfig
	if from.QPS != 0 {
		c.QPS = from.QPS
	}
	switch {
	case from.Burst < 0:
		p.warn("clientConnection.burst: %d is below 0: %d, the default, is used", from.Burst, c.Burst)
	case from.Burst > 0:
		c.Burst = int(from.Burst)
	}
}

// nodePorts reads where NodePorts are accepted. What cannot be read must not
// open more addresses than were asked for: without one of several CIDRs its
// whole family would be open.
func (p *parser) nodePorts(in *v1alpha1.KubeProxyConfiguration, c *Config) {
	const path = "nodePortAddresses"
	if in.IPTables.LocalhostNodePorts != nil {
		c.LocalhostNodePorts = *in.IPTables.LocalhostNodePorts
	}
	c.NodePortAllAddresses = false
	if wrong, ok := p.unreadable[path]; ok {
		delete(p.unreadable, path)
		c.NodePortAddresses = []string{primary}
		p.warn("%s: %s: NodePorts are accepted on the node's primary addresses only", path, wrong)
		return
	}
	if len(in.NodePortAddresses) == 0 {
		c.NodePortAllAddresses = in.Mode != modeNFTables
		return
	}
	if len(in.NodePortAddresses) == 1 && in.NodePortAddresses[0] == primary {
		c.NodePortAddresses = []string{primary}
		return
	}
	prefixes, bad := parsePrefixes(in.NodePortAddresses)
	for _, prefix := range prefixes {
		c.NodePortAddresses = append(c.NodePortAddresses, prefix.String())
	}
	if len(bad) > 0 {
		p.warn("%s: neither CIDRs nor the single word primary: %s: NodePorts are accepted on the node's primary addresses only",
			path, list(bad))
		c.NodePortAddresses = []string{primary}
	}
}

// detectLocal reads who is inside.
func (p *parser) detectLocal(in *v1alpha1.KubeProxyConfiguration, c *DetectLocal) {
	if in.ClusterCIDR != "" {
		var bad []string
		c.ClusterCIDRs, bad = parsePrefixes(strings.Split(in.ClusterCIDR, ","))
		if len(bad) > 0 {
			p.warn("clusterCIDR: not a CIDR: %s: left out", list(bad))
		}
	}
	c.BridgeInterface = in.DetectLocal.BridgeInterface
	c.InterfaceNamePrefix = in.DetectLocal.InterfaceNamePrefix
	switch mode := LocalMode(in.DetectLocalMode); {
	case mode == "":
	case mode == LocalModeClusterCIDR, mode == LocalModeNodeCIDR,
		mode == LocalModeBridgeInterface && c.BridgeInterface != "",
		mode == LocalModeInterfaceNamePrefix && c.InterfaceNamePrefix != "":
		c.Mode = mode
	case mode == LocalModeBridgeInterface:
		p.warn("detectLocal.bridgeInterface: empty, where detectLocalMode needs it: %s is used", c.Mode)
	case mode == LocalModeInterfaceNamePrefix:
		p.warn("detectLocal.interfaceNamePrefix: empty, where detectLocalMode needs it: %s is used", c.Mode)
	default:
		p.warn("detectLocalMode: %s is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix: %s is used",
			quote(string(mode)), c.Mode)
	}
	switch c.Mode {
	case LocalModeBridgeInterface:
		p.warn("detectLocal.bridgeInterface: pods of this node are known by their links: what else comes in on %s is outside",
			printable(c.BridgeInterface))
	case LocalModeInterfaceNamePrefix:
		p.warn("detectLocal.interfaceNamePrefix: pods of this node are known by their links: what else comes in on %s… is outside",
			printable(c.InterfaceNamePrefix))
	}
}

// conntrack reads the sysctls. A nil pointer is the default, zero the wish to
// leave the kernel's value alone.
func (p *parser) conntrack(in *v1alpha1.KubeProxyConntrackConfiguration, c *Conntrack) {
	c.MaxPerCore = p.count("conntrack.maxPerCore", in.MaxPerCore, c.MaxPerCore)
	c.Min = p.count("conntrack.min", in.Min, c.Min)
	c.TCPBeLiberal = in.TCPBeLiberal
	c.TCPEstablishedTimeout = p.timeout("conntrack.tcpEstablishedTimeout", in.TCPEstablishedTimeout, c.TCPEstablishedTimeout)
	c.TCPCloseWaitTimeout = p.timeout("conntrack.tcpCloseWaitTimeout", in.TCPCloseWaitTimeout, c.TCPCloseWaitTimeout)
	c.UDPTimeout = p.timeout("conntrack.udpTimeout", &in.UDPTimeout, 0)
	c.UDPStreamTimeout = p.timeout("conntrack.udpStreamTimeout", &in.UDPStreamTimeout, 0)
}

func (p *parser) count(path string, n *int32, usual int) int {
	switch {
	case n == nil:
		return usual
	case *n < 0:
		p.warn("%s: %d is below 0: %d, the default, is used", path, *n, usual)
		return usual
	default:
		return int(*n)
	}
}

// maxTimeout is the longest conntrack timeout that every kernel takes: it is
// counted in jiffies, of which there are up to 1000 in a second, by an int.
const maxTimeout = math.MaxInt32 / 1000 * time.Second

func (p *parser) timeout(path string, d *metav1.Duration, usual time.Duration) time.Duration {
	switch {
	case d == nil:
		return usual
	case d.Duration < 0:
		p.warn("%s: %v is below 0: %s", path, d.Duration, orKernels(usual))
		return usual
	case d.Duration > 0 && d.Duration < time.Second:
		// Seconds are what the kernel counts in, and none would end every flow.
		p.warn("%s: %v is below a second: %s", path, d.Duration, orKernels(0))
		return 0
	case d.Duration > maxTimeout:
		p.warn("%s: %v is more than the kernel takes: %v is used", path, d.Duration, maxTimeout)
		return maxTimeout
	default:
		return d.Duration
	}
}

// orKernels says what is used in place of a timeout.
func orKernels(d time.Duration) string {
	if d == 0 {
		return "the kernel's own value is left alone"
	}
	return d.String() + ", the default, is used"
}

// The bounds of a period. Above the upper one twice a period might overflow.
const (
	minPeriod = time.Second
	maxPeriod = 365 * 24 * time.Hour
)

func (p *parser) period(path string, d metav1.Duration, usual time.Duration) time.Duration {
	switch {
	case d.Duration == 0:
		return usual
	case d.Duration < 0:
		p.warn("%s: %v is not above 0: %v, the default, is used", path, d.Duration, usual)
		return usual
	case d.Duration < minPeriod:
		p.warn("%s: %v is too short: %v is used", path, d.Duration, minPeriod)
		return minPeriod
	case d.Duration > maxPeriod:
		p.warn("%s: %v is too long: %v is used", path, d.Duration, maxPeriod)
		return maxPeriod
	default:
		return d.Duration
	}
}

// gates reads the one feature gate there is. It is only ever set to close
// something, so it is closed when what it says cannot be read.
func (p *parser) gates(gates map[string]bool, c *Config) {
	const path = "featureGates"
	for _, name := range sortedKeys(gates) {
		if name == externalIPsGate {
			c.AllowExternalIPs = gates[name]
			continue
		}
		p.idle = append(p.idle, join(path, name))
	}
	at := join(path, externalIPsGate)
	if wrong, ok := p.unreadable[at]; ok {
		delete(p.unreadable, at)
		c.AllowExternalIPs = false
		p.warn("%s: %s: external IPs are not served", at, wrong)
	}
}

func (p *parser) logging(in *v1alpha1.KubeProxyConfiguration, c *Config) {
	if in.Logging.Verbosity >= debugVerbosity {
		c.LogLevel = "debug"
	}
	switch in.Logging.Format {
	case "":
	case "text":
		c.LogFormat = "console"
	case "json":
		c.LogFormat = "json"
	default:
		p.warn("logging.format: %s is neither text nor json: taken as not set", quote(in.Logging.Format))
	}
}

// masquerade warns of a promise that cannot be kept.
func (p *parser) masquerade(in *v1alpha1.KubeProxyConfiguration) {
	var set []string
	if in.IPTables.MasqueradeAll {
		set = append(set, "iptables.masqueradeAll")
	}
	if in.NFTables.MasqueradeAll {
		set = append(set, "nftables.masqueradeAll")
	}
	if len(set) > 0 {
		p.warn("%s: cannot be honoured at connect time: backends see the client's own address", list(set))
	}
}
