// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/health"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/metrics"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/reflector"
	"github.com/fairlead-lb/fairlead/internal/sockets"
)

const (
	// gatherFor is how long a burst of events is gathered. The first event after
	// quiet is not held back.
	gatherFor = 20 * time.Millisecond
	// stuckAfter is how long a change may wait before the node counts as
	// unhealthy: kube-proxy's two sync periods.
	stuckAfter = time.Minute
	// Failed services are tried again after retryFirst, then twice that, and so
	// on up to retryLast.
	retryFirst = time.Second
	retryLast  = time.Minute
)

// Config says what an agent serves and how.
type Config struct {
	Source reflector.Source
	// CgroupRoot is the cgroup2 directory to attach to; empty for the node's own
	// root.
	CgroupRoot string
	BPFRoot    string
	Sizes      datapath.Sizes
	// Addresses to listen on, host:port; empty for none.
	HealthzAddress string
	MetricsAddress string
	// RepairEvery is the time between two comparisons of the kernel with what is
	// wanted. Above zero.
	RepairEvery time.Duration
	Version     string
}

// agent is the one goroutine's state.
type agent struct {
	log        *zap.Logger
	datapath   *datapath.Datapath
	store      *lb.Store
	reconciler *reconciler.Reconciler
	ender      *sockets.Ender
	health     *health.Tracker
	metrics    *metrics.Metrics
	state      datapath.AgentState

	servicesSynced, slicesSynced bool
	synced                       bool // the first complete apply is in the kernel
	fresh                        bool // the kernel held nothing when we started
	lastApply                    time.Time
	failing                      map[lb.Name]string // what has been logged of it
	ticket                       uint64             // counts applies that deleted something
	walkFailing                  bool
	walks                        bool // whether stale sockets can be found at all

	repairEvery time.Duration

	retry      *time.Timer
	retryAt    time.Time     // when the timer is armed for, zero when it is not
	retryAfter time.Duration // the next pause
}

// Run serves until ctx ends and leaves the datapath in place. It returns an
// error, one line, when it cannot start: see datapath.Open, attach and
// reflector.Source.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	cgroup, err := findCgroup(cfg.CgroupRoot, log)
	if err != nil {
		return err
	}
	dp, err := datapath.Open(datapath.Config{Root: cfg.BPFRoot, Sizes: cfg.Sizes, CgroupID: cgroup.ID})
	if err != nil {
		return err
	}
	defer func() { _ = dp.Close() }() // only descriptors, and we are leaving
	if len(dp.Resized) > 0 {
		log.Warn("pinned maps keep their size; run fairlead cleanup to let them be made anew",
			logfield.Maps(dp.Resized))
	}
	if dp.NoIterators != nil {
		log.Warn("UDP sockets with dead backends cannot be found on this kernel; their owners must reconnect by themselves",
			logfield.Error(dp.NoIterators))
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	a, reports, err := newAgent(ctx, dp, cfg, cgroup, log)
	if err != nil {
		return err
	}
	for _, hook := range attach.Hooks() {
		if err := attach.Attach(cgroup, hook, dp.Program(hook.Program), datapath.LinkPath(cfg.BPFRoot, hook.Name)); err != nil {
			return err
		}
	}
	log.Info("hooks attached", logfield.Version(cfg.Version), logfield.Cgroup(cgroup.Path), logfield.Count(len(attach.Hooks())))
	if a.walks {
		go a.ender.Run(ctx)
	}
	serve(ctx, cfg, a.health, a.metrics, log)

	events := make(chan reflector.Event, 1024)
	ended := make(chan error, 1)
	go func() { ended <- cfg.Source.Run(ctx, events) }()
	go watch(ctx, events, a.health)
	return a.run(ctx, events, reports, ended)
}

// findCgroup returns the cgroup to attach to, and says so when it is not the
// one that everything on the node is below.
func findCgroup(path string, log *zap.Logger) (attach.Cgroup, error) {
	if path == "" {
		return attach.HostCgroup()
	}
	cgroup, err := attach.OpenCgroup(path)
	if err != nil {
		return cgroup, err
	}
	if host, err := attach.HostCgroup(); err == nil && host.ID != cgroup.ID {
		log.Info("only processes below this cgroup are served, not the whole node",
			logfield.Cgroup(cgroup.Path), logfield.NodeCgroup(host.Path))
	}
	return cgroup, nil
}

// newAgent takes up what the kernel holds.
func newAgent(ctx context.Context, dp *datapath.Datapath, cfg Config, cgroup attach.Cgroup, log *zap.Logger) (*agent, <-chan sockets.Report, error) {
	services, slots := dp.Limits()
	a := &agent{
		log: log, datapath: dp,
		store:       lb.NewStore(),
		reconciler:  reconciler.New(dp, reconciler.Limits{Services: services, Slots: slots}),
		health:      health.NewTracker(stuckAfter),
		metrics:     metrics.New(cfg.Version, kernelMetrics{dp}),
		failing:     map[lb.Name]string{},
		walks:       dp.NoIterators == nil,
		retry:       time.NewTimer(time.Hour),
		retryAfter:  retryFirst,
		repairEvery: cfg.RepairEvery,
		state: datapath.AgentState{
			Started: time.Now(), CgroupID: cgroup.ID, PID: os.Getpid(), Version: cfg.Version,
		},
	}
	a.retry.Stop()
	reports := make(chan sockets.Report, 1)
	a.ender = sockets.NewEnder(dp, func(r sockets.Report) {
		select {
		case reports <- r:
		case <-ctx.Done():
		}
	})
	held, err := dp.Load()
	if err != nil {
		return nil, nil, fmt.Errorf("read what the kernel holds: %w", err)
	}
	a.reconciler.Adopt(held)
	a.fresh = len(held.Names) == 0
	log.Info("adopted", logfield.Frontends(len(held.Frontends)), logfield.Services(len(held.Names)))
	if err := dp.SetAgentState(a.state); err != nil {
		return nil, nil, err
	}
	return a, reports, nil
}

// run is the agent's goroutine.
func (a *agent) run(ctx context.Context, events <-chan reflector.Event, reports <-chan sockets.Report, ended <-chan error) error {
	repair := time.NewTicker(a.repairEvery)
	defer repair.Stop()
	for {
		select {
		case <-ctx.Done():
			a.log.Info("stopping; the datapath stays in place")
			return nil
		case err := <-ended:
			if err != nil || ctx.Err() != nil {
				return err
			}
			return errors.New("the source of Services has ended")
		case ev := <-events:
			start := time.Now()
			a.take(ev)
			a.gather(ctx, events)
			a.apply(start)
		case <-a.retry.C:
			a.retryAt = time.Time{}
			a.retryAfter = min(2*a.retryAfter, retryLast)
			a.finish(time.Now(), a.reconciler.Retry(), false)
		case <-repair.C:
			a.repair()
		case r := <-reports:
			a.walked(r)
		}
	}
}

// watchEvery is how often watch looks.
const watchEvery = 5 * time.Second

// watch tells the health tracker of events that nobody takes: an agent that is
// stuck cannot say so itself.
func watch(ctx context.Context, events <-chan reflector.Event, h *health.Tracker) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if len(events) > 0 {
				h.Queued()
			}
		}
	}
}

// gather takes what else has arrived. After quiet that is all; in a burst it
// waits, so that many changes share one apply.
func (a *agent) gather(ctx context.Context, events <-chan reflector.Event) {
	until := time.NewTimer(time.Until(a.lastApply.Add(gatherFor)))
	defer until.Stop()
	for quiet := false; !quiet; {
		select {
		case ev := <-events:
			a.take(ev)
		case <-ctx.Done():
			return
		case <-until.C:
			quiet = true
		}
	}
	// What is there already costs nothing to take along.
	for range len(events) {
		a.take(<-events)
	}
}

// take enters one event into the store.
func (a *agent) take(ev reflector.Event) {
	switch ev := ev.(type) {
	case reflector.ServicesReplaced:
		a.store.ReplaceServices(ev.Services)
		a.servicesSynced = true
		a.metrics.ServiceChanges.Add(float64(len(ev.Services)))
	case reflector.SlicesReplaced:
		a.store.ReplaceSlices(ev.Slices)
		a.slicesSynced = true
		a.metrics.EndpointChanges.Add(float64(len(ev.Slices)))
	case reflector.ServiceSet:
		a.store.SetService(ev.Service)
		a.metrics.ServiceChanges.Inc()
	case reflector.ServiceGone:
		a.store.DeleteService(ev.Name)
		a.metrics.ServiceChanges.Inc()
	case reflector.SliceSet:
		a.store.SetSlice(ev.Slice)
		a.metrics.EndpointChanges.Inc()
	case reflector.SliceGone:
		a.store.DeleteSlice(ev.Name)
		a.metrics.EndpointChanges.Inc()
	case reflector.Warning:
		a.metrics.Warnings.Inc()
		a.log.Warn("left out", logfield.Object(ev.Object), logfield.Reason(ev.Text))
		return
	}
	a.metrics.QueuedTimestamp.SetToCurrentTime()
	a.health.Queued()
}

// apply brings the kernel up to date. Nothing is written, and so nothing
// deleted, before Services and EndpointSlices have both arrived as a whole.
func (a *agent) apply(start time.Time) {
	switch {
	case !a.servicesSynced || !a.slicesSynced:
		return
	case !a.synced:
		r := a.reconciler.ApplyAll(a.store.All())
		a.synced = true
		a.finish(start, r, true)
		a.log.Info("synced", logfield.Writes(r.Writes+r.Deletes), logfield.Took(time.Since(a.state.Started)))
		a.askWalk(nil)
	default:
		if delta := a.store.Changes(); !delta.Empty() {
			a.finish(start, a.reconciler.Apply(delta), false)
		} else {
			a.health.Applied()
		}
	}
}

// repair compares what the kernel really holds with what is wanted.
func (a *agent) repair() {
	if !a.synced {
		return
	}
	start := time.Now()
	held, err := a.datapath.Load()
	if err != nil {
		a.log.Warn("repair: the kernel's tables cannot be read", logfield.Error(err))
		return
	}
	// Against what we have written, not against what is wanted: a Service that
	// cannot be written is no damage.
	if n := held.Differences(a.reconciler.Tables()); n > 0 {
		a.metrics.RepairedRows.Add(float64(n))
		a.log.Warn("rows were missing or wrong in the kernel; repairing them", logfield.Count(n))
	}
	a.reconciler.Adopt(held)
	r := a.reconciler.ApplyAll(a.store.All())
	a.finish(start, r, true)
	a.askWalk(nil)
}

// finish does what follows from an apply.
func (a *agent) finish(start time.Time, r reconciler.Result, full bool) {
	a.lastApply = time.Now()
	a.health.Applied()
	a.metrics.Synced(start, full)
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
	if r.Deletes > 0 || len(r.Answered) > 0 {
		a.askWalk(r.Answered)
	}
	a.state.Synced = a.lastApply
	if err := a.datapath.SetAgentState(a.state); err != nil {
		a.log.Warn("status cannot be updated", logfield.Error(err))
	}
}

// logFailures logs the first failure of a Service and its end, not each try.
func (a *agent) logFailures(failed map[lb.Name]error) {
	for name, err := range failed {
		if a.failing[name] != err.Error() {
			a.failing[name] = err.Error()
			a.log.Error("service cannot be programmed; others go on", logfield.Service(name), logfield.Error(err))
		}
	}
	for name := range a.failing {
		if failed[name] == nil {
			delete(a.failing, name)
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

// askWalk has stale sockets looked for.
func (a *agent) askWalk(answered []lb.FrontendKey) {
	if a.walks {
		a.ender.Ask(sockets.Request{Answered: answered, Ticket: a.ticket})
		return
	}
	// What sockets remember cannot be seen, and it does not matter: for a
	// datagram VIP, service and member must all agree, and whether a connected
	// socket's backend has gone is what cannot be found out here anyway.
	a.reconciler.FreeIDs(func(lb.ServiceID) bool { return false })
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
	// An ID that came to rest after the walk began may be in use unseen.
	if r.InUse != nil && r.Ticket == a.ticket {
		a.reconciler.FreeIDs(func(id lb.ServiceID) bool { return r.InUse[id] })
	}
}

// kernelMetrics gives the metrics package the datapath's numbers.
type kernelMetrics struct{ *datapath.Datapath }

// Events implements metrics.Kernel.
func (k kernelMetrics) Events() (map[string]uint64, error) {
	counters, err := k.Counters()
	if err != nil {
		return nil, err
	}
	out := make(map[string]uint64, len(counters))
	for _, c := range counters {
		out[c.Name] = c.Value
	}
	return out, nil
}
