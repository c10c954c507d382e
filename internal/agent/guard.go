// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"sync/atomic"
	"time"

	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// guardFrom is how many Services may lose their last endpoint by one list before it
// is held.
const guardFrom = 20

// tooMany tells whether so many of the Services that have endpoints would lose them
// all at once that it is more likely that the list is wrong: a cache that is not
// filled yet, an etcd that is empty, a directory that is just being written.
func tooMany(lost, have int) bool { return lost > guardFrom && 2*lost > have }

// guard keeps the node from being emptied by one list that is wrong. Such a list is
// held, with everything that comes after it, and the source is asked to look again;
// what it says then is done, whatever it is. It asks until it gets an answer, and as
// long as there is none what the kernel holds is the best that is known.
//
// Only complete lists can be held: the first one, which is compared with what the
// kernel holds, and those that follow an interruption. What a watch says, one change
// after the other, is what really happens, and is done at once, however much it
// takes away.
type guard struct {
	source reflector.Refresher // nil when it cannot be asked; nothing is held then

	listed bool   // a complete list has come that nobody has looked at
	ticket uint64 // what the lists have that are waited for; 0 when nothing is held
	since  time.Time
	// holding is holds() for other goroutines.
	holding atomic.Bool
	// The tickets of the last lists.
	servicesTicket, slicesTicket uint64
}

// services takes note of a complete list of Services.
func (g *guard) services(ticket uint64) { g.listed, g.servicesTicket = true, ticket }

// slices takes note of a complete list of EndpointSlices.
func (g *guard) slices(ticket uint64) { g.listed, g.slicesTicket = true, ticket }

// holds tells whether lists are held.
func (g *guard) holds() bool { return g.ticket != 0 }

// answered tells whether the lists that are waited for have come.
func (g *guard) answered() bool {
	return g.servicesTicket >= g.ticket && g.slicesTicket >= g.ticket
}

// held tells whether what the store says must not reach the kernel yet.
func (a *agent) held() bool {
	g := &a.guard
	switch {
	case g.holds() && g.answered():
		a.log.Info("guard: the source has looked again; doing what it says", logfield.Took(time.Since(g.since)))
		a.metrics.GuardHeld.Set(0)
		g.holding.Store(false)
		g.ticket, g.listed = 0, false
	case !g.holds() && g.listed:
		g.listed = false
		a.look()
	}
	if g.holds() && a.applied {
		// What waits on purpose does not make the node unhealthy: it serves.
		a.health.Applied()
	}
	return g.holds()
}

// look decides whether to hold what the store says, and asks the source to look again
// if so.
func (a *agent) look() {
	g := &a.guard
	if g.source == nil {
		return
	}
	lost, have := a.store.Losses(a.reconciler.Tables())
	if !tooMany(lost, have) {
		return
	}
	g.since, g.ticket = time.Now(), g.source.Refresh()
	a.metrics.GuardHeld.Set(1)
	g.holding.Store(true)
	a.metrics.GuardHolds.Inc()
	a.log.Warn("guard: a list would take the last endpoints of many Services at once; "+
		"keeping what the kernel holds until the source has looked again",
		logfield.Lost(lost), logfield.Services(have))
}
