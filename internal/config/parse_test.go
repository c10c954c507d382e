// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// head makes a KubeProxyConfiguration of what follows it.
const head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

// byValue compares addresses, which cmp may not look into.
var byValue = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// defaultWith returns the defaults with a change.
func defaultWith(change func(*Config)) Config {
	c := Default()
	if change != nil {
		change(&c)
	}
	return c
}

// checkParsed compares what Parse has returned with what it should have.
func checkParsed(t *testing.T, got Config, warnings []Warning, err error, want Config, wantWarnings []Warning) {
	t.Helper()
	if err != nil {
		t.Fatalf("refused: %v", err)
	}
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(wantWarnings, warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

func TestFilesOfClusters(t *testing.T) {
	kubeadm := defaultWith(func(c *Config) {
		c.Client.Kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf"
		c.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
	})
	tests := []struct {
		name, file string
		want       Config
		warnings   []Warning
	}{
		{name: "what kubeadm makes needs no warning", file: "kubeadm-config.conf", want: kubeadm},
		{
			name: "kubeadm's whole ConfigMap is unwrapped", file: "kubeadm-configmap.yaml", want: kubeadm,
			warnings: []Warning{"ConfigMap kube-system/kube-proxy: config.conf is read, kubeconfig.conf is not (a kubeconfig has to be a file, named by clientConnection.kubeconfig)"},
		},
		{
			name: "what kube-proxy --write-config-to makes needs no warning", file: "write-config-to.yaml",
			want: defaultWith(func(c *Config) { c.LogFormat = "console" }),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings, err := Load(filepath.Join("testdata", tt.file))
			checkParsed(t, got, warnings, err, tt.want, tt.warnings)
		})
	}
}

func TestFileThatSetsNothingIsDefault(t *testing.T) {
	got, warnings, err := Parse([]byte(head))
	checkParsed(t, got, warnings, err, Default(), nil)
}

func TestForms(t *testing.T) {
	ipvs := defaultWith(func(c *Config) { c.SyncPeriod = 7 * time.Second })
	tests := []struct {
		name, text string
		warnings   []Warning
	}{
		{name: "YAML", text: head + "mode: ipvs\nipvs: {syncPeriod: 7s}"},
		{
			name: "JSON indented with tabs, which are no YAML",
			text: "{\n\t\"apiVersion\": \"kubeproxy.config.k8s.io/v1alpha1\",\n\t\"kind\": \"KubeProxyConfiguration\",\n\t\"mode\": \"ipvs\",\n\t\"ipvs\": {\"syncPeriod\": \"7s\"}\n}",
		},
		{name: "the first document of several", text: "# ours\n---\n" + head + "mode: ipvs\nipvs: {syncPeriod: 7s}\n---\n" + head},
		{
			name:     "a ConfigMap that has its own name for the file",
			text:     "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kube-proxy-config, namespace: kube-system}\ndata:\n  notes: none\n  config: |\n" + indent(head+"mode: ipvs\nipvs: {syncPeriod: 7s}"),
			warnings: []Warning{"ConfigMap kube-system/kube-proxy-config: config is read, notes is not (a kubeconfig has to be a file, named by clientConnection.kubeconfig)"},
		},
		{
			name: "config.conf comes before other keys",
			text: "apiVersion: v1\nkind: ConfigMap\ndata:\n  another: |\n" + indent(head) + "  config.conf: |\n" + indent(head+"mode: ipvs\nipvs: {syncPeriod: 7s}"),
			warnings: []Warning{
				"ConfigMap: config.conf is read, another is not (a kubeconfig has to be a file, named by clientConnection.kubeconfig)",
			},
		},
		{
			name: "a ConfigMap in JSON",
			text: `{"apiVersion":"v1","kind":"ConfigMap","data":{"config.conf":"{\"apiVersion\":\"kubeproxy.config.k8s.io/v1alpha1\",\"kind\":\"KubeProxyConfiguration\",\"mode\":\"ipvs\",\"ipvs\":{\"syncPeriod\":\"7s\"}}"}}`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings, err := Parse([]byte(tt.text))
			checkParsed(t, got, warnings, err, ipvs, tt.warnings)
		})
	}
}

// indent puts a text where a block of a ConfigMap's data goes.
func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ") + "\n"
}

func TestDecoding(t *testing.T) {
	tests := []struct {
		name, text string
		change     func(*Config)
		warnings   []Warning
	}{
		{
			name: "unknown fields are named and passed over",
			text: "hostNameOverride: a\nmode: nftables\nconntrack: {minimum: 3, min: 3}\n\"odd\\nname\": 1\n",
			change: func(c *Config) {
				c.NodePortAllAddresses = false
				c.Conntrack.Min = 3
			},
			warnings: []Warning{`conntrack.minimum, hostNameOverride, "odd\nname": unknown, and ignored like kube-proxy does`},
		},
		{
			name:     "the last of two counts",
			text:     "oomScoreAdj: 1\noomScoreAdj: 2\n",
			change:   func(c *Config) { c.OOMScoreAdj = 2 },
			warnings: []Warning{`line 4: key "oomScoreAdj" already set in map: the last one counts`},
		},
		{
			name: "a field that cannot be read does not take others with it",
			text: "conntrack: {min: lots, udpTimeout: 30, maxPerCore: 99999999999, tcpBeLiberal: true}\nwinkernel: [1]\nenableProfiling: \"yes\"\noomScoreAdj: 5\n",
			change: func(c *Config) {
				c.Conntrack.TCPBeLiberal = true
				c.OOMScoreAdj = 5
			},
			warnings: []Warning{
				`conntrack.maxPerCore: 99999999999 is not a whole number of 32 bits: taken as not set`,
				`conntrack.min: "lots" is not a whole number of 32 bits: taken as not set`,
				`conntrack.udpTimeout: 30 is not a duration such as 30s: taken as not set`,
				`enableProfiling: "yes" is not true or false: taken as not set`,
				`winkernel: [1] is not a mapping: taken as not set`,
			},
		},
		{
			name: "fields of earlier versions are known, and silent when they say nothing",
			text: "udpIdleTimeout: 250ms\nresourceContainer: /kube-proxy\nconntrack: {max: null}\n",
		},
		{
			name:     "fields of earlier versions that are set have no effect",
			text:     "udpIdleTimeout: 2s\nresourceContainer: \"\"\nconntrack: {max: 5}\n",
			warnings: []Warning{`conntrack.max, udpIdleTimeout: no effect in Fairlead`},
		},
		{
			name:     "everything without effect is in one warning",
			text:     "portRange: 1-2\nipvs: {scheduler: rr, strictARP: true, syncPeriod: 9s}\nfeatureGates: {WinDSR: true, AllAlpha: false}\n",
			warnings: []Warning{`featureGates.AllAlpha, featureGates.WinDSR, ipvs.syncPeriod, ipvs.scheduler, ipvs.strictARP, portRange: no effect in Fairlead`},
		},
		{
			name:     "values are shortened",
			text:     "mode: " + strings.Repeat("x", 1000) + "\n",
			warnings: []Warning{Warning(`mode: "` + strings.Repeat("x", 80) + `…" is none of iptables, ipvs, nftables: read as iptables`)},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings, err := Parse([]byte(head + tt.text))
			checkParsed(t, got, warnings, err, defaultWith(tt.change), tt.warnings)
		})
	}
}

func TestDuplicatesInJSONAreNamed(t *testing.T) {
	text := `{"apiVersion":"kubeproxy.config.k8s.io/v1alpha1","kind":"KubeProxyConfiguration","conntrack":{"min":1,"min":2},"mode":"","mode":""}`
	got, warnings, err := Parse([]byte(text))
	checkParsed(t, got, warnings, err, defaultWith(func(c *Config) { c.Conntrack.Min = 2 }),
		[]Warning{`duplicate field "conntrack.min"; duplicate field "mode": the last one counts`})
}

func TestRefused(t *testing.T) {
	const want = "kubeproxy.config.k8s.io/v1alpha1"
	tests := []struct{ name, text, want string }{
		{
			name: "an empty file", text: "",
			want: "not a KubeProxyConfiguration: apiVersion and kind are missing (want apiVersion: " + want + ", kind: KubeProxyConfiguration)",
		},
		{name: "neither YAML nor JSON", text: "a: [", want: "neither YAML nor JSON: yaml: line 1: did not find expected node content"},
		{name: "a text", text: "hello", want: "not a KubeProxyConfiguration: it is no mapping with apiVersion and kind"},
		{
			name: "another kind", text: "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n",
			want: `kind "ClusterConfiguration" of apiVersion "kubeadm.k8s.io/v1beta4" is not a KubeProxyConfiguration of ` + want + `, nor a ConfigMap that holds one`,
		},
		{
			name: "another version", text: "apiVersion: kubeproxy.config.k8s.io/v1\nkind: KubeProxyConfiguration\n",
			want: `apiVersion "kubeproxy.config.k8s.io/v1" of KubeProxyConfiguration is not known (want ` + want + `)`,
		},
		{
			name: "a ConfigMap of something else", text: "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: kube-system}\ndata: {Corefile: x}\n",
			want: "ConfigMap kube-system/coredns has no key config.conf, nor another with a KubeProxyConfiguration",
		},
		{
			name: "a ConfigMap whose config.conf is something else", text: "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kube-proxy}\ndata: {config.conf: x}\n",
			want: "key config.conf of ConfigMap kube-proxy: not a KubeProxyConfiguration: it is no mapping with apiVersion and kind",
		},
		{
			name: "a ConfigMap with two configurations", text: "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  one: |\n" + indent(head) + "  two: |\n" + indent(head),
			want: "ConfigMap a has a KubeProxyConfiguration under each of one, two (keep one, or call it config.conf)",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, warnings, err := Parse([]byte(tt.text))
			if err == nil || err.Error() != tt.want {
				t.Errorf("error:\n got %v\nwant %s", err, tt.want)
			}
			if warnings != nil {
				t.Errorf("warnings beside an error: %q", warnings)
			}
		})
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	dir := t.TempDir()
	pod := filepath.Join(dir, "pod.yaml")
	if err := os.WriteFile(pod, []byte("apiVersion: v1\nkind: Pod\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "no such file",
		dir:                        "is a directory (name the file in it, such as config.conf)",
		pod:                        `kind "Pod"`,
	} {
		_, _, err := Load(path)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("Load(%s): %v, want the path and %q", path, err, want)
		}
	}
}

func TestEncodeSaysWhatWasRead(t *testing.T) {
	for _, text := range []string{
		"", "nodePortAddresses: [10.0.0.0/8]\nbindAddress: 192.0.2.1\nconntrack: {maxPerCore: 7, udpTimeout: 3s}",
		"clusterCIDR: 10.0.0.0/8,fd00::/48\niptables: {localhostNodePorts: false, syncPeriod: 7s}\noomScoreAdj: 3",
		"detectLocalMode: NodeCIDR\ndetectLocal: {bridgeInterface: cni0}\nclientConnection: {kubeconfig: /k, qps: 3, burst: 9}",
		"featureGates: {AllowServiceExternalIPs: false}\nenableProfiling: true\nlogging: {format: json}",
	} {
		want, _, err := Parse([]byte(head + text))
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := json.Marshal(want.Encode())
		if err != nil {
			t.Fatal(err)
		}
		got, warnings, err := Parse(encoded)
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: warnings %q, error %v", encoded, warnings, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s\nsays %+v\nwant %+v", encoded, got, want)
		}
	}
}
