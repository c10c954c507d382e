// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

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
	// InUse holds the services whose backends some socket remembers; nil when
	// that could not be found out. Other errors do not matter to it.
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
	stayOut  bool

	mu       sync.Mutex
	ticket   uint64
	answered map[lb.FrontendKey]time.Time // when the last repeat is due
	busy     map[uint32]bool              // namespaces whose walk has not come to its end
}

// NewEnder returns an Ender that calls report, from the goroutine of Run, after
// each walk.
func NewEnder(d *datapath.Datapath, report func(Report)) *Ender {
	return &Ender{datapath: d, report: report, wake: make(chan struct{}, 1), answered: map[lb.FrontendKey]time.Time{}, busy: map[uint32]bool{}}
}

// StayOut makes walks find out which services are in use and nothing more: without
// the capability to enter network namespaces no socket can be ended. It is to be
// called before Run.
func (e *Ender) StayOut() { e.stayOut = true }

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
	var report Report
	origins, err := e.datapath.WalkOrigins()
	if err != nil {
		report.Err = err
		return report
	}
	overflow, err := e.datapath.OverflowServices()
	if err != nil {
		report.Err = err
		return report
	}
	report.InUse = map[lb.ServiceID]bool{}
	stale := map[uint32]bool{}
	for _, o := range origins {
		for _, id := range o.Services {
			report.InUse[id] = true
		}
		if o.Stale {
			stale[o.Netns] = true
		}
	}
	for _, id := range overflow {
		report.InUse[id] = true
	}
	all := len(answered) > 0 || len(overflow) > 0
	if e.stayOut || !all && len(stale) == 0 {
		return report
	}
	// Those whose backend has gone are ended also when this fails.
	report.Err = errors.Join(e.datapath.SetAnswered(answered), e.enter(&report, stale, all))
	return report
}

// enter walks the sockets of the stale namespaces, or of all.
func (e *Ender) enter(report *Report, stale map[uint32]bool, all bool) error {
	known := namespaces(everywhere)
	var errs []error
	for inode := range stale {
		if known[inode] == nil {
			known[inode] = namespaces(threads)[inode]
		}
		if known[inode] == nil {
			errs = append(errs, fmt.Errorf("network namespace %d holds UDP sockets to end and is nowhere to be found below /proc (hostPID is needed)", inode))
		}
	}
	for inode, paths := range known {
		if len(paths) == 0 || !all && !stale[inode] {
			continue
		}
		ended, err := e.visit(inode, paths)
		report.Gone += ended.gone
		report.Came += ended.came
		if err != nil && !errors.Is(err, errGone) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// visitTimeout is how long others wait for one namespace. Reading its sockets
// waits for the lock of each, and a pod can hold one for as long as it likes.
const visitTimeout = 3 * time.Second

// count is how many sockets were ended.
type count struct{ gone, came int }

// visit walks the sockets of one namespace. It returns without having come to
// the end when that takes too long, and does not enter the namespace again
// before the end.
func (e *Ender) visit(inode uint32, paths []string) (count, error) {
	e.mu.Lock()
	busy := e.busy[inode]
	e.mu.Unlock()
	if busy {
		return count{}, fmt.Errorf("network namespace %d: a socket there still keeps us waiting", inode)
	}
	namespace, err := open(paths, inode)
	if err != nil {
		return count{}, err
	}
	type result struct {
		ended count
		err   error
	}
	done := make(chan result, 1)
	e.setBusy(inode, true)
	go func() {
		var r result
		r.err = within(namespace, func() (err error) { r.ended, err = e.end(); return err })
		e.setBusy(inode, false)
		done <- r
	}()
	select {
	case r := <-done:
		return r.ended, r.err
	case <-time.After(visitTimeout):
		return count{}, fmt.Errorf("network namespace %d: a socket there keeps us waiting", inode)
	}
}

func (e *Ender) setBusy(inode uint32, busy bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if busy {
		e.busy[inode] = true
	} else {
		delete(e.busy, inode)
	}
}

// end runs in a namespace and ends what must be ended there.
func (e *Ender) end() (ended count, err error) {
	found, err := e.datapath.WalkUDP()
	if err != nil {
		return ended, err
	}
	var errs []error
	for _, s := range found {
		if !s.Ended {
			err := destroy(s)
			if errors.Is(err, unix.ENOENT) {
				continue // it has ended by itself
			}
			if err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if s.Reason == datapath.BackendGone {
			ended.gone++
		} else {
			ended.came++
		}
	}
	return ended, errors.Join(errs...)
}
