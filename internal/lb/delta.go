// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"net/netip"
)

// Delta says what should be true of everything a batch of events touched. What
// it does not name has not changed.
type Delta struct {
	// Services holds the backends of each service port that changed, nil for
	// one that is gone.
	Services map[ServicePort]*Backends
	// Frontends holds the owner of each frontend that changed. The zero Owner
	// means that nobody has it any more.
	Frontends map[FrontendKey]Owner
	// NodeAddresses holds each address of the node that changed; 0 means that it
	// needs to be known no more.
	NodeAddresses map[netip.Addr]NodeAddress
	// ServiceCIDRs holds each range that has come (true) or gone (false).
	ServiceCIDRs map[netip.Prefix]bool
	// Health holds what the health check of each Service that changed should
	// answer to clients of a family. The zero Health means that it has none any
	// more.
	Health map[ServiceFamily]Health
	// Problems says what is wrong with each Service whose problem changed: a
	// frontend that another Service has, too many backends. "" means that
	// nothing is wrong any more.
	Problems map[Name]Problem
}

func newDelta() Delta {
	return Delta{
		Services:      map[ServicePort]*Backends{},
		Frontends:     map[FrontendKey]Owner{},
		NodeAddresses: map[netip.Addr]NodeAddress{},
		ServiceCIDRs:  map[netip.Prefix]bool{},
		Health:        map[ServiceFamily]Health{},
		Problems:      map[Name]Problem{},
	}
}

// Backends are the backends of one service port and the rules for who gets them.
type Backends struct {
	// Sides holds the set of each side.
	Sides [Sides]Set
	// Serving may keep the clients they have: every endpoint whose condition
	// serving holds, terminating or not, here or elsewhere, and so a superset of
	// all sets. Sorted, without duplicates.
	Serving []Backend
	// Affinity is as in ServiceRow.
	Affinity uint32
	// Restricted and NodeAllowed are as in ServiceRow; Sources are the ranges
	// that are allowed. Sorted, masked, nil unless Restricted.
	Restricted  bool
	NodeAllowed bool
	Sources     []netip.Prefix
	// OutsideLocal is as in ServiceRow.
	OutsideLocal bool
}

// MemberRows returns the rows of Tables.Members for b, the backends of a service
// with this ID and protocol. Sorted.
func (b *Backends) MemberRows(id ServiceID, p Protocol) []Member {
	var out []Member
	add := func(use Use, backends []Backend) {
		for _, backend := range backends {
			out = append(out, Member{Service: id, Backend: backend, Use: use})
		}
	}
	if p.Remembers() {
		add(UseServing, b.Serving)
	}
	if b.Affinity > 0 {
		for side := range Side(Sides) {
			add(UseOn(side), b.Sides[side].Backends)
		}
	}
	return out
}

// SourceRows returns the rows of Tables.Sources for b, the backends of a service
// with this ID. Sorted.
func (b *Backends) SourceRows(id ServiceID) []Source {
	out := make([]Source, 0, len(b.Sources))
	for _, prefix := range b.Sources {
		out = append(out, Source{Service: id, Prefix: prefix})
	}
	return out
}

// Set is the backends that new clients get. Sets of one service port may share
// memory.
type Set struct {
	// Backends are sorted, without duplicates.
	Backends []Backend
	// Elsewhere tells that the set is empty only because of a traffic policy
	// Local.
	Elsewhere bool
}

// Owner is the service port a frontend leads to. For a wildcard frontend only
// Service.Service and Service.Family mean something.
type Owner struct {
	Service ServicePort
	Kind    FrontendKind
}

// Exists tells whether anybody owns the frontend.
func (o Owner) Exists() bool { return o.Kind != 0 }

// ServiceFamily is the part of a Service that has one family.
type ServiceFamily struct {
	Service Name
	Family  Family
}

// Compare orders by Service, then family.
func (s ServiceFamily) Compare(o ServiceFamily) int {
	return cmp.Or(s.Service.Compare(o.Service), cmp.Compare(s.Family, o.Family))
}

// Health is what the health check node port of a Service answers.
type Health struct {
	Port uint16
	// Local is the number of distinct addresses of ready endpoints on this node,
	// all ports together.
	Local int
}

// Empty tells whether the delta names nothing.
func (d Delta) Empty() bool {
	return len(d.Services) == 0 && len(d.Frontends) == 0 && len(d.NodeAddresses) == 0 &&
		len(d.ServiceCIDRs) == 0 && len(d.Health) == 0 && len(d.Problems) == 0
}
