// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func TestChangesNameOnlyWhatMakesADifference(t *testing.T) {
	s := newStore()
	s.SetService(webService())
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs")))
	s.Changes()

	s.SetService(webService())
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs")))
	expect(t, "equal objects", s.Changes())
	s.SetSlice(webSlice("b", 80, endpoint("10.0.0.1", "rs"), endpoint("10.0.0.2", "")))
	expect(t, "a slice that adds nothing usable", s.Changes())
	s.DeleteService(name("web"))
	s.SetService(webService())
	expect(t, "deleted and back", s.Changes())
	s.DeleteSlice(name("nobody"))
	s.DeleteService(name("nobody"))
	expect(t, "objects that are not there", s.Changes())
	s.SetSlice(lb.Slice{Name: name("c"), Service: "later", Family: lb.IPv4})
	expect(t, "a slice without its Service", s.Changes())

	svc := webService()
	svc.Ports = append(svc.Ports, lb.Port{Name: "admin", Protocol: lb.TCP, Number: 81})
	s.SetService(svc)
	expect(t, "one more port", s.Changes(),
		"service ns/web:admin/TCP/IPv4 [] serving []",
		"frontend 10.96.0.1:81/TCP ClusterIP ns/web:admin/TCP/IPv4")
	s.SetService(webService())
	expect(t, "one port less", s.Changes(), "service ns/web:admin/TCP/IPv4 gone", "frontend 10.96.0.1:81/TCP gone")

	moved := webSlice("a", 80, endpoint("10.0.0.1", "rs"))
	moved.Service = "other"
	s.DeleteSlice(name("b"))
	s.SetSlice(moved)
	expect(t, "a slice that goes to another Service", s.Changes(), "service ns/web:http/TCP/IPv4 [] serving []")
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs")))
	expect(t, "and back", s.Changes(), "service ns/web:http/TCP/IPv4 [10.0.0.1:80] serving [10.0.0.1:80]")
	other := webSlice("a", 80, endpoint("fd01::1", "rs"))
	other.Family = lb.IPv6
	s.SetSlice(other)
	expect(t, "a slice that changes its family", s.Changes(), "service ns/web:http/TCP/IPv4 [] serving []")

	s.DeleteService(name("web"))
	expect(t, "Service gone", s.Changes(), "service ns/web:http/TCP/IPv4 gone",
		"frontend 10.96.0.1:80/TCP gone", "frontend 10.96.0.1:* gone")
}

func TestReplaceComparesWithWhatIsThere(t *testing.T) {
	s := newStore()
	count := func(what string, got, want int) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %d changes, want %d", what, got, want)
		}
	}
	other := webService(func(s *lb.Service) { s.Name, s.ClusterIPs = name("other"), addrs("10.96.0.2") })
	one, two := webSlice("a", 80, endpoint("10.0.0.1", "rs")), webSlice("b", 80, endpoint("10.0.0.2", "rs"))
	count("all new", s.ReplaceServices([]lb.Service{webService(), other}), 2)
	count("all new", s.ReplaceSlices([]lb.Slice{one, two}), 2)
	s.Changes()
	count("the same again", s.ReplaceServices([]lb.Service{other, webService()}), 0)
	count("the same again", s.ReplaceSlices([]lb.Slice{two, one}), 0)
	expect(t, "the same again", s.Changes())
	count("one slice less", s.ReplaceSlices([]lb.Slice{two}), 1)
	expect(t, "one slice less", s.Changes(), "service ns/web:http/TCP/IPv4 [10.0.0.2:80] serving [10.0.0.2:80]")
	other.Affinity = 10
	count("one changed, one gone", s.ReplaceServices([]lb.Service{other}), 2)
	expect(t, "one changed, one gone", s.Changes(), "service ns/other:http/TCP/IPv4 [] serving [] affinity 10",
		"service ns/web:http/TCP/IPv4 gone", "frontend 10.96.0.1:80/TCP gone", "frontend 10.96.0.1:* gone")
	count("no Service left", s.ReplaceServices(nil), 1)
	count("no slice left", s.ReplaceSlices(nil), 1)
	s.Changes()
	expect(t, "nothing left", s.All())
}

// Every field makes a difference, each on its own.
func TestEqualObjectsAreNoChange(t *testing.T) {
	services := []func(*lb.Service){
		func(s *lb.Service) { s.Created = s.Created.Add(1e9) },
		func(s *lb.Service) { s.Foreign = true },
		func(s *lb.Service) { s.ClusterIPs = addrs("10.96.0.2") },
		func(s *lb.Service) { s.LoadBalancerIPs = addrs("10.96.0.2") },
		func(s *lb.Service) { s.ExternalIPs = addrs("10.96.0.2") },
		func(s *lb.Service) { s.Ports[0].NodePort = 30080 },
		internalLocal, externalLocal,
		func(s *lb.Service) { s.Affinity = 10 },
		func(s *lb.Service) { s.Sources = prefixes("10.0.0.0/8") },
		func(s *lb.Service) { s.HealthCheckNodePort = 32000 },
	}
	endpoints := []func(*lb.Endpoint){
		func(e *lb.Endpoint) { e.Addr = e.Addr.Next() },
		func(e *lb.Endpoint) { e.Ready = false },
		func(e *lb.Endpoint) { e.Serving = false },
		func(e *lb.Endpoint) { e.Terminating = true },
		on(here), forNodes(here), forZones("a"),
	}
	variants := []func(*lb.Slice){
		func(s *lb.Slice) { s.Service = "other" },
		func(s *lb.Slice) { s.Family = lb.IPv6 },
		func(s *lb.Slice) { s.Ports[0].Number = 81 },
		func(s *lb.Slice) { s.Endpoints = nil },
		func(s *lb.Slice) { s.Invalid = []lb.InvalidEndpoint{{Address: "x", Reason: "y"}} },
	}
	for _, set := range endpoints {
		variants = append(variants, func(s *lb.Slice) { set(&s.Endpoints[0]) })
	}
	s := newStore()
	for i, set := range services {
		s.SetService(webService())
		if !s.SetService(webService(set)) || s.SetService(webService(set)) {
			t.Errorf("Service %d: the first time is a change, the second is none", i)
		}
	}
	for i, set := range variants {
		slice := func() lb.Slice { return webSlice("a", 80, endpoint("10.0.0.1", "rs")) }
		variant := func() lb.Slice {
			sl := slice()
			set(&sl)
			return sl
		}
		s.SetSlice(slice())
		if !s.SetSlice(variant()) || s.SetSlice(variant()) {
			t.Errorf("slice %d: the first time is a change, the second is none", i)
		}
	}
	if !s.DeleteService(name("web")) || s.DeleteService(name("web")) || !s.DeleteSlice(name("a")) || s.DeleteSlice(name("a")) {
		t.Error("what is deleted is there once")
	}
}

// cluster returns a store of n Services with ten endpoints each, and two slices
// of one of them to put in each other's place.
func cluster(n int) (s *lb.Store, alternatives [2]lb.Slice) {
	slice := func(i, endpoints int) lb.Slice {
		sl := webSlice(fmt.Sprint("slice", i), 8080)
		sl.Service = fmt.Sprint("svc", i)
		for e := range endpoints {
			addr := netip.AddrFrom4([4]byte{10, byte(e), byte(i >> 8), byte(i)})
			sl.Endpoints = append(sl.Endpoints, lb.Endpoint{Addr: addr, Ready: true, Serving: true, Node: here})
		}
		return sl
	}
	s = newStore()
	for i := range n {
		s.SetService(webService(externalLocal, func(svc *lb.Service) {
			svc.Name = name(fmt.Sprint("svc", i))
			svc.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}
			svc.Ports[0].NodePort = uint16(30000 + i)
		}))
		s.SetSlice(slice(i, 10))
	}
	s.Changes()
	return s, [2]lb.Slice{slice(n/2, 9), slice(n/2, 10)}
}

// TestWorkIsProportionalToWhatChanged counts allocations: to work out any
// service port anew takes some.
func TestWorkIsProportionalToWhatChanged(t *testing.T) {
	node := []lb.Node{{Eligible: true}, {}}
	tests := []struct {
		name   string
		change func(s *lb.Store, slice lb.Slice, i int)
	}{
		{"one endpoint", func(s *lb.Store, slice lb.Slice, _ int) { s.SetSlice(slice) }},
		{"one Service", func(s *lb.Store, slice lb.Slice, i int) {
			s.SetService(webService(func(svc *lb.Service) { svc.Name, svc.Affinity = name("more"), uint32(i) }))
		}},
		{"the node, where no Service asks for it", func(s *lb.Store, _ lb.Slice, i int) {
			s.SetNode(node[i%2])
			s.SetLocalAddresses([]netip.Addr{netip.AddrFrom4([4]byte{10, 0, 9, byte(i % 2)})})
		}},
		{"nothing", func(*lb.Store, lb.Slice, int) {}},
	}
	few, fewSlices := cluster(10)
	many, manySlices := cluster(10_000)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			allocations := func(s *lb.Store, slices [2]lb.Slice) float64 {
				i := 0
				return testing.AllocsPerRun(20, func() {
					tt.change(s, slices[i%2], i)
					s.Changes()
					i++
				})
			}
			// A map of 10,000 that gets a new key may grow.
			if a, b := allocations(few, fewSlices), allocations(many, manySlices); b > a+3 {
				t.Errorf("%.0f allocations with 10 Services, %.0f with 10,000", a, b)
			}
		})
	}
}

func BenchmarkOneSliceAmong10000Services(b *testing.B) {
	s, two := cluster(10_000)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.SetSlice(two[i%2])
		if s.Changes().Empty() {
			b.Fatal("no change")
		}
	}
}
