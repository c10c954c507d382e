// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// soundTables are tables with a TCP and a UDP service, one ID at rest and
// nothing wrong.
func soundTables() lb.Tables {
	t := lb.NewTables()
	vip := netip.MustParseAddr("10.96.0.1")
	t.Frontends[lb.FrontendKey{VIP: vip}] = lb.Frontend{Kind: lb.KindClusterIP}
	t.Frontends[lb.FrontendKey{VIP: vip, Port: 80, Protocol: lb.TCP}] = lb.Frontend{Service: 1, Kind: lb.KindClusterIP}
	t.Frontends[lb.FrontendKey{VIP: vip, Port: 53, Protocol: lb.UDP}] = lb.Frontend{Service: 2, Kind: lb.KindClusterIP}
	t.Names[1] = webPort
	t.Names[2] = lb.ServicePort{Service: name("dns"), Protocol: lb.UDP, Family: lb.IPv4}
	t.Services[1] = lb.Range{Base: 4, Count: 2, Generation: 7}
	t.Services[2] = lb.Range{Base: 6, Count: 1, Generation: 1}
	t.Services[3] = lb.Range{Generation: 9}
	for i, b := range backends("10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:53") {
		t.Slots[uint32(4+i)] = b
	}
	t.Members[lb.Member{Service: 2, Backend: t.Slots[6]}] = struct{}{}
	t.Problems[name("other")] = "no room"
	return t
}

func TestCheckFindsWhatAReaderCouldStumbleOver(t *testing.T) {
	web := lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.1"), Port: 80, Protocol: lb.TCP}
	wildcard := lb.FrontendKey{VIP: web.VIP}
	tests := []struct {
		name   string
		damage func(lb.Tables)
		want   []string
	}{
		{"sound tables", func(lb.Tables) {}, nil},
		{"empty tables", func(t lb.Tables) { clear(t.Frontends); clear(t.Services); clear(t.Names); clear(t.Members) }, nil},
		{"a frontend without service", func(t lb.Tables) { t.Frontends[web] = lb.Frontend{Service: 8} },
			[]string{"frontend 10.96.0.1:80/TCP: service 8 does not exist"}},
		{"a port that leads nowhere", func(t lb.Tables) { t.Frontends[web] = lb.Frontend{} },
			[]string{"frontend 10.96.0.1:80/TCP: service 0 does not exist"}},
		{"a frontend of a service at rest", func(t lb.Tables) { t.Frontends[web] = lb.Frontend{Service: 3} },
			[]string{"frontend 10.96.0.1:80/TCP: service 3 has no name"}},
		{"a frontend of another protocol", func(t lb.Tables) { t.Frontends[web] = lb.Frontend{Service: 2} },
			[]string{"frontend 10.96.0.1:80/TCP: leads to ns/dns/UDP/IPv4"}},
		{"a wildcard with a service", func(t lb.Tables) { t.Frontends[wildcard] = lb.Frontend{Service: 1} },
			[]string{"frontend 10.96.0.1:*: leads to service 1, a wildcard belongs to none"}},
		{"a slot without row", func(t lb.Tables) { delete(t.Slots, 5) },
			[]string{"service 1: slot 5 does not exist"}},
		{"a backend of another family", func(t lb.Tables) { t.Slots[5] = backends("[fd01::1]:80")[0] },
			[]string{"service 1: ns/web:http/TCP/IPv4 has backend [fd01::1]:80"}},
		{"a UDP backend that is no member", func(t lb.Tables) { clear(t.Members) },
			[]string{"service 2: backend 10.0.0.3:53 is not in members"}},
		{"a member of a service that has none", func(t lb.Tables) { t.Members[lb.Member{Service: 1, Backend: t.Slots[4]}] = struct{}{} },
			[]string{"member 10.0.0.1:8080: nobody remembers backends of service 1"}},
		{"a member of no service", func(t lb.Tables) { t.Members[lb.Member{Service: 9, Backend: t.Slots[4]}] = struct{}{} },
			[]string{"member 10.0.0.1:8080: nobody remembers backends of service 9"}},
		{"ranges that share slots", func(t lb.Tables) { t.Services[3] = lb.Range{Base: 5, Count: 1} },
			[]string{"service 3: has backends but no name", "service 3: shares slot 5 with service 1"}},
		{"a name without service", func(t lb.Tables) { t.Names[9] = webPort },
			[]string{"name ns/web:http/TCP/IPv4: service 9 does not exist"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tables := soundTables()
			tt.damage(tables)
			var got []string
			for _, err := range tables.Check() {
				got = append(got, err.Error())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestTablesAsText(t *testing.T) {
	want := strings.TrimPrefix(`
frontends:
  10.96.0.1:* ClusterIP -> none
  10.96.0.1:53/UDP ClusterIP -> 2
  10.96.0.1:80/TCP ClusterIP -> 1
names:
  1 ns/web:http/TCP/IPv4
  2 ns/dns/UDP/IPv4
services:
  1 base=4 count=2 generation=7
  2 base=6 count=1 generation=1
  3 base=0 count=0 generation=9
slots:
  4 10.0.0.1:8080
  5 10.0.0.2:8080
  6 10.0.0.3:53
members:
  2 10.0.0.3:53
problems:
  ns/other: no room
`, "\n")
	if diff := cmp.Diff(want, soundTables().String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := lb.NewTables().String(); got != "" {
		t.Errorf("empty tables print %q", got)
	}
}

func TestBackendsOfARange(t *testing.T) {
	tables := soundTables()
	if diff := cmp.Diff(backends("10.0.0.1:8080", "10.0.0.2:8080"), tables.Backends(tables.Services[1]), compareAddr); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestGenerationsGoRound(t *testing.T) {
	r := lb.Range{Base: 1, Count: 2, Generation: lb.MaxGeneration}
	if got, want := r.Next(7, lb.MaxBackends), (lb.Range{Base: 7, Count: lb.MaxBackends}); got != want {
		t.Errorf("Next() = %+v, want %+v", got, want)
	}
}

func TestWordsAsText(t *testing.T) {
	v6 := netip.MustParseAddr("fd00::1")
	tests := []struct {
		value fmt.Stringer
		want  string
	}{
		{lb.FrontendKey{VIP: v6}, "[fd00::1]:*"},
		{lb.FrontendKey{VIP: v6, Port: 53, Protocol: lb.SCTP}, "[fd00::1]:53/SCTP"},
		{lb.Protocol(1), "protocol(1)"},
		{lb.FrontendKind(9), "kind(9)"},
		{lb.IPv6, "IPv6"},
	}
	for _, tt := range tests {
		if got := tt.value.String(); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
	for _, s := range []string{"TCP", "UDP", "SCTP"} {
		if p, ok := lb.ParseProtocol(s); !ok || p.String() != s {
			t.Errorf("ParseProtocol(%q) = %v, %v", s, p, ok)
		}
	}
	if p, ok := lb.ParseProtocol(""); p != lb.TCP || !ok {
		t.Errorf("the default protocol is %v, want TCP", p)
	}
	if _, ok := lb.ParseProtocol("tcp"); ok {
		t.Error("the API knows no protocol tcp")
	}
	if lb.FamilyOf(netip.MustParseAddr("::ffff:10.0.0.1")) != lb.IPv4 || lb.FamilyOf(v6) != lb.IPv6 {
		t.Error("a mapped address is IPv4")
	}
}
