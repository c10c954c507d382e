// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/health"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/metrics"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// noKernel is what metrics ask when there is no datapath.
type noKernel struct{}

func (noKernel) Writes() map[string]uint64          { return nil }
func (noKernel) Events() (map[string]uint64, error) { return nil, nil }
func (noKernel) Tables() map[string]metrics.Fill    { return nil }

// idle returns an agent that has nothing to write to.
func idle() *agent {
	a := &agent{
		log: zap.NewNop(), store: lb.NewStore(lb.Config{}), health: health.NewTracker(stuckAfter),
		metrics: metrics.New("test", noKernel{}), triggers: map[lb.ServiceFamily][]time.Time{}, retry: time.NewTimer(time.Hour), retryAfter: retryFirst,
	}
	a.retry.Stop()
	return a
}

// fires returns when the retry timer fires, or 0 when it does not within an hour.
func fires(a *agent, start time.Time) time.Duration {
	select {
	case <-a.retry.C:
		return time.Since(start)
	case <-time.After(time.Hour):
		return 0
	}
}

func TestRetry(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(*agent)
		want time.Duration
	}{
		{"nothing pending, no retry", func(a *agent) { a.scheduleRetry(false, false) }, 0},
		{"the first pause", func(a *agent) { a.scheduleRetry(true, false) }, retryFirst},
		{"other changes do not put it off", func(a *agent) {
			for range 9 {
				a.scheduleRetry(true, false)
				time.Sleep(retryFirst / 10)
			}
		}, retryFirst},
		{"changes that make room do not put it off either", func(a *agent) {
			for range 9 {
				a.scheduleRetry(true, true)
				time.Sleep(retryFirst / 10)
			}
		}, retryFirst},
		{"room brings a long pause forward", func(a *agent) {
			a.retryAfter = retryLast
			a.scheduleRetry(true, false)
			a.scheduleRetry(true, true)
		}, retryFirst},
		{"nothing pending any more", func(a *agent) {
			a.scheduleRetry(true, false)
			a.scheduleRetry(false, false)
		}, 0},
		{"pauses start anew", func(a *agent) {
			a.retryAfter = retryLast
			a.scheduleRetry(false, false)
			a.scheduleRetry(true, false)
		}, retryFirst},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, start := idle(), time.Now()
				tt.do(a)
				if got := fires(a, start); got != tt.want {
					t.Errorf("fires after %v, want %v", got, tt.want)
				}
			})
		})
	}
}

func TestGather(t *testing.T) {
	event := reflector.ServiceSet{Service: lb.Service{Name: lb.Name{Namespace: "ns", Name: "a"}}}
	t.Run("after quiet only what is there is taken along", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, events := idle(), make(chan reflector.Event, 8)
			for range 3 {
				events <- event
			}
			start := time.Now()
			a.gather(t.Context(), events)
			if waited := time.Since(start); waited != 0 || len(events) != 0 {
				t.Errorf("waited %v, %d events left", waited, len(events))
			}
		})
	})
	t.Run("a burst is gathered for its time, however steady it is", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, events := idle(), make(chan reflector.Event, 8)
			done := make(chan struct{})
			var sender sync.WaitGroup
			sender.Go(func() {
				for {
					select {
					case events <- event:
						time.Sleep(time.Millisecond)
					case <-done:
						return
					}
				}
			})
			a.lastApply = time.Now()
			start := time.Now()
			a.gather(t.Context(), events)
			waited := time.Since(start)
			close(done)
			sender.Wait()
			if waited != gatherFor {
				t.Errorf("waited %v, want %v", waited, gatherFor)
			}
		})
	})
}

// An agent that does not take its events cannot say so itself.
func TestEventsThatNobodyTakesMakeTheNodeUnhealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, events := idle(), make(chan reflector.Event, 1)
		a.health.Applied()
		go watch(t.Context(), events, a.health)
		time.Sleep(10 * stuckAfter)
		if !a.health.Healthy() {
			t.Error("unhealthy though nothing is waiting")
		}
		events <- reflector.SliceGone{}
		time.Sleep(stuckAfter + 2*watchEvery)
		if a.health.Healthy() {
			t.Error("healthy though an event has waited for longer than a minute")
		}
	})
}
