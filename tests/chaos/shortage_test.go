// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// withoutFiles lets the agent open nothing more, neither what it reads nor what it
// would attach to, and has a Service change and a pod appear. It does what it
// missed once it may.
func (w *world) withoutFiles(i int) {
	pid := w.agent.PID()
	before := strings.Count(w.agent.Logs(), syscall.EMFILE.Error())
	var was unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		w.t.Fatal(err)
	}
	limit := unix.Rlimit{Cur: was.Cur, Max: was.Max}
	forbid := func() error {
		limit.Cur = min(limit.Cur, w.freeFile(pid))
		return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil)
	}
	if err := forbid(); err != nil {
		w.t.Fatal(err)
	}
	s := w.services[scaled]
	s.endpoints = w.backends[:1+i%len(w.backends)]
	w.services[scaled] = s
	w.apply(s)
	pod := w.pod(fmt.Sprintf("late-%d", i), podAddrs(100+i))
	testutil.Eventually(w.t, 30*time.Second, "the agent says that it cannot open files", func() error {
		if strings.Count(w.agent.Logs(), syscall.EMFILE.Error()) == before {
			return errors.Join(forbid(), errNotYet) // it may have closed one
		}
		return nil
	})
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &was, nil); err != nil {
		w.t.Fatal(err)
	}
	w.settled(scaled)
	w.agent.WaitReady(w.t)
	if err := w.node.RemovePod(pod); err != nil {
		w.t.Error(err)
	}
}

// freeFile returns the number that the next file a process opens would have.
func (w *world) freeFile(pid int) uint64 {
	w.t.Helper()
	for n := uint64(0); ; n++ {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, n)); errors.Is(err, os.ErrNotExist) {
			return n
		}
	}
}

// starve gives the agent the twentieth part of a processor, until feed.
func (w *world) starve() {
	w.ration = newRation(w.t, "cpu", map[string]string{
		"cpu.max": "5000 100000", "cpu.cfs_quota_us": "5000",
	})
	w.ration.add(w.t, w.agent.PID())
}

// feed ends what starve has begun, and finds an agent that has caught up.
func (w *world) feed() {
	w.ration.release(w.t, w.agent.PID())
	w.agent.WaitReady(w.t)
}

// withoutMemory starts an agent with so little memory that the kernel kills it at
// some point, the first one surely.
func (w *world) withoutMemory(i int) {
	w.agent.End(w.t, syscall.SIGKILL)
	limit := strconv.Itoa((10 + 20*(i%4)) << 20)
	r := newRation(w.t, "memory", map[string]string{"memory.max": limit, "memory.limit_in_bytes": limit})
	options := w.options()
	options.Unready = true
	script := filepath.Join(w.t.TempDir(), "agent")
	writeScript(w.t, script, fmt.Sprintf("echo $$ > %s/cgroup.procs && exec %s \"$@\"", r.path, testutil.BuildBinary(w.t)))
	poor := w.startAs(script, options)
	end := time.Now().Add(20 * time.Second)
	for poor.Running() && time.Now().Before(end) {
		if _, err := poor.Get(testutil.HealthzAddress, "/healthz"); err == nil {
			break // it can live
		}
		time.Sleep(10 * time.Millisecond)
	}
	if i%4 == 0 && poor.Running() {
		w.t.Errorf("an agent lives in %s bytes: this shows nothing", limit)
	}
	poor.Discard(syscall.SIGKILL)
	w.restart()
}

// withoutDisk restarts the agent where it can make no socket, for want of inodes,
// and where nobody takes what it writes to its log.
func (w *world) withoutDisk(i int) {
	dir := filepath.Join(w.t.TempDir(), "full")
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4k,nr_inodes=1"); err != nil {
		w.t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			w.t.Error(err)
		}
	}()
	if err := os.WriteFile(filepath.Join(dir, "one"), nil, 0o600); !errors.Is(err, unix.ENOSPC) {
		w.t.Fatalf("a full disk takes a file: %v", err)
	}
	w.agent.End(w.t, syscall.SIGKILL)
	w.restart("--socket=" + filepath.Join(dir, "agent.sock"))
	w.says("no space left on device", 1)
	w.change(scaled, w.backends[:1+i%len(w.backends)]...)

	nobody, log := fullPipe(w.t)
	defer nobody.Close()
	defer log.Close()
	w.agent.End(w.t, syscall.SIGKILL)
	options := w.options()
	options.Output = log
	w.agent = testutil.StartAgent(w.t, options)
	w.change(scaled, w.backends[:1+(i+1)%len(w.backends)]...)
	w.agent.End(w.t, syscall.SIGTERM)
	w.restart()
}

// fullPipe returns a pipe that takes nothing more.
func fullPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	size, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, os.Getpagesize())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	return r, w
}

// ration is a cgroup of a controller that limits who is in it.
type ration struct{ path, parent string }

// newRation makes one with what settings name of the files that are there: version 1
// of a controller and version 2 call them by different names. It is removed with the
// test.
func newRation(t *testing.T, controller string, settings map[string]string) *ration {
	t.Helper()
	r := &ration{parent: controllerRoot(t, controller)}
	// Killed runs have left theirs; those in use cannot be removed.
	left, _ := filepath.Glob(filepath.Join(r.parent, prefix+"-*-"+controller+"-ration-*"))
	for _, path := range left {
		_ = os.Remove(path)
	}
	var err error
	if r.path, err = os.MkdirTemp(r.parent, fmt.Sprintf("%s-%d-%s-ration-*", prefix, os.Getpid(), controller)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		testutil.Eventually(t, 10*time.Second, "the cgroup is removed", func() error {
			if err := os.Remove(r.path); err == nil || errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return r.evict()
		})
	})
	written := 0
	for name, value := range settings {
		path := filepath.Join(r.path, name)
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
		written++
	}
	if written == 0 {
		t.Fatalf("%s has none of the settings %v", r.path, settings)
	}
	return r
}

// evict moves whoever is in the cgroup out of it and returns an error for the next try.
func (r *ration) evict() error {
	pids, err := os.ReadFile(filepath.Join(r.path, "cgroup.procs"))
	if err != nil {
		return err
	}
	for pid := range strings.FieldsSeq(string(pids)) {
		_ = os.WriteFile(filepath.Join(r.parent, "cgroup.procs"), []byte(pid), 0) // it may have ended
	}
	return errNotYet
}

// controllerRoot returns where cgroups with a controller are made.
func controllerRoot(t *testing.T, controller string) string {
	t.Helper()
	const mounts = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(mounts, controller, "cgroup.procs")); err == nil {
		return filepath.Join(mounts, controller) // version 1
	}
	if err := os.WriteFile(filepath.Join(mounts, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
		t.Fatalf("no cgroup controller %s: %v", controller, err)
	}
	return mounts
}

func (r *ration) add(t *testing.T, pid int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(r.path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

// release moves a process to where it came from.
func (r *ration) release(t *testing.T, pid int) {
	t.Helper()
	out := ration{path: r.parent}
	out.add(t, pid)
}
