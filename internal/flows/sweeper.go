// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

const (
	// every is the time between two passes.
	every = 5 * time.Second
	// slicePause lets others have the processor between two slices of a pass that
	// nobody waits for.
	slicePause = 5 * time.Millisecond
	// restFactor bounds what passes that somebody waits for can cost, to a fifth
	// of a processor.
	restFactor = 4
)

// Report is what a pass over all flows found.
type Report struct {
	// Ticket is that of the newest Ask before the pass began: UDP flows whose
	// backends had gone by then are forgotten.
	Ticket uint64
	// InUse holds the services that flows belong to; nil when that could not be
	// found out.
	InUse map[lb.ServiceID]bool
	// Flows counts by protocol; TCP, UDP and SCTP are always there.
	Flows map[lb.Protocol]int
	// SNAT is how many of these have a source port of the node's.
	SNAT      int
	Expired   int // flows ended because nothing came for too long
	Forgotten int // flows ended because their backend has gone
	// Err is the first of what could not be read or ended; the other fields are of
	// the rest.
	Err error
}

// Sweeper goes over all flows again and again.
type Sweeper struct {
	tables   *datapath.Tables
	timeouts Timeouts
	report   func(Report)
	ticket   atomic.Uint64
	asks     chan struct{}
}

// NewSweeper returns a Sweeper that calls report, from the goroutine of Run, after
// each pass.
func NewSweeper(t *datapath.Tables, timeouts Timeouts, report func(Report)) *Sweeper {
	return &Sweeper{tables: t, timeouts: timeouts.withDefaults(), report: report, asks: make(chan struct{}, 1)}
}

// Ask requests a pass at once, for after backends have gone. It never waits; what
// is asked during such a pass is done after it, all in one.
func (s *Sweeper) Ask(ticket uint64) {
	s.ticket.Store(ticket)
	select {
	case s.asks <- struct{}{}:
	default: // asked already
	}
}

// Run does a pass now, then every few seconds and whenever it is asked to, until ctx
// ends.
func (s *Sweeper) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return
		case <-s.asks:
			asked = true
		case <-timer.C:
		}
		r, done := s.pass(ctx, !asked)
		if !done && ctx.Err() == nil {
			// Somebody waits, also for what had been passed by then.
			asked = true
			r, done = s.pass(ctx, false)
		}
		if !done {
			return
		}
		s.report(r.Report)
		if asked && !pause(ctx, restFactor*r.took) {
			return
		}
		timer.Reset(every)
	}
}

// pause returns false when ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// sweep is a pass under way.
type sweep struct {
	Report
	took    time.Duration
	serving map[lb.Member]bool // what has been found out so far
	// Entries of either kind: a flow has one of each, unless it was evicted.
	requests, answers map[lb.Protocol]int
	snat              struct{ requests, answers int }
}

// fail notes an error. One cause can concern all flows: the first one is kept.
func (r *sweep) fail(err error) {
	if r.Err == nil {
		r.Err = err
	}
}

// pass goes over all flows once. done is false when it has not come to its end:
// since ctx has, or since a leisurely one was asked to hurry.
func (s *Sweeper) pass(ctx context.Context, leisurely bool) (r *sweep, done bool) {
	start := time.Now()
	r = &sweep{
		Report:  Report{Ticket: s.ticket.Load(), InUse: map[lb.ServiceID]bool{}, Flows: map[lb.Protocol]int{}},
		serving: map[lb.Member]bool{}, requests: map[lb.Protocol]int{}, answers: map[lb.Protocol]int{},
	}
	scan := s.tables.ScanFlows()
	for {
		flows, err := scan.Next()
		if err != nil {
			r.InUse = nil
			r.fail(err)
		}
		if err != nil || len(flows) == 0 {
			break
		}
		for i := range flows {
			s.visit(r, &flows[i])
		}
		if leisurely && !s.leave(ctx) || ctx.Err() != nil {
			return r, false
		}
	}
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP} {
		r.Flows[p] = max(r.requests[p], r.answers[p])
	}
	r.SNAT = max(r.snat.requests, r.snat.answers)
	r.took = time.Since(start)
	return r, true
}

// leave lets others have the processor. It returns false when ctx ends, or when
// somebody asks.
func (s *Sweeper) leave(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-s.asks:
		return false
	case <-time.After(slicePause):
		return true
	}
}

// visit ends the flow of an entry if it is over, and counts the entry otherwise.
func (s *Sweeper) visit(r *sweep, f *datapath.Flow) {
	expired := func(f datapath.Flow) bool { return f.Idle > s.timeouts.of(f.Protocol, f.State) }
	switch {
	case expired(*f):
		if s.end(r, f, &r.Expired, expired) {
			return
		}
	case f.Protocol == lb.UDP && !s.serves(r, f):
		// The backend may have come back since that was found out.
		if s.end(r, f, &r.Forgotten, func(f datapath.Flow) bool { return !s.asServing(r, &f) }) {
			return
		}
	}
	r.InUse[f.Service] = true
	entries, snat := r.requests, &r.snat.requests
	if f.Answers {
		entries, snat = r.answers, &r.snat.answers
	}
	entries[f.Protocol]++
	if f.SNAT {
		*snat++
	}
}

// end ends a flow while over is true of it, counts that, and tells whether it is
// gone.
func (s *Sweeper) end(r *sweep, f *datapath.Flow, count *int, over func(datapath.Flow) bool) bool {
	outcome, err := s.tables.DeleteFlow(*f, over)
	if err != nil {
		r.fail(fmt.Errorf("end the flow of %v to %v: %w", f.Client, f.VIP, err))
		return false
	}
	if outcome == datapath.FlowDeleted {
		*count++
	}
	return outcome != datapath.FlowKept
}

// serves tells whether a UDP flow may go on: its backend serves its service.
func (s *Sweeper) serves(r *sweep, f *datapath.Flow) bool {
	if serving, known := r.serving[member(f)]; known {
		return serving
	}
	return s.asServing(r, f)
}

// asServing asks the kernel what serves tells. What cannot be found out goes on.
func (s *Sweeper) asServing(r *sweep, f *datapath.Flow) bool {
	serving, err := s.tables.HasMember(member(f))
	if err != nil {
		r.fail(err)
		return true
	}
	r.serving[member(f)] = serving
	return serving
}

func member(f *datapath.Flow) lb.Member {
	return lb.Member{
		Service: f.Service, Backend: lb.Backend{Addr: f.Backend.Addr(), Port: f.Backend.Port()}, Use: lb.UseServing,
	}
}
