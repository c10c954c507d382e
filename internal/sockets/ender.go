// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Request asks for a walk over the sockets.
type Request struct {
	// Answered names UDP frontends that have just got their first backend:
	// sockets connected to these addresses themselves are ended.
	Answered []lb.FrontendKey
	// Ticket comes back in the Report, so that who asks knows which question it
	// answers.
	Ticket uint64
}

// Report is what a walk found.
type Report struct {
	Ticket uint64 // of the newest Request that came before the walk began
	// InUse holds the services whose backends some socket remembers.
	InUse map[lb.ServiceID]bool
	Gone  int // sockets ended because their backend has gone
	Came  int // sockets ended because their VIP leads somewhere now
	Err   error
}

// repeats are the times after a request at which the walk is done again: a UDP
// connect runs the hook before the socket can be found, so one walk can miss it.
var repeats = []time.Duration{time.Second, 10 * time.Second}

// Ender does the walks, one at a time.
type Ender struct {
	datapath *datapath.Datapath
	report   func(Report)
	wake     chan struct{}

	mu       sync.Mutex
	ticket   uint64
	answered map[lb.FrontendKey]time.Time // when the last repeat is due
}

// NewEnder returns an Ender that calls report, from the goroutine of Run, after
// each walk.
func NewEnder(d *datapath.Datapath, report func(Report)) *Ender {
	return &Ender{datapath: d, report: report, wake: make(chan struct{}, 1), answered: map[lb.FrontendKey]time.Time{}}
}

// Ask requests a walk, and further ones a second and ten seconds later. It never
// waits: what is asked during a walk is done after it, all in one.
func (e *Ender) Ask(r Request) {
	e.mu.Lock()
	e.ticket = r.Ticket
	for _, k := range r.Answered {
		e.answered[k] = time.Now().Add(repeats[len(repeats)-1])
	}
	e.mu.Unlock()
	select {
	case e.wake <- struct{}{}:
	default: // awake already
	}
}

// pending returns what to walk for. Frontends whose last repeat is due are then
// forgotten: later they may be without a backend again, and sockets that connect
// to them are to be left alone.
func (e *Ender) pending() (answered []lb.FrontendKey, ticket uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	for k, last := range e.answered {
		answered = append(answered, k)
		if !now.Before(last) {
			delete(e.answered, k)
		}
	}
	return answered, e.ticket
}

// Run serves requests until ctx ends.
func (e *Ender) Run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	var again []time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.wake:
			again = again[:0]
			for _, d := range repeats {
				again = append(again, time.Now().Add(d))
			}
		case <-timer.C:
			again = again[1:]
		}
		answered, ticket := e.pending()
		report := e.walk(answered)
		report.Ticket = ticket
		e.report(report)
		if len(again) > 0 {
			timer.Reset(time.Until(again[0]))
		}
	}
}

// walk does what a request asks for, once.
func (e *Ender) walk(answered []lb.FrontendKey) Report {
	report := Report{InUse: map[lb.ServiceID]bool{}}
	origins, err := e.datapath.WalkOrigins()
	if err != nil {
		report.Err = err
		return report
	}
	stale := map[uint32]bool{}
	for _, o := range origins {
		for _, id := range o.Services {
			report.InUse[id] = true
		}
		if o.Stale {
			stale[o.Netns] = true
		}
	}
	overflow, err := e.datapath.OverflowServices()
	if err != nil {
		report.Err = err
		return report
	}
	for _, id := range overflow {
		report.InUse[id] = true
	}
	everywhere := len(answered) > 0 || len(overflow) > 0
	if !everywhere && len(stale) == 0 {
		return report
	}
	if err := e.datapath.SetAnswered(answered); err != nil {
		report.Err = err
		return report
	}
	report.Err = e.enter(&report, stale, everywhere)
	return report
}

// enter walks the sockets of the stale namespaces, or of all.
func (e *Ender) enter(report *Report, stale map[uint32]bool, everywhere bool) error {
	known := namespaces()
	var errs []error
	for inode := range stale {
		if _, ok := known[inode]; !ok {
			errs = append(errs, fmt.Errorf("network namespace %d holds UDP sockets to end and is nowhere to be found below /proc (hostPID is needed)", inode))
		}
	}
	for inode, path := range known {
		if !everywhere && !stale[inode] {
			continue
		}
		err := within(path, inode, func() error { return e.end(report) })
		if err != nil && !errors.Is(err, errGone) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// end runs in a namespace and ends what must be ended there.
func (e *Ender) end(report *Report) error {
	found, err := e.datapath.WalkUDP()
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range found {
		if !s.Ended {
			if err := destroy(s); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if s.Reason == datapath.BackendGone {
			report.Gone++
		} else {
			report.Came++
		}
	}
	return errors.Join(errs...)
}
