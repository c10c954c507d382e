// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

var compareAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func name(s string) lb.Name { return lb.Name{Namespace: "ns", Name: s} }

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func backends(list ...string) []lb.Backend {
	var out []lb.Backend
	for _, s := range list {
		ap := netip.MustParseAddrPort(s)
		out = append(out, lb.Backend{Addr: ap.Addr(), Port: ap.Port()})
	}
	return out
}

// endpoint returns an endpoint whose conditions are those letters: r ready,
// s serving, t terminating.
func endpoint(addr, conditions string) lb.Endpoint {
	return lb.Endpoint{
		Addr:        netip.MustParseAddr(addr),
		Ready:       strings.Contains(conditions, "r"),
		Serving:     strings.Contains(conditions, "s"),
		Terminating: strings.Contains(conditions, "t"),
	}
}

// webSlice is a slice of the Service web with port http.
func webSlice(slice string, number uint16, endpoints ...lb.Endpoint) lb.Slice {
	return lb.Slice{
		Name:      name(slice),
		Service:   "web",
		Family:    lb.IPv4,
		Ports:     []lb.SlicePort{{Name: "http", Protocol: lb.TCP, Number: number}},
		Endpoints: endpoints,
	}
}

func webService() lb.Service {
	return lb.Service{
		Name:       name("web"),
		ClusterIPs: addrs("10.96.0.1"),
		Ports:      []lb.Port{{Name: "http", Protocol: lb.TCP, Number: 80}},
	}
}

var webPort = lb.ServicePort{Service: name("web"), Port: "http", Protocol: lb.TCP, Family: lb.IPv4}

func TestBackendsOfAServicePort(t *testing.T) {
	tests := []struct {
		name     string
		slices   []lb.Slice
		eligible []lb.Backend
		serving  []lb.Backend // beside the eligible ones
	}{{
		name: "no slice",
	}, {
		name:     "ready endpoints, sorted",
		slices:   []lb.Slice{webSlice("a", 8080, endpoint("10.0.0.2", "rs"), endpoint("10.0.0.1", "rs"))},
		eligible: backends("10.0.0.1:8080", "10.0.0.2:8080"),
	}, {
		name: "several slices with a number each",
		slices: []lb.Slice{
			webSlice("a", 8080, endpoint("10.0.0.1", "rs")),
			webSlice("b", 9090, endpoint("10.0.0.1", "rs"), endpoint("10.0.0.2", "rs")),
		},
		eligible: backends("10.0.0.1:8080", "10.0.0.1:9090", "10.0.0.2:9090"),
	}, {
		name: "a port matches by name and protocol",
		slices: []lb.Slice{{
			Name: name("a"), Service: "web", Family: lb.IPv4,
			Ports: []lb.SlicePort{
				{Name: "http", Protocol: lb.UDP, Number: 1},
				{Name: "other", Protocol: lb.TCP, Number: 2},
				{Name: "http", Protocol: lb.TCP, Number: 3},
			},
			Endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs")},
		}},
		eligible: backends("10.0.0.1:3"),
	}, {
		name: "slices of another family, Service or namespace do not count",
		slices: []lb.Slice{
			{Name: name("a"), Service: "web", Family: lb.IPv6, Ports: webSlice("", 1).Ports, Endpoints: []lb.Endpoint{endpoint("fd01::1", "rs")}},
			{Name: name("b"), Service: "other", Family: lb.IPv4, Ports: webSlice("", 1).Ports, Endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs")}},
			{Name: lb.Name{Namespace: "other", Name: "c"}, Service: "web", Family: lb.IPv4, Ports: webSlice("", 1).Ports, Endpoints: []lb.Endpoint{endpoint("10.0.0.2", "rs")}},
		},
	}, {
		name: "one that is not ready gets nobody but keeps whom it has while it serves",
		slices: []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rs"), endpoint("10.0.0.2", "s"),
			endpoint("10.0.0.3", "st"), endpoint("10.0.0.4", ""), endpoint("10.0.0.5", "t"))},
		eligible: backends("10.0.0.1:80"),
		serving:  backends("10.0.0.2:80", "10.0.0.3:80"),
	}, {
		name: "terminating backends serve when none is ready",
		slices: []lb.Slice{
			webSlice("a", 80, endpoint("10.0.0.1", "st"), endpoint("10.0.0.2", "t")),
			webSlice("b", 80, endpoint("10.0.0.3", "st"), endpoint("10.0.0.4", "s")),
		},
		eligible: backends("10.0.0.1:80", "10.0.0.3:80"),
		serving:  backends("10.0.0.4:80"),
	}, {
		name:     "ready counts as serving, also while terminating",
		slices:   []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rt"))},
		eligible: backends("10.0.0.1:80"),
	}, {
		name: "of two copies the one that is not terminating counts, ready or not",
		slices: []lb.Slice{
			webSlice("a", 80, endpoint("10.0.0.1", "rst"), endpoint("10.0.0.2", "rs")),
			webSlice("b", 80, endpoint("10.0.0.1", "s")),
		},
		eligible: backends("10.0.0.2:80"),
		serving:  backends("10.0.0.1:80"),
	}, {
		name: "of two copies that are not terminating the ready one counts",
		slices: []lb.Slice{
			webSlice("a", 80, endpoint("10.0.0.1", "")),
			webSlice("b", 80, endpoint("10.0.0.1", "rs")),
		},
		eligible: backends("10.0.0.1:80"),
	}, {
		name: "of two equal copies the one in the first slice counts",
		slices: []lb.Slice{
			webSlice("b", 80, endpoint("10.0.0.1", "s")),
			webSlice("a", 80, endpoint("10.0.0.1", "")),
		},
	}, {
		name:     "one slice that names an endpoint twice",
		slices:   []lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rs"), endpoint("10.0.0.1", "rs"))},
		eligible: backends("10.0.0.1:80"),
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := &lb.Backends{Eligible: tt.eligible, Serving: slices.Concat(tt.eligible, tt.serving)}
			slices.SortFunc(want.Serving, lb.Backend.Compare)
			for _, order := range [][]lb.Slice{tt.slices, reversed(tt.slices)} {
				s := lb.NewStore()
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

func reversed[T any](s []T) []T {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}

// text prints a delta for comparing, one line a row, sorted.
func text(d lb.Delta) string {
	var lines []string
	for sp, b := range d.Services {
		if b == nil {
			lines = append(lines, fmt.Sprintf("service %v gone", sp))
			continue
		}
		lines = append(lines, fmt.Sprintf("service %v %v serving %v", sp, b.Eligible, b.Serving))
	}
	for key, owner := range d.Frontends {
		line := fmt.Sprintf("frontend %v %v %v", key, owner.Kind, owner.Service)
		if !owner.Exists() {
			line = fmt.Sprintf("frontend %v gone", key)
		}
		lines = append(lines, line)
	}
	for name, p := range d.Problems {
		lines = append(lines, fmt.Sprintf("problem %v: %s", name, p))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func expect(t *testing.T, what string, got lb.Delta, want ...string) {
	t.Helper()
	slices.Sort(want)
	if diff := cmp.Diff(strings.Join(want, "\n"), text(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
	if got.Empty() != (len(want) == 0) {
		t.Errorf("%s: Empty() is %v", what, got.Empty())
	}
}

func TestFrontendsOfAService(t *testing.T) {
	s := lb.NewStore()
	s.SetService(lb.Service{
		Name:       name("dns"),
		ClusterIPs: addrs("10.96.0.10", "fd00::10"),
		Ports: []lb.Port{
			{Name: "dns", Protocol: lb.UDP, Number: 53},
			{Name: "dns-tcp", Protocol: lb.TCP, Number: 53},
			{Name: "sig", Protocol: lb.SCTP, Number: 53},
		},
	})
	expect(t, "dual stack, one number for three protocols", s.Changes(),
		"service ns/dns:dns/UDP/IPv4 [] serving []",
		"service ns/dns:dns/UDP/IPv6 [] serving []",
		"service ns/dns:dns-tcp/TCP/IPv4 [] serving []",
		"service ns/dns:dns-tcp/TCP/IPv6 [] serving []",
		"service ns/dns:sig/SCTP/IPv4 [] serving []",
		"service ns/dns:sig/SCTP/IPv6 [] serving []",
		"frontend 10.96.0.10:53/UDP ClusterIP ns/dns:dns/UDP/IPv4",
		"frontend 10.96.0.10:53/TCP ClusterIP ns/dns:dns-tcp/TCP/IPv4",
		"frontend 10.96.0.10:53/SCTP ClusterIP ns/dns:sig/SCTP/IPv4",
		"frontend 10.96.0.10:* ClusterIP ns/dns/*/IPv4",
		"frontend [fd00::10]:53/UDP ClusterIP ns/dns:dns/UDP/IPv6",
		"frontend [fd00::10]:53/TCP ClusterIP ns/dns:dns-tcp/TCP/IPv6",
		"frontend [fd00::10]:53/SCTP ClusterIP ns/dns:sig/SCTP/IPv6",
		"frontend [fd00::10]:* ClusterIP ns/dns/*/IPv6")
}

func TestChangesNameOnlyWhatMakesADifference(t *testing.T) {
	s := lb.NewStore()
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
	s := lb.NewStore()
	s.ReplaceServices([]lb.Service{webService()})
	s.ReplaceSlices([]lb.Slice{webSlice("a", 80, endpoint("10.0.0.1", "rs")), webSlice("b", 80, endpoint("10.0.0.2", "rs"))})
	s.Changes()
	s.ReplaceServices([]lb.Service{webService()})
	s.ReplaceSlices([]lb.Slice{webSlice("b", 80, endpoint("10.0.0.2", "rs")), webSlice("a", 80, endpoint("10.0.0.1", "rs"))})
	expect(t, "the same again", s.Changes())
	s.ReplaceSlices([]lb.Slice{webSlice("b", 80, endpoint("10.0.0.2", "rs"))})
	expect(t, "one slice less", s.Changes(), "service ns/web:http/TCP/IPv4 [10.0.0.2:80] serving [10.0.0.2:80]")
	s.ReplaceServices(nil)
	expect(t, "no Service left", s.Changes(), "service ns/web:http/TCP/IPv4 gone",
		"frontend 10.96.0.1:80/TCP gone", "frontend 10.96.0.1:* gone")
}

func TestAFrontendClaimedTwiceBelongsToTheOlderService(t *testing.T) {
	claim := func(service string, created int64) lb.Service {
		svc := webService()
		svc.Name, svc.Created = name(service), time.Unix(created, 0)
		return svc
	}
	tests := []struct{ name, first, second string }{
		{"the older comes first", "old", "young"},
		{"the older comes last", "young", "old"},
	}
	created := map[string]int64{"old": 1, "young": 2}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := lb.NewStore()
			s.SetService(claim(tt.first, created[tt.first]))
			s.SetService(claim(tt.second, created[tt.second]))
			expect(t, "both", s.Changes(),
				"service ns/old:http/TCP/IPv4 [] serving []", "service ns/young:http/TCP/IPv4 [] serving []",
				"frontend 10.96.0.1:80/TCP ClusterIP ns/old:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/old/*/IPv4",
				"problem ns/young: 10.96.0.1:80/TCP belongs to Service ns/old (and 1 more)")
			s.DeleteService(name("old"))
			expect(t, "the winner goes", s.Changes(), "service ns/old:http/TCP/IPv4 gone",
				"frontend 10.96.0.1:80/TCP ClusterIP ns/young:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/young/*/IPv4",
				"problem ns/young: ")
			s.SetService(claim("another", 2))
			expect(t, "of one age the first by name", s.Changes(), "service ns/another:http/TCP/IPv4 [] serving []",
				"frontend 10.96.0.1:80/TCP ClusterIP ns/another:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/another/*/IPv4",
				"problem ns/young: 10.96.0.1:80/TCP belongs to Service ns/another (and 1 more)")
			s.SetService(claim("another", 3))
			expect(t, "created anew", s.Changes(),
				"frontend 10.96.0.1:80/TCP ClusterIP ns/young:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/young/*/IPv4",
				"problem ns/young: ", "problem ns/another: 10.96.0.1:80/TCP belongs to Service ns/young (and 1 more)")
		})
	}
}

func TestOneServiceThatAsksForAFrontendTwice(t *testing.T) {
	s := lb.NewStore()
	svc := webService()
	svc.Ports = append(svc.Ports, svc.Ports[0], lb.Port{Name: "alt", Protocol: lb.TCP, Number: 80})
	s.SetService(svc)
	expect(t, "two ports with one number", s.Changes(),
		"service ns/web:http/TCP/IPv4 [] serving []", "service ns/web:alt/TCP/IPv4 [] serving []",
		"frontend 10.96.0.1:80/TCP ClusterIP ns/web:alt/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/web/*/IPv4",
		"problem ns/web: two of its ports ask for 10.96.0.1:80/TCP (and 1 more)")
	s.DeleteService(name("web"))
	s.Changes()
	expect(t, "gone without a trace", s.All())
}

func TestMoreBackendsThanARangeHolds(t *testing.T) {
	const extra = 5
	big := webSlice("a", 80)
	addr := netip.MustParseAddr("10.0.0.0")
	for range lb.MaxBackends + extra {
		big.Endpoints = append(big.Endpoints, lb.Endpoint{Addr: addr, Ready: true, Serving: true})
		addr = addr.Next()
	}
	s := lb.NewStore()
	s.SetService(webService())
	s.SetSlice(big)
	d := s.Changes()
	b := d.Services[webPort]
	if len(b.Eligible) != lb.MaxBackends || len(b.Serving) != lb.MaxBackends+extra || b.Eligible[0].Addr != big.Endpoints[0].Addr {
		t.Errorf("%d eligible from %v, %d serving", len(b.Eligible), b.Eligible[0], len(b.Serving))
	}
	if got, want := d.Problems[name("web")], lb.Problem("ns/web:http/TCP/IPv4 has 65540 backends; the last 5 are left out"); got != want {
		t.Errorf("problem %q, want %q", got, want)
	}
	big.Endpoints = big.Endpoints[:10]
	s.SetSlice(big)
	if p, ok := s.Changes().Problems[name("web")]; p != "" || !ok {
		t.Errorf("the problem stays: %q", p)
	}
}

// FuzzStore goes through the history that data describes. What Changes has told
// must add up to what a store says that has seen only the last state, and All
// to the rules as they are written down.
func FuzzStore(f *testing.F) {
	f.Add([]byte("0123456789"))
	f.Add([]byte{0, 0, 1, 0, 3, 1, 2, 3, 5, 9, 0, 1, 1, 1, 0, 2, 4, 4, 7, 2, 0, 0, 3, 1, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		next := func(n int) int {
			if len(data) == 0 {
				return 0
			}
			b := data[0]
			data = data[1:]
			return int(b) % n
		}
		s := lb.NewStore()
		services, slicesByName := map[lb.Name]lb.Service{}, map[lb.Name]lb.Slice{}
		told := lb.Delta{Services: map[lb.ServicePort]*lb.Backends{}, Frontends: map[lb.FrontendKey]lb.Owner{}, Problems: map[lb.Name]lb.Problem{}}
		for len(data) > 0 {
			switch next(6) {
			case 0, 1:
				svc := randomService(next)
				s.SetService(svc)
				services[svc.Name] = svc
			case 2, 3:
				slice := randomSlice(next)
				s.SetSlice(slice)
				slicesByName[slice.Name] = slice
			case 4:
				n := name(fmt.Sprint("svc", next(3)))
				s.DeleteService(n)
				delete(services, n)
			case 5:
				n := name(fmt.Sprint("slice", next(4)))
				s.DeleteSlice(n)
				delete(slicesByName, n)
			}
			if next(3) == 0 {
				add(t, told, s.Changes())
			}
		}
		add(t, told, s.Changes())
		expect(t, "nothing has happened", s.Changes())

		fresh := lb.NewStore()
		fresh.ReplaceSlices(slices.Collect(maps.Values(slicesByName)))
		fresh.ReplaceServices(slices.Collect(maps.Values(services)))
		want := text(fresh.All())
		if diff := cmp.Diff(want, text(told)); diff != "" {
			t.Errorf("changes do not add up (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(want, text(s.All())); diff != "" {
			t.Errorf("the store depends on its history (-want +got):\n%s", diff)
		}
		for sp, b := range s.All().Services {
			if diff := cmp.Diff(byTheRules(sp, slicesByName), b, compareAddr); diff != "" {
				t.Errorf("%v (-want +got):\n%s", sp, diff)
			}
		}
	})
}

// add makes told say what d says. No entry may say what was already known.
func add(t *testing.T, told, d lb.Delta) {
	t.Helper()
	before := text(told)
	for sp, b := range d.Services {
		if b == nil && told.Services[sp] == nil {
			t.Errorf("service %v: gone before", sp)
		}
		told.Services[sp] = b
		if b == nil {
			delete(told.Services, sp)
		}
	}
	for key, owner := range d.Frontends {
		if told.Frontends[key] == owner {
			t.Errorf("frontend %v: known before", key)
		}
		told.Frontends[key] = owner
		if !owner.Exists() {
			delete(told.Frontends, key)
		}
	}
	for n, p := range d.Problems {
		told.Problems[n] = p
		if p == "" {
			delete(told.Problems, n)
		}
	}
	if !d.Empty() && text(told) == before {
		t.Errorf("a delta that makes no difference: %s", text(d))
	}
}

func randomService(next func(int) int) lb.Service {
	svc := lb.Service{Name: name(fmt.Sprint("svc", next(3))), Created: time.Unix(int64(next(2)), 0)}
	svc.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(next(2))})}
	if next(2) == 0 {
		svc.ClusterIPs = append(svc.ClusterIPs, netip.MustParseAddr("fd00::1"))
	}
	for range next(3) {
		svc.Ports = append(svc.Ports, lb.Port{
			Name:     fmt.Sprint("p", next(2)),
			Protocol: []lb.Protocol{lb.TCP, lb.UDP}[next(2)],
			Number:   uint16(80 + next(2)),
		})
	}
	return svc
}

func randomSlice(next func(int) int) lb.Slice {
	s := lb.Slice{
		Name:    name(fmt.Sprint("slice", next(4))),
		Service: fmt.Sprint("svc", next(3)),
		Family:  []lb.Family{lb.IPv4, lb.IPv6}[next(2)],
	}
	for range 1 + next(2) {
		s.Ports = append(s.Ports, lb.SlicePort{
			Name:     fmt.Sprint("p", next(2)),
			Protocol: []lb.Protocol{lb.TCP, lb.UDP}[next(2)],
			Number:   uint16(8080 + next(2)),
		})
	}
	for range next(4) {
		addr := netip.AddrFrom4([4]byte{10, 0, 0, byte(next(3))})
		if s.Family == lb.IPv6 {
			addr = netip.MustParseAddr(fmt.Sprint("fd01::", next(3)))
		}
		conditions := next(8)
		s.Endpoints = append(s.Endpoints, lb.Endpoint{
			Addr: addr, Ready: conditions&1 > 0, Serving: conditions&2 > 0, Terminating: conditions&4 > 0,
		})
	}
	return s
}

// byTheRules works out the backends of sp anew, rule by rule.
func byTheRules(sp lb.ServicePort, all map[lb.Name]lb.Slice) *lb.Backends {
	copies := map[lb.Backend][]lb.Endpoint{}
	for _, n := range slices.SortedFunc(maps.Keys(all), lb.Name.Compare) {
		s := all[n]
		for _, p := range s.Ports {
			for _, e := range s.Endpoints {
				if s.Service == sp.Service.Name && s.Family == sp.Family && p.Name == sp.Port && p.Protocol == sp.Protocol {
					b := lb.Backend{Addr: e.Addr, Port: p.Number}
					copies[b] = append(copies[b], e)
				}
			}
		}
	}
	ready := false
	chosen := map[lb.Backend]lb.Endpoint{}
	for b, list := range copies {
		best := list[0]
		for _, e := range list[1:] {
			if best.Terminating && !e.Terminating || best.Terminating == e.Terminating && !best.Ready && e.Ready {
				best = e
			}
		}
		chosen[b] = best
		ready = ready || best.Ready
	}
	out := &lb.Backends{}
	for _, b := range slices.SortedFunc(maps.Keys(chosen), lb.Backend.Compare) {
		e := chosen[b]
		eligible := e.Ready || !ready && e.Serving && e.Terminating
		if eligible {
			out.Eligible = append(out.Eligible, b)
		}
		if eligible || e.Serving {
			out.Serving = append(out.Serving, b)
		}
	}
	return out
}

func BenchmarkOneSliceAmong10000Services(b *testing.B) {
	s := lb.NewStore()
	slice := func(i, endpoints int) lb.Slice {
		sl := webSlice(fmt.Sprint("slice", i), 8080)
		sl.Service = fmt.Sprint("svc", i)
		for e := range endpoints {
			addr := netip.AddrFrom4([4]byte{10, byte(e), byte(i >> 8), byte(i)})
			sl.Endpoints = append(sl.Endpoints, lb.Endpoint{Addr: addr, Ready: true, Serving: true})
		}
		return sl
	}
	for i := range 10_000 {
		svc := webService()
		svc.Name = name(fmt.Sprint("svc", i))
		svc.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}
		s.SetService(svc)
		s.SetSlice(slice(i, 10))
	}
	s.Changes()
	two := [2]lb.Slice{slice(5000, 9), slice(5000, 10)}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.SetSlice(two[i%2])
		if s.Changes().Empty() {
			b.Fatal("no change")
		}
	}
}
