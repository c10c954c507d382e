// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Fault is what somebody else has done to a hook.
type Fault string

// The faults.
const (
	Detached Fault = "detached" // the link is on no cgroup any more
	Moved    Fault = "moved"    // the link is on another cgroup than it should be
	Replaced Fault = "replaced" // the link has another program than ours
	Unpinned Fault = "unpinned" // the pin is gone, or leads to something else
)

// Restored is a hook that is as it should be again.
type Restored struct {
	Hook  string
	Fault Fault
}

// Links keeps the programs of the socket path where Attach has put them. It holds
// descriptors of the links, so that what somebody unpins stays attached. It is for
// one goroutine.
type Links struct {
	cgroup  Cgroup
	program func(name string) *ebpf.Program
	pin     func(hook string) string
	links   map[string]*keptLink
}

// keptLink is the link of one hook.
type keptLink struct {
	link   link.Link
	id     link.ID
	pinned inode         // what the pin was when it led to the link
	prog   *ebpf.Program // whose ID is progID
	progID ebpf.ProgramID
}

// inode tells files apart without opening them.
type inode struct{ device, number uint64 }

// inodeOf returns the zero inode when there is no such file.
func inodeOf(path string) inode {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return inode{}
	}
	return inode{st.Dev, st.Ino}
}

// KeepLinks returns Links for hooks that Attach has just put on the cgroup. program
// returns the program that belongs on a hook now, pin tells where its link is pinned.
func KeepLinks(cgroup Cgroup, program func(name string) *ebpf.Program, pin func(hook string) string) *Links {
	l := &Links{cgroup: cgroup, program: program, pin: pin, links: map[string]*keptLink{}}
	for _, h := range Hooks() {
		// One that is gone by now is attached anew by Check.
		if k, err := openKept(pin(h.Name)); err == nil {
			l.links[h.Name] = k
		}
	}
	return l
}

func openKept(pin string) (*keptLink, error) {
	got, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	info, err := got.Info()
	if err != nil {
		return nil, errors.Join(err, got.Close())
	}
	return &keptLink{link: got, id: info.ID, pinned: inodeOf(pin)}, nil
}

// SetCgroup makes Check put the hooks on another cgroup.
func (l *Links) SetCgroup(cgroup Cgroup) { l.cgroup = cgroup }

// Check looks at all hooks and puts back what is not as it should be: on the new
// cgroup a program is in place before the old one goes. It goes on after an error.
// pins says whether pins are looked after as well.
func (l *Links) Check(pins bool) ([]Restored, error) {
	var restored []Restored
	var errs []error
	for _, h := range Hooks() {
		fault, err := l.checkHook(h)
		if err == nil && pins {
			var unpinned bool
			unpinned, err = l.checkPin(h)
			if unpinned && fault == "" {
				fault = Unpinned
			}
		}
		if err != nil {
			errs = append(errs, err)
		} else if fault != "" {
			restored = append(restored, Restored{h.Name, fault})
		}
	}
	return restored, errors.Join(errs...)
}

// Close gives up the descriptors and leaves everything in place.
func (l *Links) Close() error {
	var errs []error
	for _, k := range l.links {
		errs = append(errs, k.link.Close())
	}
	l.links = nil
	return errors.Join(errs...)
}

// checkHook sees to it that our program is on the hook of the cgroup. fault is ""
// when it was.
func (l *Links) checkHook(h Hook) (fault Fault, err error) {
	k := l.links[h.Name]
	if k == nil {
		return Detached, l.attach(h)
	}
	info, err := k.link.Info()
	if err != nil {
		return "", fmt.Errorf("look at link of %s: %w", h.Name, err)
	}
	on := info.Cgroup()
	switch {
	case on == nil:
		return "", fmt.Errorf("link of %s is not one of a cgroup", h.Name)
	case on.CgroupId == 0:
		return Detached, l.attach(h)
	case on.CgroupId != l.cgroup.ID:
		return Moved, l.attach(h)
	}
	want, err := k.programID(l.program(h.Program))
	if err != nil {
		return "", fmt.Errorf("look at program of %s: %w", h.Name, err)
	}
	if info.Program == want {
		return "", nil
	}
	if err := k.link.Update(k.prog); err != nil {
		return "", fmt.Errorf("put program back on %s: %w", h.Name, err)
	}
	return Replaced, nil
}

// programID returns the ID of prog, which is asked for once for each program.
func (k *keptLink) programID(prog *ebpf.Program) (ebpf.ProgramID, error) {
	if k.prog == prog {
		return k.progID, nil
	}
	info, err := prog.Info()
	if err != nil {
		return 0, err
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("the kernel does not tell its ID")
	}
	k.prog, k.progID = prog, id
	return id, nil
}

// attach makes a new link, and gives up the old one if there is one. Its pin is for
// checkPin.
func (l *Links) attach(h Hook) error {
	made, err := link.AttachCgroup(link.CgroupOptions{
		Path: l.cgroup.Path, Attach: h.Type, Program: l.program(h.Program),
	})
	if err != nil {
		return explainAttach(fmt.Errorf("attach %s to cgroup %s: %w", h.Name, l.cgroup.Path, err), l.cgroup, h)
	}
	info, err := made.Info()
	if err != nil {
		return errors.Join(fmt.Errorf("look at link of %s: %w", h.Name, err), made.Close())
	}
	if old := l.links[h.Name]; old != nil {
		_ = old.link.Close() // its pin keeps it until checkPin takes that
	}
	l.links[h.Name] = &keptLink{link: made, id: info.ID}
	return nil
}

// checkPin sees to it that the pin leads to the link.
func (l *Links) checkPin(h Hook) (unpinned bool, err error) {
	k, pin := l.links[h.Name], l.pin(h.Name)
	now := inodeOf(pin)
	if now != (inode{}) && now == k.pinned {
		return false, nil
	}
	if other, err := openKept(pin); err == nil {
		_ = other.link.Close()
		if other.id == k.id { // pinned anew, by ourselves or not
			k.pinned = now
			return false, nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(pin), 0o700); err != nil {
		return false, fmt.Errorf("make directory for links: %w", err)
	}
	// The link's own idea of where it is pinned may be out of date.
	if err := k.link.Unpin(); err != nil {
		return false, fmt.Errorf("unpin link %s: %w", h.Name, err)
	}
	aside := pin + "_new" // a BPF file system refuses names with dots
	_ = os.Remove(aside)  // left by one that was killed here
	if err := k.link.Pin(aside); err != nil {
		return false, fmt.Errorf("pin link %s: %w", h.Name, err)
	}
	if err := os.Rename(aside, pin); err != nil {
		return false, fmt.Errorf("pin link %s: %w", h.Name, err)
	}
	k.pinned = inodeOf(pin)
	return true, nil
}

// CgroupWatch tells when the cgroup to attach to has become another one: when its
// directory has been removed and made anew, or when PID 1 has another root.
type CgroupWatch struct {
	root      string // the directory that was asked for, "" for the node's root
	found     Cgroup
	directory inode
	namespace inode // the cgroup namespace of PID 1; zero where it may not be looked at
}

const hostNamespace = "/proc/1/ns/cgroup"

// WatchCgroup returns a watch over what was found for root: by OpenCgroup, or by
// HostCgroup when it is empty.
func WatchCgroup(root string, found Cgroup) *CgroupWatch {
	w := &CgroupWatch{root: root}
	w.note(found)
	return w
}

func (w *CgroupWatch) note(found Cgroup) {
	w.found = found
	w.directory, w.namespace = followed(found.Path), followed(hostNamespace)
}

// followed is inodeOf for what a link leads to.
func followed(path string) inode {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return inode{}
	}
	return inode{st.Dev, st.Ino}
}

// Look returns the cgroup to attach to now. After an error, the one of before is the
// best there is. It costs two system calls while nothing changes.
func (w *CgroupWatch) Look() (Cgroup, error) {
	same := followed(w.found.Path) == w.directory
	if w.root == "" {
		same = same && followed(hostNamespace) == w.namespace
	}
	if same {
		return w.found, nil
	}
	var now Cgroup
	var err error
	if w.root == "" {
		now, err = HostCgroup()
	} else {
		now, err = OpenCgroup(w.root)
	}
	if err != nil {
		return w.found, err
	}
	w.note(now)
	return now, nil
}
