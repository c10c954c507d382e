// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"net/netip"
)

// Backend is an address and port a connection is sent to.
type Backend struct {
	Addr netip.Addr
	Port uint16
}

// String returns "address:port", IPv6 in brackets.
func (b Backend) String() string { return netip.AddrPortFrom(b.Addr, b.Port).String() }

// Compare orders backends by address, then port.
func (b Backend) Compare(o Backend) int {
	return cmp.Or(b.Addr.Compare(o.Addr), cmp.Compare(b.Port, o.Port))
}

// ServicePort names one service: a port of a Service in one family. It is the
// unit that has a service ID, sets of backends and an affinity.
type ServicePort struct {
	Service  Name
	Port     string
	Protocol Protocol
	Family   Family
}

// String returns "namespace/name:port/PROTOCOL/FAMILY", without ":port" for an
// unnamed port.
func (s ServicePort) String() string {
	port := ""
	if s.Port != "" {
		port = ":" + s.Port
	}
	return s.Service.String() + port + "/" + s.Protocol.String() + "/" + s.Family.String()
}

// Compare orders by Service, port name, protocol, family.
func (s ServicePort) Compare(o ServicePort) int {
	return cmp.Or(s.Service.Compare(o.Service), cmp.Compare(s.Port, o.Port),
		cmp.Compare(s.Protocol, o.Protocol), cmp.Compare(s.Family, o.Family))
}

// ServiceID is the number of a ServicePort in the kernel's tables. NoService
// belongs to no service.
type ServiceID uint32

// NoService is the ID a frontend leads to when its packets belong to nobody:
// every port of a ClusterIP that its Service does not define.
const NoService ServiceID = 0

// FrontendKey is what a client dials. Port 0 with protocol Any stands for
// every port and protocol of the address that has no frontend of its own. The
// VIP of a NodePort is the unspecified address of its family: it stands for all
// NodeAddresses.
type FrontendKey struct {
	VIP      netip.Addr
	Port     uint16
	Protocol Protocol
}

// IsWildcard tells whether the key stands for all undefined ports of its VIP.
func (k FrontendKey) IsWildcard() bool { return k.Port == 0 && k.Protocol == Any }

// String returns "vip:port/PROTOCOL", for a wildcard "vip:*".
func (k FrontendKey) String() string {
	if k.IsWildcard() {
		if k.VIP.Is6() {
			return "[" + k.VIP.String() + "]:*"
		}
		return k.VIP.String() + ":*"
	}
	return netip.AddrPortFrom(k.VIP, k.Port).String() + "/" + k.Protocol.String()
}

// Compare orders keys by VIP, port, protocol.
func (k FrontendKey) Compare(o FrontendKey) int {
	return cmp.Or(k.VIP.Compare(o.VIP), cmp.Compare(k.Port, o.Port), cmp.Compare(k.Protocol, o.Protocol))
}

// FrontendKind says which field of a Service a frontend comes from.
type FrontendKind uint8

// The kinds. The zero value is none of them.
const (
	KindClusterIP    FrontendKind = 1
	KindNodePort     FrontendKind = 2
	KindLoadBalancer FrontendKind = 3
	KindExternalIP   FrontendKind = 4
	// KindForeign is the wildcard of a ClusterIP that another proxy serves.
	KindForeign FrontendKind = 5
)

// String returns the name that inspect shows.
func (k FrontendKind) String() string {
	switch k {
	case KindClusterIP:
		return "ClusterIP"
	case KindNodePort:
		return "NodePort"
	case KindLoadBalancer:
		return "LoadBalancer"
	case KindExternalIP:
		return "ExternalIP"
	case KindForeign:
		return "Foreign"
	default:
		return "kind(" + itoa(uint32(k)) + ")"
	}
}

// Inside returns the side that clients on this node are on when they dial a
// frontend of this kind.
func (k FrontendKind) Inside() Side {
	if k == KindClusterIP {
		return SideClusterIP
	}
	return SideInside
}

// Outside returns the side that clients elsewhere are on when their packets for
// a frontend of this kind come to this node.
func (k FrontendKind) Outside() Side {
	if k == KindClusterIP {
		return SideClusterIP
	}
	return SideOutside
}

// Side says which of a service's sets of backends a client gets. Inside is a pod
// or process of this node, outside is everybody else.
type Side uint8

// The sides.
const (
	SideClusterIP Side = 0 // whoever dials a ClusterIP
	SideInside    Side = 1 // inside clients of a NodePort, load-balancer or external IP
	SideOutside   Side = 2 // outside clients of these
	// Sides is how many sides there are.
	Sides = 3
)

// String returns "clusterIP", "inside" or "outside".
func (s Side) String() string {
	switch s {
	case SideClusterIP:
		return "clusterIP"
	case SideInside:
		return "inside"
	case SideOutside:
		return "outside"
	default:
		return "side(" + itoa(uint32(s)) + ")"
	}
}

// Frontend is the row behind a FrontendKey.
type Frontend struct {
	Service ServiceID // NoService for a wildcard
	Kind    FrontendKind
}

// ServiceRow is the row behind a ServiceID.
type ServiceRow struct {
	// Sides holds the range of each side. Two sides with the same backends share
	// a block.
	Sides [Sides]Range
	// Affinity is how long a client keeps its backend, in seconds after its last
	// new connection; 0 when every connection is chosen anew.
	Affinity uint32
	// Restricted tells that load-balancer IPs are for clients in Sources alone.
	Restricted bool
	// NodeAllowed tells that processes on the node are among these clients.
	NodeAllowed bool
	// OutsideLocal tells that outside clients get backends of this node only,
	// whatever device these are behind, and that they keep their address.
	OutsideLocal bool
}

// Range is a block of slots. The kernel holds it in one 64-bit word, so a reader
// sees either the old range or the new one.
type Range struct {
	Base  uint32 // first slot, below MaxSlots; see Elsewhere when Count is 0
	Count uint16 // slots in the block; 0 means that there is nothing to be had
	// Generation changes with every change of the range, modulo
	// MaxGeneration+1. Whoever remembers a backend with its generation knows
	// that nothing has happened to the set while the two are equal.
	Generation uint32
}

// elsewhere is the base of an empty range that would not be empty without a
// traffic policy Local.
const elsewhere = 1

// Limits of a Range, given by the bits it has in the kernel's word.
const (
	MaxSlots      = 1 << 24
	MaxBackends   = 1<<16 - 1
	MaxGeneration = 1<<24 - 1
)

// Next returns the range that replaces r: the given block and the generation
// after r's. count is above 0.
func (r Range) Next(base uint32, count int) Range {
	return Range{Base: base, Count: uint16(count), Generation: (r.Generation + 1) & MaxGeneration}
}

// NextEmpty returns the empty range that replaces r, with the generation after
// r's. local says that a traffic policy is why it is empty: see Elsewhere.
func (r Range) NextEmpty(local bool) Range {
	r = r.Next(0, 0)
	if local {
		r.Base = elsewhere
	}
	return r
}

// Elsewhere tells whether the range is empty only because of a traffic policy
// Local: clients are dropped then, where otherwise they are refused.
func (r Range) Elsewhere() bool { return r.Count == 0 && r.Base == elsewhere }

// Member says that a backend may still be used by those who remember it for
// this service.
type Member struct {
	Service ServiceID
	Backend Backend
	Use     Use
}

// Use says who a member's row is for.
type Use uint8

// UseServing is for UDP sockets: the backend serves, though it may be terminating
// and get no new clients. The others are for clients with an affinity: the
// backend is in the set of that side.
const (
	UseServing Use = 0
	useSide    Use = 1
)

// UseOn returns the use of an affinity to a backend in the set of a side.
func UseOn(s Side) Use { return useSide + Use(s) }

// Side returns the side that an affinity's use is about; ok is false for
// UseServing and for what is no use.
func (u Use) Side() (s Side, ok bool) {
	return Side(u - useSide), u >= useSide && u < useSide+Sides
}

// String returns "serving" or the name of the side.
func (u Use) String() string {
	if u == UseServing {
		return "serving"
	}
	s, _ := u.Side()
	return s.String()
}

// Compare orders by service ID, use, backend.
func (m Member) Compare(o Member) int {
	return cmp.Or(cmp.Compare(m.Service, o.Service), cmp.Compare(m.Use, o.Use), m.Backend.Compare(o.Backend))
}

// Source says that clients in a range may use the load-balancer IPs of a service.
type Source struct {
	Service ServiceID
	Prefix  netip.Prefix // masked
}

// Compare orders by service ID, then prefix.
func (s Source) Compare(o Source) int {
	return cmp.Or(cmp.Compare(s.Service, o.Service), s.Prefix.Compare(o.Prefix))
}

// NodeAddress says what an address of this node is for. The zero value is for one
// that is not the node's, or that nobody needs to know.
type NodeAddress uint8

// The kinds of node addresses.
const (
	// NodeAddressOpen is for everybody who dials a NodePort.
	NodeAddressOpen NodeAddress = 1
	// NodeAddressLoopback is for processes on the node that do, and only while no
	// socket listens on the port itself.
	NodeAddressLoopback NodeAddress = 2
	// NodeAddressLocal has no NodePorts and lies in a service CIDR, where it is
	// not dropped: a DNS cache may listen there.
	NodeAddressLocal NodeAddress = 3
)

// NodePorts tells whether NodePorts are reached there.
func (a NodeAddress) NodePorts() bool { return a == NodeAddressOpen || a == NodeAddressLoopback }

// String returns "none", "open", "loopback" or "local".
func (a NodeAddress) String() string {
	switch a {
	case 0:
		return "none"
	case NodeAddressOpen:
		return "open"
	case NodeAddressLoopback:
		return "loopback"
	case NodeAddressLocal:
		return "local"
	default:
		return "address(" + itoa(uint32(a)) + ")"
	}
}

// Problem says why a Service could not be programmed; the operator sees it in
// inspect. Short enough for one line.
type Problem string

// MaxProblem is how many bytes of a Problem the kernel's tables hold.
const MaxProblem = 255

// Tables are the rows of the kernel's tables. They are the common tongue: the
// reconciler's mirror, what Load reads back, what inspect prints and what
// golden files hold.
type Tables struct {
	Frontends map[FrontendKey]Frontend
	// Services holds the row of every service that has a name and, with empty
	// ranges, of every ID that had one once: whoever gets the ID next goes on
	// from its generations.
	Services map[ServiceID]ServiceRow
	// Slots holds the slots inside some service's range; what other slots
	// contain has no meaning.
	Slots map[uint32]Backend
	// Members holds the rows of services whose clients remember a backend:
	// UseServing for those with protocol UDP, the others for those with an
	// affinity.
	Members map[Member]struct{}
	// Sources holds the rows of services that are restricted.
	Sources map[Source]struct{}
	// NodeAddresses are the addresses of the node that need to be known.
	NodeAddresses map[netip.Addr]NodeAddress
	// ServiceCIDRs are the ranges in which an address that nobody owns is
	// dropped. Masked.
	ServiceCIDRs map[netip.Prefix]struct{}
	Names        map[ServiceID]ServicePort
	Problems     map[Name]Problem
}

// NewTables returns empty tables with every map made.
func NewTables() Tables {
	return Tables{
		Frontends:     map[FrontendKey]Frontend{},
		Services:      map[ServiceID]ServiceRow{},
		Slots:         map[uint32]Backend{},
		Members:       map[Member]struct{}{},
		Sources:       map[Source]struct{}{},
		NodeAddresses: map[netip.Addr]NodeAddress{},
		ServiceCIDRs:  map[netip.Prefix]struct{}{},
		Names:         map[ServiceID]ServicePort{},
		Problems:      map[Name]Problem{},
	}
}

// Backends returns the backends in r's slots in slot order. A slot without a
// row is left out; Check reports those.
func (t Tables) Backends(r Range) []Backend {
	out := make([]Backend, 0, r.Count)
	for i := r.Base; i < r.Base+uint32(r.Count); i++ {
		if b, ok := t.Slots[i]; ok {
			out = append(out, b)
		}
	}
	return out
}

// Remembers tells whether sockets of this protocol remember their backend, so
// that a service needs Members rows with UseServing.
func (p Protocol) Remembers() bool { return p == UDP }

// Differences counts the rows that t and o do not have in common: those only one
// has, and those that differ. Slots count where a range leads to them.
func (t Tables) Differences(o Tables) int {
	return differences(t.Frontends, o.Frontends) + differences(t.Services, o.Services) +
		differences(t.Slots, o.Slots) + differences(t.Members, o.Members) +
		differences(t.Sources, o.Sources) + differences(t.NodeAddresses, o.NodeAddresses) +
		differences(t.ServiceCIDRs, o.ServiceCIDRs) +
		differences(t.Names, o.Names) + differences(t.Problems, o.Problems)
}

func differences[K, V comparable](a, b map[K]V) int {
	n := 0
	for k, v := range a {
		if other, ok := b[k]; !ok || other != v {
			n++
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			n++
		}
	}
	return n
}
