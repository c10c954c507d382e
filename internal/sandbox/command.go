// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"bytes"
	"context"
	"os/exec"
	"syscall"
)

// Cmd is an exec.Cmd whose process runs in a namespace. It is killed when this
// process dies, so that a killed test leaves nothing running.
type Cmd struct {
	*exec.Cmd
	ns   *Namespace
	done chan error
}

// Command returns a command that will run in the namespace. As with
// exec.CommandContext the process is killed when ctx ends.
func (ns *Namespace) Command(ctx context.Context, name string, args ...string) *Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return &Cmd{Cmd: cmd, ns: ns, done: make(chan error, 1)}
}

// Start starts the process. After success Wait must be called once.
func (c *Cmd) Start() error {
	started := make(chan error, 1)
	go func() {
		// Pdeathsig follows the thread that starts the process, not ours as a
		// whole: that thread is kept until the process ends.
		err := c.ns.Do(func() error {
			if err := c.Cmd.Start(); err != nil {
				return err
			}
			started <- nil
			return c.Cmd.Wait()
		})
		started <- err
		c.done <- err
	}()
	return <-started
}

// Wait waits for the process that Start has started, as exec.Cmd.Wait does.
func (c *Cmd) Wait() error { return <-c.done }

// Run starts the process and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// CombinedOutput runs the process and returns what it wrote to standard output
// and standard error.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// Output runs the process and returns what it wrote to standard output.
func (c *Cmd) Output() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout = &out
	err := c.Run()
	return out.Bytes(), err
}
