// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseMounts(t *testing.T) {
	const table = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 master:2 - cgroup2 cgroup2 rw
50 31 0:39 /a\040b /mnt/back\134slash\011tab rw - bpf none rw
nonsense
`
	want := []mount{
		{root: "/", point: "/sys/fs/cgroup", fsType: "tmpfs"},
		{root: "/", point: "/sys/fs/cgroup/unified", fsType: "cgroup2"},
		{root: "/a b", point: "/mnt/back\\slash\ttab", fsType: "bpf"},
	}
	if diff := cmp.Diff(want, parseMounts(table), cmp.AllowUnexported(mount{})); diff != "" {
		t.Errorf("mounts (-want +got):\n%s", diff)
	}
}

func TestCgroupHoldsProcessUntilItLeaves(t *testing.T) {
	requireRoot(t)
	home := cgroupOf(t)
	c, err := NewCgroup(prefix)
	if err != nil {
		t.Fatal(err)
	}
	leave, err := c.Enter()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := filepath.Base(cgroupOf(t)), filepath.Base(c.Path()); got != want {
		t.Errorf("after enter in %s, want %s", got, want)
	}
	if err := leave(); err != nil {
		t.Fatal(err)
	}
	if got := cgroupOf(t); got != home {
		t.Errorf("after leave in %s, want %s", got, home)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.Path()); err == nil {
		t.Error("the cgroup is still there")
	}
	if err := c.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

func TestCgroupCloseMovesOurProcessesOut(t *testing.T) {
	requireRoot(t)
	home, err := func() (string, error) {
		m, err := cgroupMount()
		if err != nil {
			return "", err
		}
		return m.home()
	}()
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewCgroup(prefix)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Enter(); err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), "sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := moveProcess(os.Getpid(), home); err != nil {
		t.Error(err)
	}
	_ = child.Process.Kill()
	_ = child.Wait()
}

func cgroupOf(t *testing.T) string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if path, found := strings.CutPrefix(line, "0::"); found {
			return strings.TrimSpace(path)
		}
	}
	t.Fatal("in no cgroup of version 2")
	return ""
}

func TestMountBPFFS(t *testing.T) {
	requireRoot(t)
	dir := filepath.Join(t.TempDir(), "bpf")
	unmount, err := MountBPFFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		t.Errorf("type %#x, want %#x", fs.Type, unix.BPF_FS_MAGIC)
	}
	if err := unmount(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.BPF_FS_MAGIC {
		t.Error("still mounted")
	}
}

// The test runs itself as a process that makes one of everything, starts another
// process and is killed.
func TestCleanLeftovers(t *testing.T) {
	requireRoot(t)
	const variable = "FAIRLEAD_SANDBOX_LEAVE"
	if os.Getenv(variable) != "" {
		leaveThings(t)
		return
	}
	alive, err := TempDir(prefix)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(alive)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCleanLeftovers$")
	cmd.Env = append(os.Environ(), variable+"=1")
	cmd.Stderr = t.Output()
	// Open as long as the killed process or the one it has started lives.
	alivePipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	base := fmt.Sprintf("%s-%d-", prefix, cmd.Process.Pid)
	// It kills itself, and is left unreaped: a zombie counts as ended.
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	if left, _ := filepath.Glob(filepath.Join(netnsDir, base+"*")); len(left) != 2 {
		t.Fatalf("the killed process has left %v, want a node and a pod", left)
	}
	if pipe, ok := alivePipe.(*os.File); ok {
		_ = pipe.SetReadDeadline(time.Now().Add(10 * time.Second))
	}
	if said, err := io.ReadAll(alivePipe); err != nil || string(said) != "started\n" {
		t.Errorf("read from the process it started: %q, %v; want it to start and to die with its maker", said, err)
	}
	if err := CleanLeftovers(prefix); err != nil {
		t.Error(err)
	}
	assertNothingLeft(t, base)
	m, err := cgroupMount()
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(m.point, base+"*")); left != nil {
		t.Errorf("cgroups left behind: %v", left)
	}
	if _, err := os.Stat(alive); err != nil {
		t.Errorf("what a living process has made is gone: %v", err)
	}
}

func leaveThings(t *testing.T) {
	n, err := NewNode(prefix)
	if err != nil {
		t.Fatal(err)
	}
	addTestPod(t, n, "client", "10.244.0.3")
	c, err := NewCgroup(prefix)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Enter(); err != nil {
		t.Fatal(err)
	}
	dir, err := TempDir(prefix)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := MountBPFFS(filepath.Join(dir, "bpf")); err != nil {
		t.Fatal(err)
	}
	ready, started, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	child := n.Namespace().Command(t.Context(), "sh", "-c", "echo started; echo started >&3; exec sleep 60")
	child.Stdout, child.ExtraFiles = os.Stdout, []*os.File{started}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(os.Getpid(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {}
}
