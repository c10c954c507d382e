// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode"
)

// FuzzParse feeds any text. Nothing may panic, and what is accepted must be
// within the bounds that the comments in Config promise and mean the same when
// it is written as JSON.
func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.*")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(head + "conntrack: {min: lots, min: 2, udpTimeout: -1s}\nfeatureGates: {AllowServiceExternalIPs: 1}\nmode: x\nfoo: [1]\n"))
	f.Add([]byte(head + "bindAddress: '::1'\nhealthzBindAddress: '::1'\nnodePortAddresses: [a, 10.0.0.0/8]\nclusterCIDR: 1.2.3.4/5,x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, warnings, err := Parse(data)
		if err != nil {
			checkLine(t, err.Error())
			if warnings != nil || !reflect.DeepEqual(got, Config{}) {
				t.Errorf("something beside the error %v: %+v, %q", err, got, warnings)
			}
			return
		}
		for _, w := range warnings {
			checkLine(t, string(w))
		}
		checkBounds(t, got)
		text, _, err := document(data)
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := Parse(text)
		if err != nil || !reflect.DeepEqual(got, again) {
			t.Errorf("as JSON: %+v (error %v), want %+v", again, err, got)
		}
		shown, err := json.Marshal(got.Encode())
		if err != nil {
			t.Fatalf("/configz cannot show it: %v", err)
		}
		if _, _, err := Parse(shown); err != nil {
			t.Errorf("what /configz shows is no configuration: %v", err)
		}
	})
}

// checkLine complains of a text that is not one printable line.
func checkLine(t *testing.T, text string) {
	t.Helper()
	bad := func(r rune) bool { return !unicode.IsGraphic(r) }
	if text == "" || len(text) > 10000 || strings.ContainsFunc(text, bad) {
		t.Errorf("not one line: %q", text)
	}
}

// checkBounds complains of a value that Config does not promise.
func checkBounds(t *testing.T, c Config) {
	t.Helper()
	ct := c.Conntrack
	for _, d := range []time.Duration{ct.TCPEstablishedTimeout, ct.TCPCloseWaitTimeout, ct.UDPTimeout, ct.UDPStreamTimeout} {
		if d != 0 && d < time.Second || d > maxTimeout {
			t.Errorf("conntrack timeout %v", d)
		}
	}
	if ct.MaxPerCore < 0 || ct.Min < 0 {
		t.Errorf("conntrack %+v", ct)
	}
	if c.SyncPeriod < time.Second || 2*c.SyncPeriod < 0 {
		t.Errorf("period %v", c.SyncPeriod)
	}
	if c.OOMScoreAdj < -1000 || c.OOMScoreAdj > 1000 || c.Client.QPS == 0 || c.Client.Burst <= 0 {
		t.Errorf("oomScoreAdj %d, client %+v", c.OOMScoreAdj, c.Client)
	}
	if !c.BindAddress.IsValid() || c.BindAddress.Is4In6() {
		t.Errorf("bind address %v", c.BindAddress)
	}
	for _, listen := range []string{c.HealthzBindAddress, c.MetricsBindAddress} {
		if address, ok := parseListen(listen, 0); !ok || address.String() != listen {
			t.Errorf("address to listen on %q", listen)
		}
	}
	if c.NodePortAddresses != nil && (len(c.NodePortAddresses) == 0 || c.NodePortAllAddresses) {
		t.Errorf("node port addresses %q, all %v", c.NodePortAddresses, c.NodePortAllAddresses)
	}
	if one := len(c.NodePortAddresses) == 1 && c.NodePortAddresses[0] == primary; !one {
		if _, bad := parsePrefixes(c.NodePortAddresses); len(bad) > 0 {
			t.Errorf("node port addresses %q", bad)
		}
	}
	for _, prefix := range c.DetectLocal.ClusterCIDRs {
		if !prefix.IsValid() || prefix != prefix.Masked() || prefix.Addr().Is4In6() {
			t.Errorf("cluster CIDR %v", prefix)
		}
	}
}
