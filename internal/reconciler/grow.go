// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Grow tells that the tables in which numbers are handed out have grown to these
// limits, which are not below those before. What has failed for want of room is tried
// again by Retry.
func (r *Reconciler) Grow(limits Limits) {
	r.limits = limits
	r.ids.Grow(limits.Services)
	r.blocks.Grow(limits.Slots)
}

// Taken returns how many service IDs, ID 0 included, and slots are in use or at rest.
func (r *Reconciler) Taken() Limits {
	return Limits{Services: r.ids.Taken() + 1, Slots: r.blocks.Taken()}
}

// Demand is how many rows the tables have when all that is wanted is in them.
type Demand struct {
	Frontends, Services, Slots, Members, Sources int
}

// Demand goes through all that is wanted. A set of backends that changes needs slots
// twice; that is not in it.
func (r *Reconciler) Demand() Demand {
	d := Demand{Frontends: len(r.want.Frontends), Services: len(r.want.Services) + 1}
	for sp, b := range r.want.Services {
		d.Members += len(b.MemberRows(lb.NoService, sp.Protocol))
		d.Sources += len(b.Sources)
		for i, set := range b.Sides {
			same := func(o lb.Set) bool { return slices.Equal(o.Backends, set.Backends) }
			if !slices.ContainsFunc(b.Sides[:i], same) { // else they share a block
				d.Slots += len(set.Backends)
			}
		}
	}
	return d
}
