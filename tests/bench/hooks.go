// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
)

// hook is what is known of one BPF program.
type hook struct {
	Name    string
	Program string // what it is called in the datapath
	// Verified is how many instructions the verifier looked at, Size how many
	// bytes of machine code there are; 0 where the kernel does not say.
	Verified, Size uint32
	// Nanoseconds is the mean run time by what was dialled, as the kernel
	// measures it, the cost of measuring included.
	Nanoseconds map[string]float64
}

// hookCases are what the programs are run with: blocks of a workload.
var hookCases = []struct {
	side     string
	workload workload
}{
	{sideMany, tcpPeer}, {sideMany, udpRoundTrip}, {sideSpread, tcpPeer},
	{sideNotOurs, tcpPeer}, {sideNotOurs, udpRoundTrip},
}

// hooks describes the programs of the installation with many Services and has
// the kernel measure their run time while the client does what hookCases say.
// The kernel counts for all programs of the machine in that time.
func (c *cluster) hooks(e effort) ([]hook, error) {
	out, err := c.describeAll(socketPrograms())
	if err != nil {
		return nil, err
	}
	counting, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("have the kernel count run times: %w", err)
	}
	defer counting.Close()
	for _, s := range c.sides() {
		for _, hc := range hookCases {
			if hc.side != s.name {
				continue
			}
			if err := c.timeHooks(out, s.name, func() error { return c.runHooks(s, hc.workload, e) }); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// runHooks has the client do so much of one workload that run times mean something.
func (c *cluster) runHooks(s side, w workload, e effort) error {
	for done := 0; done < e.hookRuns; done += e.block {
		if _, err := c.measure(s, w, e.block); err != nil {
			return err
		}
	}
	return nil
}

// socketPrograms returns the names of the hooks and of their programs.
func socketPrograms() (out [][2]string) {
	for _, h := range attach.Hooks() {
		out = append(out, [2]string{h.Name, h.Program})
	}
	return out
}

func (c *cluster) describeAll(programs [][2]string) (out []hook, err error) {
	for _, p := range programs {
		described, err := describe(p[0], c.many.datapath.Program(p[1]))
		if err != nil {
			return nil, err
		}
		described.Program = p[1]
		out = append(out, described)
	}
	return out, nil
}

func describe(name string, p *ebpf.Program) (hook, error) {
	info, err := p.Info()
	if err != nil {
		return hook{}, fmt.Errorf("describe %s: %w", name, err)
	}
	h := hook{Name: name, Nanoseconds: map[string]float64{}}
	h.Verified, _ = info.VerifiedInstructions()
	h.Size, _ = info.JitedSize() // fails where there is no JIT
	return h, nil
}

// timeHooks runs f and notes under name what each program took that ran.
func (c *cluster) timeHooks(hooks []hook, name string, f func() error) error {
	before, err := c.runTimes(hooks)
	if err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	after, err := c.runTimes(hooks)
	if err != nil {
		return err
	}
	for i := range hooks {
		if runs := after[i].RunCount - before[i].RunCount; runs > 0 {
			hooks[i].Nanoseconds[name] = float64(after[i].Runtime-before[i].Runtime) / float64(runs)
		}
	}
	return nil
}

// runTimes returns the statistics of each program.
func (c *cluster) runTimes(hooks []hook) ([]*ebpf.ProgramStats, error) {
	var out []*ebpf.ProgramStats
	for _, h := range hooks {
		stats, err := c.many.datapath.Program(h.Program).Stats()
		if err != nil {
			return nil, fmt.Errorf("read run time of %s: %w", h.Name, err)
		}
		out = append(out, stats)
	}
	return out, nil
}

// packetCases are what the programs of the packet path are run for. Where both
// programs run, or run at both ends of the way, only one is what the case is about.
var packetCases = []struct {
	name     string
	uplinks  bool // no programs on the pods' links
	programs []string
	run      func(*lane, effort) error
}{
	{"request", true, []string{"tc_ingress"}, floodNodePort},
	{"answer", true, []string{"tc_egress"}, func(l *lane, e effort) error {
		_, err := l.client.do(order{Workload: udpRoundTrip, Targets: laneNodePort, Count: e.hookRuns})
		return err
	}},
	{"at the pod", false, []string{"tc_egress"}, floodNodePort},
	{"not ours", false, []string{"tc_ingress", "tc_egress"}, func(l *lane, e effort) error {
		_, err := l.floodFromNeighbour(e.neighbour)
		return err
	}},
}

func floodNodePort(l *lane, e effort) error {
	_, err := l.floodFromOutside(laneNodePort, e.flood)
	return err
}

// packetHooks is hooks for the packet path.
func (c *cluster) packetHooks(e effort) ([]hook, error) {
	var programs [][2]string
	for _, name := range []string{"tc_ingress", "tc_egress", "tc_ingress_l3", "tc_egress_l3"} {
		programs = append(programs, [2]string{name, name})
	}
	out, err := c.describeAll(programs)
	if err != nil {
		return nil, err
	}
	counting, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("have the kernel count run times: %w", err)
	}
	defer counting.Close()
	for _, pc := range packetCases {
		devices := slices.DeleteFunc(slices.Clone(c.many.devices), func(d attach.Device) bool { return pc.uplinks && d.Pod })
		if err := errors.Join(c.routed.use(nil), c.many.attach(devices)); err != nil {
			return nil, err
		}
		about := slices.DeleteFunc(slices.Clone(out), func(h hook) bool { return !slices.Contains(pc.programs, h.Program) })
		if err := c.timeHooks(about, pc.name, func() error { return pc.run(c.routed, e) }); err != nil {
			return nil, fmt.Errorf("run times of %s: %w", pc.name, err)
		}
	}
	return out, c.many.attach(nil)
}
