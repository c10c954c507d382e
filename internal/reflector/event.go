// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package reflector turns what a source of Services and EndpointSlices says
// into events in our own words. It is the only importer of client-go; the words
// Service and EndpointSlice of the Kubernetes API stop here.
package reflector

import (
	"context"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Event is one thing a source says. Events of one source arrive in order.
type Event interface{ isEvent() }

// ServicesReplaced is a complete list: Services that are not in it are gone.
// The first one says that the source has synced its Services.
type ServicesReplaced struct{ Services []lb.Service }

// SlicesReplaced is a complete list: slices that are not in it are gone. The
// first one says that the source has synced its EndpointSlices.
type SlicesReplaced struct{ Slices []lb.Slice }

// ServiceSet is a Service that is new or has changed.
type ServiceSet struct{ Service lb.Service }

// ServiceGone is a Service that was deleted, or is not ours to serve any more.
type ServiceGone struct{ Name lb.Name }

// SliceSet is an EndpointSlice that is new or has changed.
type SliceSet struct{ Slice lb.Slice }

// SliceGone is an EndpointSlice that was deleted or does not count any more.
type SliceGone struct{ Name lb.Name }

// Warning is something wrong in what a source gave that a person should mend.
// What it concerns was left out; everything else lives. A warning is sent once
// for as long as it stays the same.
type Warning struct {
	Object string // "Service ns/name", "EndpointSlice ns/name" or a file name
	Text   string // what is wrong and what was left out, one line
}

func (ServicesReplaced) isEvent() {}
func (SlicesReplaced) isEvent()   {}
func (ServiceSet) isEvent()       {}
func (ServiceGone) isEvent()      {}
func (SliceSet) isEvent()         {}
func (SliceGone) isEvent()        {}
func (Warning) isEvent()          {}

// Source gives events until ctx ends.
type Source interface {
	// Run sends events until ctx ends, then returns nil. It returns an error
	// only when it cannot start: a missing directory, an API server that
	// cannot be reached or refuses us. Later failures are retried for ever.
	Run(ctx context.Context, events chan<- Event) error
}
