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
// unit that has a service ID, a set of backends and, later, an affinity.
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
// every port and protocol of the address that has no frontend of its own.
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
	KindClusterIP FrontendKind = 1
)

// String returns the name that inspect shows.
func (k FrontendKind) String() string {
	if k == KindClusterIP {
		return "ClusterIP"
	}
	return "kind(" + itoa(uint32(k)) + ")"
}

// Frontend is the row behind a FrontendKey.
type Frontend struct {
	Service ServiceID // NoService for a wildcard
	Kind    FrontendKind
}

// Range is the row behind a ServiceID: the block of slots that holds the
// service's backends. The kernel holds it in one 64-bit word, so a reader sees
// either the old range or the new one.
type Range struct {
	Base  uint32 // first slot; below MaxSlots
	Count uint16 // slots in the block; 0 means that nothing is usable
	// Generation changes with every change of the range, modulo
	// MaxGeneration+1. Whoever remembers a backend with its generation knows
	// that nothing has happened to the set while the two are equal.
	Generation uint32
}

// Limits of a Range, given by the bits it has in the kernel's word.
const (
	MaxSlots      = 1 << 24
	MaxBackends   = 1<<16 - 1
	MaxGeneration = 1<<24 - 1
)

// Next returns the range that replaces r: the given block and the generation
// after r's.
func (r Range) Next(base uint32, count int) Range {
	return Range{Base: base, Count: uint16(count), Generation: (r.Generation + 1) & MaxGeneration}
}

// Member says that a backend may still be used by those who remember it for
// this service: it serves, though it may be terminating and get no new clients.
type Member struct {
	Service ServiceID
	Backend Backend
}

// Compare orders by service ID, then backend.
func (m Member) Compare(o Member) int {
	return cmp.Or(cmp.Compare(m.Service, o.Service), m.Backend.Compare(o.Backend))
}

// Problem says why a Service could not be programmed; the operator sees it in
// inspect. Short enough for one line.
type Problem string

// Tables are the rows of the kernel's tables. They are the common tongue: the
// reconciler's mirror, what Load reads back, what inspect prints and what
// golden files hold.
type Tables struct {
	Frontends map[FrontendKey]Frontend
	// Services holds the range of every service that has a name and, with
	// Count 0, of every ID that had one once: whoever gets the ID next goes on
	// from its generation.
	Services map[ServiceID]Range
	// Slots holds the slots inside some service's range; what other slots
	// contain has no meaning.
	Slots map[uint32]Backend
	// Members holds the rows of services whose clients remember a backend:
	// those with protocol UDP.
	Members  map[Member]struct{}
	Names    map[ServiceID]ServicePort
	Problems map[Name]Problem
}

// NewTables returns empty tables with every map made.
func NewTables() Tables {
	return Tables{
		Frontends: map[FrontendKey]Frontend{},
		Services:  map[ServiceID]Range{},
		Slots:     map[uint32]Backend{},
		Members:   map[Member]struct{}{},
		Names:     map[ServiceID]ServicePort{},
		Problems:  map[Name]Problem{},
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

// Remembers tells whether clients of a service with this protocol remember
// their backend, so that the service needs Members rows.
func (p Protocol) Remembers() bool { return p == UDP }

// Differences counts the rows that t and o do not have in common: those only one
// has, and those that differ. Slots count where a range leads to them.
func (t Tables) Differences(o Tables) int {
	return differences(t.Frontends, o.Frontends) + differences(t.Services, o.Services) +
		differences(t.Slots, o.Slots) + differences(t.Members, o.Members) +
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
