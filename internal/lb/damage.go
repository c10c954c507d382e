// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"fmt"
	"net/netip"
	"slices"
)

// Damage is what one of the kernel's tables has that it should not have, or not
// so, and what it lacks.
type Damage struct {
	Table string // as /metrics calls it
	Rows  int
	// Examples name some of the rows, sorted.
	Examples []string
}

// damageExamples bounds Damage.Examples.
const damageExamples = 5

// Damages returns the tables in which t, what the kernel holds, differs from want,
// in the order they are written in. Slots count where a range leads to them.
func (t Tables) Damages(want Tables) []Damage {
	of := func(id ServiceID) string {
		name, ok := want.Names[id]
		if !ok {
			name, ok = t.Names[id]
		}
		if !ok {
			return "service ID " + itoa(uint32(id))
		}
		return name.String()
	}
	leads := func(k FrontendKey) string {
		f, ok := want.Frontends[k]
		if !ok {
			f = t.Frontends[k]
		}
		if f.Service == NoService {
			return k.String()
		}
		return k.String() + " of " + of(f.Service)
	}
	backend := func(i uint32) string {
		b, ok := want.Slots[i]
		if !ok {
			b = t.Slots[i]
		}
		return fmt.Sprintf("%d for %v", i, b)
	}
	all := []Damage{
		damage("members", t.Members, want.Members, func(m Member) string {
			return fmt.Sprintf("%v of %s", m.Backend, of(m.Service))
		}),
		damage("slots", t.Slots, want.Slots, backend),
		damage("source_ranges", t.Sources, want.Sources, func(s Source) string {
			return fmt.Sprintf("%v of %s", s.Prefix, of(s.Service))
		}),
		damage("services", t.Services, want.Services, of),
		damage("names", t.Names, want.Names, of),
		damage("frontends", t.Frontends, want.Frontends, leads),
		damage("node_addresses", t.NodeAddresses, want.NodeAddresses, netip.Addr.String),
		damage("service_cidrs", t.ServiceCIDRs, want.ServiceCIDRs, netip.Prefix.String),
		damage("problems", t.Problems, want.Problems, Name.String),
	}
	return slices.DeleteFunc(all, func(d Damage) bool { return d.Rows == 0 })
}

// damage compares one table. Rows are named as name says.
func damage[K, V comparable](table string, held, want map[K]V, name func(K) string) Damage {
	d := Damage{Table: table}
	add := func(k K) {
		d.Rows++
		if len(d.Examples) < damageExamples {
			d.Examples = append(d.Examples, name(k))
		}
	}
	for k, v := range held {
		if other, ok := want[k]; !ok || other != v {
			add(k)
		}
	}
	for k := range want {
		if _, ok := held[k]; !ok {
			add(k)
		}
	}
	slices.Sort(d.Examples)
	return d
}
