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

// Keys of soundTables.
var (
	webFrontend  = lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.1"), Port: 80, Protocol: lb.TCP}
	webWildcard  = lb.FrontendKey{VIP: webFrontend.VIP}
	webNodePort  = lb.FrontendKey{VIP: netip.IPv4Unspecified(), Port: 30080, Protocol: lb.TCP}
	dnsFrontend  = lb.FrontendKey{VIP: webFrontend.VIP, Port: 53, Protocol: lb.UDP}
	webFirst     = backends("10.0.0.1:8080")[0]
	webSecond    = backends("10.0.0.2:8080")[0]
	dnsBackend   = backends("10.0.0.3:53")[0]
	sourceOfWeb  = lb.Source{Service: 1, Prefix: netip.MustParsePrefix("203.0.113.0/24")}
	serviceCIDR4 = netip.MustParsePrefix("10.96.0.0/12")
)

// soundTables are tables with a TCP service that has an affinity, source ranges
// and nothing here for outside clients, a UDP service, one ID at rest and nothing
// wrong.
func soundTables() lb.Tables {
	t := lb.NewTables()
	t.Frontends[webWildcard] = lb.Frontend{Kind: lb.KindClusterIP}
	t.Frontends[webFrontend] = lb.Frontend{Service: 1, Kind: lb.KindClusterIP}
	t.Frontends[webNodePort] = lb.Frontend{Service: 1, Kind: lb.KindNodePort}
	t.Frontends[dnsFrontend] = lb.Frontend{Service: 2, Kind: lb.KindClusterIP}
	t.Names[1] = webPort
	t.Names[2] = lb.ServicePort{Service: name("dns"), Protocol: lb.UDP, Family: lb.IPv4}
	cluster := lb.Range{Base: 4, Count: 2, Generation: 7}
	t.Services[1] = lb.ServiceRow{
		Sides:    [lb.Sides]lb.Range{cluster, cluster, lb.Range{Generation: 2}.NextEmpty(true)},
		Affinity: 10, Restricted: true, NodeAllowed: true, OutsideLocal: true,
	}
	dns := lb.Range{Base: 6, Count: 1, Generation: 1}
	t.Services[2] = lb.ServiceRow{Sides: [lb.Sides]lb.Range{dns, dns, dns}}
	resting := lb.Range{Generation: 9}
	t.Services[3] = lb.ServiceRow{Sides: [lb.Sides]lb.Range{resting, resting, resting}}
	for i, b := range []lb.Backend{webFirst, webSecond, dnsBackend} {
		t.Slots[uint32(4+i)] = b
	}
	for _, b := range []lb.Backend{webFirst, webSecond} {
		t.Members[lb.Member{Service: 1, Backend: b, Use: lb.UseOn(lb.SideClusterIP)}] = struct{}{}
		t.Members[lb.Member{Service: 1, Backend: b, Use: lb.UseOn(lb.SideInside)}] = struct{}{}
	}
	t.Members[lb.Member{Service: 2, Backend: dnsBackend}] = struct{}{}
	t.Sources[sourceOfWeb] = struct{}{}
	t.NodeAddresses[netip.MustParseAddr("10.0.9.9")] = lb.NodeAddressOpen
	t.NodeAddresses[netip.MustParseAddr("127.0.0.1")] = lb.NodeAddressLoopback
	t.ServiceCIDRs[serviceCIDR4] = struct{}{}
	t.Problems[name("other")] = "no room"
	return t
}

// setRow changes the row of a service.
func setRow(t lb.Tables, id lb.ServiceID, set func(*lb.ServiceRow)) {
	row := t.Services[id]
	set(&row)
	t.Services[id] = row
}

func TestCheckFindsWhatAReaderCouldStumbleOver(t *testing.T) {
	clusterIP := func(id lb.ServiceID) lb.Frontend { return lb.Frontend{Service: id, Kind: lb.KindClusterIP} }
	member := func(t lb.Tables, m lb.Member) { t.Members[m] = struct{}{} }
	source := func(t lb.Tables, id lb.ServiceID, prefix string) {
		t.Sources[lb.Source{Service: id, Prefix: netip.MustParsePrefix(prefix)}] = struct{}{}
	}
	tests := []struct {
		name   string
		damage func(lb.Tables)
		want   []string
	}{
		{"sound tables", func(lb.Tables) {}, nil},
		{"empty tables", func(t lb.Tables) {
			clear(t.Frontends)
			clear(t.Services)
			clear(t.Names)
			clear(t.Members)
			clear(t.Sources)
		}, nil},
		{"a frontend without service", func(t lb.Tables) { t.Frontends[webFrontend] = clusterIP(8) },
			[]string{"frontend 10.96.0.1:80/TCP: service 8 does not exist"}},
		{"a port that leads nowhere", func(t lb.Tables) { t.Frontends[webFrontend] = lb.Frontend{} },
			[]string{"frontend 10.96.0.1:80/TCP: service 0 does not exist"}},
		{"a frontend of a service at rest", func(t lb.Tables) { t.Frontends[webFrontend] = clusterIP(3) },
			[]string{"frontend 10.96.0.1:80/TCP: service 3 has no name"}},
		{"a frontend of another protocol", func(t lb.Tables) { t.Frontends[webFrontend] = clusterIP(2) },
			[]string{"frontend 10.96.0.1:80/TCP: leads to ns/dns/UDP/IPv4"}},
		{"a frontend of another family", func(t lb.Tables) {
			t.Frontends[lb.FrontendKey{VIP: netip.IPv6Unspecified(), Port: 30080, Protocol: lb.TCP}] = t.Frontends[webNodePort]
		}, []string{"frontend [::]:30080/TCP: leads to ns/web:http/TCP/IPv4"}},
		{"a NodePort with an address", func(t lb.Tables) {
			t.Frontends[webFrontend] = lb.Frontend{Service: 1, Kind: lb.KindNodePort}
		}, []string{"frontend 10.96.0.1:80/TCP: is of kind NodePort"}},
		{"an unspecified address that is no NodePort", func(t lb.Tables) { t.Frontends[webNodePort] = clusterIP(1) },
			[]string{"frontend 0.0.0.0:30080/TCP: is of kind ClusterIP"}},
		{"a wildcard with a service", func(t lb.Tables) { t.Frontends[webWildcard] = clusterIP(1) },
			[]string{"frontend 10.96.0.1:*: leads to service 1, a wildcard belongs to none"}},
		// One line for each side whose range has the slot.
		{"a slot without row", func(t lb.Tables) { delete(t.Slots, 5) },
			[]string{"service 1: slot 5 does not exist", "service 1: slot 5 does not exist"}},
		{"a backend of another family", func(t lb.Tables) {
			t.Slots[5] = backends("[fd01::1]:80")[0]
			setRow(t, 1, func(r *lb.ServiceRow) { r.Affinity = 0 })
			clear(t.Members)
			member(t, lb.Member{Service: 2, Backend: dnsBackend})
		}, []string{"service 1: ns/web:http/TCP/IPv4 has backend [fd01::1]:80", "service 1: ns/web:http/TCP/IPv4 has backend [fd01::1]:80"}},
		{"a UDP backend that is no member", func(t lb.Tables) {
			delete(t.Members, lb.Member{Service: 2, Backend: dnsBackend})
			setRow(t, 2, func(r *lb.ServiceRow) { r.Sides[1], r.Sides[2] = lb.Range{}, lb.Range{} })
		}, []string{"service 2: backend 10.0.0.3:53 is not in members (serving)"}},
		{"a backend that is no member for a side with affinity", func(t lb.Tables) {
			delete(t.Members, lb.Member{Service: 1, Backend: webSecond, Use: lb.UseOn(lb.SideInside)})
		}, []string{"service 1: backend 10.0.0.2:8080 is not in members (inside)"}},
		{"members that outlive their side's set", func(t lb.Tables) {
			member(t, lb.Member{Service: 1, Backend: webFirst, Use: lb.UseOn(lb.SideOutside)})
		}, nil},
		{"a member for affinity of a service without", func(t lb.Tables) {
			member(t, lb.Member{Service: 2, Backend: dnsBackend, Use: lb.UseOn(lb.SideOutside)})
		}, []string{"member 10.0.0.3:53 (outside): nobody remembers backends of service 2"}},
		{"a member of a service that has none", func(t lb.Tables) { member(t, lb.Member{Service: 1, Backend: webFirst}) },
			[]string{"member 10.0.0.1:8080 (serving): nobody remembers backends of service 1"}},
		{"a member of no service", func(t lb.Tables) { member(t, lb.Member{Service: 9, Backend: webFirst}) },
			[]string{"member 10.0.0.1:8080 (serving): nobody remembers backends of service 9"}},
		{"a member of no use", func(t lb.Tables) { member(t, lb.Member{Service: 1, Backend: webFirst, Use: 9}) },
			[]string{"member 10.0.0.1:8080 (side(8)): nobody remembers backends of service 1"}},
		{"a source of a service that is not restricted", func(t lb.Tables) { source(t, 2, "10.0.0.0/8") },
			[]string{"source 10.0.0.0/8: means nothing to service 2"}},
		{"a source of another family", func(t lb.Tables) { source(t, 1, "fd00::/8") },
			[]string{"source fd00::/8: means nothing to service 1"}},
		{"a source of no service", func(t lb.Tables) { source(t, 9, "10.0.0.0/8") },
			[]string{"source 10.0.0.0/8: means nothing to service 9"}},
		{"ranges that share slots", func(t lb.Tables) {
			setRow(t, 3, func(r *lb.ServiceRow) { r.Sides[lb.SideOutside] = lb.Range{Base: 5, Count: 1} })
		}, []string{"service 3: has backends but no name", "service 3: shares slot 5 with service 1"}},
		{"two sides that share a part of a block", func(t lb.Tables) {
			setRow(t, 1, func(r *lb.ServiceRow) { r.Sides[lb.SideInside].Count = 1 })
		}, []string{"service 1: shares slot 4 with service 1"}},
		{"two sides with a block each", func(t lb.Tables) {
			t.Slots[7] = webFirst
			member(t, lb.Member{Service: 1, Backend: webFirst, Use: lb.UseOn(lb.SideOutside)})
			setRow(t, 1, func(r *lb.ServiceRow) { r.Sides[lb.SideOutside] = lb.Range{Base: 7, Count: 1} })
		}, nil},
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
  0.0.0.0:30080/TCP NodePort -> 1
  10.96.0.1:* ClusterIP -> none
  10.96.0.1:53/UDP ClusterIP -> 2
  10.96.0.1:80/TCP ClusterIP -> 1
names:
  1 ns/web:http/TCP/IPv4
  2 ns/dns/UDP/IPv4
services:
  1 clusterIP{base=4 count=2 generation=7} inside{base=4 count=2 generation=7} outside{elsewhere generation=3} affinity=10s restricted node=true outside-local
  2 base=6 count=1 generation=1
  3 base=0 count=0 generation=9
slots:
  4 10.0.0.1:8080
  5 10.0.0.2:8080
  6 10.0.0.3:53
members:
  1 clusterIP 10.0.0.1:8080
  1 clusterIP 10.0.0.2:8080
  1 inside 10.0.0.1:8080
  1 inside 10.0.0.2:8080
  2 serving 10.0.0.3:53
sources:
  1 203.0.113.0/24
node addresses:
  10.0.9.9 open
  127.0.0.1 loopback
service CIDRs:
  10.96.0.0/12
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

func TestDifferencesCountsRows(t *testing.T) {
	tests := []struct {
		name   string
		change func(lb.Tables)
		want   int
	}{
		{"equal tables", func(lb.Tables) {}, 0},
		{"a frontend of another kind", func(t lb.Tables) { t.Frontends[webFrontend] = lb.Frontend{Service: 1, Kind: lb.KindExternalIP} }, 1},
		{"another generation on one side", func(t lb.Tables) { setRow(t, 1, func(r *lb.ServiceRow) { r.Sides[1].Generation++ }) }, 1},
		{"empty for another reason", func(t lb.Tables) { setRow(t, 1, func(r *lb.ServiceRow) { r.Sides[2].Base = 0 }) }, 1},
		{"another affinity", func(t lb.Tables) { setRow(t, 1, func(r *lb.ServiceRow) { r.Affinity++ }) }, 1},
		{"not restricted", func(t lb.Tables) { setRow(t, 1, func(r *lb.ServiceRow) { r.Restricted = false }) }, 1},
		{"outside clients lose their address", func(t lb.Tables) { setRow(t, 1, func(r *lb.ServiceRow) { r.OutsideLocal = false }) }, 1},
		{"two rows of one service", func(t lb.Tables) {
			setRow(t, 1, func(r *lb.ServiceRow) { r.NodeAllowed = false })
			delete(t.Sources, sourceOfWeb)
		}, 2},
		{"another backend in a slot", func(t lb.Tables) { t.Slots[4] = dnsBackend }, 1},
		{"a member for another use", func(t lb.Tables) {
			delete(t.Members, lb.Member{Service: 2, Backend: dnsBackend})
			t.Members[lb.Member{Service: 2, Backend: dnsBackend, Use: lb.UseOn(lb.SideInside)}] = struct{}{}
		}, 2},
		{"a node address for others", func(t lb.Tables) { t.NodeAddresses[netip.MustParseAddr("127.0.0.1")] = lb.NodeAddressOpen }, 1},
		{"a service CIDR", func(t lb.Tables) { delete(t.ServiceCIDRs, serviceCIDR4) }, 1},
		{"a name", func(t lb.Tables) { t.Names[3] = webPort6 }, 1},
		{"a problem", func(t lb.Tables) { t.Problems[name("other")] = "no memory" }, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			changed := soundTables()
			tt.change(changed)
			if a, b := soundTables().Differences(changed), changed.Differences(soundTables()); a != tt.want || b != tt.want {
				t.Errorf("%d one way, %d the other, want %d", a, b, tt.want)
			}
		})
	}
}

func TestBackendsOfARange(t *testing.T) {
	tables := soundTables()
	for side, want := range [lb.Sides][]lb.Backend{backends("10.0.0.1:8080", "10.0.0.2:8080"), backends("10.0.0.1:8080", "10.0.0.2:8080"), {}} {
		if diff := cmp.Diff(want, tables.Backends(tables.Services[1].Sides[side]), compareAddr); diff != "" {
			t.Errorf("%v (-want +got):\n%s", lb.Side(side), diff)
		}
	}
}

func TestGenerationsGoRound(t *testing.T) {
	r := lb.Range{Base: 1, Count: 2, Generation: lb.MaxGeneration}
	if got, want := r.Next(7, lb.MaxBackends), (lb.Range{Base: 7, Count: lb.MaxBackends}); got != want {
		t.Errorf("Next() = %+v, want %+v", got, want)
	}
	if got := r.NextEmpty(false); got != (lb.Range{}) {
		t.Errorf("NextEmpty(false) = %+v, want the zero range", got)
	}
}

func TestAnEmptyRangeSaysWhy(t *testing.T) {
	full := lb.Range{Base: 1, Count: 2}
	none, elsewhere := full.NextEmpty(false), full.NextEmpty(true)
	if full.Elsewhere() || none.Elsewhere() || !elsewhere.Elsewhere() || elsewhere == none {
		t.Errorf("full %v, refused %v, dropped %v", full, none, elsewhere)
	}
	if none.Count != 0 || elsewhere.Count != 0 || none.Generation != 1 || elsewhere.Generation != 1 {
		t.Errorf("refused %+v, dropped %+v", none, elsewhere)
	}
	if next := elsewhere.Next(1, 1); next.Elsewhere() || next != (lb.Range{Base: 1, Count: 1, Generation: 2}) {
		t.Errorf("a backend again: %+v", next)
	}
}

func TestUsesAndSides(t *testing.T) {
	seen := map[lb.Use]bool{lb.UseServing: true}
	for side := range lb.Side(lb.Sides) {
		use := lb.UseOn(side)
		if got, ok := use.Side(); !ok || got != side || use.String() != side.String() || seen[use] {
			t.Errorf("use %d of side %v: %v, %v, %q", use, side, got, ok, use)
		}
		seen[use] = true
	}
	for _, use := range []lb.Use{lb.UseServing, lb.UseOn(lb.Sides)} {
		if _, ok := use.Side(); ok {
			t.Errorf("use %d has a side", use)
		}
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
		{lb.FrontendKey{VIP: netip.IPv6Unspecified(), Port: 30053, Protocol: lb.UDP}, "[::]:30053/UDP"},
		{lb.Any, "*"},
		{lb.Protocol(1), "protocol(1)"},
		{lb.KindForeign, "Foreign"},
		{lb.FrontendKind(9), "kind(9)"},
		{lb.Side(9), "side(9)"},
		{lb.UseServing, "serving"},
		{lb.NodeAddressOpen, "open"},
		{lb.NodeAddressLoopback, "loopback"},
		{lb.NodeAddress(9), "address(9)"},
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
