// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// kept is hooks that are attached and looked after.
type kept struct {
	*Links
	cgroup   Cgroup
	dir      string // of pins
	programs map[string]*ebpf.Program
}

func newKept(t *testing.T) *kept {
	t.Helper()
	k := &kept{cgroup: newCgroup(t), dir: pins(t), programs: map[string]*ebpf.Program{}}
	for _, h := range Hooks() {
		k.programs[h.Program] = proceed(t, h, "fairlead_test")
		if err := Attach(k.cgroup, h, k.programs[h.Program], k.pin(h.Name)); err != nil {
			t.Fatal(err)
		}
	}
	k.Links = KeepLinks(k.cgroup, func(name string) *ebpf.Program { return k.programs[name] }, k.pin)
	t.Cleanup(func() {
		if err := errors.Join(k.Close(), DetachAll(k.dir)); err != nil {
			t.Error(err)
		}
	})
	return k
}

func (k *kept) pin(hook string) string { return filepath.Join(k.dir, hook) }

func (k *kept) open(t *testing.T, hook string) link.Link {
	t.Helper()
	l, err := link.LoadPinnedLink(k.pin(hook), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func TestLinksAreKept(t *testing.T) {
	first := Hooks()[0]
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, k *kept) error
		want []Restored
	}{
		{"nothing happens", func(*testing.T, *kept) error { return nil }, nil},
		{"a link is detached", func(t *testing.T, k *kept) error { return k.open(t, first.Name).Detach() },
			[]Restored{{first.Name, Detached}}},
		{"a link gets another program", func(t *testing.T, k *kept) error {
			return k.open(t, first.Name).Update(proceed(t, first, "strange"))
		}, []Restored{{first.Name, Replaced}}},
		{"our own program becomes another one", func(t *testing.T, k *kept) error {
			k.programs[first.Program] = proceed(t, first, "fairlead_next")
			return nil
		}, []Restored{{first.Name, Replaced}}},
		{"a pin is removed", func(_ *testing.T, k *kept) error { return os.Remove(k.pin(first.Name)) },
			[]Restored{{first.Name, Unpinned}}},
		{"two pins change places", func(_ *testing.T, k *kept) error {
			return unix.Renameat2(unix.AT_FDCWD, k.pin(first.Name), unix.AT_FDCWD, k.pin(Hooks()[1].Name), unix.RENAME_EXCHANGE)
		}, []Restored{{first.Name, Unpinned}, {Hooks()[1].Name, Unpinned}}},
		{"a pin is made anew by ourselves", func(t *testing.T, k *kept) error {
			l := k.open(t, first.Name)
			return errors.Join(l.Unpin(), l.Pin(k.pin(first.Name)))
		}, nil},
		{"the directory is removed", func(_ *testing.T, k *kept) error { return os.RemoveAll(k.dir) }, func() (all []Restored) {
			for _, h := range Hooks() {
				all = append(all, Restored{h.Name, Unpinned})
			}
			return all
		}()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := newKept(t)
			if err := tt.do(t, k); err != nil {
				t.Fatal(err)
			}
			got, err := k.Check(true)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if got, err := k.Check(true); err != nil || len(got) > 0 {
				t.Errorf("again: %v, %v; want nothing left to do", got, err)
			}
			for _, s := range Check(k.pin) {
				if s.Err != nil || s.CgroupID != k.cgroup.ID {
					t.Errorf("%+v, want cgroup %d", s, k.cgroup.ID)
				}
			}
			for _, h := range Hooks() {
				wantAttached(t, k.cgroup, h, k.programs[h.Program])
			}
		})
	}
}

func TestLinksMoveToAnotherCgroup(t *testing.T) {
	k, other := newKept(t), newCgroup(t)
	k.SetCgroup(other)
	got, err := k.Check(true)
	if err != nil || len(got) != len(Hooks()) || got[0].Fault != Moved {
		t.Fatalf("%v, %v; want all moved", got, err)
	}
	for _, h := range Hooks() {
		wantAttached(t, k.cgroup, h)
		wantAttached(t, other, h, k.programs[h.Program])
	}
}

func TestCgroupIsWatched(t *testing.T) {
	top := newCgroup(t)
	dir := filepath.Join(top.Path, "moves")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Remove(dir) }()
	before, err := OpenCgroup(dir)
	if err != nil {
		t.Fatal(err)
	}
	w := WatchCgroup(dir, before)
	look := func() Cgroup {
		t.Helper()
		now, err := w.Look()
		if err != nil {
			t.Fatal(err)
		}
		return now
	}
	if now := look(); now != before {
		t.Errorf("%v, want %v", now, before)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if now, err := w.Look(); err == nil || now != before {
		t.Errorf("removed: %v, %v; want an error and the one before", now, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if now := look(); now.ID == before.ID || now.Path != dir {
		t.Errorf("made anew: %v, want another one than %v", now, before)
	}
	host, err := HostCgroup()
	if err != nil {
		t.Skip(err)
	}
	if now, err := WatchCgroup("", host).Look(); err != nil || now != host {
		t.Errorf("the node's: %v, %v; want %v", now, err, host)
	}
}
