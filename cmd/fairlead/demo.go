// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// demoPrefix begins the name of everything the demo makes.
const demoPrefix = "fairlead-demo"

// demoRequests is how many requests each picture of the demo is made of.
const demoRequests = 300

// demoSteps are what happens to the Service, in order. The requests before and
// after a step, and while it takes effect, are all counted.
var demoSteps = []struct {
	title string
	pods  []string // what the Service has from then on
}{
	{title: "simpleservice has one pod", pods: []string{"pod-1"}},
	{title: "scaled to three pods, under load", pods: []string{"pod-1", "pod-2", "pod-3"}},
	{title: "pod-2 taken away, under load", pods: []string{"pod-1", "pod-3"}},
}

func newDemoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show Fairlead at work, without a cluster",
		Long: `Makes a node, three pods and a client out of network namespaces that have no way
out, starts the agent there with a Service from a file, and sends requests to
the Service's address while the Service is scaled. Shows which pod answered how
often. Removes everything at the end, also on Ctrl-C. Needs root.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDemo(cmd.Context(), cmd.OutOrStdout())
		},
	}
}

// runDemo shows the demo on out. It returns an error when a step could not be
// done or a request has failed; in either case nothing of it is left.
func runDemo(ctx context.Context, out io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes network namespaces and loads BPF programs: run it as root")
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := sandbox.CleanLeftovers(demoPrefix); err != nil {
		return fmt.Errorf("clean up after an earlier demo: %w", err)
	}

	c := &demoCluster{}
	defer func() { err = errors.Join(err, c.close()) }()
	err = showDemo(ctx, c, out)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	return err
}

// showDemo builds the cluster and plays the steps. The caller closes c.
func showDemo(ctx context.Context, c *demoCluster, out io.Writer) error {
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(out, format, args...) }

	say("A node, three pods and a client, made of network namespaces with no way out.\n")
	if err := c.build(ctx, demoSteps[0].pods); err != nil {
		return err
	}
	failed := 0
	for i, step := range demoSteps {
		say("\n%s\n", step.title)
		if i > 0 {
			change, err := c.scale(ctx, step.pods)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			say("  %d requests while that took effect, %s\n", change.total(), change.failures())
			if failed += change.failed; err != nil {
				return err
			}
		}
		requests, err := c.send(ctx, demoRequests)
		if err != nil {
			return err
		}
		say("  %d requests to http://%s, %s\n%s", requests.total(), demoVIP, requests.failures(), requests.bars())
		failed += requests.failed
	}
	for _, what := range []string{"services", "frontends", "counters"} {
		say("\n$ fairlead inspect %s\n", what)
		if err := c.inspect(ctx, what, out); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d requests have failed", failed)
	}
	return nil
}

// inspect runs `fairlead inspect`, which reads the same pinned maps as the
// programs in the kernel.
func (c *demoCluster) inspect(ctx context.Context, what string, out io.Writer) error {
	cmd := exec.CommandContext(ctx, c.program, "inspect", what, "--bpf-root="+c.bpfRoot)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("inspect %s: %w", what, err)
	}
	return nil
}
