// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package testutil

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// RequireRoot skips the test when it cannot make namespaces, load programs or
// attach them to a cgroup, and says why. Where tests must not be skipped (CI is
// "true" or FAIRLEAD_TEST_STRICT is "1") it fails the test instead.
func RequireRoot(t testing.TB) {
	t.Helper()
	err := privileged()
	if err == nil {
		return
	}
	if os.Getenv("CI") == "true" || os.Getenv("FAIRLEAD_TEST_STRICT") == "1" {
		t.Fatalf("cannot run here, and must not be skipped: %v", err)
	}
	t.Skipf("cannot run here: %v", err)
}

// privileged returns what this process lacks, nil when it lacks nothing.
func privileged() error {
	if os.Geteuid() != 0 {
		return errors.New("not root")
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for name, bit := range map[string]int{
		"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_BPF": unix.CAP_BPF,
	} {
		if caps[bit/32].Effective&(1<<(bit%32)) == 0 {
			return fmt.Errorf("no %s", name)
		}
	}
	_, err := sandbox.CgroupRoot()
	return err
}
