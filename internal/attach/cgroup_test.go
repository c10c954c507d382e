// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

func TestParseMount(t *testing.T) {
	for _, tc := range []struct {
		name  string
		line  string
		point string // "" when the line is none of ours
		root  string
	}{
		{"cgroup2 alone",
			"30 25 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot",
			"/sys/fs/cgroup", "/"},
		{"hybrid: version 2 beside version 1",
			"33 32 0:28 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime - cgroup2 cgroup2 rw,nsdelegate",
			"/sys/fs/cgroup/unified", "/"},
		{"hybrid: a controller of version 1",
			"36 32 0:31 / /sys/fs/cgroup/memory rw,nosuid,nodev,noexec,relatime - cgroup cgroup rw,memory", "", ""},
		{"private namespace: above its root",
			"700 690 0:26 /../.. /sys/fs/cgroup ro - cgroup2 cgroup rw", "/sys/fs/cgroup", "/../.."},
		{"part of the hierarchy",
			"700 690 0:26 /kubepods/pod1 /sys/fs/cgroup ro,relatime - cgroup2 cgroup rw", "/sys/fs/cgroup", "/kubepods/pod1"},
		{"many optional fields",
			"30 25 0:26 / /cg rw shared:4 master:1 propagate_from:2 unbindable - cgroup2 none rw", "/cg", "/"},
		{"blanks, tabs, line ends and backslashes in names",
			`30 25 0:26 /a\134b /c\040d\011e\012f rw - cgroup2 none rw`, "/c d\te\nf", `/a\b`},
		{"an escaped backslash before digits",
			`30 25 0:26 / /a\134040b rw - cgroup2 none rw`, `/a\040b`, "/"},
		{"a source that looks like a file system",
			"40 25 0:40 / /mnt rw - tmpfs cgroup2 rw", "", ""},
		{"empty", "", "", ""},
		{"cut off", "30 25 0:26 / /sys/fs/cgroup rw,nosuid", "", ""},
		{"no file system", "30 25 0:26 / /sys/fs/cgroup rw - ", "", ""},
		{"too few fields", "30 25 0:26 - cgroup2 none rw", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, ok := parseMount(tc.line)
			if ok != (tc.point != "") || got != (mount{tc.point, tc.root}) {
				t.Errorf("got %+v, %v; want %q showing %q", got, ok, tc.point, tc.root)
			}
		})
	}
}

func TestCgroup2MountsKeepTheirOrder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mountinfo")
	table := "21 1 0:20 / /proc rw - proc proc rw\n" +
		"30 25 0:26 /../.. /first rw - cgroup2 none rw\n" +
		"36 32 0:31 / /cpu rw - cgroup cgroup rw,cpu\n" +
		"31 25 0:26 / /second rw - cgroup2 none rw\n"
	if err := os.WriteFile(file, []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := cgroup2Mounts(file)
	if want := []mount{{"/first", "/../.."}, {"/second", "/"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	if _, err := cgroup2Mounts(file + ".missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a table that is missing: %v", err)
	}
}

func TestOpenCgroupSaysWhatIsWrong(t *testing.T) {
	testutil.RequireRoot(t)
	root, err := sandbox.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	_, err = OpenCgroup(dir)
	if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "cgroup2 is at "+root) {
		t.Errorf("a directory elsewhere: error %v names neither %s nor %s", err, dir, root)
	}
	missing := filepath.Join(root, "missing")
	if _, err = OpenCgroup(missing); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), missing) {
		t.Errorf("a directory that is missing: %v", err)
	}
	if _, err = OpenCgroup(filepath.Join(root, "cgroup.procs")); err == nil {
		t.Error("a file of cgroup2 is taken for a cgroup")
	}
}

func TestCgroupIDIsTheKernels(t *testing.T) {
	cg := newCgroup(t)
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, cg.Path, 0)
	if err != nil {
		t.Skipf("kernel gives no file handles of cgroups: %v", err)
	}
	var id uint64
	for i, b := range handle.Bytes() {
		id |= uint64(b) << (8 * i)
	}
	if cg.ID != id {
		t.Errorf("cgroup ID is %d, the kernel says %d", cg.ID, id)
	}
}

func TestHostCgroupIsARoot(t *testing.T) {
	testutil.RequireRoot(t)
	host, err := HostCgroup()
	if err != nil {
		t.Fatal(err)
	}
	ours := newCgroup(t)
	if rel, err := filepath.Rel(host.Path, ours.Path); err != nil || !filepath.IsLocal(rel) {
		t.Errorf("%s, where this machine's cgroups are, is not below %s", ours.Path, host.Path)
	}
	if host.ID == ours.ID || host.ID == 0 {
		t.Errorf("%s has ID %d, a cgroup below it %d", host.Path, host.ID, ours.ID)
	}
}

// newCgroup makes a cgroup that is removed when the test ends. Nobody is in it.
func newCgroup(t *testing.T) Cgroup {
	t.Helper()
	testutil.RequireRoot(t)
	c, err := sandbox.NewCgroup("fairlead-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	cg, err := OpenCgroup(c.Path())
	if err != nil {
		t.Fatal(err)
	}
	return cg
}
