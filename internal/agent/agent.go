// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/conntrack"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/flows"
	"github.com/fairlead-lb/fairlead/internal/health"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/metrics"
	"github.com/fairlead-lb/fairlead/internal/privileges"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/reflector"
	"github.com/fairlead-lb/fairlead/internal/sockets"
)

const (
	// gatherFor is how long a burst of events is gathered. The first event after
	// quiet is not held back.
	gatherFor = 20 * time.Millisecond
	// stuckAfter is what Config.StuckAfter is when it is not given.
	stuckAfter = time.Minute
	// Failed services are tried again after retryFirst, then twice that, and so
	// on up to retryLast.
	retryFirst = time.Second
	retryLast  = time.Minute
	// sourceRetry is the pause before a source that could not start is tried again.
	sourceRetry = 10 * time.Second
)

// Config says what an agent serves and how.
type Config struct {
	Source reflector.Source
	// NodeName is the name of this node in the API.
	NodeName string
	// NodeOptional says that the source need not have the Node.
	NodeOptional bool
	NodePorts    lb.NodePorts
	Limits       lb.Limits
	// NodeAddress, when it is valid, takes the place of the Node's address of its
	// family.
	NodeAddress netip.Addr
	// Recorder takes Kubernetes Events.
	Recorder reflector.Recorder
	// CgroupRoot is the cgroup2 directory to attach to; empty for the node's own
	// root.
	CgroupRoot string
	BPFRoot    string
	Sizes      datapath.Sizes
	// Socket is where explain asks, a path; empty for nowhere.
	Socket string
	// Addresses to listen on, host:port; empty for none.
	HealthzAddress string
	MetricsAddress string
	// ListenOrFail makes an address that cannot be had the end of Run; otherwise
	// it is tried again and again.
	ListenOrFail bool
	// Profiling adds /debug/pprof to the metrics' address.
	Profiling bool
	// Configz is what /configz shows, anything that encodes as JSON.
	Configz any
	Packets Packets
	// Conntrack is what the kernel's connection tracking is set to.
	Conntrack conntrack.Settings
	// Lacks are the capabilities that the process does not have and could use.
	Lacks []privileges.Capability
	// StuckAfter is how long a change may wait before the node counts as
	// unhealthy: kube-proxy's two sync periods. 0 for a minute.
	StuckAfter time.Duration
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
	sweeper    *flows.Sweeper
	devices    *devices // nil without a packet path
	guardian   *guardian
	selfProbe  *selfProbe
	proven     proven
	tc         *attach.TC
	health     *health.Tracker
	metrics    *metrics.Metrics
	kernel     kernelMetrics
	state      datapath.AgentState

	source       reflector.Source
	recorder     reflector.Recorder
	root         string // where the datapath is pinned
	lacks        []Lack
	nodeOptional bool
	nodeAddress  netip.Addr
	ports        *health.Servers // of health check node ports
	healths      map[lb.ServiceFamily]lb.Health
	// triggers holds when the changes of endpoints happened that are not in the
	// kernel yet.
	triggers map[lb.ServiceFamily][]time.Time

	synced        synced
	guard         guard
	applied       bool          // the first complete apply is in the kernel
	filled        signal        // the tables say which backends serve
	cgroup        attach.Cgroup // where the hooks are or are to be
	cgroupRoot    string        // as configured
	switching     bool          // programs of another version serve, ours do not yet
	tookOver      bool          // other versions have no hooks any more
	switchFailing string        // what was logged of it last
	alone         signal        // ... nor programs on devices; they have nothing that remembers services
	fresh         bool          // the tables held nothing when we started
	lastApply     time.Time
	failing       map[lb.Name]string // what has been logged of it
	refused       map[lb.Name]string // and of what limits keep from it
	ticket        uint64             // counts applies that deleted something
	walkFailing   bool
	walks         bool // whether stale sockets can be found at all
	bySockets     found
	sweepFailing  bool
	sweeps        bool // whether there may be flows at all
	byFlows       found
	packets       PacketState // where there are no devices

	repairEvery  time.Duration
	clusterCIDRs []netip.Prefix

	// What others send.
	events    chan reflector.Event
	addresses chan []netip.Addr
	reports   chan sockets.Report
	sweepings chan flows.Report
	asks      chan ask

	running   sync.WaitGroup // everything that runs beside the agent's goroutine
	answering sync.RWMutex   // held for reading by every answer to a request
	left      bool           // nobody is answered any more

	growth growth

	retry      *time.Timer
	retryAt    time.Time     // when the timer is armed for, zero when it is not
	retryAfter time.Duration // the next pause
}

// Run serves until ctx ends and leaves the datapath in place. It returns an
// error, one line, when it cannot start: see datapath.Open, attach and, if the
// kernel held nothing, reflector.Source. It can be called again when it has returned.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	cgroup, err := findCgroup(cfg.CgroupRoot, log)
	if err != nil {
		return err
	}
	cookie, err := attach.NetnsCookie()
	if err != nil {
		return err
	}
	dp, err := datapath.Open(datapath.Config{
		Root: cfg.BPFRoot, Sizes: cfg.Sizes, Grow: true, CgroupID: cgroup.ID, HostNetnsCookie: cookie,
		PacketPath: cfg.Packets.On, SNATPorts: cfg.Packets.SNATPorts,
	})
	if err != nil {
		return err
	}
	explainDatapath(dp, log)
	explainLacks(cfg.Lacks, log)
	ctx, stop := context.WithCancel(ctx)
	a := newAgent(ctx, dp, cfg, log)
	defer func() {
		stop()
		a.leave()
	}()
	if err := a.adopt(datapath.AgentState{
		Started: time.Now(), CgroupID: cgroup.ID, NetnsCookie: cookie, PID: os.Getpid(), Version: cfg.Version,
	}); err != nil {
		return err
	}
	a.cgroup, a.cgroupRoot = cgroup, cfg.CgroupRoot
	if err := a.attachAtStart(); err != nil {
		return err
	}
	if err := a.openPackets(cfg.Packets); err != nil {
		return err
	}
	return a.start(ctx, cfg)
}

// start starts everything that runs beside the agent's goroutine, and becomes it.
func (a *agent) start(ctx context.Context, cfg Config) error {
	ended := make(chan error, 3)
	serves := !a.fresh
	a.running.Go(func() { ended <- a.follow(ctx, cfg.Source, serves) })
	a.serve(ctx, cfg, ended)
	if a.walks {
		a.running.Go(func() { a.ender.Run(ctx) })
	}
	if a.sweeps {
		a.running.Go(func() { a.sweep(ctx) })
	}
	if a.devices != nil {
		a.running.Go(func() { a.devices.watch(ctx) })
		a.running.Go(func() { a.devices.run(ctx) })
		if !a.fresh && !a.switching {
			a.devices.ready.give() // the tables serve already
		}
	}
	a.running.Go(func() { a.selfProbe.run(ctx) })
	a.running.Go(func() { watch(ctx, a.events, a.health) })
	a.running.Go(func() { watchAddresses(ctx, a.addresses, a.log) })
	a.running.Go(func() { setConntrack(ctx, cfg.Conntrack, cfg.RepairEvery, a.log) })
	a.running.Go(func() { cfg.Recorder.Run(ctx) })
	cfg.Recorder.Node(reflector.Notice{Reason: "Starting", Action: "StartKubeProxy"})
	return a.run(ctx, ended)
}

// follow runs the source until ctx ends. A source that cannot start is the end of an
// agent that has nothing to keep. One whose tables serve the node keeps them as they
// should be and tries again: what is wrong, credentials that have expired while the
// API server was away, say, can be put right without us.
func (a *agent) follow(ctx context.Context, source reflector.Source, serves bool) error {
	for said := ""; ; {
		err := source.Run(ctx, a.events)
		if err == nil || ctx.Err() != nil || !serves {
			return err
		}
		if text := err.Error(); text != said {
			said = text
			a.log.Error("Services cannot be followed: serving what the kernel holds, and trying again", logfield.Error(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(sourceRetry):
		}
	}
}

// leaveWithin bounds the wait for what runs beside: a search for stale sockets can
// be held up by a task in the kernel.
const leaveWithin = 4 * time.Second

// leave waits until nothing runs any more, then lets go of the datapath: tables
// that are closed are not in memory any more, and another agent may be about to
// begin in this process. What will not end keeps its tables, and with them the
// lock, until the process ends.
func (a *agent) leave() {
	a.ports.Close()
	done := make(chan struct{})
	go func() {
		a.running.Wait()
		if a.guardian != nil {
			a.guardian.close()
		}
		a.answering.Lock()
		a.left = true
		a.answering.Unlock()
		close(done)
	}()
	select {
	case <-done:
		_ = a.datapath.Close() // only descriptors, and we are leaving
	case <-time.After(leaveWithin):
		a.log.Warn("something does not end; leaving it behind")
	}
}

// explainDatapath says what the datapath cannot do here.
func explainDatapath(dp *datapath.Datapath, log *zap.Logger) {
	if len(dp.Resized) > 0 {
		log.Warn("pinned maps keep their size; run fairlead cleanup to let them be made anew",
			logfield.Maps(dp.Resized))
	}
	if dp.NoIterators != nil {
		log.Warn("UDP sockets with dead backends cannot be found on this kernel; their owners must reconnect by themselves",
			logfield.Error(dp.NoIterators))
	}
	if dp.NoClientAddress != nil {
		log.Warn("addresses of pods cannot be read on this kernel; where loadBalancerSourceRanges are set pods are not allowed",
			logfield.Error(dp.NoClientAddress))
	}
	if dp.NoPacketPath != nil {
		log.Warn("no packet path on this kernel; clients whose sockets cannot be seen, those on other machines above all, are not served",
			logfield.Error(dp.NoPacketPath))
	}
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

// newAgent returns an agent that knows nothing yet.
func newAgent(ctx context.Context, dp *datapath.Datapath, cfg Config, log *zap.Logger) *agent {
	services, slots := dp.Limits()
	kernel := kernelMetrics{dp, new(atomic.Int64)}
	a := &agent{
		log: log, datapath: dp, root: cfg.BPFRoot,
		store:        lb.NewStore(lb.Config{NodeName: cfg.NodeName, NodePorts: cfg.NodePorts, Limits: cfg.Limits}),
		reconciler:   reconciler.New(dp, reconciler.Limits{Services: services, Slots: slots}),
		health:       health.NewTracker(cmp.Or(cfg.StuckAfter, stuckAfter)),
		kernel:       kernel,
		metrics:      metrics.New(cfg.Version, kernel),
		switching:    dp.Switching,
		alone:        newSignal(),
		filled:       newSignal(),
		nodeOptional: cfg.NodeOptional,
		nodeAddress:  cfg.NodeAddress,
		healths:      map[lb.ServiceFamily]lb.Health{},
		triggers:     map[lb.ServiceFamily][]time.Time{},
		failing:      map[lb.Name]string{},
		refused:      map[lb.Name]string{},
		recorder:     cfg.Recorder,
		walks:        dp.NoIterators == nil,
		sweeps:       true,
		retry:        time.NewTimer(time.Hour),
		retryAfter:   retryFirst,
		repairEvery:  cfg.RepairEvery,
		clusterCIDRs: cfg.Packets.ClusterCIDRs,
		events:       make(chan reflector.Event, 1024),
		addresses:    make(chan []netip.Addr),
		asks:         make(chan ask),
		reports:      make(chan sockets.Report, 1),
		sweepings:    make(chan flows.Report, 1),
	}
	a.source = cfg.Source
	a.guard.source, _ = cfg.Source.(reflector.Refresher)
	a.retry.Stop()
	a.health.SetNodeEligible(cfg.NodeOptional)
	a.health.Observe(health.Observer{Healthz: a.metrics.Healthz, Livez: a.metrics.Livez})
	a.ports = health.NewServers(a.health.Healthy, portReport(cfg.NodeName, cfg.Recorder, log))
	a.selfProbe = newSelfProbe(cfg, a)
	a.ender = sockets.NewEnder(dp, func(r sockets.Report) {
		select {
		case a.reports <- r:
		case <-ctx.Done():
		}
	})
	a.lacks = lacksOf(cfg.Lacks)
	if cannotEnter(cfg.Lacks) {
		a.ender.StayOut()
	}
	a.sweeper = flows.NewSweeper(dp.Tables, cfg.Packets.Timeouts, func(r flows.Report) {
		select {
		case a.sweepings <- r:
		case <-ctx.Done():
		}
	})
	return a
}

// adopt takes up what the kernel holds and leaves state there.
func (a *agent) adopt(state datapath.AgentState) error {
	a.expelStrangers()
	held, err := a.datapath.Load()
	if err != nil {
		return fmt.Errorf("read what the kernel holds: %w", err)
	}
	a.reconciler.Adopt(held)
	// State has names that other tables are about.
	a.fresh = len(held.Frontends) == 0
	if !a.fresh {
		a.filled.give()
	}
	a.log.Info("adopted", logfield.Frontends(len(held.Frontends)), logfield.Services(len(held.Names)))
	a.state = state
	return a.datapath.SetAgentState(a.state)
}

// run is the agent's goroutine.
func (a *agent) run(ctx context.Context, ended <-chan error) error {
	repair := time.NewTicker(a.repairEvery)
	defer repair.Stop()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
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
		case ev := <-a.events:
			start := time.Now()
			a.take(ev)
			a.gather(ctx, a.events)
			a.apply(start)
		case addresses := <-a.addresses:
			a.addressesChanged(addresses)
			a.apply(time.Now())
		case <-a.retry.C:
			a.retryAt = time.Time{}
			a.retryAfter = min(2*a.retryAfter, retryLast)
			r := a.makeRoom(a.reconciler.Retry())
			a.finish(time.Now(), r, false)
			a.takeOver(r)
		case <-repair.C:
			a.repair()
		case <-look.C:
			a.lookAfter()
		case answer := <-a.selfProbe.ask:
			answer <- a.probeTasks()
		case r := <-a.reports:
			a.walked(r)
		case r := <-a.sweepings:
			a.swept(r)
		case q := <-a.asks:
			q.answer <- a.explain(q)
		}
	}
}

// watchAddresses sends the node's local addresses, at the start and whenever they
// change. Where they cannot be had it sends none to begin with: everything but
// NodePorts at local addresses does without.
func watchAddresses(ctx context.Context, to chan<- []netip.Addr, log *zap.Logger) {
	said, failing := false, false
	send := func(addresses []netip.Addr) {
		said = true
		select {
		case to <- addresses:
		case <-ctx.Done():
		}
	}
	for {
		err := attach.WatchAddresses(ctx, func(addresses []netip.Addr) {
			failing = false
			send(addresses)
		})
		if ctx.Err() != nil {
			return
		}
		if !said {
			send(nil)
		}
		if !failing {
			log.Warn("the node's addresses cannot be watched; trying again", logfield.Error(err))
			failing = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryFirst):
		}
	}
}

// setConntrack keeps the kernel's connection tracking as it is to be. A module
// that is loaded later begins with values of its own, so it looks again.
func setConntrack(ctx context.Context, settings conntrack.Settings, every time.Duration, log *zap.Logger) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var said string
	for {
		changes, problems := conntrack.Apply(settings, conntrack.Cores())
		for _, c := range changes {
			log.Info("connection tracking set", logfield.Sysctl(c.Name), logfield.Old(c.Old), logfield.New(c.New))
		}
		var problem string
		if err := errors.Join(problems...); err != nil {
			problem = err.Error()
		}
		if problem != said && problem != "" {
			log.Warn("connection tracking is not as kube-proxy would set it", logfield.Reason(problem))
		}
		said = problem
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// watchEvery is how often watch looks.
const watchEvery = 5 * time.Second

// watch tells the health tracker of events that nobody takes: an agent that is
// stuck cannot say so itself. Events that two looks in a row have found, with
// nothing applied in between, are such.
func watch(ctx context.Context, events <-chan reflector.Event, h *health.Tracker) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	waiting, applied := false, uint64(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if waiting && len(events) > 0 {
				h.QueuedUnless(applied)
			}
			waiting, applied = len(events) > 0, h.Applies()
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

// kernelMetrics gives the metrics package the datapath's numbers.
type kernelMetrics struct {
	*datapath.Datapath
	slots *atomic.Int64 // that are handed out
}

// Tables implements metrics.Kernel.
func (k kernelMetrics) Tables() map[string]metrics.Fill {
	out := map[string]metrics.Fill{}
	for table, f := range k.Fill() {
		if table == datapath.TableSlots {
			f.Rows = uint32(k.slots.Load())
		}
		out[table] = metrics.Fill(f)
	}
	return out
}

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
