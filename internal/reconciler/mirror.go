// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"cmp"
	"maps"
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
	problems  map[lb.Name]lb.Problem
}

// service is all the rows of one service ID.
type service struct {
	id    lb.ServiceID
	name  lb.ServicePort // zero when names has no row
	rng   lb.Range
	slots []lb.Backend // what the slots of rng hold, in slot order
	// block tells that the slots of rng are allocated to this service. It is
	// false for an empty range, and for a damaged one that shares slots with
	// another or points past the end.
	block     bool
	members   []lb.Backend     // sorted
	frontends []lb.FrontendKey // those that lead here
}

func newMirror() mirror {
	return mirror{
		services:  map[lb.ServiceID]*service{},
		ids:       map[lb.ServicePort]lb.ServiceID{},
		frontends: map[lb.FrontendKey]lb.Frontend{},
		problems:  map[lb.Name]lb.Problem{},
	}
}

// mirrorOf returns a mirror of t. No service has a block yet.
func mirrorOf(t lb.Tables) mirror {
	m := newMirror()
	maps.Copy(m.problems, t.Problems)
	for id, rng := range t.Services {
		s := m.service(id)
		s.rng = rng
		s.slots = make([]lb.Backend, rng.Count)
		for i := range s.slots {
			// A slot without a row is left as the zero Backend, which equals
			// nothing that could be wanted.
			s.slots[i] = t.Slots[rng.Base+uint32(i)]
		}
	}
	for member := range t.Members {
		s := m.service(member.Service)
		s.members = append(s.members, member.Backend)
	}
	for key, f := range t.Frontends {
		m.setFrontend(key, f)
	}
	for id, name := range t.Names {
		m.service(id).name = name
	}
	for _, s := range m.services {
		slices.SortFunc(s.members, lb.Backend.Compare)
	}
	return m
}

// tables returns the mirror as tables that share nothing with it.
func (m *mirror) tables() lb.Tables {
	t := lb.NewTables()
	maps.Copy(t.Frontends, m.frontends)
	maps.Copy(t.Problems, m.problems)
	for id, s := range m.services {
		if s.name != (lb.ServicePort{}) {
			t.Names[id] = s.name
		}
		if s.name != (lb.ServicePort{}) || s.rng != (lb.Range{}) {
			t.Services[id] = s.rng
		}
		for i, b := range s.slots {
			if b != (lb.Backend{}) {
				t.Slots[s.rng.Base+uint32(i)] = b
			}
		}
		for _, b := range s.members {
			t.Members[lb.Member{Service: id, Backend: b}] = struct{}{}
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

// resting tells that the kernel holds no more of the service than the last
// generation of its range.
func (s *service) resting() bool {
	return s.name == (lb.ServicePort{}) && s.rng.Count == 0 && len(s.members) == 0 && len(s.frontends) == 0
}

// holds tells whether the service's slots hold these backends, sorted; the
// order of the slots means nothing.
func (s *service) holds(backends []lb.Backend) bool {
	if len(s.slots) != len(backends) {
		return false
	}
	if len(backends) == 0 || s.block && slices.Equal(s.slots, backends) {
		return true
	}
	return s.block && slices.Equal(slices.SortedFunc(slices.Values(s.slots), lb.Backend.Compare), backends)
}

// outranks tells which of two services with one name is the one to keep: the
// one that more frontends lead to.
func (s *service) outranks(o *service) bool {
	return cmp.Or(cmp.Compare(len(o.frontends), len(s.frontends)), cmp.Compare(s.id, o.id)) < 0
}

// usable tells whether clients of s, which may be nil, get a backend.
func (s *service) usable() bool { return s != nil && s.rng.Count > 0 }

// without returns what is in a and not in b, both sorted.
func without(a, b []lb.Backend) []lb.Backend {
	var out []lb.Backend
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
func union(a, b []lb.Backend) []lb.Backend {
	out := slices.Concat(a, b)
	slices.SortFunc(out, lb.Backend.Compare)
	return slices.Compact(out)
}
