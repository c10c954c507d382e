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

func TestDevicesPathsOfOtherVersions(t *testing.T) {
	root := testutil.BPFRoot(t)
	openDatapath(t, root, small)
	older := makeDir(t, root, "v2", "devices")
	newer := makeDir(t, root, "v99", "devices")
	makeDir(t, root, "v1", "links") // had none
	got, err := OtherDevicesPaths(root)
	if err != nil || !slices.Equal(got, []string{older, newer}) {
		t.Errorf("got %v, %v; want %s and %s", got, err, older, newer)
	}
	if st, err := os.Stat(DevicesPath(root)); err != nil || !st.IsDir() {
		t.Errorf("our own is not there: %v", err)
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

func TestLinksOfOtherVersionsAreRemoved(t *testing.T) {
	root, cgroup := testutil.BPFRoot(t), testutil.Cgroup(t).Path()
	d := openDatapath(t, root, small)
	const hook = ebpf.AttachCgroupInet4GetPeername
	attach := func(dir string) string {
		t.Helper()
		return pinLink(t, d, cgroup, filepath.Join(dir, "getpeername4"), hook)
	}
	ours := attach(filepath.Dir(LinkPath(root, "any")))
	newer := attach(makeDir(t, root, "v99", "links"))
	older := attach(makeDir(t, root, "v1", "links"))
	keep := []string{ours}
	for _, version := range []string{"v1", "v99"} {
		pin := filepath.Join(makeDir(t, root, version, "maps"), "frontends")
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		fatal(t, err)
		fatal(t, m.Pin(pin))
		fatal(t, m.Close())
		keep = append(keep, pin)
	}
	t.Cleanup(func() { fatal(t, os.RemoveAll(root)) })

	removed, err := RemoveOtherLinks(root)
	fatal(t, err)
	if want := []string{older, newer}; !slices.Equal(removed, want) {
		t.Errorf("removed are %v, want %v", removed, want)
	}
	if n := attached(t, cgroup, hook); n != 1 {
		t.Errorf("%d programs are attached, want ours alone", n)
	}
	for _, path := range keep {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%s should stay: %v", path, err)
		}
	}

	t.Run("a second time there is nothing to do", func(t *testing.T) {
		if removed, err := RemoveOtherLinks(root); err != nil || len(removed) > 0 {
			t.Errorf("removed are %v, %v; want none", removed, err)
		}
	})
	t.Run("a stranger at a pin stays and is named", func(t *testing.T) {
		stranger := filepath.Join(root, "v1", "links", "a_map")
		fatal(t, d.maps[bpfMapMembers].Pin(stranger))
		older := attach(filepath.Join(root, "v1", "links"))
		removed, err := RemoveOtherLinks(root)
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

// pinLink attaches one of our programs to the cgroup, pins the link and returns
// the pin.
func pinLink(t *testing.T, d *Datapath, cgroup, pin string, hook ebpf.AttachType) string {
	t.Helper()
	program := "sock_" + strings.TrimSuffix(filepath.Base(pin), "_new")
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: hook, Program: d.Program(program)})
	fatal(t, err)
	fatal(t, l.Pin(pin))
	fatal(t, l.Close())
	return pin
}

// TestAnotherVersionAnswersAsLongAsItTranslates is about two versions at once:
// neither may still translate when the other no longer answers.
func TestAnotherVersionAnswersAsLongAsItTranslates(t *testing.T) {
	root, cgroup := testutil.BPFRoot(t), testutil.Cgroup(t).Path()
	d := openDatapath(t, root, small)
	var want []string
	for _, hooks := range [][]struct {
		name string
		hook ebpf.AttachType
	}{
		{
			{"connect4", ebpf.AttachCGroupInet4Connect},
			{"connect6", ebpf.AttachCGroupInet6Connect},
			{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg},
			{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg},
			// Of an agent that was killed while it moved the link to another cgroup.
			{"sendmsg6_new", ebpf.AttachCGroupUDP6Sendmsg},
		}, {
			{"getpeername4", ebpf.AttachCgroupInet4GetPeername},
			{"getpeername6", ebpf.AttachCgroupInet6GetPeername},
			{"recvmsg4", ebpf.AttachCGroupUDP4Recvmsg},
			{"recvmsg6", ebpf.AttachCGroupUDP6Recvmsg},
		},
	} {
		for _, version := range []string{"v1", "v99"} {
			dir := makeDir(t, root, version, "links")
			for _, h := range hooks {
				want = append(want, pinLink(t, d, cgroup, filepath.Join(dir, h.name), h.hook))
			}
		}
	}
	t.Cleanup(func() { fatal(t, os.RemoveAll(root)) })

	removed, err := RemoveOtherLinks(root)
	fatal(t, err)
	if !slices.Equal(removed, want) {
		t.Errorf("links went in the order\n%s\nwant\n%s", strings.Join(removed, "\n"), strings.Join(want, "\n"))
	}
}
