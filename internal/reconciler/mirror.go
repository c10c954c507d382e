// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// mirror is what the kernel holds, as read at adoption and changed by every
// write that succeeded since. It can hold anything that lb.Tables can, also
// what no reconciler would write.
type mirror struct {
	services map[lb.ServiceID]*service
	// ids leads from a name to the one service that has it by right.
	ids       map[lb.ServicePort]lb.ServiceID
	frontends map[lb.FrontendKey]lb.Frontend
	addresses map[netip.Addr]lb.NodeAddress
	cidrs     map[netip.Prefix]struct{}
	problems  map[lb.Name]lb.Problem
}

// service is all the rows of one service ID.
type service struct {
	id    lb.ServiceID
	name  lb.ServicePort // zero when names has no row
	sides [lb.Sides]side
	options
	members   []lb.Member      // sorted
	sources   []lb.Source      // sorted
	frontends []lb.FrontendKey // those that lead here
}

// side is one side's range and what it leads to.
type side struct {
	lb.Range
	slots []lb.Backend // what the slots hold, in slot order
	// block tells that the slots are allocated to this service. It is false for
	// an empty range, and for a damaged one that points past the end or shares
	// slots with another, other than by being the same as another side's.
	block bool
	// quarantined tells that a damaged range has slots of the block, so that it
	// may not be free when this service leaves it.
	quarantined bool
}

// options is what a lb.ServiceRow has beside the ranges.
type options struct {
	affinity     uint32
	restricted   bool
	nodeAllowed  bool
	outsideLocal bool
}

// row returns a row with these options.
func (o options) row() lb.ServiceRow {
	return lb.ServiceRow{
		Affinity: o.affinity, Restricted: o.restricted, NodeAllowed: o.nodeAllowed, OutsideLocal: o.outsideLocal,
	}
}

func newMirror() mirror {
	return mirror{
		services:  map[lb.ServiceID]*service{},
		ids:       map[lb.ServicePort]lb.ServiceID{},
		frontends: map[lb.FrontendKey]lb.Frontend{},
		addresses: map[netip.Addr]lb.NodeAddress{},
		cidrs:     map[netip.Prefix]struct{}{},
		problems:  map[lb.Name]lb.Problem{},
	}
}

// mirrorOf returns a mirror of t. No service has a block yet.
func mirrorOf(t lb.Tables) mirror {
	m := newMirror()
	maps.Copy(m.addresses, t.NodeAddresses)
	maps.Copy(m.cidrs, t.ServiceCIDRs)
	maps.Copy(m.problems, t.Problems)
	for id, row := range t.Services {
		s := m.service(id)
		s.options = options{row.Affinity, row.Restricted, row.NodeAllowed, row.OutsideLocal}
		for i, r := range row.Sides {
			s.sides[i] = side{Range: r, slots: s.slotsOf(r, t.Slots)}
		}
	}
	for member := range t.Members {
		s := m.service(member.Service)
		s.members = append(s.members, member)
	}
	for source := range t.Sources {
		s := m.service(source.Service)
		s.sources = append(s.sources, source)
	}
	for key, f := range t.Frontends {
		m.setFrontend(key, f)
	}
	for id, name := range t.Names {
		m.service(id).name = name
	}
	for _, s := range m.services {
		slices.SortFunc(s.members, lb.Member.Compare)
		slices.SortFunc(s.sources, lb.Source.Compare)
	}
	return m
}

// slotsOf returns what is in the slots of r, shared with the sides of s that
// have them, too. A slot without a row is left as the zero Backend, which equals
// nothing that could be wanted.
func (s *service) slotsOf(r lb.Range, slots map[uint32]lb.Backend) []lb.Backend {
	for _, other := range s.sides {
		if sameSlots(other.Range, r) {
			return other.slots
		}
	}
	out := make([]lb.Backend, r.Count)
	for i := range out {
		out[i] = slots[r.Base+uint32(i)]
	}
	return out
}

// backends returns what any side of s leads to.
func (s *service) backends() map[lb.Backend]struct{} {
	out := map[lb.Backend]struct{}{}
	for _, side := range s.sides {
		for _, b := range side.slots {
			out[b] = struct{}{}
		}
	}
	return out
}

// tables returns the mirror as tables that share nothing with it.
func (m *mirror) tables() lb.Tables {
	t := lb.NewTables()
	maps.Copy(t.Frontends, m.frontends)
	maps.Copy(t.NodeAddresses, m.addresses)
	maps.Copy(t.ServiceCIDRs, m.cidrs)
	maps.Copy(t.Problems, m.problems)
	for id, s := range m.services {
		if s.name != (lb.ServicePort{}) {
			t.Names[id] = s.name
		}
		if row := s.row(); s.name != (lb.ServicePort{}) || row != (lb.ServiceRow{}) {
			t.Services[id] = row
		}
		for _, side := range s.sides {
			for i, b := range side.slots {
				if b != (lb.Backend{}) {
					t.Slots[side.Base+uint32(i)] = b
				}
			}
		}
		for _, member := range s.members {
			t.Members[member] = struct{}{}
		}
		for _, source := range s.sources {
			t.Sources[source] = struct{}{}
		}
	}
	return t
}

// service returns the rows of id, made if there are none.
func (m *mirror) service(id lb.ServiceID) *service {
	s, ok := m.services[id]
	if !ok {
		s = &service{id: id}
		m.services[id] = s
	}
	return s
}

// named returns the service that has this name by right, or nil.
func (m *mirror) named(name lb.ServicePort) *service {
	if id, ok := m.ids[name]; ok {
		return m.services[id]
	}
	return nil
}

// setFrontend makes key lead where f says.
func (m *mirror) setFrontend(key lb.FrontendKey, f lb.Frontend) {
	m.deleteFrontend(key)
	m.frontends[key] = f
	if f.Service != lb.NoService {
		s := m.service(f.Service)
		s.frontends = append(s.frontends, key)
	}
}

func (m *mirror) deleteFrontend(key lb.FrontendKey) {
	if s := m.target(key); s != nil {
		i := slices.Index(s.frontends, key)
		s.frontends = slices.Delete(s.frontends, i, i+1)
	}
	delete(m.frontends, key)
}

// target returns the service that key leads to, nil when there is no such
// frontend or it leads to none.
func (m *mirror) target(key lb.FrontendKey) *service {
	if id := m.frontends[key].Service; id != lb.NoService {
		return m.services[id]
	}
	return nil
}

// answers tells whether clients on this node get a backend from key, which need
// not exist.
func (m *mirror) answers(key lb.FrontendKey) bool {
	s := m.target(key)
	return s != nil && s.sides[m.frontends[key].Kind.Inside()].Count > 0
}

// row returns the row of the services table.
func (s *service) row() lb.ServiceRow {
	row := s.options.row()
	for i, side := range s.sides {
		row.Sides[i] = side.Range
	}
	return row
}

// resting tells that the kernel holds no more of the service than the last
// generations of its ranges.
func (s *service) resting() bool {
	for _, side := range s.sides {
		if !side.blank() {
			return false
		}
	}
	return s.name == (lb.ServicePort{}) && s.options == (options{}) &&
		len(s.members) == 0 && len(s.sources) == 0 && len(s.frontends) == 0
}

// blank tells that nothing but a generation is left in the range.
func (s side) blank() bool { return s.Range == lb.Range{Generation: s.Generation} }

// holds tells whether the side leads to what is in set, in slots of its own
// service; the order of the slots means nothing.
func (s side) holds(set lb.Set) bool {
	if len(set.Backends) == 0 {
		empty := s.NextEmpty(set.Elsewhere)
		return s.Count == 0 && s.Base == empty.Base
	}
	if !s.block || len(s.slots) != len(set.Backends) {
		return false
	}
	// Only what was adopted can be in another order.
	return slices.Equal(s.slots, set.Backends) || !slices.IsSortedFunc(s.slots, lb.Backend.Compare) &&
		slices.Equal(slices.SortedFunc(slices.Values(s.slots), lb.Backend.Compare), set.Backends)
}

// sameSlots tells whether a and b are the same run of slots, of which there is
// at least one.
func sameSlots(a, b lb.Range) bool { return a.Count > 0 && a.Base == b.Base && a.Count == b.Count }

// abandoned returns the blocks that sides had before and have no more, for
// others to use.
func (s *service) abandoned(before [lb.Sides]side) []lb.Range {
	var out []lb.Range
	for i, old := range before {
		same := func(o side) bool { return sameSlots(o.Range, old.Range) }
		if old.block && !old.quarantined && !slices.ContainsFunc(before[:i], same) && !slices.ContainsFunc(s.sides[:], same) {
			out = append(out, old.Range)
		}
	}
	return out
}

// outranks tells which of two services with one name is the one to keep: the
// one that more frontends lead to.
func (s *service) outranks(o *service) bool {
	return cmp.Or(cmp.Compare(len(o.frontends), len(s.frontends)), cmp.Compare(s.id, o.id)) < 0
}

// row is what tables have one of for each member or source.
type row[T any] interface {
	comparable
	Compare(T) int
}

// without returns what is in a and not in b, both sorted.
func without[T row[T]](a, b []T) []T {
	var out []T
	for _, x := range a {
		for len(b) > 0 && b[0].Compare(x) < 0 {
			b = b[1:]
		}
		if len(b) == 0 || b[0] != x {
			out = append(out, x)
		}
	}
	return out
}

// union returns what is in a or b, sorted, without duplicates.
func union[T row[T]](a, b []T) []T {
	out := slices.Concat(a, b)
	slices.SortFunc(out, T.Compare)
	return slices.Compact(out)
}
