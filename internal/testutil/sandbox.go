// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package testutil

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// prefix begins the name of everything that tests make outside of t.TempDir.
const prefix = "fairlead-test"

// cleanLeftovers removes, once, what earlier test processes could not.
var cleanLeftovers = sync.OnceValue(func() error { return sandbox.CleanLeftovers(prefix) })

// Node returns a node without pods that is closed when the test ends.
func Node(t testing.TB) *sandbox.Node {
	t.Helper()
	RequireRoot(t)
	if err := cleanLeftovers(); err != nil {
		t.Logf("clean up after earlier tests: %v", err)
	}
	n, err := sandbox.NewNode(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { report(t, n.Close()) })
	return n
}

// Cgroup moves the test process into a cgroup of its own until the test ends.
// Since a process is in one cgroup at a time, the test must not be parallel.
func Cgroup(t testing.TB) *sandbox.Cgroup {
	t.Helper()
	RequireRoot(t)
	c, err := sandbox.NewCgroup(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { report(t, c.Close()) })
	leave, err := c.Enter()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { report(t, leave()) })
	return c
}

// BPFRoot returns a directory for pins that does not exist yet, on a BPF
// filesystem of its own. All pins are gone when the test ends.
func BPFRoot(t testing.TB) string {
	t.Helper()
	RequireRoot(t)
	dir := filepath.Join(t.TempDir(), "bpf")
	unmount, err := sandbox.MountBPFFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { report(t, unmount()) })
	return filepath.Join(dir, "fairlead")
}

// Emulated tells whether the processor is emulated, as in the virtual machines of
// tests/vm: what takes milliseconds elsewhere takes a second there.
func Emulated() bool { return os.Getenv("FAIRLEAD_VM_KERNEL") != "" }

// Patience is how long to wait for what must happen before a test fails. It is no
// promise of how soon that is.
func Patience() time.Duration {
	if Emulated() {
		return 3 * time.Minute
	}
	return 20 * time.Second
}

// WriteFile gives a file its content in one step: who reads it finds what it held
// before or all of what it holds now.
func WriteFile(t testing.TB, path, text string) {
	t.Helper()
	aside := path + ".new"
	if err := os.WriteFile(aside, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(aside, path); err != nil {
		t.Fatal(err)
	}
}

// Eventually calls f until it returns nil. The test fails when that takes
// longer than timeout; the message holds what and f's last error.
func Eventually(t testing.TB, timeout time.Duration, what string, f func() error) {
	t.Helper()
	for end := time.Now().Add(timeout); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within %s: %v", what, timeout, err)
		}
	}
}

func report(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
