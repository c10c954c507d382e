// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"net/netip"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// kubernetes is the Service whose endpoints are the API server's.
var kubernetes = lb.Name{Namespace: "default", Name: "kubernetes"}

// servers returns a slice with these addresses and ports of API servers.
func servers(at ...string) lb.Slice {
	s := lb.Slice{
		Name: kubernetes, Service: kubernetes.Name, Family: lb.FamilyOf(netip.MustParseAddrPort(at[0]).Addr()),
		Ports: []lb.SlicePort{{Name: "https", Protocol: lb.TCP, Number: netip.MustParseAddrPort(at[0]).Port()}},
	}
	for _, text := range at {
		s.Endpoints = append(s.Endpoints, lb.Endpoint{Addr: netip.MustParseAddrPort(text).Addr(), Ready: true, Serving: true})
	}
	return s
}

// randomServers has API servers at addresses and ports that Services ask for.
func randomServers(next func(int) int) lb.Slice {
	s := lb.Slice{
		Name: kubernetes, Service: kubernetes.Name, Family: lb.IPv4,
		Ports: []lb.SlicePort{{Protocol: lb.TCP, Number: []uint16{80, 81, 30000}[next(3)]}},
	}
	for _, addr := range some(next, append(vips[:3:3], nodeAddrs...)) {
		s.Endpoints = append(s.Endpoints, lb.Endpoint{Addr: addr})
	}
	return s
}

func randomLimits(next func(int) int) (l lb.Limits) {
	allowed := func() lb.Allowed {
		return lb.Allowed{Limited: next(3) == 0, CIDRs: some(next, prefixes("192.0.2.0/24", "10.0.0.0/8", "2001:db8::/32"))}
	}
	l.ExternalIPs, l.LoadBalancerIPs = allowed(), allowed()
	for range next(3) {
		l.Reserved = append(l.Reserved, lb.Reservation{
			Addr: append(vips[2:], netip.Addr{})[next(5)], Port: []uint16{80, 81, 30000, 30001}[next(4)], Why: "a test says so",
		})
	}
	return l
}

// refuses works out anew whether limits keep a frontend from who asks for it.
func (w world) refuses(key lb.FrontendKey, o lb.Owner) bool {
	within := func(a lb.Allowed) bool {
		return !a.Limited || slices.ContainsFunc(a.CIDRs, func(p netip.Prefix) bool { return p.Contains(key.VIP) })
	}
	external := within(w.limits.ExternalIPs)
	switch o.Kind {
	case lb.KindClusterIP, lb.KindForeign:
		return false
	case lb.KindExternalIP:
		if !external {
			return true
		}
	case lb.KindLoadBalancer:
		listed := slices.Contains(w.services[o.Service.Service].ExternalIPs, key.VIP)
		if !within(w.limits.LoadBalancerIPs) && !(external && listed) {
			return true
		}
	}
	return o.Service.Service != kubernetes && w.isReserved(key)
}

// isReserved asks for every reservation whether it means this address and port.
func (w world) isReserved(key lb.FrontendKey) bool {
	own := slices.Concat(w.local, w.node.Addresses)
	own = slices.DeleteFunc(own, netip.Addr.IsLoopback)
	all := slices.Clone(w.limits.Reserved)
	for _, s := range w.slices {
		for _, p := range s.Ports {
			for _, e := range s.Endpoints {
				if s.Name.Namespace == kubernetes.Namespace && s.Service == kubernetes.Name {
					all = append(all, lb.Reservation{Addr: e.Addr, Port: p.Number})
				}
			}
		}
	}
	return slices.ContainsFunc(all, func(r lb.Reservation) bool {
		switch {
		case r.Port != key.Port:
			return false
		case r.Addr.IsValid() && key.VIP.IsUnspecified():
			return slices.ContainsFunc(own, func(a netip.Addr) bool {
				return a == r.Addr && lb.FamilyOf(a) == lb.FamilyOf(key.VIP)
			})
		case r.Addr.IsValid():
			return r.Addr == key.VIP
		default:
			return key.VIP.IsUnspecified() || slices.Contains(own, key.VIP)
		}
	})
}

// refusedByTheRules counts, for each Service, the frontends that limits keep from it.
func (w world) refusedByTheRules() int {
	type claim struct {
		service lb.Name
		key     lb.FrontendKey
	}
	found := map[claim]bool{}
	d := w.byTheRules()
	for key, claims := range w.claims() {
		for _, o := range claims {
			if w.refuses(key, o) && d.Frontends[key].Service != o.Service {
				found[claim{o.Service.Service, key}] = true
			}
		}
	}
	return len(found)
}
