// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"errors"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/metrics"
)

// lookEvery is how often the guardian looks: what it finds is back within a second.
const lookEvery = 900 * time.Millisecond

// guardian looks after what somebody else could take from the socket path: the
// hooks, the pins, the cgroup. The agent's goroutine calls it.
type guardian struct {
	log      *zap.Logger
	datapath *datapath.Datapath
	links    *attach.Links
	cgroup   *attach.CgroupWatch
	on       attach.Cgroup // where the hooks are
	behind   bool          // programs are still told of another cgroup
	count    func(fault string, n int)
	failing  string               // what has been logged
	spoken   map[string]time.Time // of which faults, and when
}

// lookFrom begins to look after what has just been attached to a cgroup.
func (a *agent) lookFrom(cgroup attach.Cgroup) {
	a.guardian = &guardian{
		log: a.log, datapath: a.datapath,
		links: attach.KeepLinks(cgroup, a.datapath.Program, func(hook string) string {
			return datapath.LinkPath(a.root, hook)
		}),
		cgroup: attach.WatchCgroup(a.cgroupRoot, cgroup), on: cgroup,
		count: func(fault string, n int) {
			a.metrics.AttachmentsRestored.WithLabelValues(fault).Add(float64(n))
		},
		spoken: map[string]time.Time{},
	}
}

// look puts back what somebody else has taken. It returns the cgroup the hooks are
// on, which is another one than before when moved is true.
func (g *guardian) look() (on attach.Cgroup, moved bool) {
	pins, pinErr := g.datapath.KeepPins()
	found, cgroupErr := g.cgroup.Look()
	was := g.on
	if found.ID != was.ID {
		g.links.SetCgroup(found)
		g.on, g.behind = found, true
	}
	// Where the root is not ours another agent's links may be in it.
	hooks, hookErr := g.links.Check(pins != nil)
	g.report(pins, hooks, was)
	if g.behind {
		// Only searches for sockets want to know: it comes last.
		err := g.datapath.SetCgroup(found.ID)
		g.behind = err != nil
		hookErr = errors.Join(hookErr, err)
	}
	g.failed(errors.Join(pinErr, cgroupErr, hookErr))
	return g.on, g.on.ID != was.ID
}

// report counts and names what is back.
func (g *guardian) report(pins []string, hooks []attach.Restored, was attach.Cgroup) {
	faults := map[attach.Fault][]string{}
	for _, r := range hooks {
		faults[r.Fault] = append(faults[r.Fault], r.Hook)
	}
	if g.on.ID != was.ID {
		g.count(metrics.FaultCgroup, 1)
		g.log.Warn("the cgroup to attach to has become another one; hooks follow it",
			logfield.Cgroup(g.on.Path), logfield.CgroupID(g.on.ID), logfield.OldCgroupID(was.ID))
	}
	for _, fault := range slices.Sorted(maps.Keys(faults)) {
		g.count(string(fault), len(faults[fault]))
	}
	g.count(metrics.FaultMapUnpinned, len(pins))
	now := time.Now()
	maps.DeleteFunc(g.spoken, func(_ string, at time.Time) bool { return now.Sub(at) > restoredAgain })
	for _, line := range []struct {
		message string
		names   []string
		field   func([]string) zap.Field
	}{
		{"somebody has detached hooks; they are attached again", faults[attach.Detached], logfield.Hooks},
		{"hooks were on another cgroup; they are on the right one", faults[attach.Moved], logfield.Hooks},
		{"somebody has replaced programs on hooks; ours are back", faults[attach.Replaced], logfield.Hooks},
		{"somebody has removed or replaced pins of hooks; they are back", faults[attach.Unpinned], logfield.Hooks},
		{"somebody has removed or replaced pins of maps; they are back", pins, logfield.Maps},
	} {
		if names := g.news(line.message, line.names, now); len(names) > 0 {
			g.log.Warn(line.message, line.field(names))
		}
	}
}

// news returns the names of which a message has not been logged lately: who does
// the same again and again need not fill the log.
func (g *guardian) news(message string, names []string, now time.Time) (news []string) {
	for _, name := range names {
		key := name + ": " + message
		if _, lately := g.spoken[key]; !lately {
			g.spoken[key] = now
			news = append(news, name)
		}
	}
	return news
}

// failed logs the first of a series of failures, and the end of it.
func (g *guardian) failed(err error) {
	switch {
	case err != nil && err.Error() != g.failing:
		g.failing = err.Error()
		g.log.Error("hooks or pins are not as they should be and cannot be put back; trying again", logfield.Error(err))
	case err == nil && g.failing != "":
		g.failing = ""
		g.log.Info("hooks and pins are as they should be at last")
	}
}

// close lets go and leaves everything attached.
func (g *guardian) close() { _ = g.links.Close() } // only descriptors

// lookAfter has the guardian look, and follows the cgroup. There is none while another
// version's programs serve.
func (a *agent) lookAfter() {
	if a.guardian == nil {
		return
	}
	on, moved := a.guardian.look()
	if !moved {
		return
	}
	a.cgroup, a.state.CgroupID = on, on.ID
	if err := a.datapath.SetAgentState(a.state); err != nil {
		a.log.Warn("status cannot be updated", logfield.Error(err))
	}
	a.askWalk(nil)
}
