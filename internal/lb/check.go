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
//   - a range that has slots without a row or shares slots with another range,
//   - a backend of another family than its service, or missing in members
//     where the service's clients remember it,
//   - a service with backends but no name, or a name or member without a
//     service.
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
		if name, ok := t.Names[m.Service]; !ok || !name.Protocol.Remembers() {
			errs = append(errs, fmt.Errorf("member %v: nobody remembers backends of service %d", m.Backend, m.Service))
		}
	}
	return errs
}

func (t Tables) checkFrontends() []error {
	var errs []error
	for _, key := range slices.SortedFunc(maps.Keys(t.Frontends), FrontendKey.Compare) {
		id := t.Frontends[key].Service
		name, named := t.Names[id]
		_, exists := t.Services[id]
		switch {
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
		r := t.Services[id]
		name, named := t.Names[id]
		if !named && r.Count > 0 {
			errs = append(errs, fmt.Errorf("service %d: has backends but no name", id))
		}
		for i := r.Base; i < r.Base+uint32(r.Count); i++ {
			b, ok := t.Slots[i]
			if !ok {
				errs = append(errs, fmt.Errorf("service %d: slot %d does not exist", id, i))
				continue
			}
			if named && FamilyOf(b.Addr) != name.Family {
				errs = append(errs, fmt.Errorf("service %d: %v has backend %v", id, name, b))
			}
			if _, member := t.Members[Member{id, b}]; !member && name.Protocol.Remembers() {
				errs = append(errs, fmt.Errorf("service %d: backend %v is not in members", id, b))
			}
		}
	}
	return errs
}

// checkOverlap reports each range that begins before an earlier one ends.
func (t Tables) checkOverlap() []error {
	var errs []error
	ids := slices.DeleteFunc(slices.Collect(maps.Keys(t.Services)), func(id ServiceID) bool {
		return t.Services[id].Count == 0
	})
	slices.SortFunc(ids, func(a, b ServiceID) int {
		return cmp.Or(cmp.Compare(t.Services[a].Base, t.Services[b].Base), cmp.Compare(a, b))
	})
	var end uint32
	var before ServiceID
	for _, id := range ids {
		r := t.Services[id]
		if r.Base < end {
			errs = append(errs, fmt.Errorf("service %d: shares slot %d with service %d", id, r.Base, before))
		}
		if e := r.Base + uint32(r.Count); e > end {
			end, before = e, id
		}
	}
	return errs
}
