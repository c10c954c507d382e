// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/metrics"
	"github.com/fairlead-lb/fairlead/internal/sockets"
)

// askWalk has stale sockets looked for. In tables that are not filled yet no backend
// serves.
func (a *agent) askWalk(answered []lb.FrontendKey) {
	if !a.filled.isGiven() {
		return
	}
	if a.walks {
		a.ender.Ask(sockets.Request{Answered: answered, Ticket: a.ticket})
		return
	}
	// What sockets remember cannot be seen, and it does not matter: for a
	// datagram VIP, service and member must all agree, and whether a connected
	// socket's backend has gone is what cannot be found out here anyway.
	a.freeIDs()
}

// found is what a search has found to remember backends of services.
type found struct {
	ticket uint64                // of the question it answers
	inUse  map[lb.ServiceID]bool // nil when that could not be found out
}

// freeIDs lets the IDs of services that are gone be used again, once neither
// sockets nor flows remember them. Programs of another version may still make
// connections to services that are gone for us.
func (a *agent) freeIDs() {
	if !a.alone.isGiven() {
		return
	}
	for _, search := range []struct {
		done bool
		found
	}{{a.walks, a.bySockets}, {a.sweeps, a.byFlows}} {
		// An ID that came to rest after the search began may be in use unseen.
		if search.done && (search.inUse == nil || search.ticket != a.ticket) {
			return
		}
	}
	a.reconciler.FreeIDs(func(id lb.ServiceID) bool { return a.bySockets.inUse[id] || a.byFlows.inUse[id] })
}

// walked takes the result of a walk.
func (a *agent) walked(r sockets.Report) {
	a.metrics.SocketsEnded.WithLabelValues(metrics.ReasonBackendGone).Add(float64(r.Gone))
	a.metrics.SocketsEnded.WithLabelValues(metrics.ReasonBackendCame).Add(float64(r.Came))
	if r.Gone+r.Came > 0 {
		a.log.Info("ended UDP sockets so that they connect anew",
			logfield.BackendGone(r.Gone), logfield.BackendCame(r.Came))
	}
	if r.Err != nil {
		a.metrics.SocketWalksFailed.Inc()
		if !a.walkFailing {
			a.log.Warn("looking for stale UDP sockets failed", logfield.Error(r.Err))
		}
		a.walkFailing = true
	} else if a.walkFailing {
		a.walkFailing = false
		a.log.Info("looking for stale UDP sockets works again")
	}
	a.bySockets = found{r.Ticket, r.InUse}
	a.freeIDs()
}

// forgetAffinities deletes the entries of clients whose backend has left every
// set of its service, or whose service has no affinity any more. No program uses
// them, but if the backend came back its clients would come back to it. So it
// cannot be put off: the next batch may bring the backend.
func (a *agent) forgetAffinities() {
	if !a.filled.isGiven() {
		return
	}
	n, err := a.datapath.ForgetAffinities(func(e datapath.AffinityEntry) bool {
		for side := range lb.Side(lb.Sides) {
			if a.reconciler.HasMember(lb.Member{Service: e.Service, Backend: e.Backend, Use: lb.UseOn(side)}) {
				return false
			}
		}
		return true
	})
	if err != nil {
		a.log.Warn("clients of backends that are gone cannot be forgotten", logfield.Error(err))
	}
	a.log.Debug("affinities forgotten", logfield.Count(n))
}
