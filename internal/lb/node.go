// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"net/netip"
	"slices"
)

// SetNode says what the Node we run on says now. The zero Node stands for one
// that does not exist, or is not known yet.
func (s *Store) SetNode(n Node) {
	old := s.node
	s.node = n
	if old.Zone != n.Zone {
		for _, svc := range s.services {
			s.touchService(svc)
		}
	}
	if !slices.Equal(old.Addresses, n.Addresses) {
		s.touchNode()
	}
}

// AllAddresses tells whether NodePorts are reached at every local address of a
// family: no CIDR names the family, or its whole. For the primary address that
// means, as with kube-proxy, that the Node names none of the family.
func (s *Store) AllAddresses(family Family) bool {
	ports := s.config.NodePorts
	if ports.Primary {
		return !slices.ContainsFunc(s.node.Addresses, func(a netip.Addr) bool { return FamilyOf(a) == family })
	}
	named := false
	for _, p := range ports.CIDRs {
		if FamilyOf(p.Addr()) == family {
			if p.Bits() == 0 {
				return true
			}
			named = true
		}
	}
	return !named
}

// NodePortAddresses returns where everybody reaches NodePorts, sorted. The
// unspecified address of a family stands for all its local addresses.
func (s *Store) NodePortAddresses() []netip.Addr {
	var out []netip.Addr
	for _, family := range []Family{IPv4, IPv6} {
		if s.AllAddresses(family) {
			out = append(out, Unspecified(family))
		}
	}
	for addr, kind := range s.nodeAddresses() {
		if kind == NodeAddressOpen && !s.AllAddresses(FamilyOf(addr)) {
			out = append(out, addr)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// SetNodePorts changes at which addresses NodePorts are reached.
func (s *Store) SetNodePorts(n NodePorts) {
	s.config.NodePorts = n
	s.touchedNode = true
}

// SetLocalAddresses says which unicast addresses the node's devices have.
func (s *Store) SetLocalAddresses(addrs []netip.Addr) {
	if !slices.Equal(s.local, addrs) {
		s.local = addrs
		s.touchNode()
	}
}

// IsLocal tells whether a is an address of the node: a local one, or in its Node.
func (s *Store) IsLocal(a netip.Addr) bool {
	return a.IsLoopback() || slices.Contains(s.local, a) || slices.Contains(s.node.Addresses, a)
}

// SetServiceCIDRs says which ranges ClusterIPs are allocated from. An address in
// them that nobody owns is dropped.
func (s *Store) SetServiceCIDRs(cidrs []netip.Prefix) {
	s.cidrs = make([]netip.Prefix, 0, len(cidrs))
	for _, p := range cidrs {
		s.cidrs = append(s.cidrs, p.Masked())
	}
	s.touchedNode = true
}

// touchNode marks what depends on the node's addresses.
func (s *Store) touchNode() {
	s.touchedNode, s.staleReserved = true, true
	for _, svc := range s.services {
		if len(svc.Sources) > 0 {
			s.touchService(svc)
		}
	}
}

// nodeAddresses returns the addresses of the node that need to be known.
func (s *Store) nodeAddresses() map[netip.Addr]NodeAddress {
	out := map[netip.Addr]NodeAddress{}
	ports := s.config.NodePorts
	if ports.Primary {
		for _, a := range s.node.Addresses {
			out[a] = NodeAddressOpen
		}
	}
	for _, a := range s.local {
		in := func(p netip.Prefix) bool { return p.Contains(a) }
		switch open := !ports.Primary && slices.ContainsFunc(ports.CIDRs, in) || s.AllAddresses(FamilyOf(a)); {
		case open && !a.IsLoopback():
			out[a] = NodeAddressOpen
		case out[a] == 0 && slices.ContainsFunc(s.cidrs, in):
			out[a] = NodeAddressLocal
		}
	}
	for _, a := range []netip.Addr{loopback4, netip.IPv6Loopback()} {
		delete(out, a)
		if ports.Loopback {
			out[a] = NodeAddressLoopback
		}
	}
	return out
}

var loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// restrict fills in who may use the load-balancer IPs of svc in a family: those
// in loadBalancerSourceRanges. A range that holds the node's own address also
// lets packets through that have a load-balancer IP as their source, as
// kube-proxy does: that is how some load balancers show the node its own
// packets.
func (s *Store) restrict(b *Backends, svc Service, family Family) {
	var allowed []netip.Prefix
	for _, p := range svc.Sources {
		if FamilyOf(p.Addr()) != family {
			continue
		}
		if p.Bits() == 0 {
			b.NodeAllowed = false
			return // open to the whole family
		}
		allowed = append(allowed, p)
		b.NodeAllowed = b.NodeAllowed || s.nodeIn(p)
	}
	var vips []netip.Prefix
	for _, vip := range svc.LoadBalancerIPs {
		if FamilyOf(vip) == family {
			vips = append(vips, netip.PrefixFrom(vip, vip.BitLen()))
		}
	}
	if len(allowed) == 0 || len(vips) == 0 {
		b.NodeAllowed = false
		return
	}
	if b.NodeAllowed {
		allowed = append(allowed, vips...)
	}
	slices.SortFunc(allowed, netip.Prefix.Compare)
	b.Restricted, b.Sources = true, slices.Compact(allowed)
}

// nodeIn tells whether p holds the address that processes on the node have: that
// of the Node or, while it says none, any local one.
func (s *Store) nodeIn(p netip.Prefix) bool {
	for _, a := range s.node.Addresses {
		if FamilyOf(a) == FamilyOf(p.Addr()) {
			return p.Contains(a)
		}
	}
	return slices.ContainsFunc(s.local, p.Contains)
}
