// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Example returns a TCP frontend of some ClusterIP of a family, as the kernel has it,
// and the backends that connections to it are sent to: another one at each call, where
// there are several. A connection to it leaves nothing behind, so its service has no
// affinity. ok is false when there is none.
func (r *Reconciler) Example(family lb.Family) (key lb.FrontendKey, backends []lb.Backend, ok bool) {
	for key, f := range r.have.frontends { // in random order
		if f.Kind != lb.KindClusterIP || key.Protocol != lb.TCP || lb.FamilyOf(key.VIP) != family {
			continue
		}
		s := r.have.target(key)
		if s == nil || s.affinity > 0 || s.restricted || !s.sides[lb.SideClusterIP].block {
			continue
		}
		return key, slices.Clone(s.sides[lb.SideClusterIP].slots), true
	}
	return lb.FrontendKey{}, nil, false
}
