// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// TestBackendsOfAServicePort is about traffic policy Cluster without hints, where
// all sides get the same.
func TestBackendsOfAServicePort(t *testing.T) {
	tests := []struct {
		name    string
		slices  []lb.Slice
		sets    []lb.Backend
		serving []lb.Backend // beside those in the sets
	}{{
		name: "no slice",
	}, {
		name:   "ready endpoints, sorted",
		slices: []lb.Slice{webSlice("a", 8080, endpoint("10.0.0.2", "rs"), endpoint("10.0.0.1", "rs"))},
		sets:   backends("10.0.0.1:8080", "10.0.0.2:8080"),
	}, {
		name: "one name may mean different numbers in different slices",
		slices: []lb.Slice{
			webSlice("a", 8080, endpoint("10.0.0.1", "rs")),
			webSlice("b", 9090, endpoint("10.0.0.1", "rs"), endpoint("10.0.0.2", "rs")),
		},
		sets: backends("10.0.0.1:8080", "10.0.0.1:9090", "10.0.0.2:9090"),
	}, {
		name: "ports match by name and protocol",
		slices: []lb.Slice{{
			Name: name("a"), Service: "web", Family: lb.IPv4,
			Ports: []lb.SlicePort{
				{Name: "http", Protocol: lb.UDP, Number: 1},
				{Name: "other", Protocol: lb.TCP, Number: 2},
				{Name: "http", Protocol: lb.TCP, Number: 3},
			},
			Endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs")},
		}},
		sets: backends("10.0.0.1:3"),
	}, {
		name: "slices of another family, Service or namespace do not count",
		slices: []lb.Slice{
			ofIPv6(webSlice("a", 1, endpoint("fd01::1", "rs"))),
			{Name: name("b"), Service: "other", Family: lb.IPv4, Ports: webSlice("", 1).Ports, Endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs")}},
			{Name: lb.Name{Namespace: "other", Name: "c"}, Service: "web", Family: lb.IPv4, Ports: webSlice("", 1).Ports, Endpoints: []lb.Endpoint{endpoint("10.0.0.2", "rs")}},
		},
	}, {
		name: "one that is not ready gets nobody but keeps whom it has while it serves",
		slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rs"), endpoint("10.0.0.2", "s"),
			endpoint("10.0.0.3", "st"), endpoint("10.0.0.4", ""), endpoint("10.0.0.5", "t"))},
		sets:    backends("10.0.0.1:80"),
		serving: backends("10.0.0.2:80", "10.0.0.3:80"),
	}, {
		name: "when no endpoint is ready anywhere, those serving and terminating",
		slices: []lb.Slice{
			webSlice("a", 80, endpoint("10.0.0.1", "st"), endpoint("10.0.0.2", "t")),
			webSlice("b", 80, endpoint("10.0.0.3", "st"), endpoint("10.0.0.4", "s")),
		},
		sets:    backends("10.0.0.1:80", "10.0.0.3:80"),
		serving: backends("10.0.0.4:80"),
	}, {
		name:    "serving without terminating is no fallback",
		slices:  []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "s"))},
		serving: backends("10.0.0.1:80"),
	}, {
		name:   "publishNotReadyAddresses: ready says all, whatever serving and terminating say",
		slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rt"), endpoint("10.0.0.2", "rst"), endpoint("10.0.0.3", "r"))},
		sets:   backends("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"),
	}, {
		name: "the same address and port in two slices counts once",
		slices: []lb.Slice{
			webSlice("a", 80, endpoint("10.0.0.1", "rs")),
			webSlice("b", 80, endpoint("10.0.0.1", "rs")),
		},
		sets: backends("10.0.0.1:80"),
	}, {
		name: "a non-terminating copy beats a terminating one, ready or not",
		slices: []lb.Slice{
			webSlice("a", 80, endpoint("10.0.0.1", "rst"), endpoint("10.0.0.2", "rs")),
			webSlice("b", 80, endpoint("10.0.0.1", "s")),
		},
		sets:    backends("10.0.0.2:80"),
		serving: backends("10.0.0.1:80"),
	}, {
		name: "several non-terminating copies: we take the ready one",
		slices: []lb.Slice{
			webSlice("a", 80, endpoint("10.0.0.1", "")),
			webSlice("b", 80, endpoint("10.0.0.1", "rs")),
		},
		sets: backends("10.0.0.1:80"),
	}, {
		name: "several non-terminating copies: then the first by slice name",
		slices: []lb.Slice{
			webSlice("b", 80, endpoint("10.0.0.1", "s")),
			webSlice("a", 80, endpoint("10.0.0.1", "")),
		},
	}, {
		name:   "one slice that names an endpoint twice",
		slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rs"), endpoint("10.0.0.1", "rs"))},
		sets:   backends("10.0.0.1:80"),
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := &lb.Backends{Serving: slices.Concat(tt.sets, tt.serving)}
			for i := range want.Sides {
				want.Sides[i].Backends = tt.sets
			}
			slices.SortFunc(want.Serving, lb.Backend.Compare)
			for _, order := range [][]lb.Slice{tt.slices, reversed(tt.slices)} {
				s := newStore()
				for _, slice := range order {
					s.SetSlice(slice)
				}
				s.SetService(webService())
				if diff := cmp.Diff(want, s.Changes().Services[webPort], compareAddr); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestTrafficPolicies(t *testing.T) {
	const (
		local, remote         = "10.0.0.1", "10.0.1.1"
		localDying, remoteDie = "10.0.0.2", "10.0.1.2"
	)
	ready := func(addr, node string) lb.Endpoint { return endpoint(addr, "rs", on(node)) }
	dying := func(addr, node string) lb.Endpoint { return endpoint(addr, "st", on(node)) }
	endpoints := []struct {
		name           string
		list           []lb.Endpoint
		cluster, local string // what either policy makes of them
	}{
		{"this node's ready endpoints",
			[]lb.Endpoint{ready(local, here), dying(localDying, here), ready(remote, "there")}, local + " " + remote, local},
		{"this node's serving and terminating ones, even while ready ones exist elsewhere",
			[]lb.Endpoint{dying(localDying, here), ready(remote, "there")}, remote, localDying},
		{"the fallback of Cluster does not ask where",
			[]lb.Endpoint{dying(localDying, here), dying(remoteDie, "there")}, localDying + " " + remoteDie, localDying},
		{"usable endpoints elsewhere, none here under Local: dropped",
			[]lb.Endpoint{ready(remote, "there"), endpoint(local, "s", on(here)), endpoint(localDying, "t", on(here))}, remote, "dropped"},
		{"only serving and terminating ones elsewhere: dropped as well",
			[]lb.Endpoint{dying(remoteDie, "there")}, remoteDie, "dropped"},
		{"nil is not local",
			[]lb.Endpoint{ready(local, "")}, local, "dropped"},
		{"none usable anywhere: refused",
			[]lb.Endpoint{endpoint(local, "s", on(here)), endpoint(remote, "t", on("there"))}, "refused", "refused"},
		{"no endpoint at all: refused", nil, "refused", "refused"},
	}
	for _, internal := range []bool{false, true} {
		for _, external := range []bool{false, true} {
			for _, tt := range endpoints {
				t.Run(fmt.Sprintf("internalTrafficPolicy %s, externalTrafficPolicy %s: %s", policy(internal), policy(external), tt.name), func(t *testing.T) {
					// Inside clients get the Cluster set at all but ClusterIPs, also under
					// internalTrafficPolicy Local.
					want := [lb.Sides]string{lb.SideClusterIP: tt.cluster, lb.SideInside: tt.cluster, lb.SideOutside: tt.cluster}
					if internal {
						want[lb.SideClusterIP] = tt.local
					}
					if external {
						want[lb.SideOutside] = tt.local
					}
					s := newStore()
					s.SetService(webService(func(s *lb.Service) { s.InternalLocal, s.ExternalLocal = internal, external }))
					s.SetSlice(webSlice("a", 80, tt.list...))
					if diff := cmp.Diff(want, sides(s.Changes().Services[webPort])); diff != "" {
						t.Errorf("(-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

// TestOutsideClientsKeepTheirAddress: the kernel is told when all backends of
// outside clients are here, which the backends alone do not say.
func TestOutsideClientsKeepTheirAddress(t *testing.T) {
	s := newStore()
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs", on(here))))
	for _, step := range []struct {
		name               string
		internal, external bool
		changed, want      bool
	}{
		{"under Cluster they do not", false, false, true, false},
		{"internalTrafficPolicy Local is not about them", true, false, false, false},
		{"externalTrafficPolicy Local changes it, and none of the backends", true, true, true, true},
		{"the same again changes nothing", true, true, false, true},
		{"it does not ask for internalTrafficPolicy", false, true, false, true},
		{"Cluster again", false, false, true, false},
	} {
		s.SetService(webService(func(s *lb.Service) { s.InternalLocal, s.ExternalLocal = step.internal, step.external }))
		b, changed := s.Changes().Services[webPort]
		if changed != step.changed {
			t.Errorf("%s: the service changed: %v, want %v", step.name, changed, step.changed)
		}
		if all := s.All().Services[webPort]; all.OutsideLocal != step.want || changed && b.OutsideLocal != step.want {
			t.Errorf("%s: all say %v, changes say %+v, want %v", step.name, all.OutsideLocal, b, step.want)
		}
	}
	s.SetService(webService(func(s *lb.Service) { s.ExternalLocal = true }))
	s.SetSlice(webSlice("a", 80))
	if b := s.Changes().Services[webPort]; b == nil || !b.OutsideLocal {
		t.Errorf("without backends: %+v, want what the policy says", b)
	}
}

func policy(local bool) string {
	if local {
		return "Local"
	}
	return "Cluster"
}

// TestWhoDialsWhat ties kinds of frontends to sides.
func TestWhoDialsWhat(t *testing.T) {
	tests := []struct {
		name            string
		kind            lb.FrontendKind
		inside, outside lb.Side
	}{
		{"internalTrafficPolicy Local decides for ClusterIP frontends, whoever dials", lb.KindClusterIP, lb.SideClusterIP, lb.SideClusterIP},
		{"external policy Local: address reachable from inside (NodePort)", lb.KindNodePort, lb.SideInside, lb.SideOutside},
		{"external policy Local: address reachable from inside (load-balancer IP)", lb.KindLoadBalancer, lb.SideInside, lb.SideOutside},
		{"external policy Local: address reachable from inside (external IP)", lb.KindExternalIP, lb.SideInside, lb.SideOutside},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.kind.Inside() != tt.inside || tt.kind.Outside() != tt.outside {
				t.Errorf("%v: inside %v, outside %v, want %v, %v", tt.kind, tt.kind.Inside(), tt.kind.Outside(), tt.inside, tt.outside)
			}
		})
	}
}

func TestHints(t *testing.T) {
	tests := []struct {
		name      string
		zone      string
		endpoints []lb.Endpoint
		want      string // the Cluster set
	}{{
		name: "if every ready endpoint has node hints and one names this node, those that name it",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes(here)), endpoint("10.0.0.2", "rs", forNodes("there")),
			endpoint("10.0.0.3", "rs", forNodes("there", here))},
		want: "10.0.0.1 10.0.0.3",
	}, {
		name: "node before zone", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes("there"), forZones("a")),
			endpoint("10.0.0.2", "rs", forNodes(here), forZones("b"))},
		want: "10.0.0.2",
	}, {
		name: "a ready endpoint without node hints: zone hints decide", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes(here), forZones("b")),
			endpoint("10.0.0.2", "rs", forZones("a"))},
		want: "10.0.0.2",
	}, {
		name: "no node hint names this node: zone hints decide", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes("there"), forZones("b")),
			endpoint("10.0.0.2", "rs", forNodes("there"), forZones("a"))},
		want: "10.0.0.2",
	}, {
		name: "no node hint names this node, no zone hints: all", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes("there")), endpoint("10.0.0.2", "rs", forNodes("there"))},
		want:      "10.0.0.1 10.0.0.2",
	}, {
		name: "if every ready endpoint has zone hints and one names this node's topology.kubernetes.io/zone, those", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs", forZones("b")),
			endpoint("10.0.0.3", "rs", forZones("b", "a"))},
		want: "10.0.0.1 10.0.0.3",
	}, {
		name: "the all-or-none rule: hints taken from some endpoints only do not count", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs")},
		want:      "10.0.0.1 10.0.0.2",
	}, {
		name: "an empty list of hints is none", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs", forZones())},
		want:      "10.0.0.1 10.0.0.2",
	}, {
		name: "none names the zone: all", zone: "c",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs", forZones("b"))},
		want:      "10.0.0.1 10.0.0.2",
	}, {
		name:      "a node without zone: all",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs", forZones("b"))},
		want:      "10.0.0.1 10.0.0.2",
	}, {
		name: "one that is not ready needs no hint", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs", forZones("b")), endpoint("10.0.0.3", "st")},
		want:      "10.0.0.1",
	}, {
		name: "the hint of one that is not ready does not name us", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "s", forZones("a")), endpoint("10.0.0.2", "rs", forZones("b")), endpoint("10.0.0.3", "rs", forZones("b"))},
		want:      "10.0.0.2 10.0.0.3",
	}, {
		name: "those serving and terminating are never narrowed", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "st", forZones("a"), forNodes(here)), endpoint("10.0.0.2", "st", forZones("b"), forNodes("there"))},
		want:      "10.0.0.1 10.0.0.2",
	}, {
		name: "trafficDistribution PreferSameNode acts through hints alone: none on this node, so its zone", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", on("n1"), forNodes("n1"), forZones("a")),
			endpoint("10.0.0.2", "rs", on("n2"), forNodes("n2"), forZones("b"))},
		want: "10.0.0.1",
	}, {
		name: "trafficDistribution acts through hints alone: where an endpoint is says nothing", zone: "a",
		endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs", on(here), forZones("b")), endpoint("10.0.0.2", "rs", on("there"), forZones("a"))},
		want:      "10.0.0.2",
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetNode(lb.Node{Zone: tt.zone})
			s.SetService(webService())
			s.SetSlice(webSlice("a", 80, tt.endpoints...))
			b := s.Changes().Services[webPort]
			if got, want := sides(b), [lb.Sides]string{tt.want, tt.want, tt.want}; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestTopologyTouchesTheClusterSetOnly(t *testing.T) {
	s := newStore()
	s.SetNode(lb.Node{Zone: "a"})
	s.SetService(webService(internalLocal, externalLocal))
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs", on(here), forZones("b")), endpoint("10.0.0.2", "rs", on("there"), forZones("a"))))
	want := [lb.Sides]string{lb.SideClusterIP: "10.0.0.1", lb.SideInside: "10.0.0.2", lb.SideOutside: "10.0.0.1"}
	if diff := cmp.Diff(want, sides(s.Changes().Services[webPort])); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A terminating copy, or the later slice's, may say otherwise.
func TestTheCopyThatCountsBringsItsNodeNameAndHints(t *testing.T) {
	dead := endpoint("10.0.0.1", "st", on("there"), forZones("b"))
	alive := endpoint("10.0.0.1", "rs", on(here), forZones("a"))
	other := endpoint("10.0.0.2", "rs", on("there"), forZones("b"))
	for _, tt := range []struct {
		name          string
		first, second lb.Endpoint
	}{{"terminating in the first slice", dead, alive}, {"terminating in the second slice", alive, dead}} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetNode(lb.Node{Zone: "a"})
			s.SetService(webService(externalLocal))
			s.SetSlice(webSlice("a", 80, tt.first, other))
			s.SetSlice(webSlice("b", 80, tt.second))
			want := [lb.Sides]string{"10.0.0.1", "10.0.0.1", "10.0.0.1"}
			if diff := cmp.Diff(want, sides(s.Changes().Services[webPort])); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Many of them: few elements are sorted in another way.
func TestOfManyEqualCopiesTheFirstBySliceNameCounts(t *testing.T) {
	var first, second []lb.Endpoint
	for i := range 200 {
		addr := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
		first = append(first, lb.Endpoint{Addr: addr, Ready: true, Serving: true, Node: here})
		second = append(second, lb.Endpoint{Addr: addr, Ready: true, Serving: true, Node: "there"})
	}
	s := newStore()
	s.SetService(webService(externalLocal))
	s.SetSlice(webSlice("b", 80, second...))
	s.SetSlice(webSlice("a", 80, reversed(first)...))
	if n := len(s.Changes().Services[webPort].Sides[lb.SideOutside].Backends); n != len(first) {
		t.Errorf("%d backends on this node, want %d", n, len(first))
	}
}

func TestNilIsNotLocalToANodeWithoutName(t *testing.T) {
	s := lb.NewStore(lb.Config{})
	s.SetService(webService(internalLocal, func(s *lb.Service) { s.HealthCheckNodePort = 32000 }))
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs")))
	d := s.Changes()
	if got := sides(d.Services[webPort])[lb.SideClusterIP]; got != "dropped" {
		t.Errorf("got %s, want dropped", got)
	}
	if h := d.Health[lb.ServiceFamily{Service: name("web"), Family: lb.IPv4}]; h.Local != 0 {
		t.Errorf("health counts %d", h.Local)
	}
}

func TestNodeLabelChanges(t *testing.T) {
	s := newStore()
	s.SetService(webService())
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs", forZones("b"))))
	s.SetService(lb.Service{Name: name("plain"), ClusterIPs: addrs("10.96.0.2"), Ports: webService().Ports})
	s.Changes()
	const all = "serving [10.0.0.1:80 10.0.0.2:80]"
	steps := []struct{ name, zone, want string }{
		{"the label appears", "a", "[10.0.0.1:80] " + all},
		{"the label changes", "b", "[10.0.0.2:80] " + all},
		{"a zone that no hint names", "c", "[10.0.0.1:80 10.0.0.2:80] " + all},
		{"back", "a", "[10.0.0.1:80] " + all},
		{"the label goes", "", "[10.0.0.1:80 10.0.0.2:80] " + all},
	}
	for _, step := range steps {
		s.SetNode(lb.Node{Zone: step.zone})
		expect(t, step.name, s.Changes(), "service ns/web:http/TCP/IPv4 "+step.want)
	}
	s.SetNode(lb.Node{Eligible: true})
	expect(t, "what endpoints have nothing to do with", s.Changes())
}

func TestDualStackEndpointsOfThatFamilyOnly(t *testing.T) {
	for _, tt := range []struct {
		name       string
		clusterIPs []netip.Addr
	}{{"IPv4 first", addrs("10.96.0.1", "fd00::1")}, {"IPv6 first", addrs("fd00::1", "10.96.0.1")}} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetService(webService(externalLocal, func(s *lb.Service) { s.ClusterIPs = tt.clusterIPs }))
			s.SetSlice(webSlice("four", 80, endpoint("10.0.0.1", "rs", on(here))))
			s.SetSlice(ofIPv6(webSlice("six", 80, endpoint("fd01::1", "rs", on("there")))))
			d := s.Changes()
			if diff := cmp.Diff([lb.Sides]string{"10.0.0.1", "10.0.0.1", "10.0.0.1"}, sides(d.Services[webPort])); diff != "" {
				t.Errorf("IPv4 (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([lb.Sides]string{"fd01::1", "fd01::1", "dropped"}, sides(d.Services[webPort6])); diff != "" {
				t.Errorf("IPv6 (-want +got):\n%s", diff)
			}
		})
	}
}

// TestWhoKeepsClients is about UDP: sockets and flows stay with a backend in
// Serving and leave any other.
func TestWhoKeepsClients(t *testing.T) {
	before := webSlice("a", 80, endpoint("10.0.0.1", "rs", on(here), forZones("a")), endpoint("10.0.0.2", "rs", on(here), forZones("a")))
	slice := func(port uint16, first ...lb.Endpoint) func(*lb.Store) {
		return func(s *lb.Store) { s.SetSlice(webSlice("a", port, append(first, before.Endpoints[1])...)) }
	}
	tests := []struct {
		name   string
		change func(*lb.Store)
		stays  bool
	}{
		{"endpoint gone (address and port)", slice(80), false},
		{"serving false", slice(80, endpoint("10.0.0.1", "", on(here))), false},
		{"serving false while it terminates", slice(80, endpoint("10.0.0.1", "t", on(here))), false},
		{"target port changed", slice(81, before.Endpoints[0]), false},
		{"terminating", slice(80, endpoint("10.0.0.1", "st", on(here), forZones("a"))), true},
		{"not ready but serving", slice(80, endpoint("10.0.0.1", "s", on(here), forZones("a"))), true},
		{"hints", slice(80, endpoint("10.0.0.1", "rs", on(here), forZones("b"))), true},
		{"zone", func(s *lb.Store) {
			slice(80, endpoint("10.0.0.1", "rs", forZones("b")))(s)
			s.SetNode(lb.Node{Zone: "b"})
			s.SetNode(lb.Node{Zone: "a"})
		}, true},
		{"policy", func(s *lb.Store) {
			slice(80, endpoint("10.0.0.1", "rs", on("there"), forZones("a")))(s)
			s.SetService(webService(internalLocal))
		}, true},
		{"last endpoint gone", func(s *lb.Store) { s.DeleteSlice(before.Name) }, false},
		{"Service deleted", func(s *lb.Store) { s.DeleteService(name("web")) }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetNode(lb.Node{Zone: "a"})
			s.SetService(webService())
			s.SetSlice(before)
			s.Changes()
			tt.change(s)
			b, changed := s.Changes().Services[webPort]
			if !changed {
				t.Fatal("nothing has changed")
			}
			backend := backends("10.0.0.1:80")[0]
			if b != nil && slices.Contains(b.Sides[lb.SideClusterIP].Backends, backend) {
				t.Error("new clients still get it")
			}
			if stays := b != nil && slices.Contains(b.Serving, backend); stays != tt.stays {
				t.Errorf("it keeps its clients: %v, want %v", stays, tt.stays)
			}
		})
	}
}

func TestSessionAffinityOnAndOffAtOnce(t *testing.T) {
	s := newStore()
	s.SetService(webService())
	s.Changes()
	for _, seconds := range []uint32{10800, 10, 1, 0} {
		s.SetService(webService(func(s *lb.Service) { s.Affinity = seconds }))
		b := s.Changes().Services[webPort]
		if b == nil || b.Affinity != seconds {
			t.Errorf("timeout %d: got %+v", seconds, b)
		}
	}
}

func TestMoreBackendsThanARangeHolds(t *testing.T) {
	const extra = 5
	big := webSlice("a", 80)
	addr := netip.MustParseAddr("10.0.0.0")
	for range lb.MaxBackends + extra {
		big.Endpoints = append(big.Endpoints, lb.Endpoint{Addr: addr, Ready: true, Serving: true, Node: here})
		addr = addr.Next()
	}
	s := newStore()
	s.SetService(webService(externalLocal))
	s.SetSlice(big)
	d := s.Changes()
	b := d.Services[webPort]
	for i, set := range b.Sides {
		if len(set.Backends) != lb.MaxBackends || set.Backends[0].Addr != big.Endpoints[0].Addr {
			t.Errorf("%v: %d backends from %v", lb.Side(i), len(set.Backends), set.Backends[0])
		}
	}
	if len(b.Serving) != lb.MaxBackends+extra {
		t.Errorf("%d serving", len(b.Serving))
	}
	if got, want := d.Problems[name("web")], lb.Problem("ns/web:http/TCP/IPv4 has 65540 backends; the last 5 are left out"); got != want {
		t.Errorf("problem %q, want %q", got, want)
	}
	const left = "beyond the 65535 backends that a service port can have"
	e, err := s.Explain(lb.Query{Service: name("web")})
	if err != nil {
		t.Fatal(err)
	}
	last := e.Ports[0].Endpoints[lb.MaxBackends]
	if want := map[string]string{"clusterIP": left, "inside": left, "outside": left}; !cmp.Equal(last.Out, want) {
		t.Errorf("%s is out because %v", last.Address, last.Out)
	}
	big.Endpoints = big.Endpoints[:10]
	s.SetSlice(big)
	if p, ok := s.Changes().Problems[name("web")]; p != "" || !ok {
		t.Errorf("the problem stays: %q", p)
	}
}
