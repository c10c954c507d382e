// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/health"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/metrics"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// apply brings the kernel up to date. Nothing is written, and so nothing
// deleted, before Services and EndpointSlices have both arrived as a whole, nor
// while a list is held.
func (a *agent) apply(start time.Time) {
	switch {
	case !a.synced.complete() || a.held():
		return
	case !a.applied:
		all := a.store.All()
		r := a.makeRoom(a.reconciler.ApplyAll(all))
		a.applied = true
		a.finish(start, r, true)
		a.healthPorts(all, true)
		a.sayRefused(all.Problems)
		a.log.Info("synced", logfield.Writes(r.Writes+r.Deletes), logfield.Took(time.Since(a.state.Started)))
		if a.devices != nil && !a.switching {
			a.devices.ready.give()
		}
		a.takeOver(r)
		a.forgetAffinities()
		a.askWalk(nil)
	default:
		delta := a.store.Changes()
		if delta.Empty() {
			if a.state.Synced.Equal(a.lastApply) { // not while much is broken
				a.health.Applied()
				a.metrics.Settled()
				a.programmed()
			}
			return
		}
		r := a.makeRoom(a.reconciler.Apply(delta))
		a.finish(start, r, false)
		a.healthPorts(delta, false)
		a.takeOver(r)
		a.sayRefused(delta.Problems)
	}
}

// healthPorts brings health check node ports up to date: what they answer, and
// where they are opened, which is where NodePorts are reached, as with kube-proxy.
func (a *agent) healthPorts(delta lb.Delta, first bool) {
	if first || len(delta.NodeAddresses) > 0 {
		a.ports.SetAddresses(a.store.NodePortAddresses())
	}
	if len(delta.Health) == 0 {
		return
	}
	for key, h := range delta.Health {
		if h.Port == 0 {
			delete(a.healths, key)
		} else {
			a.healths[key] = h
		}
	}
	want := make([]health.ServiceHealth, 0, len(a.healths))
	for _, key := range slices.SortedFunc(maps.Keys(a.healths), lb.ServiceFamily.Compare) {
		h := a.healths[key]
		want = append(want, health.ServiceHealth{
			Name: key.Service, Port: h.Port, Family: key.Family, LocalEndpoints: h.Local,
		})
	}
	a.ports.Sync(want)
}

// portReport says that a health check node port cannot be opened, or can at last.
// It may be called from any goroutine.
func portReport(node string, recorder reflector.Recorder, log *zap.Logger) func(health.PortReport) {
	return func(r health.PortReport) {
		if r.Err == nil {
			log.Info("health check node port: no trouble any more", logfield.Service(r.Service), logfield.Address(r.Address.String()))
			return
		}
		log.Warn("health check node port cannot be opened; trying again",
			logfield.Service(r.Service), logfield.Address(r.Address.String()), logfield.Error(r.Err))
		recorder.Service(r.Service, reflector.Notice{
			Warning: true, Reason: "FailedToStartServiceHealthcheck", Action: "Listen",
			Note: fmt.Sprintf("node %s failed to open the health check node port at %v: %v", node, r.Address, r.Err),
		})
	}
}

// finish does what follows from an apply.
func (a *agent) finish(start time.Time, r reconciler.Result, full bool) {
	a.lastApply = time.Now()
	if a.broken(r) {
		a.health.Queued() // the time it is given begins now, if it has not begun
	} else {
		a.health.Applied()
		a.metrics.Synced(start, full)
		a.programmed()
		a.state.Synced = a.lastApply
	}
	a.metrics.FailedServices.Set(float64(len(r.Failed)))
	a.log.Debug("applied", logfield.Writes(r.Writes), logfield.Deletes(r.Deletes), logfield.Took(time.Since(start)))
	a.logFailures(r.Failed)
	a.scheduleRetry(a.reconciler.Pending(), r.Deletes > 0)
	if a.fresh {
		// Whoever served these addresses before us, kube-proxy say, serves the
		// sockets that are connected to them by kernel conntrack.
		r.Answered = nil
		a.fresh = a.reconciler.Pending()
	}
	if r.Deletes > 0 {
		a.ticket++
	}
	if r.Unremembered {
		a.forgetAffinities()
	}
	if r.Deletes > 0 || len(r.Answered) > 0 {
		a.askWalk(r.Answered)
	}
	if r.Deletes > 0 && a.sweeps {
		a.sweeper.Ask(a.ticket)
	}
	if err := a.datapath.SetAgentState(a.state); err != nil {
		a.log.Warn("status cannot be updated", logfield.Error(err))
	}
}

// broken tells that so much could not be written that the node does not do its
// work: most Services, or rows that belong to none. A single Service that does not
// fit is no reason to take the node from all others.
func (a *agent) broken(r reconciler.Result) bool {
	return r.Failed[lb.Name{}] != nil || 2*len(r.Failed) > a.store.Services()
}

// logAtOnce is how many Services are named that fail at once: one cause, a full
// map say, can concern thousands.
const logAtOnce = 20

// logFailures logs the first failure of a Service and its end, not each try.
func (a *agent) logFailures(failed map[lb.Name]error) {
	news := 0
	for _, name := range slices.SortedFunc(maps.Keys(failed), lb.Name.Compare) {
		err := failed[name]
		if a.failing[name] == err.Error() {
			continue
		}
		a.failing[name] = err.Error()
		news++
		switch {
		case name == (lb.Name{}):
			a.log.Error("rows that belong to no Service cannot be written; Services go on", logfield.Error(err))
		case news <= logAtOnce:
			a.log.Error("service cannot be programmed; others go on", logfield.Service(name), logfield.Error(err))
		}
	}
	if news > logAtOnce {
		a.log.Error("more services cannot be programmed; fairlead inspect services says why", logfield.Count(news-logAtOnce))
	}
	for name := range a.failing {
		if failed[name] == nil {
			delete(a.failing, name)
			if name == (lb.Name{}) {
				a.log.Info("rows that belong to no Service are written at last")
				continue
			}
			a.log.Info("service has no problem any more: it is programmed, or gone", logfield.Service(name))
		}
	}
}

// scheduleRetry arms the timer while something is left to do. Other changes do
// not put it off, and room that has just been made brings it forward.
func (a *agent) scheduleRetry(pending, room bool) {
	if !pending || room {
		a.retryAfter = retryFirst
	}
	if !pending {
		a.retryAt = time.Time{}
		a.retry.Stop()
		return
	}
	if at := time.Now().Add(a.retryAfter); a.retryAt.IsZero() || at.Before(a.retryAt) {
		a.retryAt = at
		a.retry.Reset(a.retryAfter)
	}
}

// programmed measures how long the changes of endpoints that are now in the kernel
// took, and says how many services lack a local endpoint.
func (a *agent) programmed() {
	for key, triggers := range a.triggers {
		for _, at := range triggers {
			a.metrics.NetworkProgramming(key.Family, at)
		}
	}
	clear(a.triggers)
	for _, family := range []lb.Family{lb.IPv4, lb.IPv6} {
		n := a.store.NoLocal(family)
		a.metrics.NoLocalEndpoints(metrics.PolicyInternal, family, n.Internal)
		a.metrics.NoLocalEndpoints(metrics.PolicyExternal, family, n.External)
	}
}
