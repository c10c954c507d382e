// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Fairlead sends connections for Kubernetes Services to their pods, in place of
// kube-proxy. See `fairlead --help`.
package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/probe"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run executes a command line and returns the exit code: 0, or 1 after one line
// on stderr.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == probe.Command { // started by an agent, not by people
		return probe.Main(args[1:], stdout)
	}
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.Execute(); err != nil {
		_, _ = fmt.Fprintf(stderr, "fairlead: %s\n", oneLine(err))
		return 1
	}
	return 0
}

// oneLine returns the text of an error whose parts may be on lines of their own,
// as errors.Join puts them.
func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "fairlead",
		Short: "Send connections for Kubernetes Services to their pods, in place of kube-proxy",
		Long: `Fairlead runs on every node, watches Services and EndpointSlices, and keeps BPF
programs in the kernel that send each connection for a Service's address to one
of its pods when a socket connects. No packet is ever rewritten for that.

Exit codes: 0 when all is well, otherwise 1 and one line on standard error.`,
		Version: buildVersion(),
		Args:    noCommand,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		// Both are done by run.
		SilenceErrors: true,
		SilenceUsage:  true,
		// Ours tells a shell it does not know from one it does.
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SuggestionsMinimumDistance = 2
	root.SetVersionTemplate("{{.Version}}\n")
	root.SetFlagErrorFunc(usageError)
	root.AddCommand(
		newAgentCommand(),
		newInspectCommand(),
		newExplainCommand(),
		newStatusCommand(),
		newDemoCommand(),
		newCleanupCommand(),
		newVersionCommand(),
		newCompletionCommand(),
	)
	explainArgs(root)
	return root
}

// noCommand refuses the name of a command that does not exist.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	err := fmt.Errorf("unknown command %q", args[0])
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		err = fmt.Errorf("%w (did you mean %s?)", err, strings.Join(near, " or "))
	}
	return err
}

// explainArgs makes the argument checks of cmd and all commands below it say
// where to read more.
func explainArgs(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError(cmd, err)
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		explainArgs(sub)
	}
}

func usageError(cmd *cobra.Command, err error) error {
	return fmt.Errorf("%w; run '%s --help'", err, cmd.CommandPath())
}

// noArgs refuses arguments; cobra.NoArgs would call them commands.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q", args[0])
	}
	return nil
}

// oneOf wants one argument that is one of choices; what names it in errors.
func oneOf(what string, choices []string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return fmt.Errorf("missing %s: one of %s", what, strings.Join(choices, ", "))
		}
		if len(args) > 1 {
			return fmt.Errorf("unexpected argument %q", args[1])
		}
		if !slices.Contains(choices, args[0]) {
			return fmt.Errorf("unknown %s %q: want one of %s", what, args[0], strings.Join(choices, ", "))
		}
		return nil
	}
}

// completeFirst completes the first argument with one of choices and nothing
// after it.
func completeFirst(choices ...cobra.Completion) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return choices, cobra.ShellCompDirectiveNoFileComp
	}
}

// choice is a flag's value that is one of several.
type choice struct {
	value string
	of    []string
}

// addOutputFlag adds -o to cmd; the first of formats is the default.
func addOutputFlag(cmd *cobra.Command, formats ...string) *choice {
	c := &choice{formats[0], formats}
	cmd.Flags().VarP(c, "output", "o", "how to print it: "+strings.Join(formats, ", "))
	// Fails only for a flag that does not exist.
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// addBPFRootFlag adds --bpf-root to cmd.
func addBPFRootFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("bpf-root", agent.DefaultBPFRoot, "directory on a BPF file system that the agent uses")
}

// addCgroupRootFlag adds --cgroup-root to cmd.
func addCgroupRootFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("cgroup-root", "", "cgroup2 directory that the agent uses (default: the node's root)")
}

// String, Set and Type make a choice a pflag.Value.
func (c *choice) String() string { return c.value }

// Set takes a value that is one of those allowed.
func (c *choice) Set(s string) error {
	if !slices.Contains(c.of, s) {
		return fmt.Errorf("want one of %s", strings.Join(c.of, ", "))
	}
	c.value = s
	return nil
}

// Type is what help shows for the value.
func (c *choice) Type() string { return "format" }
