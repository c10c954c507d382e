// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import "slices"

// Losses compares what the store says with t, the tables as they are: have is how
// many Services lead to a backend in t, and lost how many of these would lead to
// none any more, on any of their ports and for no client.
func (s *Store) Losses(t Tables) (lost, have int) {
	keeps := map[Name]bool{}
	for id, sp := range t.Names {
		if _, known := keeps[sp.Service]; !known && t.Services[id].serves() {
			keeps[sp.Service] = s.serves(sp.Service)
		}
	}
	for _, keeps := range keeps {
		if !keeps {
			lost++
		}
	}
	return lost, len(keeps)
}

// serves tells whether a client of some side gets a backend.
func (r ServiceRow) serves() bool {
	return slices.ContainsFunc(r.Sides[:], func(r Range) bool { return r.Count > 0 })
}

// serves tells whether a client of some port and side of a Service gets a backend.
func (s *Store) serves(name Name) bool {
	for sp := range s.services[name].servicePorts {
		b := s.backends(sp)
		if slices.ContainsFunc(b.Sides[:], func(set Set) bool { return len(set.Backends) > 0 }) {
			return true
		}
	}
	return false
}
