// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

var compareNetip = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func TestWhatNoServiceGets(t *testing.T) {
	every := func(port uint16, why string) lb.Reservation { return lb.Reservation{Port: port, Why: why} }
	at := func(text, why string) lb.Reservation {
		a := netip.MustParseAddrPort(text)
		return lb.Reservation{Addr: a.Addr(), Port: a.Port(), Why: why}
	}
	const flag, healthz, metrics = "--reserved has it", "the agent's /healthz listens there", "the agent's metrics listen there"
	for _, tt := range []struct {
		name  string
		flags []string
		want  lb.Limits
	}{
		{
			"nothing but the kubelet's port and our own", nil,
			lb.Limits{Reserved: []lb.Reservation{every(10250, flag), every(10256, healthz), at("127.0.0.1:10249", metrics)}},
		},
		{
			"ranges and words",
			[]string{"--external-ip-cidrs=none", "--load-balancer-cidrs=192.0.2.7/24, ::ffff:10.0.0.0/104", "--reserved=", "--healthz-bind-address=[::]:1", "--metrics-bind-address="},
			lb.Limits{
				ExternalIPs:     lb.Allowed{Limited: true},
				LoadBalancerIPs: lb.Allowed{Limited: true, CIDRs: prefixes("192.0.2.0/24", "10.0.0.0/8")},
				Reserved:        []lb.Reservation{every(1, healthz)},
			},
		},
		{
			"pairs",
			[]string{"--reserved=:22, 192.0.2.1:53,[::ffff:192.0.2.2]:53,[2001:db8::1]:53,0.0.0.0:80", "--healthz-bind-address=192.0.2.1:1", "--metrics-bind-address=:2"},
			lb.Limits{Reserved: []lb.Reservation{
				every(22, flag), at("192.0.2.1:53", flag), at("192.0.2.2:53", flag), at("[2001:db8::1]:53", flag), every(80, flag),
				at("192.0.2.1:1", healthz), every(2, metrics),
			}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := settingsOf(t, "", tt.flags...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, s.agent.Limits, compareNetip); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	for _, bad := range []string{
		"--external-ip-cidrs=", "--external-ip-cidrs=192.0.2.1", "--load-balancer-cidrs=none,10.0.0.0/8", "--load-balancer-cidrs=10.0.0.0/8,",
		"--reserved=22", "--reserved=:0", "--reserved=:22,", "--reserved=host:22", "--reserved=[fe80::1%eth0]:22", "--reserved=192.0.2.1:65536",
	} {
		name, _, _ := strings.Cut(bad, "=")
		if _, err := settingsOf(t, "", bad); err == nil || !strings.HasPrefix(err.Error(), name) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one line about it", bad, err)
		}
	}
}

func TestTheAPIServerThatIsDialledIsReserved(t *testing.T) {
	for server, want := range map[string]string{
		"https://192.0.2.10:6443":    "192.0.2.10:6443",
		"https://[2001:db8::1]":      "[2001:db8::1]:443",
		"http://[::ffff:192.0.2.10]": "192.0.2.10:80",
		"192.0.2.10:6443":            "192.0.2.10:6443",
		"https://api.example:6443":   "",
	} {
		s, err := settingsOf(t, "")
		if err != nil {
			t.Fatal(err)
		}
		before := len(s.agent.Limits.Reserved)
		if err := (agentFlags{source: sourceKubernetes, apiServer: server}).connect(&s, zap.NewNop()); err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, r := range s.agent.Limits.Reserved[before:] {
			got += netip.AddrPortFrom(r.Addr, r.Port).String()
		}
		if got != want {
			t.Errorf("%s: reserved is %q, want %q", server, got, want)
		}
	}
}
