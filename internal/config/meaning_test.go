// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestValues(t *testing.T) {
	tests := []struct {
		name, text string
		change     func(*Config)
		warnings   []Warning
	}{
		{
			name: "host name is trimmed and in lower case", text: `hostnameOverride: " Node-A "`,
			change: func(c *Config) { c.HostnameOverride = "node-a" },
		},
		{
			name: "host name of blanks is none", text: `hostnameOverride: " "`,
			warnings: []Warning{`hostnameOverride: nothing but blanks: the host's name is used`},
		},

		{
			name: "IPv6 bind address moves the servers", text: `bindAddress: "::"`,
			change: func(c *Config) {
				c.BindAddress, c.HealthzBindAddress, c.MetricsBindAddress = netip.IPv6Unspecified(), "[::]:10256", "[::1]:10249"
			},
		},
		{
			name: "mapped bind address is IPv4", text: `bindAddress: "::ffff:192.0.2.1"`,
			change: func(c *Config) { c.BindAddress = netip.MustParseAddr("192.0.2.1") },
		},
		{
			name: "bind address that is none leaves the default", text: "bindAddress: node-a",
			warnings: []Warning{`bindAddress: "node-a" is not an IP address: 0.0.0.0, the default, is used`},
		},
		{
			name: "addresses without ports get them", text: "healthzBindAddress: 127.0.0.1\nmetricsBindAddress: '::'",
			change: func(c *Config) { c.HealthzBindAddress, c.MetricsBindAddress = "127.0.0.1:10256", "[::]:10249" },
		},
		{
			name: "addresses with ports are kept, zeros in front as kube-proxy reads them",
			text: "healthzBindAddress: 010.0.0.1:1\nmetricsBindAddress: '[fd00::1]:65535'",
			change: func(c *Config) {
				c.HealthzBindAddress, c.MetricsBindAddress = "10.0.0.1:1", "[fd00::1]:65535"
			},
		},
		{
			name: "addresses nobody can listen on are the defaults", text: "bindAddress: fd00::1\nhealthzBindAddress: 0.0.0.0:0\nmetricsBindAddress: localhost:10249",
			change: func(c *Config) {
				c.BindAddress, c.HealthzBindAddress, c.MetricsBindAddress = netip.MustParseAddr("fd00::1"), "[::]:10256", "[::1]:10249"
			},
			warnings: []Warning{
				`healthzBindAddress: "0.0.0.0:0" is not an IP address and a port, such as 127.0.0.1:10256 or [::1]:10256: [::]:10256, the default, is used`,
				`metricsBindAddress: "localhost:10249" is not an IP address and a port, such as 127.0.0.1:10249 or [::1]:10249: [::1]:10249, the default, is used`,
			},
		},

		{
			name: "qps below zero is no bound", text: "clientConnection: {qps: -1, burst: 0}",
			change: func(c *Config) { c.Client.QPS = -1 },
		},
		{
			name: "burst below zero is the default", text: "clientConnection: {burst: -1}",
			warnings: []Warning{`clientConnection.burst: -1 is below 0: 10, the default, is used`},
		},

		{
			name: "two CIDRs of one family are kept", text: "clusterCIDR: '10.0.0.1/8, fd00::/48,192.0.2.0/24'",
			change: func(c *Config) { c.DetectLocal.ClusterCIDRs = prefixes("10.0.0.0/8", "fd00::/48", "192.0.2.0/24") },
		},
		{
			name: "what is no CIDR is left out", text: "clusterCIDR: '10.0.0.0/8,,pods,::ffff:10.0.0.0/104'",
			change:   func(c *Config) { c.DetectLocal.ClusterCIDRs = prefixes("10.0.0.0/8") },
			warnings: []Warning{`clusterCIDR: not a CIDR: "", pods, ::ffff:10.0.0.0/104: left out`},
		},
		{
			name: "unknown way to tell who is inside", text: "detectLocalMode: Magic",
			warnings: []Warning{`detectLocalMode: "Magic" is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix: ClusterCIDR is used`},
		},
		{
			name: "bridge without a name", text: "detectLocalMode: BridgeInterface",
			warnings: []Warning{`detectLocal.bridgeInterface: empty, where detectLocalMode needs it: ClusterCIDR is used`},
		},
		{
			name: "prefix of interfaces without one", text: "detectLocalMode: InterfaceNamePrefix",
			warnings: []Warning{`detectLocal.interfaceNamePrefix: empty, where detectLocalMode needs it: ClusterCIDR is used`},
		},
		{
			name: "a bridge that pods are behind", text: "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
			change: func(c *Config) {
				c.DetectLocal.Mode, c.DetectLocal.BridgeInterface = LocalModeBridgeInterface, "cni0"
			},
			warnings: []Warning{`detectLocal.bridgeInterface: pods of this node are known by their links: what else comes in on cni0 is outside`},
		},
		{
			name: "names of pods' interfaces", text: "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cali}",
			change: func(c *Config) {
				c.DetectLocal.Mode, c.DetectLocal.InterfaceNamePrefix = LocalModeInterfaceNamePrefix, "cali"
			},
			warnings: []Warning{`detectLocal.interfaceNamePrefix: pods of this node are known by their links: what else comes in on cali… is outside`},
		},

		{
			name: "negative period", text: "iptables: {syncPeriod: -1s}",
			warnings: []Warning{`iptables.syncPeriod: -1s is not above 0: 30s, the default, is used`},
		},
		{
			name: "short period", text: "iptables: {syncPeriod: 1ms}",
			change:   func(c *Config) { c.SyncPeriod = time.Second },
			warnings: []Warning{`iptables.syncPeriod: 1ms is too short: 1s is used`},
		},
		{
			name: "huge period", text: "mode: nftables\nnftables: {syncPeriod: 2000000h}",
			change: func(c *Config) {
				c.NodePortAllAddresses = false
				c.SyncPeriod = 365 * 24 * time.Hour
			},
			warnings: []Warning{`nftables.syncPeriod: 2000000h0m0s is too long: 8760h0m0s is used`},
		},
		{
			name: "oomScoreAdj out of range", text: "oomScoreAdj: -1001",
			warnings: []Warning{`oomScoreAdj: -1001 is not from -1000 to 1000: -999, the default, is used`},
		},

		{name: "verbosity of an ordinary log says nothing", text: "logging: {verbosity: 3}"},
		{
			name: "unknown log format", text: "logging: {format: xml}",
			warnings: []Warning{`logging.format: "xml" is neither text nor json: taken as not set`},
		},
		{
			name: "masqueradeAll cannot be honoured", text: "iptables: {masqueradeAll: true}\nnftables: {masqueradeAll: true}",
			warnings: []Warning{`iptables.masqueradeAll, nftables.masqueradeAll: cannot be honoured at connect time: backends see the client's own address`},
		},
		{
			name: "feature gate that cannot be read is closed", text: "featureGates: {AllowServiceExternalIPs: 'false'}",
			change:   func(c *Config) { c.AllowExternalIPs = false },
			warnings: []Warning{`featureGates.AllowServiceExternalIPs: "false" is not true or false: external IPs are not served`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings, err := Parse([]byte(head + tt.text))
			checkParsed(t, got, warnings, err, defaultWith(tt.change), tt.warnings)
		})
	}
}

func prefixes(cidrs ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, cidr := range cidrs {
		out = append(out, netip.MustParsePrefix(cidr))
	}
	return out
}

func TestNodePortAddresses(t *testing.T) {
	const primaryOnly = ": NodePorts are accepted on the node's primary addresses only"
	tests := []struct {
		name, text string
		want       []string
		all        bool
		warnings   []Warning
	}{
		{name: "unset without a mode is all", text: "mode: ''", all: true},
		{name: "unset in iptables mode is all", text: "mode: iptables", all: true},
		{name: "unset in ipvs mode is all", text: "mode: ipvs\nnodePortAddresses: []", all: true},
		{name: "unset in nftables mode is primary", text: "mode: nftables\nnodePortAddresses: null"},
		{
			name: "unset in a mode of Windows is read as iptables", text: "mode: kernelspace", all: true,
			warnings: []Warning{`mode: "kernelspace" is none of iptables, ipvs, nftables: read as iptables`},
		},
		{name: "primary", text: "nodePortAddresses: [primary]", want: []string{"primary"}},
		{name: "CIDRs are masked", text: "nodePortAddresses: [192.0.2.7/24, 'fd00::7/64']", want: []string{"192.0.2.0/24", "fd00::/64"}},
		{
			name: "a bad CIDR does not open its family", text: "nodePortAddresses: [192.0.2.0/24, 'fd00::/129']",
			want: []string{"primary"}, warnings: []Warning{"nodePortAddresses: neither CIDRs nor the single word primary: fd00::/129" + primaryOnly},
		},
		{
			name: "primary beside CIDRs", text: "nodePortAddresses: [primary, 192.0.2.0/24]",
			want: []string{"primary"}, warnings: []Warning{"nodePortAddresses: neither CIDRs nor the single word primary: primary" + primaryOnly},
		},
		{
			name: "a text where a list belongs", text: "nodePortAddresses: 192.0.2.0/24",
			want: []string{"primary"}, warnings: []Warning{`nodePortAddresses: "192.0.2.0/24" is not a list` + primaryOnly},
		},
		{
			name: "a thousand bad ones are counted", text: "nodePortAddresses: [" + strings.Repeat("x,", 1000) + "]",
			want: []string{"primary"},
			warnings: []Warning{Warning("nodePortAddresses: neither CIDRs nor the single word primary: " +
				strings.Repeat("x, ", 19) + "x and 980 more" + primaryOnly)},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings, err := Parse([]byte(head + tt.text))
			want := defaultWith(func(c *Config) { c.NodePortAddresses, c.NodePortAllAddresses = tt.want, tt.all })
			checkParsed(t, got, warnings, err, want, tt.warnings)
		})
	}
}

func TestConntrackValues(t *testing.T) {
	tests := []struct {
		name, text string
		change     func(*Conntrack)
		warnings   []Warning
	}{
		{
			name: "zero leaves the kernel's values alone",
			text: "{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s, udpTimeout: 0s, udpStreamTimeout: 0s}",
			change: func(c *Conntrack) {
				c.MaxPerCore, c.Min, c.TCPEstablishedTimeout, c.TCPCloseWaitTimeout = 0, 0, 0, 0
			},
		},
		{
			name: "below zero is the default",
			text: "{maxPerCore: -1, min: -1, tcpEstablishedTimeout: -1s, tcpCloseWaitTimeout: -1s, udpTimeout: -1s, udpStreamTimeout: -1s}",
			warnings: []Warning{
				"conntrack.maxPerCore: -1 is below 0: 32768, the default, is used",
				"conntrack.min: -1 is below 0: 131072, the default, is used",
				"conntrack.tcpEstablishedTimeout: -1s is below 0: 24h0m0s, the default, is used",
				"conntrack.tcpCloseWaitTimeout: -1s is below 0: 1h0m0s, the default, is used",
				"conntrack.udpTimeout: -1s is below 0: the kernel's own value is left alone",
				"conntrack.udpStreamTimeout: -1s is below 0: the kernel's own value is left alone",
			},
		},
		{
			name:     "a part of a second would be none at all",
			text:     "{tcpEstablishedTimeout: 999ms}",
			change:   func(c *Conntrack) { c.TCPEstablishedTimeout = 0 },
			warnings: []Warning{"conntrack.tcpEstablishedTimeout: 999ms is below a second: the kernel's own value is left alone"},
		},
		{
			name:     "more than the kernel counts to",
			text:     "{udpTimeout: 2562047h}",
			change:   func(c *Conntrack) { c.UDPTimeout = 2147483 * time.Second },
			warnings: []Warning{"conntrack.udpTimeout: 2562047h0m0s is more than the kernel takes: 596h31m23s is used"},
		},
		{
			name:     "a duration that no number holds",
			text:     "{udpTimeout: 25620470h}",
			warnings: []Warning{`conntrack.udpTimeout: "25620470h" is not a duration such as 30s: taken as not set`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings, err := Parse([]byte(head + "conntrack: " + tt.text))
			want := defaultWith(func(c *Config) {
				if tt.change != nil {
					tt.change(&c.Conntrack)
				}
			})
			checkParsed(t, got, warnings, err, want, tt.warnings)
		})
	}
}

func TestWhoIsInsideWhereverTheyArrive(t *testing.T) {
	const cidr = "clusterCIDR: 10.244.0.0/16\n"
	for mode, want := range map[string][]netip.Prefix{
		"":                             prefixes("10.244.0.0/16"),
		"detectLocalMode: ClusterCIDR": prefixes("10.244.0.0/16"),
		"detectLocalMode: NodeCIDR":    nil,
		"detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}": nil,
	} {
		c, _, err := Parse([]byte(head + cidr + mode))
		if got := c.DetectLocal.Inside(); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v; want %v", mode, got, err, want)
		}
	}
}
