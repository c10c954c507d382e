// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Limits say which addresses and ports no Service gets though it asks for them.
// Whoever may create a Service can ask for any externalIP, and would take what
// pods send there (CVE-2020-8554). ClusterIPs are not limited: the API server
// hands them out. The zero Limits leave out what cuts a node off and no more: see
// Store.refusal.
type Limits struct {
	ExternalIPs     Allowed // of externalIPs
	LoadBalancerIPs Allowed // of status.loadBalancer
	Reserved        []Reservation
}

// Allowed bounds the addresses of one kind. The zero value bounds nothing.
type Allowed struct {
	Limited bool
	CIDRs   []netip.Prefix // where addresses may be; none when there are none
}

func (a Allowed) contains(addr netip.Addr) bool {
	return !a.Limited || slices.ContainsFunc(a.CIDRs, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// Reservation keeps an address and port, with every protocol, for who has it.
type Reservation struct {
	Addr netip.Addr // invalid for every address of the node
	Port uint16
	Why  string // completes "… is reserved, "
}

// apiServer is the Service through which pods reach the API server. Its endpoints
// are reserved: with them taken the node hears of no change any more, not even
// that they are given back.
var apiServer = Name{Namespace: "default", Name: "kubernetes"}

// metadata are the addresses at which clouds hand credentials to their machines.
var metadata = []netip.Addr{
	netip.AddrFrom4([4]byte{169, 254, 169, 254}),
	netip.MustParseAddr("fd00:ec2::254"),
}

// refusal says why a claim does not count though nobody else has the frontend, as
// the end of "… is …"; "" when it does count.
func (s *Store) refusal(key FrontendKey, owner Owner) string {
	if owner.Kind.isClusterIP() {
		return ""
	}
	if why := s.outside(key.VIP, owner); why != "" {
		return why
	}
	if slices.Contains(metadata, key.VIP) {
		return "reserved, clouds hand out credentials there"
	}
	if why := s.reserved[netip.AddrPortFrom(key.VIP, key.Port)]; why != "" && owner.Service.Service != apiServer {
		return "reserved, " + why
	}
	return ""
}

// outside says that an address is in none of the ranges it may be in, "" when it is
// in one. An address that its Service has in both lists needs to be in a range of
// one of them; it counts as a load-balancer IP all the same, or its source ranges
// would be lost.
func (s *Store) outside(vip netip.Addr, owner Owner) string {
	external, balancer := s.config.Limits.ExternalIPs, s.config.Limits.LoadBalancerIPs
	switch {
	case owner.Kind == KindExternalIP && !external.contains(vip):
		return "outside --external-ip-cidrs"
	case owner.Kind != KindLoadBalancer || balancer.contains(vip):
		return ""
	case external.contains(vip) && slices.Contains(s.services[owner.Service.Service].ExternalIPs, vip):
		return ""
	default:
		return "outside --load-balancer-cidrs"
	}
}

// reserve works out anew what is reserved and marks the frontends for which that
// makes a difference. The work is in proportion to what is reserved, a few rows for
// each address of the node, however many Services there are.
func (s *Store) reserve() {
	if !s.staleReserved {
		return
	}
	s.staleReserved = false
	before := s.reserved
	s.reserved = s.reservations()
	touch := func(at netip.AddrPort) {
		if before[at] != s.reserved[at] {
			for _, protocol := range []Protocol{TCP, UDP, SCTP} {
				s.touchFrontend(FrontendKey{VIP: at.Addr(), Port: at.Port(), Protocol: protocol})
			}
		}
	}
	for at := range before {
		touch(at)
	}
	for at := range s.reserved {
		touch(at)
	}
}

// reservations returns why each address and port is reserved. The unspecified
// address stands for NodePorts: a port that is reserved at one of the node's
// addresses can be none.
func (s *Store) reservations() map[netip.AddrPort]string {
	out := map[netip.AddrPort]string{}
	keep := func(addr netip.Addr, port uint16, why string) {
		if at := netip.AddrPortFrom(addr, port); out[at] == "" {
			out[at] = why
		}
	}
	own := map[netip.Addr]bool{}
	for _, addr := range slices.Concat(s.local, s.node.Addresses) {
		own[addr] = !addr.IsLoopback() // a listener there keeps its port from a NodePort anyway
	}
	for _, r := range slices.Concat(s.config.Limits.Reserved, s.apiServers()) {
		if r.Addr.IsValid() {
			keep(r.Addr, r.Port, r.Why)
			if own[r.Addr] {
				keep(Unspecified(FamilyOf(r.Addr)), r.Port, r.Why)
			}
			continue
		}
		keep(netip.IPv4Unspecified(), r.Port, r.Why)
		keep(netip.IPv6Unspecified(), r.Port, r.Why)
		for addr := range own {
			keep(addr, r.Port, r.Why)
		}
	}
	return out
}

// apiServers returns a reservation for every endpoint of the API server, ready or
// not.
func (s *Store) apiServers() []Reservation {
	var out []Reservation
	for i := range s.endpoints[apiServer] {
		slice := &s.endpoints[apiServer][i]
		for _, port := range slice.Ports {
			for j := range slice.Endpoints {
				out = append(out, Reservation{slice.Endpoints[j].Addr, port.Number, "an API server listens there"})
			}
		}
	}
	return out
}

// refused is a frontend that a Service asks for and does not get.
type refused struct {
	key FrontendKey
	why string
}

// refusals returns what svc does not get because of limits, each frontend once, in
// the order of its fields.
func (s *Store) refusals(svc Service) []refused {
	var out []refused
	var seen map[FrontendKey]bool // made when it is needed, which is hardly ever
	for key, owner := range svc.frontends {
		why := s.refusal(key, owner)
		if why == "" || seen[key] || s.owner(key).Service == owner.Service {
			continue
		}
		if seen == nil {
			seen = map[FrontendKey]bool{}
		}
		seen[key] = true
		out = append(out, refused{key, why})
	}
	return out
}

// Refused returns how many frontends Services ask for and do not get because of
// limits, as of the last call of Changes or All.
func (s *Store) Refused() int { return s.refused }

// WhyRefused says which frontends a Service does not get because of limits, the
// first few of them and why; "" when limits keep nothing from it.
func (s *Store) WhyRefused(name Name) string {
	const few = 3
	list := s.refusals(s.services[name])
	var words []string
	for _, r := range list[:min(few, len(list))] {
		words = append(words, r.key.String()+" is "+r.why)
	}
	if n := len(list) - few; n > 0 {
		words = append(words, strconv.Itoa(n)+" more")
	}
	return strings.Join(words, "; ")
}

// countRefused takes note of how many frontends of a Service are refused now.
func (s *Store) countRefused(name Name) {
	now := len(s.refusals(s.services[name]))
	s.refused += now - s.refusedOf[name]
	put(s.refusedOf, name, now, now > 0)
}
