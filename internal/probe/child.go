// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Command is the subcommand of this program that a Child runs, see Main.
const Command = "probe"

const (
	// childCgroup is the name of the cgroup a Child is in.
	childCgroup = "fairlead-probe"
	childWithin = 10 * time.Second
	// What Main ends with.
	exitFailed = 1
	exitCannot = 2
)

// Child is Connect by a process of its own, in a cgroup made for it below the one at
// path. It is this program, started once more.
func Child(ctx context.Context, path string, t Target) error {
	ctx, cancel := context.WithTimeout(ctx, childWithin)
	defer cancel()
	dir := filepath.Join(path, childCgroup)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: make cgroup: %w", ErrCannot, err)
	}
	defer func() { _ = os.Remove(dir) }() // another agent may be in it
	cgroup, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("%w: open cgroup: %w", ErrCannot, err)
	}
	defer func() { _ = cgroup.Close() }()
	args := []string{Command, t.Frontend.String()}
	for _, b := range t.Backends {
		args = append(args, b.String())
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	said, err := cmd.Output()
	var ended *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &ended) && ended.ExitCode() == exitFailed && len(said) > 0:
		return errors.New(strings.TrimSpace(string(said)))
	case errors.As(err, &ended) && len(said) > 0:
		return fmt.Errorf("%w: %s", ErrCannot, strings.TrimSpace(string(said)))
	default:
		return fmt.Errorf("%w: start ourselves in a cgroup below %s: %w", ErrCannot, path, err)
	}
}

// Main is what the process of Child does: args are the frontend and its backends. It
// says on w what is wrong and returns the exit code.
func Main(args []string, w io.Writer) int {
	err := run(args)
	if err == nil {
		return 0
	}
	if errors.Is(err, ErrCannot) {
		_, _ = fmt.Fprintln(w, strings.TrimPrefix(err.Error(), ErrCannot.Error()+": "))
		return exitCannot
	}
	_, _ = fmt.Fprintln(w, err)
	return exitFailed
}

func run(args []string) error {
	var ends []netip.AddrPort
	for _, arg := range args {
		end, err := netip.ParseAddrPort(arg)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrCannot, err)
		}
		ends = append(ends, end)
	}
	if len(ends) < 2 {
		return fmt.Errorf("%w: a frontend and its backends are missing", ErrCannot)
	}
	p, err := New()
	if err != nil {
		return err
	}
	defer p.Close()
	return p.Connect(Target{Frontend: ends[0], Backends: ends[1:]})
}
