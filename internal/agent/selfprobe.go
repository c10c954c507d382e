// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/health"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/probe"
)

const (
	// probeEvery is the time between two probes while all is well, probeAgain while
	// it is not, or not known.
	probeEvery = 10 * time.Second
	probeAgain = time.Second
	// A backend can leave between the choice of a frontend and the connection, so
	// that one failure proves nothing.
	probeTries = 3
	probePause = 200 * time.Millisecond
)

// selfProbe proves again and again that connections are translated. Its goroutine,
// run, owns what is not shared.
type selfProbe struct {
	log    *zap.Logger
	health *health.Tracker
	failed func()                 // counts
	ask    chan chan<- probeTasks // to the agent's goroutine

	prober *probe.Prober
	// inside says that our own process is in a cgroup below the hooks', outside that
	// it is not: we know neither to begin with where somebody has chosen the cgroup.
	inside, outside bool

	mu    sync.Mutex // of what follows
	state ProbeState
}

// probeTasks is what there is to be probed.
type probeTasks struct {
	cgroup  string
	targets []probe.Target // one for each family; none before the first sync
}

// ProbeState is what an agent says of its probe.
type ProbeState struct {
	// Translated is when connections were last seen to be translated; null for never.
	Translated *time.Time `json:"translated"`
	// Problem says why they are not, "" while they are.
	Problem string `json:"problem"`
	// Unknown says why it is not known whether they are, "" while it is.
	Unknown string `json:"unknown"`
}

func newSelfProbe(cfg Config, a *agent) *selfProbe {
	return &selfProbe{
		log: a.log, health: a.health, failed: a.metrics.ProbeFailures.Inc,
		ask: make(chan chan<- probeTasks), inside: cfg.CgroupRoot == "",
		state: ProbeState{Unknown: errNothing.Error()},
	}
}

// errNothing is probe.ErrCannot where there is nothing to make a connection to.
var errNothing = fmt.Errorf("%w: there is no ClusterIP with a TCP backend", probe.ErrCannot)

// run probes until ctx ends.
func (s *selfProbe) run(ctx context.Context) {
	var err error
	if s.prober, err = probe.New(); err != nil {
		s.log.Warn("whether connections are translated cannot be probed", logfield.Error(err))
		s.note(err, time.Time{})
		return
	}
	defer s.prober.Close()
	for pause := probeAgain; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = s.probe(ctx)
	}
}

// probe proves it once for each family, and returns when to do so again.
func (s *selfProbe) probe(ctx context.Context) (pause time.Duration) {
	tries := probeTries
	if s.State().Problem != "" {
		tries = 1 // one success is enough
	}
	var err error
	for try := range tries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return 0
			case <-time.After(probePause):
			}
		}
		tasks, ok := s.tasks(ctx)
		if !ok {
			return 0
		}
		if err = s.connect(ctx, tasks); err == nil || errors.Is(err, errNothing) {
			break
		}
	}
	if ctx.Err() != nil {
		return 0
	}
	s.note(err, time.Now())
	if err == nil || errors.Is(err, probe.ErrCannot) && !errors.Is(err, errNothing) {
		return probeEvery
	}
	return probeAgain
}

// tasks asks the agent's goroutine what to probe.
func (s *selfProbe) tasks(ctx context.Context) (tasks probeTasks, ok bool) {
	answer := make(chan probeTasks, 1)
	select {
	case s.ask <- answer:
	case <-ctx.Done():
		return probeTasks{}, false
	}
	return <-answer, true
}

// connect makes a connection to each target.
func (s *selfProbe) connect(ctx context.Context, tasks probeTasks) error {
	if len(tasks.targets) == 0 {
		return errNothing
	}
	for _, t := range tasks.targets {
		if err := s.connectTo(ctx, tasks.cgroup, t); err != nil {
			return err
		}
	}
	return nil
}

// connectTo makes one, by ourselves if that can tell anything.
func (s *selfProbe) connectTo(ctx context.Context, cgroup string, t probe.Target) error {
	if !s.outside {
		err := s.prober.Connect(t)
		if err == nil {
			s.inside = true
		}
		if err == nil || s.inside {
			return err
		}
	}
	err := probe.Child(ctx, cgroup, t)
	if err == nil {
		s.outside = true
	}
	return err
}

// note keeps the result and tells of it: of the first failure and of its end.
func (s *selfProbe) note(err error, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.state.Problem
	switch {
	case err == nil:
		s.state = ProbeState{Translated: &at}
	case errors.Is(err, probe.ErrCannot):
		s.state.Unknown, s.state.Problem = err.Error(), ""
	default:
		s.failed()
		s.state.Unknown, s.state.Problem = "", err.Error()
		if was == "" {
			s.log.Error("connections to Services are not translated", logfield.Error(err))
		}
	}
	if was != "" && s.state.Problem == "" {
		s.log.Info("connections to Services are translated again", logfield.Reason(s.state.Unknown))
	}
	s.health.SetProblem(s.state.Problem)
}

// State returns what is known; it may be called from any goroutine.
func (s *selfProbe) State() ProbeState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// probeTasks says what there is to be probed now.
func (a *agent) probeTasks() probeTasks {
	tasks := probeTasks{cgroup: a.cgroup.Path}
	if !a.applied || a.switching {
		return tasks
	}
	for _, family := range []lb.Family{lb.IPv4, lb.IPv6} {
		key, backends, ok := a.reconciler.Example(family)
		if !ok {
			continue
		}
		t := probe.Target{Frontend: netip.AddrPortFrom(key.VIP, key.Port)}
		for _, b := range backends {
			t.Backends = append(t.Backends, netip.AddrPortFrom(b.Addr, b.Port))
		}
		tasks.targets = append(tasks.targets, t)
	}
	return tasks
}

func (a *agent) answerProbe(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	// The client may be gone; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(a.selfProbe.State())
}

// AskProbe asks the agent that listens on socket what its probe has found. The error
// is as that of AskPackets.
func AskProbe(ctx context.Context, socket string) (ProbeState, error) {
	var s ProbeState
	err := askAgent(ctx, socket, "/probe", &s)
	return s, err
}
