// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package reflector turns what a source of Services, EndpointSlices, ServiceCIDRs
// and our own Node says into events in our own words. It is the only importer of
// client-go; the objects of the Kubernetes API stop here.
package reflector

import (
	"context"
	"net/netip"
	"time"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Event is one thing a source says. Events of one source arrive in order.
type Event interface{ isEvent() }

// ServicesReplaced is a complete list: Services that are not in it are gone.
// The first one says that the source has synced its Services.
type ServicesReplaced struct {
	Services []lb.Service
	// Ticket is that of the last Refresh before the list was asked for.
	Ticket uint64
}

// SlicesReplaced is a complete list: slices that are not in it are gone. The
// first one says that the source has synced its EndpointSlices.
type SlicesReplaced struct {
	Slices []lb.Slice
	// Triggers holds, by name of the slice, what Trigger is in SliceSet, for
	// slices that have one which no event has told before. May be nil.
	Triggers map[lb.Name]time.Time
	// Ticket is as in ServicesReplaced.
	Ticket uint64
}

// ServiceSet is a Service that is new or has changed.
type ServiceSet struct{ Service lb.Service }

// ServiceGone is a Service that was deleted, or has no address any more that we
// need to know.
type ServiceGone struct{ Name lb.Name }

// SliceSet is an EndpointSlice that is new or has changed.
type SliceSet struct {
	Slice lb.Slice
	// Trigger is when something happened that changed the slice (a pod became
	// ready, say), as its annotation has it. It is zero when that is unknown or
	// not after the start of the source.
	Trigger time.Time
}

// SliceGone is an EndpointSlice that was deleted or does not count any more.
// Triggers of its Service and family that were not accounted for yet are void.
type SliceGone struct {
	Name lb.Name
	// Service and Family are what the object said last; they have no value for a
	// slice that never counted.
	Service string
	Family  lb.Family
}

// NodeSet is the Node we run on. The first NodeSet or NodeGone says that the
// source has looked for it.
type NodeSet struct{ Node lb.Node }

// NodeGone says that there is no Node object with our name: not yet, or not any
// more.
type NodeGone struct{}

// ServiceCIDRsReplaced is the complete list of the ranges that ClusterIPs are
// taken from, sorted and each once. It is empty when the API server has no such
// resource or does not let us read it.
type ServiceCIDRsReplaced struct{ Prefixes []netip.Prefix }

// Warning is something wrong in what a source gave that a person should mend.
// What it concerns was left out or given its safest meaning; everything else
// lives. A warning is sent once for as long as it stays the same.
type Warning struct {
	Object string // "Service ns/name", "Node name" and the like, or a file name
	Text   string // what is wrong and what was done about it, one line
}

func (ServicesReplaced) isEvent()     {}
func (SlicesReplaced) isEvent()       {}
func (ServiceSet) isEvent()           {}
func (ServiceGone) isEvent()          {}
func (SliceSet) isEvent()             {}
func (SliceGone) isEvent()            {}
func (NodeSet) isEvent()              {}
func (NodeGone) isEvent()             {}
func (ServiceCIDRsReplaced) isEvent() {}
func (Warning) isEvent()              {}

// Source gives events until ctx ends.
type Source interface {
	// Run sends events until ctx ends, then returns nil. It returns an error
	// only when it cannot start: a missing directory, an API server that
	// refuses us. It may be called again then. An API server that does not answer
	// is waited for, and later failures are retried for ever.
	Run(ctx context.Context, events chan<- Event) error
}

// Refresher is a Source that can be asked to look again.
type Refresher interface {
	// Refresh makes the source send all Services and all EndpointSlices anew, as
	// they are now and not as some cache has them. The lists have the ticket that is
	// returned, or that of a later Refresh. They may be long in coming: what cannot
	// be reached is tried again and again. Refresh does not block and may be called
	// from any goroutine.
	Refresh() (ticket uint64)
}

// Remote is a Source that is somewhere else.
type Remote interface {
	// Address returns the URL of what is asked now, and whether that is the
	// configured one. It may be called from any goroutine.
	Address() (url string, configured bool)
}
