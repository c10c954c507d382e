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

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// proceed returns a program for the hook that lets everything through.
func proceed(t *testing.T, hook Hook, name string) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.CGroupSockAddr, AttachType: hook.Type,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return prog
}

// pins returns a directory for pins.
func pins(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(testutil.BPFRoot(t), "links")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// attached returns the IDs of the programs on a cgroup's hook.
func attached(t *testing.T, cg Cgroup, hook Hook) []ebpf.ProgramID {
	t.Helper()
	dir, err := os.Open(cg.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	got, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook.Type})
	if err != nil {
		t.Fatal(err)
	}
	var ids []ebpf.ProgramID
	for _, p := range got.Programs {
		ids = append(ids, p.ID)
	}
	return ids
}

func wantAttached(t *testing.T, cg Cgroup, hook Hook, progs ...*ebpf.Program) {
	t.Helper()
	var want []ebpf.ProgramID
	for _, p := range progs {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		want = append(want, id)
	}
	if got := attached(t, cg, hook); !slices.Equal(got, want) {
		t.Errorf("%s of %s has programs %v, want %v", hook.Name, cg.Path, got, want)
	}
}

func TestAnswersAreAttachedBeforeTranslations(t *testing.T) {
	translates := false
	seen := map[string]bool{}
	for _, h := range Hooks() {
		isTranslation := strings.HasPrefix(h.Name, "connect") || strings.HasPrefix(h.Name, "sendmsg")
		if translates && !isTranslation {
			t.Errorf("%s comes after a hook that translates", h.Name)
		}
		translates = isTranslation
		seen[h.Name] = true
	}
	if len(seen) != 8 {
		t.Errorf("%d hooks, want 8", len(seen))
	}
}

func TestEveryHookIsAttachedAndDetached(t *testing.T) {
	cg, dir := newCgroup(t), pins(t)
	pin := func(hook string) string { return filepath.Join(dir, hook) }
	for _, s := range Check(pin) {
		if s.Err == nil || s.Err.Error() != "not attached" || s.CgroupID != 0 {
			t.Errorf("before: %+v, want not attached", s)
		}
	}
	for _, h := range Hooks() {
		prog := proceed(t, h, "fairlead_test")
		if err := Attach(cg, h, prog, pin(h.Name)); err != nil {
			t.Fatal(err)
		}
		wantAttached(t, cg, h, prog)
	}
	for _, s := range Check(pin) {
		if s.Err != nil || s.CgroupID != cg.ID {
			t.Errorf("attached: %+v, want cgroup %d", s, cg.ID)
		}
	}
	for range 2 {
		if err := DetachAll(dir); err != nil {
			t.Error(err)
		}
		for _, h := range Hooks() {
			wantAttached(t, cg, h)
		}
	}
	if err := DetachAll(dir + "-missing"); err != nil {
		t.Errorf("nothing was ever pinned: %v", err)
	}
}

func TestAttachReplaces(t *testing.T) {
	first, second, dir := newCgroup(t), newCgroup(t), pins(t)
	hook := Hooks()[4]
	pin := filepath.Join(dir, hook.Name)
	v1, v2, v3 := proceed(t, hook, "v1"), proceed(t, hook, "v2"), proceed(t, hook, "v3")
	attach := func(cg Cgroup, prog *ebpf.Program) {
		t.Helper()
		if err := Attach(cg, hook, prog, pin); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("pins are %v, %v; want %s alone", entries, err, hook.Name)
		}
	}
	attach(first, v1)
	attach(first, v2)
	wantAttached(t, first, hook, v2)
	attach(first, v2)
	wantAttached(t, first, hook, v2)

	attach(second, v3)
	wantAttached(t, second, hook, v3)
	wantAttached(t, first, hook)
	if s := Check(func(string) string { return pin }); s[4].CgroupID != second.ID {
		t.Errorf("after the move to another cgroup: %+v, want cgroup %d", s[4], second.ID)
	}
}

func TestTakeOver(t *testing.T) {
	cg := newCgroup(t)
	hook := Hooks()[4]
	ours, theirs := proceed(t, hook, "ours"), proceed(t, hook, "theirs")
	for _, tc := range []struct {
		name   string
		before func(pin string, others []string) error
		taken  bool
		left   []int // those of others that stay
	}{
		{name: "of nothing is attaching", before: func(string, []string) error { return nil }},
		{
			name:   "takes another's link and pin",
			before: func(_ string, others []string) error { return Attach(cg, hook, theirs, others[1]) },
			taken:  true,
		}, {
			name:   "of one that was killed before it had the pin",
			before: func(_ string, others []string) error { return Attach(cg, hook, ours, others[0]) },
			taken:  true,
		}, {
			name:   "leaves alone what is on another cgroup",
			before: func(_ string, others []string) error { return Attach(newCgroup(t), hook, theirs, others[0]) },
			left:   []int{0},
		}, {
			name: "leaves alone what is on another hook",
			before: func(_ string, others []string) error {
				return Attach(cg, Hooks()[0], proceed(t, Hooks()[0], "theirs"), others[0])
			},
			left: []int{0},
		}, {
			name:   "has a link of its own before others'",
			before: func(pin string, _ []string) error { return Attach(cg, hook, theirs, pin) },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := pins(t)
			pin := filepath.Join(dir, hook.Name)
			others := []string{filepath.Join(dir, "other1"), filepath.Join(dir, "other2")}
			if err := tc.before(pin, others); err != nil {
				t.Fatal(err)
			}
			taken, err := TakeOver(cg, hook, ours, pin, others)
			if err != nil || taken != tc.taken {
				t.Errorf("got %v, %v; want %v", taken, err, tc.taken)
			}
			wantAttached(t, cg, hook, ours)
			if s := Check(func(string) string { return pin })[4]; s.Err != nil || s.CgroupID != cg.ID {
				t.Errorf("our pin: %+v", s)
			}
			for i, other := range others {
				if _, err := os.Stat(other); (err == nil) != slices.Contains(tc.left, i) {
					t.Errorf("the pin %s: %v", other, err)
				}
			}
			if err := DetachAll(dir); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAttachAfterTheCgroupIsGone(t *testing.T) {
	dir := pins(t)
	hook := Hooks()[4]
	pin := filepath.Join(dir, hook.Name)
	prog := proceed(t, hook, "fairlead_test")
	first := newCgroup(t)
	if err := Attach(first, hook, prog, pin); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(first.Path); err != nil {
		t.Fatal(err)
	}
	check := func() Status { return Check(func(string) string { return pin })[4] }
	// The kernel lets go of a removed cgroup's programs a little later.
	testutil.Eventually(t, testutil.Patience(), "a removed cgroup is noticed", func() error {
		if s := check(); s.Err == nil {
			return errors.New("still attached")
		}
		return nil
	})
	if s := check(); s.Err.Error() != "its cgroup has been removed" {
		t.Errorf("status is %+v", s)
	}
	second := newCgroup(t)
	if err := Attach(second, hook, prog, pin); err != nil {
		t.Fatal(err)
	}
	wantAttached(t, second, hook, prog)
	if err := os.Remove(second.Path); err != nil {
		t.Fatal(err)
	}
	if err := DetachAll(dir); err != nil {
		t.Errorf("detach from a removed cgroup: %v", err)
	}
	if _, err := os.Stat(pin); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", pin, err)
	}
}

func TestAttachBesideOthers(t *testing.T) {
	cg, dir := newCgroup(t), pins(t)
	hook := Hooks()[4]
	other := proceed(t, hook, "other")
	theirs, err := link.AttachCgroup(link.CgroupOptions{Path: cg.Path, Attach: hook.Type, Program: other})
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	ours := proceed(t, hook, "ours")
	if err := Attach(cg, hook, ours, filepath.Join(dir, hook.Name)); err != nil {
		t.Fatal(err)
	}
	wantAttached(t, cg, hook, other, ours)
	if err := DetachAll(dir); err != nil {
		t.Error(err)
	}
	wantAttached(t, cg, hook, other)
}

// TestAttachNamesWhoKeepsUsOut attaches a program the old way, which lets nobody
// in beside it.
func TestAttachNamesWhoKeepsUsOut(t *testing.T) {
	cg, dir := newCgroup(t), pins(t)
	hook := Hooks()[4]
	legacy := proceed(t, hook, "legacy_prog")
	cgroupDir, err := os.Open(cg.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroupDir.Close()
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: int(cgroupDir.Fd()), Program: legacy, Attach: hook.Type,
	}); err != nil {
		t.Fatal(err)
	}
	err = Attach(cg, hook, proceed(t, hook, "ours"), filepath.Join(dir, hook.Name))
	if !errors.Is(err, unix.EPERM) {
		t.Fatalf("error is %v, want EPERM", err)
	}
	for _, part := range []string{"attach connect4 to cgroup " + cg.Path, "legacy_prog", "BPF_F_ALLOW_MULTI"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, hook.Name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a failed attach leaves a pin: %v", err)
	}
	wantAttached(t, cg, hook, legacy)
}

func TestDetachAllGoesOnAfterAnError(t *testing.T) {
	cg, dir := newCgroup(t), pins(t)
	hook := Hooks()[4]
	prog := proceed(t, hook, "fairlead_test")
	if err := Attach(cg, hook, prog, filepath.Join(dir, hook.Name)); err != nil {
		t.Fatal(err)
	}
	if err := prog.Pin(filepath.Join(dir, "a_program")); err != nil {
		t.Fatal(err)
	}
	if err := DetachAll(dir); err == nil || !strings.Contains(err.Error(), "a_program") {
		t.Errorf("error %v does not name the pin that is no link", err)
	}
	wantAttached(t, cg, hook)
}
