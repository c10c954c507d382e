// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func explain(t *testing.T, s *lb.Store, q lb.Query) lb.Explanation {
	t.Helper()
	e, err := s.Explain(q)
	if err != nil {
		t.Fatalf("explain %+v: %v", q, err)
	}
	return e
}

// everywhere is what an endpoint is on all sides.
func everywhere(what string) map[string]string {
	return map[string]string{"clusterIP": what, "inside": what, "outside": what}
}

// TestWhyAnEndpointIsInOrOut asks about 10.0.0.1, the first endpoint of the
// first slice where nothing else is said.
func TestWhyAnEndpointIsInOrOut(t *testing.T) {
	other := endpoint("10.0.0.9", "rs", on("there"), forZones("a"), forNodes(here))
	one := func(first lb.Endpoint, more ...lb.Endpoint) []lb.Slice {
		return []lb.Slice{webSlice("s", 80, append([]lb.Endpoint{first}, more...)...)}
	}
	tests := []struct {
		name    string
		service func(*lb.Service)
		slices  []lb.Slice
		address string // "" for 10.0.0.1
		want    map[string]string
	}{{
		name: "ready", slices: one(endpoint("10.0.0.1", "rs")), want: everywhere("in"),
	}, {
		name: "not ready", slices: one(endpoint("10.0.0.1", "s"), other), want: everywhere("not ready"),
	}, {
		name: "not ready though none is", slices: one(endpoint("10.0.0.1", "s")), want: everywhere("not ready"),
	}, {
		name: "terminating", slices: one(endpoint("10.0.0.1", "st"), other), want: everywhere("terminating, and others are ready"),
	}, {
		name: "terminating, and none is ready", slices: one(endpoint("10.0.0.1", "st")), want: everywhere("in"),
	}, {
		name: "not serving any more", slices: one(endpoint("10.0.0.1", "t")), want: everywhere("terminating and not serving any more"),
	}, {
		name: "other zone", slices: one(endpoint("10.0.0.1", "rs", forZones("b", "c")), endpoint("10.0.0.9", "rs", forZones("a"))),
		want: everywhere("its hints are for other zones (b, c)"),
	}, {
		name: "hints for another node", slices: one(endpoint("10.0.0.1", "rs", forNodes("there")), other),
		want: everywhere("its hints are for other nodes (there)"),
	}, {
		name: "hints ignored", slices: one(endpoint("10.0.0.1", "rs", forZones("b")), endpoint("10.0.0.9", "rs")), want: everywhere("in"),
	}, {
		name: "not ready comes before its hints", slices: one(endpoint("10.0.0.1", "", forZones("b")), other), want: everywhere("not ready"),
	}, {
		name: "other node under externalTrafficPolicy Local", service: externalLocal, slices: one(endpoint("10.0.0.1", "rs", on("there"))),
		want: map[string]string{"clusterIP": "in", "inside": "in", "outside": "on another node (there), and the policy is Local"},
	}, {
		name: "other node under internalTrafficPolicy Local", service: internalLocal, slices: one(endpoint("10.0.0.1", "rs", on("there"))),
		want: map[string]string{"clusterIP": "on another node (there), and the policy is Local", "inside": "in", "outside": "in"},
	}, {
		name: "no node under Local", service: externalLocal, slices: one(endpoint("10.0.0.1", "rs")),
		want: map[string]string{"clusterIP": "in", "inside": "in", "outside": "policy Local, and the slice does not say which node it is on"},
	}, {
		name: "terminating here, ready elsewhere under Local", service: externalLocal, slices: one(endpoint("10.0.0.1", "st", on(here)), other),
		want: map[string]string{"clusterIP": "terminating, and others are ready", "inside": "terminating, and others are ready", "outside": "in"},
	}, {
		name: "hints for others have no say under Local", service: internalLocal, slices: one(endpoint("10.0.0.1", "rs", on(here), forNodes("there")), other),
		want: map[string]string{"clusterIP": "in", "inside": "its hints are for other nodes (there)", "outside": "its hints are for other nodes (there)"},
	}, {
		name: "not ready here under Local", service: externalLocal, slices: one(endpoint("10.0.0.1", "", on(here))), want: everywhere("not ready"),
	}, {
		name: "wrong family", slices: []lb.Slice{ofIPv6(webSlice("s", 80, endpoint("fd01::1", "rs")))}, address: "fd01::1",
		want: everywhere("wrong family: the slice is IPv6"),
	}, {
		name: "invalid", slices: []lb.Slice{{Name: name("s"), Service: "web", Family: lb.IPv4,
			Invalid: []lb.InvalidEndpoint{{Address: "169.254.0.1", Reason: "link-local"}}}}, address: "169.254.0.1",
		want: everywhere("invalid: link-local"),
	}, {
		name: "no such port", slices: []lb.Slice{{Name: name("s"), Service: "web", Family: lb.IPv4, Endpoints: []lb.Endpoint{endpoint("10.0.0.1", "rs")},
			Ports: []lb.SlicePort{{Name: "http", Protocol: lb.UDP, Number: 80}, {Name: "admin", Protocol: lb.TCP, Number: 81}}}},
		want: everywhere(`its slice has no port "http" with protocol TCP`),
	}, {
		name: "duplicate copy: one that is not terminating counts", slices: []lb.Slice{webSlice("s", 80, endpoint("10.0.0.1", "rst")), webSlice("t", 80, endpoint("10.0.0.1", "rs"))},
		want: everywhere("another copy of the same address and port counts"),
	}, {
		name: "duplicate copy: the first slice counts", slices: []lb.Slice{webSlice("t", 80, endpoint("10.0.0.1", "rs")), webSlice("a", 80, endpoint("10.0.0.1", "rs")), webSlice("s", 80, endpoint("10.0.0.1", "rs"))},
		want: everywhere("another copy of the same address and port counts"),
	}, {
		name: "the same address with another port is no copy", slices: []lb.Slice{webSlice("s", 80, endpoint("10.0.0.1", "rs")), webSlice("a", 81, endpoint("10.0.0.1", "rs"))},
		want: everywhere("in"),
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetNode(lb.Node{Zone: "a"})
			svc := webService()
			if tt.service != nil {
				tt.service(&svc)
			}
			s.SetService(svc)
			for _, slice := range tt.slices {
				s.SetSlice(slice)
			}
			address := tt.address
			if address == "" {
				address = "10.0.0.1"
			}
			got := map[string]string{}
			for _, e := range explain(t, s, lb.Query{Service: svc.Name}).Ports[0].Endpoints {
				if e.Address == address && e.Slice == "s" {
					maps.Copy(got, e.Out)
					for _, side := range e.In {
						got[side] = "in"
					}
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestWhichRuleDecided(t *testing.T) {
	const none, elsewhere = "no endpoint is ready, or serves while it terminates: no_backend 0",
		"policy Local: no usable endpoint on this node, but elsewhere: drop 0"
	all := func(rule string) [lb.Sides]string { return [lb.Sides]string{rule, rule, rule} }
	tests := []struct {
		name      string
		service   func(*lb.Service)
		endpoints []lb.Endpoint
		want      [lb.Sides]string
	}{
		{"no endpoint", dualStack, nil, all(none)},
		{"no endpoint under Local", internalLocal, nil, all(none)},
		{"ready", dualStack, []lb.Endpoint{endpoint("10.0.0.1", "rs"), endpoint("10.0.0.2", "rs"), endpoint("10.0.0.3", "st")},
			all("policy Cluster: all ready endpoints: translate 2")},
		{"terminating", dualStack, []lb.Endpoint{endpoint("10.0.0.1", "st"), endpoint("10.0.0.2", "s")},
			all("policy Cluster: none is ready anywhere, so those that serve while they terminate: translate 1")},
		{"hints for this node", dualStack, []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes(here)), endpoint("10.0.0.2", "rs", forNodes("there"))},
			all("policy Cluster: the ready endpoints with a hint for this node: translate 1")},
		{"hints for this zone", dualStack, []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs", forZones("b"))},
			all("policy Cluster: the ready endpoints with a hint for this zone: translate 1")},
		{"Local, ready here", externalLocal, []lb.Endpoint{endpoint("10.0.0.1", "rs", on(here)), endpoint("10.0.0.2", "rs")},
			[lb.Sides]string{"policy Cluster: all ready endpoints: translate 2", "policy Cluster: all ready endpoints: translate 2",
				"policy Local: the ready endpoints on this node: translate 1"}},
		{"Local, terminating here", internalLocal, []lb.Endpoint{endpoint("10.0.0.1", "st", on(here)), endpoint("10.0.0.2", "rs")},
			[lb.Sides]string{"policy Local: none on this node is ready, so those that serve while they terminate: translate 1",
				"policy Cluster: all ready endpoints: translate 1", "policy Cluster: all ready endpoints: translate 1"}},
		{"Local, none here", externalLocal, []lb.Endpoint{endpoint("10.0.0.2", "rs")},
			[lb.Sides]string{"policy Cluster: all ready endpoints: translate 1", "policy Cluster: all ready endpoints: translate 1", elsewhere}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetNode(lb.Node{Zone: "a"})
			s.SetService(webService(tt.service))
			s.SetSlice(webSlice("s", 80, tt.endpoints...))
			var got [lb.Sides]string
			for i, r := range explain(t, s, lb.Query{Service: name("web")}).Ports[0].Rules {
				if r.Side != lb.Side(i).String() {
					t.Errorf("rule %d is about %q", i, r.Side)
				}
				got[i] = fmt.Sprintf("%s: %s %d", r.Rule, r.Verdict, r.Backends)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestHintsIgnoredBecause(t *testing.T) {
	tests := []struct {
		name, zone string
		endpoints  []lb.Endpoint
		want       string
	}{
		{"no hints", "a", []lb.Endpoint{endpoint("10.0.0.1", "rs")}, "none"},
		{"hints of endpoints that are not ready", "a", []lb.Endpoint{endpoint("10.0.0.1", "st", forZones("a"))}, "none"},
		{"for this node", "a", []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes(here), forZones("a"))},
			"every ready endpoint has node hints and one names node here: those that do are used"},
		{"for this zone", "a", []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes("there"), forZones("a"))},
			"every ready endpoint has zone hints and one names zone a: those that do are used"},
		{"a zone hint is missing", "a", []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a")), endpoint("10.0.0.2", "rs")},
			"ignored because not every ready endpoint has zone hints"},
		{"the node has no zone", "", []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("a"))},
			"ignored because the node has no label topology.kubernetes.io/zone"},
		{"for other zones", "a", []lb.Endpoint{endpoint("10.0.0.1", "rs", forZones("b"))}, "ignored because none names zone a"},
		{"a node hint is missing", "a", []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes(here)), endpoint("10.0.0.2", "rs")},
			"ignored because not every ready endpoint has node hints"},
		{"for other nodes", "a", []lb.Endpoint{endpoint("10.0.0.1", "rs", forNodes("there"))}, "ignored because none names node here"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			s.SetNode(lb.Node{Zone: tt.zone})
			s.SetService(webService())
			s.SetSlice(webSlice("s", 80, tt.endpoints...))
			e := explain(t, s, lb.Query{Service: name("web")})
			if e.Ports[0].Hints != tt.want || e.Node != here || e.Zone != tt.zone {
				t.Errorf("node %q, zone %q: %q, want %q", e.Node, e.Zone, e.Ports[0].Hints, tt.want)
			}
		})
	}
}

// explainedStore has a Service of each sort that a query can be about.
func explainedStore() *lb.Store {
	s := lb.NewStore(lb.Config{NodeName: here, NodePorts: lb.NodePorts{Primary: true, Loopback: true}})
	s.SetNode(lb.Node{Addresses: addrs("10.0.9.9")})
	s.SetServiceCIDRs(prefixes("10.96.0.0/16"))
	s.SetService(webService(dualStack, externalLocal, func(s *lb.Service) {
		s.Ports[0].NodePort = 30080
		s.Ports = append(s.Ports, lb.Port{Name: "admin", Protocol: lb.TCP, Number: 8443}, lb.Port{Name: "http-udp", Protocol: lb.UDP, Number: 80})
		s.LoadBalancerIPs, s.ExternalIPs = addrs("192.0.2.1"), addrs("198.51.100.1")
		s.Sources, s.Affinity = prefixes("203.0.113.0/24"), 10
	}))
	s.SetService(claimant("late", 0, func(s *lb.Service) {
		s.ExternalIPs, s.Created = addrs("198.51.100.1", "198.51.100.2"), webService().Created.AddDate(2000, 0, 0)
	}))
	s.SetService(foreignService("theirs", "10.96.0.77"))
	s.SetService(webService(func(s *lb.Service) { s.Name, s.ClusterIPs, s.Ports = name("empty"), addrs("10.96.0.78"), nil }))
	return s
}

func TestWhatAQueryFinds(t *testing.T) {
	vip := func(s string) lb.Query {
		ap := netip.MustParseAddrPort(s)
		return lb.Query{VIP: ap.Addr(), Number: ap.Port()}
	}
	const http4, udp4 = "ns/web http TCP IPv4", "ns/web http-udp UDP IPv4"
	tests := []struct {
		name    string
		query   lb.Query
		ports   []string
		verdict string
		err     string
	}{
		{name: "a Service", query: lb.Query{Service: name("web")}, ports: []string{"ns/web admin TCP IPv4", "ns/web admin TCP IPv6",
			http4, "ns/web http TCP IPv6", udp4, "ns/web http-udp UDP IPv6"}},
		{name: "SERVICE:PORT by name", query: lb.Query{Service: name("web"), Port: "http"}, ports: []string{http4, "ns/web http TCP IPv6"}},
		{name: "SERVICE:PORT by number, each protocol", query: lb.Query{Service: name("web"), Port: "80"},
			ports: []string{http4, "ns/web http TCP IPv6", udp4, "ns/web http-udp UDP IPv6"}},
		{name: "a port that the Service does not have", query: lb.Query{Service: name("web"), Port: "81"}, err: `Service ns/web has no port "81"`},
		{name: "a Service that is not there", query: lb.Query{Service: name("nobody")},
			err: "no Service ns/nobody is served here (it does not exist, is headless or of type ExternalName)"},
		{name: "a Service without ports", query: lb.Query{Service: name("empty")}, verdict: "the Service has no ports"},
		{name: "foreign", query: lb.Query{Service: name("theirs")},
			verdict: "another proxy serves it (label service.kubernetes.io/service-proxy-name): connections pass untouched"},
		{name: "VIP:PORT of a ClusterIP, each protocol", query: vip("10.96.0.1:80"), ports: []string{http4, udp4}},
		{name: "VIP:PORT of IPv6", query: vip("[fd00::1]:8443"), ports: []string{"ns/web admin TCP IPv6"}},
		{name: "VIP:PORT of a load-balancer IP", query: vip("192.0.2.1:80"), ports: []string{http4, udp4}},
		{name: "VIP:PORT of an external IP that another Service has, too", query: vip("198.51.100.1:80"), ports: []string{http4, udp4}},
		{name: "VIP:PORT of a NodePort", query: vip("10.0.9.9:30080"), ports: []string{http4}},
		{name: "VIP:PORT of a NodePort at loopback", query: vip("127.0.0.1:30080"), ports: []string{http4}},
		{name: "a NodePort at an address that is not the node's", query: vip("10.0.9.10:30080"), verdict: "pass: no Service has this address"},
		{name: "a number that is no NodePort", query: vip("10.0.9.9:30081"), verdict: "pass: an address of this node, but no Service has NodePort 30081"},
		{name: "undefined port", query: vip("10.96.0.1:81"), verdict: "no_port: the ClusterIP of Service ns/web, which does not define port 81: refused"},
		{name: "undefined port of a Service without any", query: vip("10.96.0.78:81"), verdict: "no_port: the ClusterIP of Service ns/empty, which does not define port 81: refused"},
		{name: "undefined port of a load-balancer IP: ClusterIPs only", query: vip("192.0.2.1:81"), verdict: "pass: Service ns/web has this address, but not port 81; only a ClusterIP's undefined ports are refused"},
		{name: "an address inside a ServiceCIDR that belongs to no Service", query: vip("10.96.200.1:80"), verdict: "drop: in a ServiceCIDR, but no Service has this address as its ClusterIP"},
		{name: "the ClusterIP of a foreign Service", query: vip("10.96.0.77:80"), verdict: "pass: the ClusterIP of Service ns/theirs, which another proxy serves"},
		{name: "nobody's address", query: vip("8.8.8.8:53"), verdict: "pass: no Service has this address"},
	}
	s := explainedStore()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e, err := s.Explain(tt.query)
			message := ""
			if err != nil {
				message = err.Error()
			}
			if message != tt.err {
				t.Errorf("error %q, want %q", message, tt.err)
			}
			var got []string
			for _, p := range e.Ports {
				got = append(got, strings.Join([]string{p.Service, p.PortName, p.Protocol, p.Family}, " "))
			}
			if diff := cmp.Diff(tt.ports, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if e.Verdict != tt.verdict {
				t.Errorf("verdict %q, want %q", e.Verdict, tt.verdict)
			}
		})
	}
}

func TestExplainedFrontends(t *testing.T) {
	s := explainedStore()
	lines := func(q lb.Query) (out []string) {
		for _, f := range explain(t, s, q).Ports[0].Frontends {
			line := fmt.Sprintf("%s %s inside %s outside %s", netip.AddrPortFrom(f.VIP, f.Port), f.Type, f.Inside, f.Outside)
			if f.Lost != "" {
				line += " lost to " + f.Lost
			}
			out = append(out, line)
		}
		slices.Sort(out)
		return out
	}
	want := []string{
		"0.0.0.0:30080 NodePort inside inside outside outside",
		"10.96.0.1:80 ClusterIP inside clusterIP outside clusterIP",
		"192.0.2.1:80 LoadBalancer inside inside outside outside",
		"198.51.100.1:80 ExternalIP inside inside outside outside",
	}
	if diff := cmp.Diff(want, lines(lb.Query{Service: name("web"), Port: "http"})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	want = []string{
		"10.96.1.4:80 ClusterIP inside clusterIP outside clusterIP",
		"198.51.100.1:80 ExternalIP inside inside outside outside lost to ns/web",
		"198.51.100.2:80 ExternalIP inside inside outside outside",
	}
	if diff := cmp.Diff(want, lines(lb.Query{Service: name("late")})); diff != "" {
		t.Errorf("lost frontend (-want +got):\n%s", diff)
	}
	if e := explain(t, s, lb.Query{Service: name("late")}); e.Problem != "198.51.100.1:80/TCP belongs to Service ns/web" {
		t.Errorf("problem %q", e.Problem)
	}
}

func TestExplainedServicePort(t *testing.T) {
	s := explainedStore()
	p := explain(t, s, lb.Query{Service: name("web"), Port: "http"}).Ports[0]
	if p.Key() != webPort {
		t.Errorf("Key() = %v, want %v", p.Key(), webPort)
	}
	if p.InternalTrafficPolicy != "Cluster" || p.ExternalTrafficPolicy != "Local" || p.AffinitySeconds != 10 ||
		!slices.Equal(p.SourceRanges, []string{"203.0.113.0/24"}) || p.Kernel != nil {
		t.Errorf("got %+v", p)
	}
}

// Other programs read the JSON: what has nothing in it is [], not null.
func TestExplanationAsJSON(t *testing.T) {
	s := newStore()
	s.SetService(webService())
	s.SetSlice(webSlice("s", 80, endpoint("10.0.0.1", "")))
	out, err := json.Marshal(explain(t, s, lb.Query{Service: name("web")}))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"sourceRanges":[]`, `"in":[]`, `"vip":"10.96.0.1"`, `"kernel":null`, `"portName":"http"`} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%s is not in %s", want, out)
		}
	}
	out, err = json.Marshal(explain(t, s, lb.Query{VIP: addrs("8.8.8.8")[0], Number: 53}))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"node":"here","zone":"","verdict":"pass: no Service has this address","ports":[]}`; string(out) != want {
		t.Errorf("got %s, want %s", out, want)
	}
}

// program returns tables that hold what d says, as a reconciler makes them.
func program(d lb.Delta) lb.Tables {
	t := lb.NewTables()
	ids := map[lb.ServicePort]lb.ServiceID{}
	base := uint32(2)
	for _, sp := range slices.SortedFunc(maps.Keys(d.Services), lb.ServicePort.Compare) {
		b, id := d.Services[sp], lb.ServiceID(len(ids)+1)
		ids[sp], t.Names[id] = id, sp
		row := lb.ServiceRow{Affinity: b.Affinity, Restricted: b.Restricted, NodeAllowed: b.NodeAllowed, OutsideLocal: b.OutsideLocal}
		for side, set := range b.Sides {
			row.Sides[side] = lb.Range{}.NextEmpty(set.Elsewhere)
			if n := len(set.Backends); n > 0 {
				row.Sides[side] = lb.Range{}.Next(base, n)
			}
			for _, backend := range set.Backends {
				t.Slots[base] = backend
				base++
				if b.Affinity > 0 {
					t.Members[lb.Member{Service: id, Backend: backend, Use: lb.UseOn(lb.Side(side))}] = struct{}{}
				}
			}
		}
		for _, backend := range b.Serving {
			if sp.Protocol.Remembers() {
				t.Members[lb.Member{Service: id, Backend: backend}] = struct{}{}
			}
		}
		for _, prefix := range b.Sources {
			t.Sources[lb.Source{Service: id, Prefix: prefix}] = struct{}{}
		}
		t.Services[id] = row
	}
	for key, owner := range d.Frontends {
		t.Frontends[key] = lb.Frontend{Service: ids[owner.Service], Kind: owner.Kind}
	}
	maps.Copy(t.NodeAddresses, d.NodeAddresses)
	return t
}

func TestCompareWithTheKernelsTables(t *testing.T) {
	s := explainedStore()
	s.SetSlice(webSlice("s", 8080, endpoint("10.0.0.1", "rs", on("there")), endpoint("10.0.0.2", "rs", on("there"))))
	delta := s.All()
	id := func(t lb.Tables) lb.ServiceID {
		for id, sp := range t.Names {
			if sp == webPort {
				return id
			}
		}
		return lb.NoService
	}
	row := func(set func(*lb.ServiceRow)) func(lb.Tables) {
		return func(t lb.Tables) { setRow(t, id(t), set) }
	}
	nodePort := lb.FrontendKey{VIP: netip.IPv4Unspecified(), Port: 30080, Protocol: lb.TCP}
	const rules = "affinity %ds, restricted %v, node allowed %v; wanted is 10s, true, false"
	tests := []struct {
		name   string
		damage func(lb.Tables)
		want   []string
	}{
		{"they agree", func(lb.Tables) {}, []string{}},
		{"a generation says nothing", row(func(r *lb.ServiceRow) { r.Sides[1].Generation++ }), []string{}},
		{"another order of slots says nothing", func(t lb.Tables) {
			base := t.Services[id(t)].Sides[lb.SideInside].Base
			t.Slots[base], t.Slots[base+1] = t.Slots[base+1], t.Slots[base]
		}, []string{}},
		{"no service", func(t lb.Tables) { delete(t.Names, id(t)) }, []string{"ns/web:http/TCP/IPv4 has 0 service IDs"}},
		{"two services", func(t lb.Tables) { t.Names[99] = webPort }, []string{"ns/web:http/TCP/IPv4 has 2 service IDs"}},
		{"a node address less", func(t lb.Tables) { delete(t.NodeAddresses, netip.MustParseAddr("127.0.0.1")) },
			[]string{"node address 127.0.0.1: the kernel has none, wanted is loopback"}},
		{"a node address too many", func(t lb.Tables) { t.NodeAddresses[netip.MustParseAddr("10.0.9.99")] = lb.NodeAddressOpen },
			[]string{"node address 10.0.9.99: the kernel has open, wanted is none"}},
		{"no wildcard", func(t lb.Tables) { delete(t.Frontends, lb.FrontendKey{VIP: webService().ClusterIPs[0]}) },
			[]string{"undefined ports of " + webService().ClusterIPs[0].String() + " are not refused"}},
		{"a backend less", row(func(r *lb.ServiceRow) { r.Sides[lb.SideInside].Count = 1 }),
			[]string{"inside: the kernel has [10.0.0.1:8080], wanted is [10.0.0.1:8080 10.0.0.2:8080]"}},
		{"another backend", func(t lb.Tables) { t.Slots[t.Services[id(t)].Sides[lb.SideClusterIP].Base] = dnsBackend },
			[]string{"clusterIP: the kernel has [10.0.0.2:8080 10.0.0.3:53], wanted is [10.0.0.1:8080 10.0.0.2:8080]"}},
		{"a slot without row", func(t lb.Tables) { delete(t.Slots, t.Services[id(t)].Sides[lb.SideClusterIP].Base) },
			[]string{"clusterIP: the kernel has [10.0.0.2:8080], wanted is [10.0.0.1:8080 10.0.0.2:8080]"}},
		{"refused instead of dropped", row(func(r *lb.ServiceRow) { r.Sides[lb.SideOutside].Base = 0 }),
			[]string{"outside: the kernel has none (refused), wanted is none (dropped)"}},
		{"another affinity", row(func(r *lb.ServiceRow) { r.Affinity = 11 }), []string{fmt.Sprintf(rules, 11, true, false)}},
		{"unrestricted", row(func(r *lb.ServiceRow) { r.Restricted = false }), []string{fmt.Sprintf(rules, 10, false, false)}},
		{"open to the node", row(func(r *lb.ServiceRow) { r.NodeAllowed = true }), []string{fmt.Sprintf(rules, 10, true, true)}},
		{"outside clients lose their address", row(func(r *lb.ServiceRow) { r.OutsideLocal = false }),
			[]string{"outside local false; wanted is true"}},
		{"a source range less", func(t lb.Tables) { delete(t.Sources, lb.Source{Service: id(t), Prefix: sourceOfWeb.Prefix}) },
			[]string{"source range 203.0.113.0/24 is missing"}},
		{"a frontend less", func(t lb.Tables) { delete(t.Frontends, nodePort) }, []string{"frontend 0.0.0.0:30080/TCP does not lead here"}},
		{"a frontend that leads elsewhere", func(t lb.Tables) { t.Frontends[webFrontend] = lb.Frontend{Service: 99, Kind: lb.KindClusterIP} },
			[]string{"frontend 10.96.0.1:80/TCP does not lead here"}},
		{"a frontend of another kind", func(t lb.Tables) { t.Frontends[webFrontend] = lb.Frontend{Service: id(t), Kind: lb.KindExternalIP} },
			[]string{"frontend 10.96.0.1:80/TCP does not lead here"}},
		{"what another service port has says nothing", func(t lb.Tables) {
			t.Frontends[lb.FrontendKey{VIP: webFrontend.VIP, Port: 8443, Protocol: lb.TCP}] = lb.Frontend{}
		}, []string{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tables := program(delta)
			if errs := tables.Check(); len(errs) > 0 {
				t.Fatalf("the tables of this test: %v", errs)
			}
			tt.damage(tables)
			if diff := cmp.Diff(tt.want, s.Compare([]lb.ServicePort{webPort}, tables)[webPort]); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	for sp := range delta.Services {
		if got := s.Compare([]lb.ServicePort{sp}, program(delta))[sp]; got == nil || len(got) > 0 {
			t.Errorf("%v: %#v", sp, got)
		}
	}
}

func webID(t lb.Tables) lb.ServiceID {
	for id, sp := range t.Names {
		if sp == webPort {
			return id
		}
	}
	return lb.NoService
}

func TestCompareSeesASourceRangeTooMany(t *testing.T) {
	s := explainedStore()
	tables := program(s.All())
	tables.Sources[lb.Source{Service: webID(tables), Prefix: netip.MustParsePrefix("10.0.0.0/8")}] = struct{}{}
	if got := s.Compare([]lb.ServicePort{webPort}, tables)[webPort]; len(got) == 0 {
		t.Error("they agree")
	}
}

func TestCompareSeesAFrontendTooMany(t *testing.T) {
	s := explainedStore()
	tables := program(s.All())
	tables.Frontends[lb.FrontendKey{VIP: netip.MustParseAddr("192.0.2.99"), Port: 80, Protocol: lb.TCP}] = lb.Frontend{Service: webID(tables), Kind: lb.KindExternalIP}
	if got := s.Compare([]lb.ServicePort{webPort}, tables)[webPort]; len(got) == 0 {
		t.Error("they agree")
	}
}

func TestCompareSeesMissingMembers(t *testing.T) {
	s := explainedStore()
	s.SetSlice(webSlice("s", 8080, endpoint("10.0.0.1", "rs", on(here))))
	tables := program(s.All())
	clear(tables.Members)
	if got := s.Compare([]lb.ServicePort{webPort}, tables)[webPort]; len(got) == 0 {
		t.Error("they agree")
	}
}

func TestCompareSaysWhatDiffersInAnEmptySet(t *testing.T) {
	s := explainedStore()
	s.SetSlice(webSlice("s", 8080, endpoint("10.0.0.1", "rs", on("there"))))
	tables := program(s.All())
	setRow(tables, webID(tables), func(r *lb.ServiceRow) { r.Sides[lb.SideOutside].Base = 0 })
	if got := s.Compare([]lb.ServicePort{webPort}, tables)[webPort]; len(got) != 1 || got[0] == "outside: the kernel has [], wanted is []" {
		t.Errorf("got %q", got)
	}
}

func TestExplainVIPLooksEachProtocolUpByItself(t *testing.T) {
	s := lb.NewStore(lb.Config{NodeName: here, NodePorts: lb.NodePorts{Primary: true}})
	s.SetNode(lb.Node{Addresses: addrs("10.0.9.9")})
	s.SetService(webService(func(s *lb.Service) { s.Ports[0].Number, s.ExternalIPs = 30053, addrs("10.0.9.9") }))
	s.SetService(lb.Service{Name: name("dns"), ClusterIPs: addrs("10.96.0.10"), Ports: []lb.Port{{Name: "dns", Protocol: lb.UDP, Number: 53, NodePort: 30053}}})
	if e := explain(t, s, lb.Query{VIP: addrs("10.0.9.9")[0], Number: 30053}); len(e.Ports) != 2 {
		t.Errorf("%d ports, want web over TCP and dns over UDP", len(e.Ports))
	}
}

func TestExplainVIPShowsTheProblemOfEitherService(t *testing.T) {
	s := newStore()
	external := func(s *lb.Service) { s.ExternalIPs = addrs("192.0.2.1", "192.0.2.2") }
	s.SetService(claimant("a", 1, external))
	s.SetService(claimant("old", 9, func(s *lb.Service) { s.ExternalIPs = addrs("192.0.2.2") }))
	s.SetService(claimant("zz-udp", 1, external, func(s *lb.Service) { s.Ports = []lb.Port{{Name: "dns", Protocol: lb.UDP, Number: 80}} }))
	if e := explain(t, s, lb.Query{VIP: addrs("192.0.2.1")[0], Number: 80}); e.Problem == "" {
		t.Error("no problem")
	}
}

func TestExplainTakesNoChangesAway(t *testing.T) {
	s := newStore()
	s.SetService(webService())
	if _, err := s.Explain(lb.Query{Service: name("web")}); err != nil {
		t.Fatal(err)
	}
	if s.Changes().Empty() {
		t.Error("nobody has been told of the Service")
	}
}

func TestForeignMeansThatNothingElseDoes(t *testing.T) {
	s := newStore()
	s.SetService(webService(func(s *lb.Service) { s.Foreign, s.HealthCheckNodePort = true, 32000 }))
	expect(t, "foreign with ports", s.Changes(), "frontend 10.96.0.1:* Foreign ns/web/*/IPv4")
}
