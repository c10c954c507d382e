// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// settingsOf returns the settings of an agent with these flags and, unless it is
// empty, a KubeProxyConfiguration with these fields.
func settingsOf(t *testing.T, file string, flags ...string) (settings, error) {
	t.Helper()
	t.Setenv("NODE_NAME", "From-Env")
	cmd := newAgentCommand()
	if file != "" {
		path := filepath.Join(t.TempDir(), "config.yaml")
		text := "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n" + file
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		flags = append(flags, "--config="+path)
	}
	if err := cmd.ParseFlags(flags); err != nil {
		t.Fatal(err)
	}
	value := func(name string) string { return cmd.Flag(name).Value.String() }
	f := agentFlags{
		source: value("source"), kubeconfig: value("kubeconfig"), nodeName: value("node-name"), config: value("config"),
		nodePorts: value("nodeport-addresses"), bpfRoot: value("bpf-root"), socket: value("socket"),
		healthz: value("healthz-bind-address"), metrics: value("metrics-bind-address"),
		logLevel: value("log-level"), logFormat: value("log-format"),
		limits: limitFlags{
			externalIPs: value("external-ip-cidrs"), loadBalancerIPs: value("load-balancer-cidrs"), reserved: value("reserved"),
		},
		packetPath: value("packet-path"), devices: value("devices"), snatPorts: value("snat-ports"), clusterCIDR: value("cluster-cidr"),
	}
	return f.settings(cmd.Flags().Changed)
}

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

func TestWhereNodePortsAreReached(t *testing.T) {
	for _, tt := range []struct {
		name, file, flag string
		want             lb.NodePorts
	}{
		{"our default", "", "", lb.NodePorts{Primary: true, Loopback: true}},
		{"the word", "", "primary", lb.NodePorts{Primary: true, Loopback: true}},
		{
			"CIDRs, blanks and host bits", "", "192.0.2.7/24, fd00::1/64",
			lb.NodePorts{CIDRs: prefixes("192.0.2.0/24", "fd00::/64"), Loopback: true},
		},
		{"IPv4 in IPv6", "", "::ffff:192.0.2.0/120", lb.NodePorts{CIDRs: prefixes("192.0.2.0/24"), Loopback: true}},
		{"a file of kube-proxy's default mode", "mode: ''", "", lb.NodePorts{Loopback: true}},
		{"a file of mode nftables", "mode: nftables", "", lb.NodePorts{Primary: true, Loopback: true}},
		{"a file with CIDRs", "nodePortAddresses: [10.0.0.0/8]", "", lb.NodePorts{CIDRs: prefixes("10.0.0.0/8"), Loopback: true}},
		{"a file with the word", "nodePortAddresses: [primary]", "", lb.NodePorts{Primary: true, Loopback: true}},
		{"a file without the loopback address", "iptables: {localhostNodePorts: false}", "primary", lb.NodePorts{Primary: true}},
		{
			"a flag beats the file", "nodePortAddresses: [10.0.0.0/8]", "192.0.2.0/24",
			lb.NodePorts{CIDRs: prefixes("192.0.2.0/24"), Loopback: true},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var flags []string
			if tt.flag != "" {
				flags = append(flags, "--nodeport-addresses="+tt.flag)
			}
			s, err := settingsOf(t, tt.file, flags...)
			if err != nil {
				t.Fatal(err)
			}
			equal := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
			if diff := cmp.Diff(tt.want, s.agent.NodePorts, equal); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	for _, bad := range []string{"", "10.0.0.0", "primary,10.0.0.0/8", "10.0.0.0/8,", "all"} {
		if _, err := settingsOf(t, "", "--nodeport-addresses="+bad); err == nil || !strings.Contains(err.Error(), "--nodeport-addresses") {
			t.Errorf("%q: %v, want an error", bad, err)
		}
	}
}

func TestFlagsBeatTheFileAndTheFileOurDefaults(t *testing.T) {
	const file = `
hostnameOverride: From-File
healthzBindAddress: 192.0.2.1:1
metricsBindAddress: 192.0.2.1:2
bindAddress: 192.0.2.9
bindAddressHardFail: true
enableProfiling: true
logging: {verbosity: 5, format: json}
featureGates: {AllowServiceExternalIPs: false}
oomScoreAdj: 7
iptables: {syncPeriod: 10s}
conntrack: {maxPerCore: 0, tcpCloseWaitTimeout: 5s}
clientConnection: {kubeconfig: /nowhere/at/all}
`
	without, err := settingsOf(t, "")
	if err != nil {
		t.Fatal(err)
	}
	with, err := settingsOf(t, file)
	if err != nil {
		t.Fatal(err)
	}
	beaten, err := settingsOf(t, file, "--node-name= Flag ", "--healthz-bind-address=", "--metrics-bind-address=127.0.0.1:3",
		"--log-level=warn", "--log-format=console", "--kubeconfig=mine")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name                  string
		of                    func(settings) any
		without, with, beaten any
	}{
		{"node name", func(s settings) any { return s.agent.NodeName }, "from-env", "from-file", "flag"},
		{"healthz", func(s settings) any { return s.agent.HealthzAddress }, "0.0.0.0:10256", "192.0.2.1:1", ""},
		{"metrics", func(s settings) any { return s.agent.MetricsAddress }, "127.0.0.1:10249", "192.0.2.1:2", "127.0.0.1:3"},
		{"level", func(s settings) any { return s.logLevel }, "info", "debug", "warn"},
		{"kubeconfig", func(s settings) any { return s.kubeconfig }, "", "", "mine"},
		{"node address", func(s settings) any { return s.agent.NodeAddress.IsValid() }, false, true, true},
		{"listen or fail", func(s settings) any { return s.agent.ListenOrFail }, false, true, true},
		{"profiling", func(s settings) any { return s.agent.Profiling }, false, true, true},
		{"no external IPs", func(s settings) any { return s.noExternalIPs }, false, true, true},
		{"OOM score", func(s settings) any { return s.oomScore }, -999, 7, 7},
		{"two sync periods", func(s settings) any { return s.agent.StuckAfter }, time.Minute, 20 * time.Second, 20 * time.Second},
		{"connections tracked", func(s settings) any { return s.agent.Conntrack.MaxPerCore }, int32(32768), int32(0), int32(0)},
		{"close_wait", func(s settings) any { return s.agent.Conntrack.TCPCloseWaitTimeout }, time.Hour, 5 * time.Second, 5 * time.Second},
	} {
		for who, got := range map[string][2]any{
			"without a file": {tt.without, tt.of(without)}, "with one": {tt.with, tt.of(with)}, "with flags as well": {tt.beaten, tt.of(beaten)},
		} {
			if got[0] != got[1] {
				t.Errorf("%s %s is %v, want %v", tt.name, who, got[1], got[0])
			}
		}
	}
	named := func(s settings) bool {
		return strings.Contains(strings.Join(s.warnings, "\n"), "/nowhere/at/all does not exist")
	}
	if !named(with) || named(beaten) {
		t.Errorf("warnings about the kubeconfig that is missing: %q with the file, %q with a flag", with.warnings, beaten.warnings)
	}
}

func TestSocketFollowsTheRootUnlessItIsGiven(t *testing.T) {
	for want, flags := range map[string][]string{
		"/run/fairlead/agent.sock": {"--bpf-root=/sys/fs/bpf/fairlead/"},
		"/my.sock":                 {"--socket=/my.sock", "--bpf-root=/x"},
	} {
		s, err := settingsOf(t, "", flags...)
		if err != nil || s.agent.Socket != want {
			t.Errorf("%v: socket %q, %v; want %q", flags, s.agent.Socket, err, want)
		}
	}
}
