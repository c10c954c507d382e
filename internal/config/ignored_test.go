// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"k8s.io/kube-proxy/config/v1alpha1"
)

// honoured are the fields that mean something here, each with a value (in JSON)
// that says something else than the default.
var honoured = map[string]string{
	"clientConnection.kubeconfig": `"/etc/kubeconfig"`,
	"clientConnection.qps":        `50`,
	"clientConnection.burst":      `100`,

	"logging.format":    `"json"`,
	"logging.verbosity": `5`,

	"featureGates":                    `{"AllowServiceExternalIPs": false}`,
	"hostnameOverride":                `"node-a"`,
	"bindAddress":                     `"192.0.2.1"`,
	"healthzBindAddress":              `"127.0.0.1:10256"`,
	"metricsBindAddress":              `"0.0.0.0:10249"`,
	"bindAddressHardFail":             `true`,
	"enableProfiling":                 `true`,
	"mode":                            `"nftables"`,
	"iptables.localhostNodePorts":     `false`,
	"iptables.syncPeriod":             `"10s"`,
	"detectLocalMode":                 `"NodeCIDR"`,
	"detectLocal.bridgeInterface":     `"cni0"`,
	"detectLocal.interfaceNamePrefix": `"cali"`,
	"clusterCIDR":                     `"10.244.0.0/16"`,
	"nodePortAddresses":               `["primary"]`,
	"oomScoreAdj":                     `0`,
	"conntrack.maxPerCore":            `0`,
	"conntrack.min":                   `0`,
	"conntrack.tcpEstablishedTimeout": `"0s"`,
	"conntrack.tcpCloseWaitTimeout":   `"60s"`,
	"conntrack.tcpBeLiberal":          `true`,
	"conntrack.udpTimeout":            `"10s"`,
	"conntrack.udpStreamTimeout":      `"60s"`,
}

// warnedOf are the fields that have a warning of their own.
var warnedOf = []string{"iptables.masqueradeAll", "nftables.masqueradeAll"}

// TestEveryFieldOfUpstream fails when a new version of the format has a field
// that nobody has thought about, or no longer has one.
func TestEveryFieldOfUpstream(t *testing.T) {
	known := map[string]bool{"kind": true, "apiVersion": true}
	for path := range honoured {
		known[path] = true
	}
	for path := range ignored {
		known[path] = true
	}
	for _, path := range warnedOf {
		known[path] = true
	}
	for path := range leaves("", reflect.ValueOf(&v1alpha1.KubeProxyConfiguration{}).Elem()) {
		if !known[path] {
			t.Errorf("%s is neither honoured nor in the table of ignored fields", path)
		}
		delete(known, path)
	}
	for path := range known {
		t.Errorf("%s is no field of KubeProxyConfiguration", path)
	}
	for path := range retired {
		if known[path] {
			t.Errorf("%s is retired, and yet a field of KubeProxyConfiguration", path)
		}
	}
}

func TestHonouredFieldsChangeSomething(t *testing.T) {
	for path, value := range honoured {
		got, warnings, err := Parse(fileWith(path, value))
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: %s: warnings %q, error %v", path, value, warnings, err)
		}
		if reflect.DeepEqual(got, Default()) {
			t.Errorf("%s: %s changes nothing", path, value)
		}
	}
}

func TestIgnoredFieldsAreNamed(t *testing.T) {
	for path, field := range leaves("", reflect.ValueOf(&v1alpha1.KubeProxyConfiguration{}).Elem()) {
		usual, ok := ignored[path]
		if _, also := honoured[path]; !ok || also {
			continue
		}
		got, warnings, err := Parse(fileWith(path, sample(t, path, field)))
		checkParsed(t, got, warnings, err, Default(), []Warning{Warning(path + ": no effect in Fairlead")})
		for _, value := range usual {
			got, warnings, err := Parse(fileWith(path, value))
			checkParsed(t, got, warnings, err, Default(), nil)
		}
	}
}

func TestPeriodOfTheModeInUseCounts(t *testing.T) {
	for _, mode := range []string{"iptables", "ipvs", "nftables"} {
		for _, other := range []string{"iptables", "ipvs", "nftables"} {
			got, warnings, err := Parse([]byte(head + "mode: " + mode + "\n" + other + ": {syncPeriod: 9s}"))
			want := defaultWith(func(c *Config) { c.NodePortAllAddresses = mode != "nftables" })
			var wantWarnings []Warning
			if mode == other {
				want.SyncPeriod = 9e9
			} else {
				wantWarnings = []Warning{Warning(other + ".syncPeriod: no effect in Fairlead")}
			}
			checkParsed(t, got, warnings, err, want, wantWarnings)
		}
	}
}

// sample returns a value for a field, in JSON, that is not its default.
func sample(t *testing.T, path string, field reflect.Value) string {
	for _, text := range []string{`true`, `"7s"`, `7`, `["x"]`, `[{"filePattern": "x"}]`} {
		if json.Unmarshal([]byte(text), reflect.New(field.Type()).Interface()) == nil {
			return text
		}
	}
	t.Fatalf("%s: no sample for a %v", path, field.Type())
	return ""
}

// fileWith returns a file in which one field is set.
func fileWith(path, value string) []byte {
	names := strings.Split(path, ".")
	for i := len(names) - 1; i > 0; i-- {
		value = `{"` + names[i] + `": ` + value + `}`
	}
	return []byte(head + names[0] + ": " + value + "\n")
}
