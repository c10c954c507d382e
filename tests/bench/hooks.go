// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
)

// hook is what is known of one BPF program.
type hook struct {
	Name string
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
	var out []hook
	for _, h := range attach.Hooks() {
		described, err := describe(h.Name, c.many.datapath.Program(h.Program))
		if err != nil {
			return nil, err
		}
		out = append(out, described)
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
			if err := c.timeHooks(out, s, hc.workload, e); err != nil {
				return nil, err
			}
		}
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

// timeHooks does one case and adds to hooks what each program took.
func (c *cluster) timeHooks(hooks []hook, s side, w workload, e effort) error {
	before, err := c.runTimes()
	if err != nil {
		return err
	}
	for done := 0; done < e.hookRuns; done += e.block {
		if _, err := c.measure(s, w, e.block); err != nil {
			return err
		}
	}
	after, err := c.runTimes()
	if err != nil {
		return err
	}
	for i := range hooks {
		if runs := after[i].RunCount - before[i].RunCount; runs > 0 {
			hooks[i].Nanoseconds[s.name] = float64(after[i].Runtime-before[i].Runtime) / float64(runs)
		}
	}
	return nil
}

// runTimes returns the statistics of each program, in the order of the hooks.
func (c *cluster) runTimes() ([]*ebpf.ProgramStats, error) {
	var out []*ebpf.ProgramStats
	for _, h := range attach.Hooks() {
		stats, err := c.many.datapath.Program(h.Program).Stats()
		if err != nil {
			return nil, fmt.Errorf("read run time of %s: %w", h.Name, err)
		}
		out = append(out, stats)
	}
	return out, nil
}
