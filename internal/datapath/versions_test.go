// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// makeDir makes a directory with its parents and returns it.
func makeDir(t *testing.T, parts ...string) string {
	t.Helper()
	dir := filepath.Join(parts...)
	fatal(t, os.MkdirAll(dir, 0o700))
	return dir
}

func TestNothingPinnedSaysWhatIs(t *testing.T) {
	for _, tc := range []struct {
		name string
		dirs []string
		want string
	}{
		{"nothing at all", nil, "(is the agent running with this --bpf-root?)"},
		{"what is no version", []string{"v", "vx", "v01", "other"}, "(is the agent running with this --bpf-root?)"},
		{"an older version", []string{"v1"}, "(v1 is: it belongs to an older fairlead)"},
		{"a newer version", []string{"v1", "v99"}, "(v99 is: it belongs to a newer fairlead)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := testutil.BPFRoot(t)
			for _, dir := range tc.dirs {
				makeDir(t, root, dir, "maps")
			}
			_, err := OpenView(root)
			if !errors.Is(err, ErrNoDatapath) || !strings.HasSuffix(err.Error(), tc.want) {
				t.Errorf("error %v, want ErrNoDatapath %s", err, tc.want)
			}
		})
	}
}

// attached returns how many programs are on a hook of the cgroup.
func attached(t *testing.T, cgroup string, hook ebpf.AttachType) int {
	t.Helper()
	dir, err := os.Open(cgroup)
	fatal(t, err)
	defer dir.Close()
	got, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook})
	fatal(t, err)
	return len(got.Programs)
}

func TestLinksOfOlderVersionsAreRemoved(t *testing.T) {
	root, cgroup := testutil.BPFRoot(t), testutil.Cgroup(t).Path()
	d := openDatapath(t, root, small)
	const hook = ebpf.AttachCgroupInet4GetPeername
	attach := func(dir string) string {
		t.Helper()
		l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: hook, Program: d.Program("sock_getpeername4")})
		fatal(t, err)
		pin := filepath.Join(dir, "getpeername4")
		fatal(t, l.Pin(pin))
		fatal(t, l.Close())
		return pin
	}
	ours := attach(filepath.Dir(LinkPath(root, "any")))
	newer := attach(makeDir(t, root, "v99", "links"))
	older := attach(makeDir(t, root, "v1", "links"))
	oldMaps := makeDir(t, root, "v1", "maps")
	kept := filepath.Join(oldMaps, "frontends")
	fatal(t, d.maps[bpfMapFrontends].Pin(kept))
	t.Cleanup(func() { fatal(t, os.RemoveAll(root)) })

	removed, err := RemoveOldLinks(root)
	fatal(t, err)
	if want := []string{older}; !slices.Equal(removed, want) {
		t.Errorf("removed are %v, want %v", removed, want)
	}
	if n := attached(t, cgroup, hook); n != 2 {
		t.Errorf("%d programs are attached, want ours and the newer version's", n)
	}
	for _, path := range []string{ours, newer, kept} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%s should stay: %v", path, err)
		}
	}

	t.Run("a second time there is nothing to do", func(t *testing.T) {
		if removed, err := RemoveOldLinks(root); err != nil || len(removed) > 0 {
			t.Errorf("removed are %v, %v; want none", removed, err)
		}
	})
	t.Run("a stranger at a pin stays and is named", func(t *testing.T) {
		stranger := filepath.Join(root, "v1", "links", "a_map")
		fatal(t, d.maps[bpfMapMembers].Pin(stranger))
		older := attach(filepath.Join(root, "v1", "links"))
		removed, err := RemoveOldLinks(root)
		if err == nil || !strings.Contains(err.Error(), stranger) {
			t.Errorf("error %v does not name %s", err, stranger)
		}
		if !slices.Equal(removed, []string{older}) {
			t.Errorf("removed are %v, want %s beside the stranger", removed, older)
		}
		if _, err := os.Stat(stranger); err != nil {
			t.Errorf("the stranger should stay: %v", err)
		}
	})
}
