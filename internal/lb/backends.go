// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"slices"
)

// candidate is one copy of a backend: what one slice says about it.
type candidate struct {
	Backend
	ready, serving, terminating bool
}

// compare orders candidates by backend and then by which copy counts: one
// that is not terminating, then one that is ready. Copies that are still equal
// keep their order.
func (c candidate) compare(o candidate) int {
	return cmp.Or(c.Backend.Compare(o.Backend),
		compareBool(c.terminating, o.terminating), compareBool(o.ready, c.ready))
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// backends works out the backends of sp, nil when there is no such service
// port, and notes in s.cut how many were left out.
func (s *Store) backends(sp ServicePort) *Backends {
	delete(s.cut, sp)
	if !s.services[sp.Service].has(sp) {
		return nil
	}
	found := s.scratch[:0]
	for _, slice := range s.endpoints[sp.Service] {
		if slice.Family == sp.Family {
			found = slice.collect(found, sp)
		}
	}
	// Slices come in the order of their names and the sort is stable, so of
	// equal copies the one in the first slice counts.
	slices.SortStableFunc(found, candidate.compare)
	found = slices.CompactFunc(found, func(a, b candidate) bool { return a.Backend == b.Backend })
	s.scratch = found[:0]

	b := categorize(found)
	if n := len(b.Eligible) - MaxBackends; n > 0 {
		s.cut[sp] = n
		b.Eligible = slices.Clip(b.Eligible[:MaxBackends])
	}
	return b
}

// has tells whether sp is one of the Service's service ports.
func (svc Service) has(sp ServicePort) bool {
	for have := range svc.servicePorts {
		if have == sp {
			return true
		}
	}
	return false
}

// collect appends the slice's endpoints for sp, once for each number that sp's
// port has here.
func (s Slice) collect(to []candidate, sp ServicePort) []candidate {
	for _, port := range s.Ports {
		if port.Name != sp.Port || port.Protocol != sp.Protocol {
			continue
		}
		for _, e := range s.Endpoints {
			to = append(to, candidate{
				Backend:     Backend{Addr: e.Addr, Port: port.Number},
				ready:       e.Ready,
				serving:     e.Serving,
				terminating: e.Terminating,
			})
		}
	}
	return to
}

// categorize says which backends may get new clients and which may keep those
// they have. The rule is that of kube-proxy's CategorizeEndpoints (KEP-1669):
// the ready ones or, when none is ready, those that serve while they terminate.
// The two lists share memory when they are equal, which they nearly always are.
func categorize(found []candidate) *Backends {
	anyReady := slices.ContainsFunc(found, func(c candidate) bool { return c.ready })
	eligible := func(c candidate) bool {
		if anyReady {
			return c.ready
		}
		return c.serving && c.terminating
	}
	b := &Backends{Eligible: pick(found, eligible)}
	b.Serving = b.Eligible
	serving := func(c candidate) bool { return c.serving || eligible(c) }
	if count(found, serving) > len(b.Eligible) {
		b.Serving = pick(found, serving)
	}
	return b
}

// pick returns the backends for which keep holds, nil when there is none.
func pick(found []candidate, keep func(candidate) bool) []Backend {
	n := count(found, keep)
	if n == 0 {
		return nil
	}
	out := make([]Backend, 0, n)
	for _, c := range found {
		if keep(c) {
			out = append(out, c.Backend)
		}
	}
	return out
}

func count(found []candidate, keep func(candidate) bool) int {
	n := 0
	for _, c := range found {
		if keep(c) {
			n++
		}
	}
	return n
}

// equal compares two sets of backends; nil, a service port that does not
// exist, equals only nil.
func (b *Backends) equal(o *Backends) bool {
	if b == nil || o == nil {
		return b == o
	}
	return slices.Equal(b.Eligible, o.Eligible) && slices.Equal(b.Serving, o.Serving)
}
