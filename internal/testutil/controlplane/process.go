// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package controlplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// process is a running program of the control plane.
type process struct {
	cmd  *sandbox.Cmd
	done chan struct{} // closed once the program has ended
}

// startProcess runs a program in a network namespace and appends what it prints
// to the file log. The program is killed when the test's process dies.
func startProcess(netns *sandbox.Namespace, log, path string, args ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", path, err)
	}
	cmd := netns.Command(context.Background(), path, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		out.Close()
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		defer out.Close()
		fmt.Fprintf(out, "ended: %v\n", cmd.Wait())
	}()
	return p, nil
}

// ended tells whether the program has ended.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop sends the program a signal and returns when it has ended; a program that
// takes longer than ten seconds is killed.
func (p *process) stop(signal syscall.Signal) error {
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s: %w", p.cmd.Path, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.cmd.Path, err)
	}
	<-p.done
	return nil
}
