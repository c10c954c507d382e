// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func TestNodePortAddresses(t *testing.T) {
	local := addrs("10.0.9.9", "10.0.9.10", "172.16.0.1", "127.0.0.1", "127.0.0.53", "fd00:9::9", "2001:db8:9::9", "::1")
	node := addrs("10.0.9.9", "fd00:9::9")
	tests := []struct {
		name   string
		config lb.NodePorts
		node   []netip.Addr
		want   []string
	}{{
		name: "primary: the addresses in the Node", config: lb.NodePorts{Primary: true}, node: node,
		want: []string{"10.0.9.9 open", "fd00:9::9 open"},
	}, {
		name: "primary, whatever CIDRs say", config: lb.NodePorts{Primary: true, CIDRs: prefixes("172.16.0.0/16")}, node: node,
		want: []string{"10.0.9.9 open", "fd00:9::9 open"},
	}, {
		name: "primary, a family that the Node has no address of accepts on every local address", config: lb.NodePorts{Primary: true}, node: node[:1],
		want: []string{"10.0.9.9 open", "fd00:9::9 open", "2001:db8:9::9 open"},
	}, {
		name: "primary, a Node without addresses", config: lb.NodePorts{Primary: true, Loopback: true},
		want: []string{"10.0.9.9 open", "10.0.9.10 open", "172.16.0.1 open", "fd00:9::9 open", "2001:db8:9::9 open",
			"127.0.0.1 loopback", "::1 loopback"},
	}, {
		name: "primary, a Node that says a loopback address is its own", config: lb.NodePorts{Primary: true}, node: addrs("127.0.0.1", "::1"),
	}, {
		name: "CIDRs", config: lb.NodePorts{CIDRs: prefixes("10.0.0.0/8", "2001:db8::/32")}, node: node,
		want: []string{"10.0.9.9 open", "10.0.9.10 open", "2001:db8:9::9 open"},
	}, {
		name: "a family none of them names accepts on every local address", config: lb.NodePorts{CIDRs: prefixes("172.16.0.0/16")}, node: node,
		want: []string{"172.16.0.1 open", "fd00:9::9 open", "2001:db8:9::9 open"},
	}, {
		name: "nodePortAddresses unset means all addresses", node: node,
		want: []string{"10.0.9.9 open", "10.0.9.10 open", "172.16.0.1 open", "fd00:9::9 open", "2001:db8:9::9 open"},
	}, {
		name: "a zero CIDR is all addresses of its family", config: lb.NodePorts{CIDRs: prefixes("0.0.0.0/0", "fd00::/8")}, node: node,
		want: []string{"10.0.9.9 open", "10.0.9.10 open", "172.16.0.1 open", "fd00:9::9 open"},
	}, {
		name: "no address in the CIDRs", config: lb.NodePorts{CIDRs: prefixes("192.0.2.0/24", "fc00::/16")}, node: node,
	}, {
		name: "127.0.0.1 and [::1] for processes on the node", config: lb.NodePorts{Loopback: true, CIDRs: prefixes("127.0.0.0/8", "::1/128")}, node: node,
		want: []string{"127.0.0.1 loopback", "::1 loopback"},
	}, {
		name: "iptables.localhostNodePorts: false, whatever CIDRs say", config: lb.NodePorts{CIDRs: prefixes("127.0.0.0/8", "::1/128")}, node: node,
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := lb.NewStore(lb.Config{NodeName: here, NodePorts: tt.config})
			s.SetNode(lb.Node{Addresses: tt.node})
			s.SetLocalAddresses(local)
			var got []string
			for a, kind := range s.Changes().NodeAddresses {
				got = append(got, fmt.Sprintf("%v %v", a, kind))
			}
			slices.Sort(got)
			slices.Sort(tt.want)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestNodePortsAtEveryLocalAddress(t *testing.T) {
	tests := []struct {
		name   string
		config lb.NodePorts
		node   []netip.Addr
		v4, v6 bool
	}{
		{"primary", lb.NodePorts{Primary: true}, addrs("10.0.9.9", "fd00:9::9"), false, false},
		{"primary, a Node of one family", lb.NodePorts{Primary: true}, addrs("fd00:9::9"), true, false},
		{"primary, no Node", lb.NodePorts{Primary: true}, nil, true, true},
		{"primary, whatever CIDRs say", lb.NodePorts{Primary: true, CIDRs: prefixes("0.0.0.0/0", "::/0")}, addrs("10.0.9.9", "fd00:9::9"), false, false},
		{"no CIDRs", lb.NodePorts{}, nil, true, true},
		{"CIDRs of one family", lb.NodePorts{CIDRs: prefixes("10.0.0.0/8")}, nil, false, true},
		{"CIDRs of both families", lb.NodePorts{CIDRs: prefixes("10.0.0.0/8", "fd00::/8")}, nil, false, false},
		{"a zero CIDR among others", lb.NodePorts{CIDRs: prefixes("fd00::/8", "::/0", "10.0.0.0/8")}, nil, false, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := lb.NewStore(lb.Config{NodePorts: tt.config})
			s.SetNode(lb.Node{Addresses: tt.node})
			if v4, v6 := s.AllAddresses(lb.IPv4), s.AllAddresses(lb.IPv6); v4 != tt.v4 || v6 != tt.v6 {
				t.Errorf("IPv4 %v, IPv6 %v, want %v, %v", v4, v6, tt.v4, tt.v6)
			}
		})
	}
}

func TestAddressesOfTheNode(t *testing.T) {
	s := newStore()
	s.SetNode(lb.Node{Addresses: addrs("10.0.9.9")})
	s.SetLocalAddresses(addrs("172.16.0.1", "fd00:9::9"))
	for _, a := range addrs("10.0.9.9", "172.16.0.1", "fd00:9::9", "127.0.0.2", "::1") {
		if !s.IsLocal(a) {
			t.Errorf("%v is an address of the node", a)
		}
	}
	for _, a := range append(addrs("10.0.9.10", "::"), netip.Addr{}) {
		if s.IsLocal(a) {
			t.Errorf("%v is no address of the node", a)
		}
	}
}

func TestNodeAddressesChange(t *testing.T) {
	s := lb.NewStore(lb.Config{NodeName: here, NodePorts: lb.NodePorts{Loopback: true}})
	s.SetService(webService(func(s *lb.Service) { s.Ports[0].NodePort = 30080 }))
	s.Changes()
	steps := []struct {
		name string
		do   func()
		want []string
	}{
		{"a device gets an address", func() { s.SetLocalAddresses(addrs("10.0.9.9")) }, []string{"node address 10.0.9.9 open"}},
		{"the same again", func() { s.SetLocalAddresses(addrs("10.0.9.9")) }, nil},
		{"another one", func() { s.SetLocalAddresses(addrs("10.0.9.10")) }, []string{"node address 10.0.9.9 gone", "node address 10.0.9.10 open"}},
		{"the Node's own addresses do not count", func() { s.SetNode(lb.Node{Addresses: addrs("10.0.9.1")}) }, nil},
		{"until they are what is asked for", func() { s.SetNodePorts(lb.NodePorts{Primary: true, Loopback: true}) },
			[]string{"node address 10.0.9.10 gone", "node address 10.0.9.1 open"}},
		{"the Node moves", func() { s.SetNode(lb.Node{Addresses: addrs("10.0.9.2", "fd00:9::2")}) },
			[]string{"node address 10.0.9.1 gone", "node address 10.0.9.2 open", "node address fd00:9::2 open"}},
		{"local addresses do not count now", func() { s.SetLocalAddresses(nil) }, nil},
		{"without loopback", func() { s.SetNodePorts(lb.NodePorts{Primary: true}) },
			[]string{"node address 127.0.0.1 gone", "node address ::1 gone"}},
		{"the Node is deleted", func() { s.SetNode(lb.Node{}) }, []string{"node address 10.0.9.2 gone", "node address fd00:9::2 gone"}},
	}
	for _, step := range steps {
		step.do()
		expect(t, step.name, s.Changes(), step.want...)
	}
}

func TestAnAddressOfTheNodeInAServiceCIDRIsNotDropped(t *testing.T) {
	s := lb.NewStore(lb.Config{NodePorts: lb.NodePorts{Primary: true}})
	s.SetNode(lb.Node{Addresses: addrs("10.0.9.9", "fd00:9::9")})
	s.SetLocalAddresses(addrs("10.0.9.9", "10.96.0.10", "192.0.2.1", "fd00:9::9"))
	expect(t, "without CIDRs", s.Changes(), "node address 10.0.9.9 open", "node address fd00:9::9 open")
	s.SetServiceCIDRs(prefixes("10.0.0.0/8"))
	expect(t, "with one", s.Changes(), "service CIDR 10.0.0.0/8 true", "node address 10.96.0.10 local")
	s.SetServiceCIDRs(nil)
	expect(t, "with none again", s.Changes(), "service CIDR 10.0.0.0/8 false", "node address 10.96.0.10 gone")
}

func TestServiceCIDRs(t *testing.T) {
	s := newStore()
	steps := []struct {
		name  string
		cidrs []string
		want  []string
	}{
		{"two ranges, masked", []string{"10.96.0.7/12", "fd00::/108"}, []string{"service CIDR 10.96.0.0/12 true", "service CIDR fd00::/108 true"}},
		{"the same again, one of them twice", []string{"fd00::1/108", "10.96.0.0/12", "10.96.0.0/12"}, nil},
		{"one comes, one goes", []string{"10.96.0.0/12", "10.112.0.0/12"}, []string{"service CIDR fd00::/108 false", "service CIDR 10.112.0.0/12 true"}},
		{"none left", nil, []string{"service CIDR 10.96.0.0/12 false", "service CIDR 10.112.0.0/12 false"}},
	}
	for _, step := range steps {
		s.SetServiceCIDRs(prefixes(step.cidrs...))
		expect(t, step.name, s.Changes(), step.want...)
	}
}

func TestLoadBalancerSourceRanges(t *testing.T) {
	both := addrs("192.0.2.1", "2001:db8::1")
	type rules struct {
		Restricted, NodeAllowed bool
		Sources                 []netip.Prefix
	}
	tests := []struct {
		name   string
		ranges []string
		vips   []netip.Addr
		more   func(*lb.Service)
		node   []netip.Addr
		local  []netip.Addr
		v4, v6 rules
	}{{
		name: "no range: open", vips: both,
	}, {
		name: "ranges, sorted, each once", ranges: []string{"203.0.113.0/24", "198.51.100.0/24", "203.0.113.0/24"}, vips: both,
		v4: rules{Restricted: true, Sources: prefixes("198.51.100.0/24", "203.0.113.0/24")},
	}, {
		name: "by family", ranges: []string{"203.0.113.0/24", "2001:db8:1::/48"}, vips: both,
		v4: rules{Restricted: true, Sources: prefixes("203.0.113.0/24")},
		v6: rules{Restricted: true, Sources: prefixes("2001:db8:1::/48")},
	}, {
		name: "a zero prefix opens its family", ranges: []string{"203.0.113.0/24", "0.0.0.0/0", "2001:db8:1::/48"}, vips: both,
		v6: rules{Restricted: true, Sources: prefixes("2001:db8:1::/48")},
	}, {
		name: "a zero prefix opens its family (IPv6)", ranges: []string{"203.0.113.0/24", "::/0"}, vips: both,
		v4: rules{Restricted: true, Sources: prefixes("203.0.113.0/24")},
	}, {
		name: "a zero prefix opens its family, also after a range with this node's address", ranges: []string{"10.0.0.0/8", "0.0.0.0/0"}, vips: both,
		node: addrs("10.0.9.9"),
	}, {
		name: "when a range contains this node's address, sources equal to the load-balancer IPs pass too",
		vips: addrs("192.0.2.1", "192.0.2.2", "2001:db8::1"), ranges: []string{"10.0.9.9/32"},
		node: addrs("10.0.9.9", "fd00:9::9"),
		v4:   rules{Restricted: true, NodeAllowed: true, Sources: prefixes("10.0.9.9/32", "192.0.2.1/32", "192.0.2.2/32")},
	}, {
		name: "this node's address is that of the Node, not any local one", vips: both, ranges: []string{"172.16.0.0/16"},
		node: addrs("10.0.9.9"), local: addrs("172.16.0.1"),
		v4: rules{Restricted: true, Sources: prefixes("172.16.0.0/16")},
	}, {
		name: "a node without address: any local one", vips: both, ranges: []string{"172.16.0.0/16", "fd00:9::/64"},
		node: addrs("fd00:8::8"), local: addrs("172.16.0.1", "fd00:9::9"),
		v4: rules{Restricted: true, NodeAllowed: true, Sources: prefixes("172.16.0.0/16", "192.0.2.1/32")},
		v6: rules{Restricted: true, Sources: prefixes("fd00:9::/64")},
	}, {
		name: "nothing is known of the node", vips: both, ranges: []string{"10.0.0.0/8"},
		v4: rules{Restricted: true, Sources: prefixes("10.0.0.0/8")},
	}, {
		name: "no load-balancer IP: unrestricted", ranges: []string{"203.0.113.0/24"},
		node: addrs("203.0.113.9"),
	}, {
		name: "no load-balancer IP of the family: unrestricted", ranges: []string{"203.0.113.0/24", "2001:db8:1::/48"}, vips: both[:1],
		v4: rules{Restricted: true, Sources: prefixes("203.0.113.0/24")},
	}, {
		name: "also when that IP is listed in externalIPs", ranges: []string{"203.0.113.0/24"}, vips: both,
		more: func(s *lb.Service) { s.ExternalIPs = both },
		v4:   rules{Restricted: true, Sources: prefixes("203.0.113.0/24")},
	}, {
		name: "whatever the policies", ranges: []string{"203.0.113.0/24"}, vips: both,
		more: func(s *lb.Service) { s.InternalLocal, s.ExternalLocal = true, true },
		v4:   rules{Restricted: true, Sources: prefixes("203.0.113.0/24")},
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetNode(lb.Node{Addresses: tt.node})
			s.SetLocalAddresses(tt.local)
			svc := webService(dualStack, func(s *lb.Service) { s.LoadBalancerIPs, s.Sources = tt.vips, prefixes(tt.ranges...) })
			if tt.more != nil {
				tt.more(&svc)
			}
			s.SetService(svc)
			d := s.Changes()
			for sp, want := range map[lb.ServicePort]rules{webPort: tt.v4, webPort6: tt.v6} {
				b := d.Services[sp]
				got := rules{b.Restricted, b.NodeAllowed, b.Sources}
				if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
					t.Errorf("%v (-want +got):\n%s", sp.Family, diff)
				}
			}
		})
	}
}

func TestAThousandSourceRanges(t *testing.T) {
	var ranges []netip.Prefix
	for i := range 1000 {
		ranges = append(ranges, netip.PrefixFrom(netip.AddrFrom4([4]byte{203, byte(i >> 8), byte(i), 0}), 24))
	}
	slices.Reverse(ranges)
	s := newStore()
	s.SetService(webService(func(s *lb.Service) { s.LoadBalancerIPs, s.Sources = addrs("192.0.2.1"), ranges }))
	d := s.Changes()
	b := d.Services[webPort]
	if !b.Restricted || len(b.Sources) != 1000 || !slices.IsSortedFunc(b.Sources, netip.Prefix.Compare) || len(d.Problems) > 0 {
		t.Errorf("restricted %v to %d ranges, problems %v", b.Restricted, len(b.Sources), d.Problems)
	}
}

func TestTheNodesAddressMovesIntoASourceRange(t *testing.T) {
	s := lb.NewStore(lb.Config{NodeName: here, NodePorts: lb.NodePorts{CIDRs: prefixes("192.0.2.0/24")}})
	s.SetService(webService(func(s *lb.Service) { s.LoadBalancerIPs, s.Sources = addrs("192.0.2.1"), prefixes("10.0.0.0/8") }))
	s.SetService(claimant("plain", 1))
	s.Changes()
	const out, in = "service ns/web:http/TCP/IPv4 [] serving [] restricted true to [10.0.0.0/8] node false",
		"service ns/web:http/TCP/IPv4 [] serving [] restricted true to [10.0.0.0/8 192.0.2.1/32] node true"
	s.SetNode(lb.Node{Addresses: addrs("10.0.9.9")})
	expect(t, "the Node's address", s.Changes(), in)
	s.SetNode(lb.Node{Addresses: addrs("10.0.9.10"), Zone: "a"})
	expect(t, "another in the range", s.Changes())
	s.SetNode(lb.Node{Addresses: addrs("172.16.0.1")})
	expect(t, "out of the range", s.Changes(), out)
	s.SetLocalAddresses(addrs("10.0.9.9"))
	expect(t, "a local one, while the Node has its own", s.Changes())
	s.SetNode(lb.Node{})
	expect(t, "the Node gone", s.Changes(), in)
	s.SetLocalAddresses(nil)
	expect(t, "no address left", s.Changes(), out)
}

// The node's processes are a matter of their own: the ranges may stay what they are.
func TestTheNodesAddressMovesAndTheRangesStay(t *testing.T) {
	s := newStore()
	s.SetService(webService(func(s *lb.Service) {
		s.LoadBalancerIPs, s.Sources = addrs("192.0.2.1"), prefixes("10.0.0.0/8", "192.0.2.1/32")
	}))
	for _, step := range []struct {
		address string
		allowed bool
	}{{"172.16.0.1", false}, {"10.0.9.9", true}, {"172.16.0.1", false}} {
		s.SetNode(lb.Node{Addresses: addrs(step.address)})
		b := s.Changes().Services[webPort]
		if b == nil || b.NodeAllowed != step.allowed || len(b.Sources) != 2 {
			t.Errorf("node at %s: %+v", step.address, b)
		}
	}
}

func TestHealthCheckNodePort(t *testing.T) {
	ready := func(addr string) lb.Endpoint { return endpoint(addr, "rs", on(here)) }
	second := func(s lb.Slice) lb.Slice {
		s.Name = name("second")
		s.Ports = []lb.SlicePort{{Name: "admin", Protocol: lb.TCP, Number: 81}}
		return s
	}
	tests := []struct {
		name   string
		slices []lb.Slice
		v4, v6 int
	}{
		{name: "no endpoint"},
		{name: "distinct IPs", slices: []lb.Slice{webSlice("a", 80, ready("10.0.0.1"), ready("10.0.0.2"))}, v4: 2},
		{name: "all ports together, also one that the Service does not have",
			slices: []lb.Slice{webSlice("a", 80, ready("10.0.0.1")), second(webSlice("", 81, ready("10.0.0.1"), ready("10.0.0.3")))}, v4: 2},
		{name: "one IP with two numbers", slices: []lb.Slice{webSlice("a", 80, ready("10.0.0.1")), webSlice("b", 81, ready("10.0.0.1"))}, v4: 1},
		{name: "ready only", slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "st", on(here)), endpoint("10.0.0.2", "s", on(here)))}},
		{name: "local only", slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rs", on("there")), endpoint("10.0.0.2", "rs"), ready("10.0.0.3"))}, v4: 1},
		{name: "hints have no say", slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rs", on(here), forNodes("there")), endpoint("10.0.0.2", "rs", on("there"), forNodes(here)))}, v4: 1},
		{name: "the copy that counts", slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rst", on(here))), webSlice("b", 80, endpoint("10.0.0.1", "s", on(here)))}},
		{name: "families apart", slices: []lb.Slice{webSlice("a", 80, ready("10.0.0.1")), ofIPv6(webSlice("b", 80, ready("fd01::1"), ready("fd01::2")))}, v4: 1, v6: 2},
		{name: "a slice without ports", slices: []lb.Slice{{Name: name("a"), Service: "web", Family: lb.IPv4, Endpoints: []lb.Endpoint{ready("10.0.0.1")}}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetService(webService(dualStack, externalLocal, func(s *lb.Service) { s.HealthCheckNodePort = 32000 }))
			for _, slice := range tt.slices {
				s.SetSlice(slice)
			}
			want := map[lb.ServiceFamily]lb.Health{
				{Service: name("web"), Family: lb.IPv4}: {Port: 32000, Local: tt.v4},
				{Service: name("web"), Family: lb.IPv6}: {Port: 32000, Local: tt.v6},
			}
			if got := s.Changes().Health; !maps.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func TestHealthCheckNodePortChanges(t *testing.T) {
	s := newStore()
	withPort := func(port uint16) func(*lb.Service) {
		return func(s *lb.Service) { s.HealthCheckNodePort = port }
	}
	none := webSlice("a", 80, endpoint("10.0.0.1", "rs", on("there")))
	one := webSlice("a", 80, endpoint("10.0.0.1", "rs", on(here)))
	two := webSlice("a", 80, endpoint("10.0.0.1", "rs", on(here)), endpoint("10.0.0.2", "rs", on(here)))
	health := func(line string) string { return "health ns/web/IPv4 " + line }
	const service, gone = "service ns/web:http/TCP/IPv4 [10.0.0.1:80] serving [10.0.0.1:80]", "health ns/web/IPv4 {Port:0 Local:0}"
	s.SetSlice(one)
	s.SetService(webService())
	s.Changes()
	s.SetService(webService(withPort(32000)))
	expect(t, "the policy becomes Local", s.Changes(), health("{Port:32000 Local:1}"))
	s.SetSlice(none)
	expect(t, "the last local one goes", s.Changes(), health("{Port:32000 Local:0}"))
	s.SetSlice(two)
	expect(t, "two of them", s.Changes(), health("{Port:32000 Local:2}"),
		"service ns/web:http/TCP/IPv4 [10.0.0.1:80 10.0.0.2:80] serving [10.0.0.1:80 10.0.0.2:80]")
	s.SetSlice(one)
	expect(t, "one of them", s.Changes(), health("{Port:32000 Local:1}"), service)
	s.SetService(webService(withPort(32001)))
	expect(t, "another number", s.Changes(), health("{Port:32001 Local:1}"))
	s.SetService(webService())
	expect(t, "closed at once when the policy changes", s.Changes(), gone)
	s.SetService(webService(withPort(32000)))
	expect(t, "reopened on the same number", s.Changes(), health("{Port:32000 Local:1}"))
	s.DeleteService(name("web"))
	expect(t, "Service deleted", s.Changes(), gone, "service ns/web:http/TCP/IPv4 gone",
		"frontend 10.96.0.1:80/TCP gone", "frontend 10.96.0.1:* gone")
}

func TestNoLocalEndpoints(t *testing.T) {
	s := newStore()
	check := func(what string, v4, v6 lb.NoLocal) {
		t.Helper()
		s.Changes()
		if got := s.NoLocal(lb.IPv4); got != v4 {
			t.Errorf("%s: IPv4 %+v, want %+v", what, got, v4)
		}
		if got := s.NoLocal(lb.IPv6); got != v6 {
			t.Errorf("%s: IPv6 %+v, want %+v", what, got, v6)
		}
	}
	ports := func(s *lb.Service) {
		s.Ports = append(s.Ports, lb.Port{Name: "admin", Protocol: lb.TCP, Number: 81})
	}
	admin := webSlice("admin", 81, endpoint("10.0.0.1", "rs", on("there")))
	admin.Ports[0].Name = "admin"
	none := lb.NoLocal{}
	s.SetService(webService(dualStack, internalLocal, externalLocal, ports))
	check("none usable anywhere does not count", none, none)
	s.SetSlice(webSlice("http", 80, endpoint("10.0.0.1", "rs", on("there"))))
	s.SetSlice(admin)
	check("each service port counts", lb.NoLocal{Internal: 2, External: 2}, none)
	s.SetSlice(ofIPv6(webSlice("six", 80, endpoint("fd01::1", "st", on("there")))))
	check("families apart, terminating ones elsewhere", lb.NoLocal{Internal: 2, External: 2}, lb.NoLocal{Internal: 1, External: 1})
	s.SetService(webService(dualStack, externalLocal, ports))
	check("policies apart", lb.NoLocal{External: 2}, lb.NoLocal{External: 1})
	s.SetSlice(webSlice("http", 80, endpoint("10.0.0.1", "st", on(here)), endpoint("10.0.0.2", "rs", on("there"))))
	check("a terminating one here will do", lb.NoLocal{External: 1}, lb.NoLocal{External: 1})
	s.SetService(webService(dualStack, ports))
	check("policy Cluster", none, none)
	s.SetService(webService(dualStack, internalLocal, ports))
	check("internal only", lb.NoLocal{Internal: 1}, lb.NoLocal{Internal: 1})
	s.DeleteService(name("web"))
	check("Service deleted", none, none)
}

func TestWhereEverybodyReachesNodePorts(t *testing.T) {
	s := lb.NewStore(lb.Config{NodePorts: lb.NodePorts{Primary: true, Loopback: true}})
	s.SetLocalAddresses(addrs("10.0.9.9", "10.96.0.10", "fd00:9::9"))
	s.SetServiceCIDRs(prefixes("10.96.0.0/16"))
	for _, tt := range []struct {
		name       string
		node, want []netip.Addr
	}{
		{"at all addresses while the Node names none", nil, addrs("0.0.0.0", "::")},
		{"at all of the family it names none of", addrs("10.0.9.9"), addrs("10.0.9.9", "::")},
		{"at those it names, not at loopback or local ones", addrs("10.0.9.9", "fd00:9::9"), addrs("10.0.9.9", "fd00:9::9")},
	} {
		s.SetNode(lb.Node{Addresses: tt.node})
		if got := s.NodePortAddresses(); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
