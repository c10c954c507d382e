// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// resultsDir is where -save writes, from the top of the repository.
const resultsDir = "tests/bench/results"

func main() {
	if status, child := runChild(); child {
		os.Exit(status)
	}
	os.Exit(run())
}

func run() int {
	hurry := flag.Bool("quick", false, "measure for one minute instead of three")
	save := flag.Bool("save", false, "write the figures to "+resultsDir+"/KERNEL.json, too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	e := full
	if *hurry {
		e = quick
	}
	r, err := bench(ctx, e, os.Stderr)
	if err == nil {
		err = r.write(os.Stdout)
	}
	if err == nil && *save {
		err = r.save(resultsDir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// bench makes a cluster, measures and removes it again. It says on progress
// what it is doing.
func bench(ctx context.Context, e effort, progress io.Writer) (r report, err error) {
	if os.Geteuid() != 0 {
		return r, errors.New("makes network namespaces and loads BPF programs: run it as root")
	}
	if err := sandbox.CleanLeftovers(prefix); err != nil {
		return r, fmt.Errorf("clean up after an earlier run: %w", err)
	}
	c := &cluster{}
	defer func() { err = errors.Join(err, c.close()) }()
	r, err = c.bench(ctx, e, func(what string) { _, _ = fmt.Fprintf(progress, "%s ...\n", what) })
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	return r, err
}

// bench builds the cluster and measures; the caller closes it.
func (c *cluster) bench(ctx context.Context, e effort, say func(string)) (report, error) {
	say(fmt.Sprintf("programming %d and %d Services", e.few, e.many))
	if err := c.build(ctx, e.few, e.many); err != nil {
		return report{}, err
	}
	if err := c.verify(e); err != nil {
		return report{}, err
	}
	r := report{
		Machine: thisMachine(), Few: e.few, Many: e.many,
		Rounds: e.rounds, Samples: 2 * e.block, Programming: c.programming,
	}
	for _, g := range goals {
		say(string(g.workload))
		got, err := c.compare(ctx, g, e)
		if err != nil {
			return r, err
		}
		r.Workloads = append(r.Workloads, summarize(g.workload, false, socketLines(g), got))
	}
	say("BPF programs")
	var err error
	if r.Hooks, err = c.hooks(e); err != nil {
		return r, err
	}
	r.Packets, err = c.benchPackets(ctx, e, say)
	return r, err
}

// save writes the report to a file in dir that is named after the kernel.
func (r report) save(dir string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("save figures: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("save figures: %w", err)
	}
	return os.WriteFile(filepath.Join(dir, r.Machine.Kernel+".json"), append(text, '\n'), 0o644)
}
