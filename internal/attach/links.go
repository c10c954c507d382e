// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Hook is a place a program is attached to on a cgroup.
type Hook struct {
	Name    string // what status calls it, and the name of its pin
	Program string // name of the program in bpf/datapath.bpf.c
	Type    ebpf.AttachType
}

// Hooks returns the hooks of the socket path, in the order they are attached:
// those that answer with a service address before those that translate it, so
// that no answer comes from an address the client did not ask.
func Hooks() []Hook {
	return []Hook{
		{"recvmsg4", "sock_recvmsg4", ebpf.AttachCGroupUDP4Recvmsg},
		{"recvmsg6", "sock_recvmsg6", ebpf.AttachCGroupUDP6Recvmsg},
		{"getpeername4", "sock_getpeername4", ebpf.AttachCgroupInet4GetPeername},
		{"getpeername6", "sock_getpeername6", ebpf.AttachCgroupInet6GetPeername},
		{"connect4", "sock_connect4", ebpf.AttachCGroupInet4Connect},
		{"connect6", "sock_connect6", ebpf.AttachCGroupInet6Connect},
		{"sendmsg4", "sock_sendmsg4", ebpf.AttachCGroupUDP4Sendmsg},
		{"sendmsg6", "sock_sendmsg6", ebpf.AttachCGroupUDP6Sendmsg},
	}
}

// Attach puts prog on the hook of the cgroup and pins the link at pin. A link
// that is pinned there already gets the new program in one step; one that is on
// another cgroup is replaced, the new one being in place before the old one goes.
func Attach(cgroup Cgroup, hook Hook, prog *ebpf.Program, pin string) error {
	old, err := link.LoadPinnedLink(pin, nil)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open pinned link %s: %w", hook.Name, err)
	}
	if old == nil {
		return attachNew(cgroup, hook, prog, pin)
	}
	defer old.Close()
	if id, err := cgroupOf(old); err == nil && id == cgroup.ID {
		if err := old.Update(prog); err != nil {
			return fmt.Errorf("update program on %s: %w", hook.Name, err)
		}
		return nil
	}
	aside := pin + "_new" // a BPF file system refuses names with dots
	_ = os.Remove(aside)  // left by one that was killed here
	if err := attachNew(cgroup, hook, prog, aside); err != nil {
		return err
	}
	if err := os.Rename(aside, pin); err != nil {
		return fmt.Errorf("pin link %s: %w", hook.Name, err)
	}
	return nil
}

// TakeOver is Attach for when pins of other versions may lead to links on the hook:
// the first one of others that is on the cgroup gets the program in one step and is
// pinned at pin from then on. So the hook always has one of our programs, and never
// two for what is taken over. taken tells that there was such a link; the rest of
// others stays.
func TakeOver(cgroup Cgroup, hook Hook, prog *ebpf.Program, pin string, others []string) (taken bool, err error) {
	if _, err := os.Lstat(pin); err == nil {
		return false, Attach(cgroup, hook, prog, pin)
	}
	for _, other := range others {
		taken, err := inherit(cgroup, hook, prog, pin, other)
		if taken || err != nil {
			return taken, err
		}
	}
	return false, Attach(cgroup, hook, prog, pin)
}

// inherit is TakeOver with one other pin, which need not exist.
func inherit(cgroup Cgroup, hook Hook, prog *ebpf.Program, pin, other string) (taken bool, err error) {
	l, err := link.LoadPinnedLink(other, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open pinned link %s: %w", other, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return false, fmt.Errorf("look at pinned link %s: %w", other, err)
	}
	on := info.Cgroup()
	if on == nil || on.CgroupId != cgroup.ID || ebpf.AttachType(on.AttachType) != hook.Type {
		return false, nil
	}
	if err := l.Update(prog); err != nil {
		return false, fmt.Errorf("update program on %s: %w", hook.Name, err)
	}
	// Whoever comes after one that was killed here finds our program on the other's
	// link, and that it can be taken over like any.
	if err := os.Rename(other, pin); err != nil {
		return false, fmt.Errorf("pin link %s: %w", hook.Name, err)
	}
	return true, nil
}

func attachNew(cgroup Cgroup, hook Hook, prog *ebpf.Program, pin string) error {
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup.Path, Attach: hook.Type, Program: prog})
	if err != nil {
		return explainAttach(fmt.Errorf("attach %s to cgroup %s: %w", hook.Name, cgroup.Path, err), cgroup, hook)
	}
	defer l.Close()
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin link %s: %w", hook.Name, err)
	}
	return nil
}

// explainAttach names the program that keeps others out, if that is the cause.
func explainAttach(err error, cgroup Cgroup, hook Hook) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	dir, openErr := os.Open(cgroup.Path)
	if openErr != nil {
		return err
	}
	defer dir.Close()
	got, queryErr := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook.Type, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE})
	if queryErr != nil || len(got.Programs) == 0 {
		return fmt.Errorf("%w (run as root, or with CAP_BPF and CAP_NET_ADMIN)", err)
	}
	var names []string
	for _, p := range got.Programs {
		names = append(names, programName(p.ID))
	}
	return fmt.Errorf("%w (attached there without allowing others: %s; detach it with bpftool cgroup detach, "+
		"or have its owner use BPF_F_ALLOW_MULTI)", err, strings.Join(names, ", "))
}

func programName(id ebpf.ProgramID) string {
	name := fmt.Sprintf("program %d", id)
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return name
	}
	defer p.Close()
	if info, err := p.Info(); err == nil && info.Name != "" {
		name += " " + info.Name
	}
	return name
}

func cgroupOf(l link.Link) (uint64, error) {
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	cg := info.Cgroup()
	if cg == nil {
		return 0, errors.New("not a cgroup link")
	}
	return cg.CgroupId, nil
}

// Status is what is known of one hook.
type Status struct {
	Hook string
	// CgroupID is the cgroup the link is on; 0 when the cgroup has been removed.
	CgroupID uint64
	// Err says why the hook is not attached; nil when it is.
	Err error
}

// Check looks at the pinned links of all hooks. pin tells where each is.
func Check(pin func(hook string) string) []Status {
	var out []Status
	for _, h := range Hooks() {
		s := Status{Hook: h.Name}
		s.CgroupID, s.Err = pinnedCgroup(pin(h.Name))
		if s.Err == nil && s.CgroupID == 0 {
			s.Err = errors.New("its cgroup has been removed")
		}
		out = append(out, s)
	}
	return out
}

func pinnedCgroup(pin string) (uint64, error) {
	l, err := link.LoadPinnedLink(pin, nil) // links cannot be opened read-only
	if errors.Is(err, fs.ErrNotExist) {
		return 0, errors.New("not attached")
	}
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return cgroupOf(l)
}

// DetachAll detaches and unpins every link below dir, which may be missing.
func DetachAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list pinned links: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, detach(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

func detach(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	defer l.Close()
	// A link whose cgroup is gone has nothing to detach from; its pin goes all
	// the same.
	_ = l.Detach()
	if err := os.Remove(pin); err != nil {
		return fmt.Errorf("unpin link: %w", err)
	}
	return nil
}
