// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// Check returns what a reader of the tables could stumble over, nil when there
// is nothing:
//
//   - a frontend that leads nowhere, or to a service of another protocol or
//     family,
//   - a range that has slots without a row, or shares some with another range
//     (two sides of one service may have the same block),
//   - a backend of another family than its service, or missing in members
//     where the service's clients remember it,
//   - a service with backends but no name, or a name, member or source without
//     a service that has a use for it.
//
// The order of the result is stable.
func (t Tables) Check() []error {
	errs := t.checkFrontends()
	errs = append(errs, t.checkServices()...)
	errs = append(errs, t.checkOverlap()...)
	for _, id := range slices.Sorted(maps.Keys(t.Names)) {
		if _, ok := t.Services[id]; !ok {
			errs = append(errs, fmt.Errorf("name %v: service %d does not exist", t.Names[id], id))
		}
	}
	for _, m := range slices.SortedFunc(maps.Keys(t.Members), Member.Compare) {
		if !t.remembers(m.Service, m.Use) {
			errs = append(errs, fmt.Errorf("member %v (%v): nobody remembers backends of service %d", m.Backend, m.Use, m.Service))
		}
	}
	for _, src := range slices.SortedFunc(maps.Keys(t.Sources), Source.Compare) {
		if name, ok := t.Names[src.Service]; !ok || !t.Services[src.Service].Restricted || name.Family != FamilyOf(src.Prefix.Addr()) {
			errs = append(errs, fmt.Errorf("source %v: means nothing to service %d", src.Prefix, src.Service))
		}
	}
	return errs
}

// remembers tells whether a service needs members for that use.
func (t Tables) remembers(id ServiceID, use Use) bool {
	name, named := t.Names[id]
	if use == UseServing {
		return named && name.Protocol.Remembers()
	}
	_, ok := use.Side()
	return named && ok && t.Services[id].Affinity > 0
}

func (t Tables) checkFrontends() []error {
	var errs []error
	for _, key := range slices.SortedFunc(maps.Keys(t.Frontends), FrontendKey.Compare) {
		id := t.Frontends[key].Service
		name, named := t.Names[id]
		_, exists := t.Services[id]
		switch {
		case t.Frontends[key].Kind == KindNodePort != key.VIP.IsUnspecified():
			errs = append(errs, fmt.Errorf("frontend %v: is of kind %v", key, t.Frontends[key].Kind))
		case key.IsWildcard():
			if id != NoService {
				errs = append(errs, fmt.Errorf("frontend %v: leads to service %d, a wildcard belongs to none", key, id))
			}
		case !exists:
			errs = append(errs, fmt.Errorf("frontend %v: service %d does not exist", key, id))
		case !named:
			errs = append(errs, fmt.Errorf("frontend %v: service %d has no name", key, id))
		case name.Protocol != key.Protocol || name.Family != FamilyOf(key.VIP):
			errs = append(errs, fmt.Errorf("frontend %v: leads to %v", key, name))
		}
	}
	return errs
}

func (t Tables) checkServices() []error {
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(t.Services)) {
		for i, r := range t.Services[id].Sides {
			if _, named := t.Names[id]; !named && r.Count > 0 {
				errs = append(errs, fmt.Errorf("service %d: has backends but no name", id))
			}
			errs = append(errs, t.checkRange(id, Side(i), r)...)
		}
	}
	return errs
}

func (t Tables) checkRange(id ServiceID, side Side, r Range) []error {
	var errs []error
	name, named := t.Names[id]
	for i := r.Base; i < r.Base+uint32(r.Count); i++ {
		b, ok := t.Slots[i]
		if !ok {
			errs = append(errs, fmt.Errorf("service %d: slot %d does not exist", id, i))
			continue
		}
		if named && FamilyOf(b.Addr) != name.Family {
			errs = append(errs, fmt.Errorf("service %d: %v has backend %v", id, name, b))
		}
		for _, use := range []Use{UseServing, UseOn(side)} {
			if _, member := t.Members[Member{id, b, use}]; !member && t.remembers(id, use) {
				errs = append(errs, fmt.Errorf("service %d: backend %v is not in members (%v)", id, b, use))
			}
		}
	}
	return errs
}

// checkOverlap reports each block that begins before an earlier one ends.
func (t Tables) checkOverlap() []error {
	type block struct {
		base, end uint32
		id        ServiceID
	}
	var blocks []block
	for id, row := range t.Services {
		for _, r := range row.Sides {
			if r.Count > 0 {
				blocks = append(blocks, block{r.Base, r.Base + uint32(r.Count), id})
			}
		}
	}
	slices.SortFunc(blocks, func(a, b block) int {
		return cmp.Or(cmp.Compare(a.base, b.base), cmp.Compare(a.id, b.id), cmp.Compare(a.end, b.end))
	})
	var errs []error
	var before block
	for _, b := range slices.Compact(blocks) {
		if b.base < before.end {
			errs = append(errs, fmt.Errorf("service %d: shares slot %d with service %d", b.id, b.base, before.id))
		}
		if b.end > before.end {
			before = b
		}
	}
	return errs
}
