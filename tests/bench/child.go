// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// childVariable tells a process started from our own executable what to be.
const childVariable = "FAIRLEAD_BENCH_CHILD"

// children are the processes this program can be; they talk over standard input
// and output and end when their input does.
var children = map[string]func(in io.Reader, out io.Writer) error{
	"client": beClient,
	"server": serve,
}

// runChild is main for a child. child is false in the process that was started
// by hand.
func runChild() (status int, child bool) {
	be, child := children[os.Getenv(childVariable)]
	if !child {
		return 0, false
	}
	if err := be(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Getenv(childVariable), err)
		return 1, true
	}
	return 0, true
}

// process is a child that runs.
type process struct {
	cmd *sandbox.Cmd
	in  io.WriteCloser
	out io.Reader
}

// startChild starts one of children in a namespace. The caller stops it.
func startChild(ctx context.Context, ns *sandbox.Namespace, name string) (*process, error) {
	path, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own executable: %w", err)
	}
	cmd := ns.Command(ctx, path)
	// Without signals to its threads no system call of a child is interrupted.
	cmd.Env = append(os.Environ(), childVariable+"="+name, "GODEBUG=asyncpreemptoff=1")
	cmd.Stderr = os.Stderr
	p := &process{cmd: cmd}
	if p.in, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	if p.out, err = cmd.StdoutPipe(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop ends the process and waits for it. What went wrong in there the process
// has said itself.
func (p *process) stop() error {
	err := errors.Join(p.in.Close(), p.cmd.Wait())
	if errors.As(err, new(*exec.ExitError)) {
		return nil
	}
	return err
}

// startServer returns when the server listens.
func startServer(ctx context.Context, ns *sandbox.Namespace) (*process, error) {
	p, err := startChild(ctx, ns, "server")
	if err != nil {
		return nil, err
	}
	var ready [1]byte
	if _, err := io.ReadFull(p.out, ready[:]); err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the server: %w", err), p.stop())
	}
	return p, nil
}

// remote is the client as its parent sees it.
type remote struct {
	*process
	orders  *gob.Encoder
	results *gob.Decoder
}

// startClient starts a client with the lists of targets that orders name.
func startClient(ctx context.Context, ns *sandbox.Namespace, targets [][]netip.AddrPort) (*remote, error) {
	p, err := startChild(ctx, ns, "client")
	if err != nil {
		return nil, err
	}
	r := &remote{process: p, orders: gob.NewEncoder(p.in), results: gob.NewDecoder(p.out)}
	if err := r.orders.Encode(targets); err != nil {
		return nil, errors.Join(fmt.Errorf("tell the client its targets: %w", err), p.stop())
	}
	return r, nil
}

// do has the client do one block.
func (r *remote) do(o order) (result, error) {
	if err := r.orders.Encode(o); err != nil {
		return result{}, fmt.Errorf("write to the client: %w", err)
	}
	var got result
	if err := r.results.Decode(&got); err != nil {
		return result{}, fmt.Errorf("read from the client: %w", err)
	}
	if got.Err != "" {
		return result{}, errors.New(got.Err)
	}
	return got, nil
}
