// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// world is the last state that a history has led to.
type world struct {
	services map[lb.Name]lb.Service
	slices   map[lb.Name]lb.Slice
	node     lb.Node
	ports    lb.NodePorts
	local    []netip.Addr
	cidrs    []netip.Prefix
	limits   lb.Limits
}

// FuzzStore goes through the history that data describes. What Changes has told
// must add up to what a store says that has seen only the last state, and All
// to the rules as they are written down.
func FuzzStore(f *testing.F) {
	f.Add([]byte("0123456789"))
	f.Add([]byte{0, 0, 1, 0, 3, 1, 2, 3, 5, 9, 0, 1, 1, 1, 0, 2, 4, 4, 7, 2, 0, 0, 3, 1, 1})
	f.Fuzz(checkHistory)
}

func TestLongHistories(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 250 {
		data := make([]byte, 100+rng.IntN(600))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		checkHistory(t, data)
		if t.Failed() {
			t.Fatalf("history %#v", data)
		}
	}
}

func checkHistory(t *testing.T, data []byte) {
	next := func(n int) int {
		if len(data) == 0 {
			return 0
		}
		b := data[0]
		data = data[1:]
		return int(b) % n
	}
	config := lb.Config{NodeName: here, Limits: randomLimits(next)}
	s := lb.NewStore(config)
	w := world{limits: config.Limits, services: map[lb.Name]lb.Service{}, slices: map[lb.Name]lb.Slice{}}
	told := lb.Delta{
		Services: map[lb.ServicePort]*lb.Backends{}, Frontends: map[lb.FrontendKey]lb.Owner{},
		NodeAddresses: map[netip.Addr]lb.NodeAddress{}, ServiceCIDRs: map[netip.Prefix]bool{},
		Health: map[lb.ServiceFamily]lb.Health{}, Problems: map[lb.Name]lb.Problem{},
	}
	for len(data) > 0 {
		w.happen(next, s)
		if next(3) == 0 {
			add(t, told, s.Changes())
		}
	}
	add(t, told, s.Changes())
	expect(t, "nothing has happened", s.Changes())

	fresh := lb.NewStore(config)
	fresh.SetNodePorts(w.ports)
	fresh.SetNode(w.node)
	fresh.SetLocalAddresses(w.local)
	fresh.SetServiceCIDRs(w.cidrs)
	fresh.ReplaceSlices(slices.Collect(maps.Values(w.slices)))
	fresh.ReplaceServices(slices.Collect(maps.Values(w.services)))
	all := s.All()
	want := text(fresh.All())
	if diff := gocmp.Diff(want, text(told)); diff != "" {
		t.Errorf("changes do not add up (-want +got):\n%s", diff)
	}
	if diff := gocmp.Diff(want, text(all)); diff != "" {
		t.Errorf("the store depends on its history (-want +got):\n%s", diff)
	}
	for _, family := range []lb.Family{lb.IPv4, lb.IPv6} {
		if got, want := s.NoLocal(family), noLocal(all, family); got != want || fresh.NoLocal(family) != want {
			t.Errorf("NoLocal(%v) = %+v and %+v, want %+v", family, got, fresh.NoLocal(family), want)
		}
	}
	if got, want := s.Refused(), w.refusedByTheRules(); got != want || fresh.Refused() != want {
		t.Errorf("Refused() = %d and %d, want %d", got, fresh.Refused(), want)
	}
	if diff := gocmp.Diff(text(w.byTheRules()), text(lb.Delta{Services: all.Services, Frontends: all.Frontends, Health: all.Health})); diff != "" {
		t.Errorf("by the rules (-want +got):\n%s", diff)
	}
	for sp := range all.Services {
		if _, err := s.Explain(lb.Query{Service: sp.Service}); err != nil {
			t.Errorf("explain %v: %v", sp.Service, err)
		}
	}
}

// happen lets the next thing happen to the world and tells the store.
func (w *world) happen(next func(int) int, s *lb.Store) {
	switch next(11) {
	case 0, 1, 2:
		svc := randomService(next)
		s.SetService(svc)
		w.services[svc.Name] = svc
	case 3, 4, 5:
		slice := randomSlice(next)
		s.SetSlice(slice)
		w.slices[slice.Name] = slice
	case 6:
		n := name(fmt.Sprint("svc", next(3)))
		s.DeleteService(n)
		delete(w.services, n)
	case 7:
		n := name(fmt.Sprint("slice", next(4)))
		s.DeleteSlice(n)
		delete(w.slices, n)
	case 8:
		w.node = lb.Node{Zone: []string{"", "a", "b"}[next(3)], Addresses: some(next, nodeAddrs), Eligible: next(2) == 0}
		s.SetNode(w.node)
	case 9:
		switch next(3) {
		case 0:
			w.local = some(next, nodeAddrs)
			s.SetLocalAddresses(w.local)
		case 1:
			w.ports = lb.NodePorts{Primary: next(2) == 0, CIDRs: some(next, sourceRanges), Loopback: next(2) == 0}
			s.SetNodePorts(w.ports)
		case 2:
			w.cidrs = some(next, sourceRanges)
			s.SetServiceCIDRs(w.cidrs)
		}
	case 10:
		servers := randomServers(next)
		s.SetSlice(servers)
		w.slices[servers.Name] = servers
	}
}

var (
	nodeAddrs = addrs("10.0.9.9", "172.16.0.1", "fd00:9::9", "127.0.0.1")
	// vips are addresses that Services compete for; one is a node's, too.
	vips         = addrs("10.96.0.0", "10.96.0.1", "192.0.2.1", "10.0.9.9", "fd00::1", "2001:db8::1")
	sourceRanges = prefixes("10.0.0.0/8", "203.0.113.0/24", "0.0.0.0/0", "fd00:9::/64", "2001:db8:1::/48")
)

// some draws a few of all, in their order.
func some[T any](next func(int) int, all []T) []T {
	var out []T
	for _, x := range all {
		if next(3) == 0 {
			out = append(out, x)
		}
	}
	return out
}

func randomService(next func(int) int) lb.Service {
	svc := lb.Service{Name: name(fmt.Sprint("svc", next(3))), Created: time.Unix(int64(next(2)), 0)}
	svc.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(next(2))})}
	if next(2) == 0 {
		svc.ClusterIPs = append(svc.ClusterIPs, netip.MustParseAddr("fd00::1"))
	}
	if next(2) == 0 {
		slices.Reverse(svc.ClusterIPs)
	}
	if svc.Foreign = next(8) == 0; svc.Foreign {
		return svc
	}
	for range next(3) {
		svc.Ports = append(svc.Ports, lb.Port{
			Name:     fmt.Sprint("p", next(2)),
			Protocol: []lb.Protocol{lb.TCP, lb.UDP}[next(2)],
			Number:   uint16(80 + next(2)),
			NodePort: []uint16{0, 30000, 30001}[next(3)],
		})
	}
	policies := next(8)
	svc.InternalLocal, svc.ExternalLocal = policies&1 > 0, policies&2 > 0
	if svc.ExternalLocal && next(2) == 0 {
		svc.HealthCheckNodePort = 32000
	}
	svc.LoadBalancerIPs, svc.ExternalIPs = some(next, vips), some(next, vips)
	svc.Affinity = []uint32{0, 0, 10, 10800}[next(4)]
	svc.Sources = some(next, sourceRanges)
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
	hinted := next(4) // most slices have hints of one kind on all endpoints, or none
	for range next(4) {
		addr := netip.AddrFrom4([4]byte{10, 0, 0, byte(next(3))})
		if s.Family == lb.IPv6 {
			addr = netip.MustParseAddr(fmt.Sprint("fd01::", next(3)))
		}
		conditions := next(8)
		e := lb.Endpoint{
			Addr: addr, Ready: conditions&1 > 0, Serving: conditions&2 > 0, Terminating: conditions&4 > 0,
			Node: []string{here, "there", ""}[next(3)],
		}
		if hinted&1 > 0 {
			e.NodeHints = [][]string{{here}, {"there"}, {"there", here}, nil}[next(4)]
		}
		if hinted&2 > 0 {
			e.ZoneHints = [][]string{{"a"}, {"b"}, {"b", "a"}, nil}[next(4)]
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
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
	addRows(t, "frontend", told.Frontends, d.Frontends)
	addRows(t, "node address", told.NodeAddresses, d.NodeAddresses)
	addRows(t, "service CIDR", told.ServiceCIDRs, d.ServiceCIDRs)
	addRows(t, "health", told.Health, d.Health)
	addRows(t, "problem", told.Problems, d.Problems)
	if !d.Empty() && text(told) == before {
		t.Errorf("a delta that makes no difference: %s", text(d))
	}
}

func addRows[K, V comparable](t *testing.T, what string, told, news map[K]V) {
	t.Helper()
	var none V
	for key, value := range news {
		if told[key] == value {
			t.Errorf("%s %v: known before", what, key)
		}
		told[key] = value
		if value == none {
			delete(told, key)
		}
	}
}

// noLocal counts anew.
func noLocal(all lb.Delta, family lb.Family) (n lb.NoLocal) {
	for sp, b := range all.Services {
		if sp.Family == family && b.Sides[lb.SideClusterIP].Elsewhere {
			n.Internal++
		}
		if sp.Family == family && b.Sides[lb.SideOutside].Elsewhere {
			n.External++
		}
	}
	return n
}

// byTheRules works out anew, rule by rule, what there should be.
func (w world) byTheRules() lb.Delta {
	d := lb.Delta{Services: map[lb.ServicePort]*lb.Backends{}, Frontends: map[lb.FrontendKey]lb.Owner{}, Health: map[lb.ServiceFamily]lb.Health{}}
	for n, svc := range w.services {
		for _, vip := range svc.ClusterIPs {
			family := lb.FamilyOf(vip)
			if svc.HealthCheckNodePort > 0 {
				d.Health[lb.ServiceFamily{Service: n, Family: family}] = lb.Health{Port: svc.HealthCheckNodePort, Local: w.localReady(n, family)}
			}
			for _, port := range svc.Ports {
				sp := lb.ServicePort{Service: n, Port: port.Name, Protocol: port.Protocol, Family: family}
				d.Services[sp] = w.backends(sp)
			}
		}
	}
	for key, claims := range w.claims() {
		claims = slices.DeleteFunc(claims, func(o lb.Owner) bool { return w.refuses(key, o) })
		if len(claims) > 0 {
			d.Frontends[key] = slices.MinFunc(claims, w.compareClaims)
		}
	}
	return d
}

// claims returns who asks for what: every port at every address of its family.
func (w world) claims() map[lb.FrontendKey][]lb.Owner {
	out := map[lb.FrontendKey][]lb.Owner{}
	for n, svc := range w.services {
		families := map[lb.Family]bool{}
		for _, vip := range svc.ClusterIPs {
			families[lb.FamilyOf(vip)] = true
			owner := lb.Owner{Service: lb.ServicePort{Service: n, Family: lb.FamilyOf(vip)}, Kind: lb.KindClusterIP}
			if svc.Foreign {
				owner.Kind = lb.KindForeign
			}
			out[lb.FrontendKey{VIP: vip}] = append(out[lb.FrontendKey{VIP: vip}], owner)
		}
		for _, port := range svc.Ports {
			claim := func(vip netip.Addr, number uint16, kind lb.FrontendKind) {
				if family := lb.FamilyOf(vip); families[family] && number > 0 {
					key := lb.FrontendKey{VIP: vip, Port: number, Protocol: port.Protocol}
					sp := lb.ServicePort{Service: n, Port: port.Name, Protocol: port.Protocol, Family: family}
					out[key] = append(out[key], lb.Owner{Service: sp, Kind: kind})
				}
			}
			claim(netip.IPv4Unspecified(), port.NodePort, lb.KindNodePort)
			claim(netip.IPv6Unspecified(), port.NodePort, lb.KindNodePort)
			for kind, list := range map[lb.FrontendKind][]netip.Addr{
				lb.KindClusterIP: svc.ClusterIPs, lb.KindLoadBalancer: svc.LoadBalancerIPs, lb.KindExternalIP: svc.ExternalIPs,
			} {
				for _, vip := range list {
					claim(vip, port.Number, kind)
				}
			}
		}
	}
	return out
}

// compareClaims puts the one that wins first.
func (w world) compareClaims(a, b lb.Owner) int {
	rank := func(o lb.Owner) int {
		if o.Kind == lb.KindClusterIP || o.Kind == lb.KindForeign {
			return 0
		}
		return 1
	}
	created := func(o lb.Owner) time.Time { return w.services[o.Service.Service].Created }
	return cmp.Or(rank(a)-rank(b), created(a).Compare(created(b)), a.Service.Compare(b.Service), int(a.Kind)-int(b.Kind))
}

// endpoints returns the copy that counts of each backend.
func (w world) endpoints(sp lb.ServicePort) map[lb.Backend]lb.Endpoint {
	out := map[lb.Backend]lb.Endpoint{}
	for _, n := range slices.SortedFunc(maps.Keys(w.slices), lb.Name.Compare) {
		s := w.slices[n]
		for _, p := range s.Ports {
			if s.Service != sp.Service.Name || s.Family != sp.Family || p.Name != sp.Port || p.Protocol != sp.Protocol {
				continue
			}
			for _, e := range s.Endpoints {
				b := lb.Backend{Addr: e.Addr, Port: p.Number}
				best, ok := out[b]
				if !ok || best.Terminating && !e.Terminating || best.Terminating == e.Terminating && !best.Ready && e.Ready {
					out[b] = e
				}
			}
		}
	}
	return out
}

func (w world) backends(sp lb.ServicePort) *lb.Backends {
	svc, found := w.services[sp.Service], w.endpoints(sp)
	which := func(keep func(lb.Endpoint) bool) (out []lb.Backend) {
		for _, b := range slices.SortedFunc(maps.Keys(found), lb.Backend.Compare) {
			if keep(found[b]) {
				out = append(out, b)
			}
		}
		return out
	}
	ready := func(e lb.Endpoint) bool { return e.Ready }
	usable := func(e lb.Endpoint) bool { return e.Ready || e.Serving && e.Terminating }
	local := func(e lb.Endpoint) bool { return e.Node == here }
	both := func(a, b func(lb.Endpoint) bool) func(lb.Endpoint) bool {
		return func(e lb.Endpoint) bool { return a(e) && b(e) }
	}
	// narrow applies one kind of hints; ok tells whether they count.
	narrow := func(hints func(lb.Endpoint) []string, us string) (out []lb.Backend, ok bool) {
		unhinted := which(both(ready, func(e lb.Endpoint) bool { return len(hints(e)) == 0 }))
		out = which(both(ready, func(e lb.Endpoint) bool { return slices.Contains(hints(e), us) }))
		return out, len(out) > 0 && len(unhinted) == 0
	}
	forNode, nodes := narrow(func(e lb.Endpoint) []string { return e.NodeHints }, here)
	forZone, zones := narrow(func(e lb.Endpoint) []string { return e.ZoneHints }, w.node.Zone)

	cluster := which(ready)
	switch {
	case len(cluster) == 0:
		cluster = which(usable)
	case nodes:
		cluster = forNode
	case zones:
		cluster = forZone
	}
	own := which(both(ready, local))
	if len(own) == 0 {
		own = which(both(usable, local))
	}
	choose := func(policyLocal bool) lb.Set {
		if policyLocal {
			return lb.Set{Backends: own, Elsewhere: len(own) == 0 && len(which(usable)) > 0}
		}
		return lb.Set{Backends: cluster}
	}
	out := &lb.Backends{Affinity: svc.Affinity, Serving: which(func(e lb.Endpoint) bool { return e.Ready || e.Serving })}
	out.Sides = [lb.Sides]lb.Set{choose(svc.InternalLocal), choose(false), choose(svc.ExternalLocal)}
	out.OutsideLocal = svc.ExternalLocal
	out.Restricted, out.NodeAllowed, out.Sources = w.sources(svc, sp.Family)
	return out
}

// sources returns who may use the load-balancer IPs of a family.
func (w world) sources(svc lb.Service, family lb.Family) (restricted, node bool, allowed []netip.Prefix) {
	own := slices.DeleteFunc(slices.Clone(w.node.Addresses), func(a netip.Addr) bool { return lb.FamilyOf(a) != family })
	if len(own) == 0 {
		own = w.local
	} else {
		own = own[:1]
	}
	var vips []netip.Prefix
	for _, vip := range svc.LoadBalancerIPs {
		if lb.FamilyOf(vip) == family {
			vips = append(vips, netip.PrefixFrom(vip, vip.BitLen()))
		}
	}
	for _, p := range svc.Sources {
		if lb.FamilyOf(p.Addr()) != family {
			continue
		}
		if p.Bits() == 0 {
			return false, false, nil
		}
		allowed = append(allowed, p)
		node = node || slices.ContainsFunc(own, p.Contains)
	}
	if len(vips) == 0 || len(allowed) == 0 {
		return false, false, nil
	}
	if node {
		allowed = append(allowed, vips...)
	}
	slices.SortFunc(allowed, netip.Prefix.Compare)
	return true, node, slices.Compact(allowed)
}

// localReady counts the addresses on this node of all ports together.
func (w world) localReady(n lb.Name, family lb.Family) int {
	found := map[netip.Addr]bool{}
	for _, port := range []string{"p0", "p1"} {
		for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
			for b, e := range w.endpoints(lb.ServicePort{Service: n, Port: port, Protocol: protocol, Family: family}) {
				if e.Ready && e.Node == here {
					found[b.Addr] = true
				}
			}
		}
	}
	return len(found)
}
