// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Programs are those of the packet path: for devices whose packets begin with an
// Ethernet header, and for those whose packets begin with the IP header.
type Programs struct {
	Ingress, Egress, IngressL3, EgressL3 *ebpf.Program
}

func (p Programs) forDevice(d Device, dir direction) *ebpf.Program {
	switch {
	case d.L2 && dir == ingress:
		return p.Ingress
	case d.L2:
		return p.Egress
	case dir == ingress:
		return p.IngressL3
	default:
		return p.EgressL3
	}
}

// direction is one of a device's two sides.
type direction string

const (
	ingress direction = "ingress"
	egress  direction = "egress"
)

// place is where one program goes.
type place struct {
	index int // of the device
	dir   direction
}

// placesOf returns the places on a device in the order they are filled: what
// translates answers before what lets in requests.
func placesOf(index int) [2]place { return [2]place{{index, egress}, {index, ingress}} }

// hook is a program of ours that is in its place. It stays there when this process
// ends.
type hook interface {
	// update puts another program in its place in one step.
	update(*ebpf.Program) error
	// detach takes the program away. A device that is gone is no error.
	detach() error
	// close gives up the hook and leaves the program where it is.
	close() error
}

// way is how programs get onto devices.
type way interface {
	// adopt returns the hooks that an earlier process has left. They hold its
	// programs.
	adopt() (map[place]hook, error)
	// attach returns a new hook, or one that another process has made meanwhile,
	// with the program in it. The error is ENODEV when the device is gone.
	attach(place, *ebpf.Program) (hook, error)
	// inspect returns the places whose programs are not there any more, and those
	// where somebody had put another one and ours is back. It does what it can to
	// keep the others.
	inspect(map[place]hook) (lost, replaced []place, err error)
	close() error
}

// TC keeps the programs of the packet path on devices: the first one at ingress,
// the last one at egress. Programs of others are left alone, and what they do
// stays theirs: one that is put before ours later, or that was in the first place of
// a clsact qdisc already, decides first.
//
// Programs that another version has attached, with its own directory, go on until this
// one's take their places, each in one step.
//
// On Linux 6.6 and later programs are on tcx links, pinned under the directory as
// <ifindex>-ingress and <ifindex>-egress. They come before all filters of clsact
// qdiscs. On older kernels they are filters of such a qdisc, direct-action, whose name has
// the directory in it; a qdisc that is there already is shared.
//
// Devices are those of the network namespace of the calling thread, which must
// be the same in all calls. Methods may be called from several goroutines.
type TC struct {
	dir      string
	others   []string // directories of other versions
	programs Programs

	mu      sync.Mutex
	way     way
	adopted bool                    // what earlier processes left is in hooks
	hooks   map[place]hook          // what is attached
	current map[place]*ebpf.Program // by us; missing for what was adopted
	want    map[place]Device
}

// NewTC makes dir, which must be on a BPF file system and belong to nobody else.
// Programs that an earlier process has left under it go on until Apply. others are
// the directories of other versions; what is left there after Apply RemoveTC takes
// away. programs stay the caller's and must be open until Close.
func NewTC(dir string, programs Programs, others ...string) (*TC, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for tc links: %w", err)
	}
	return &TC{
		dir: dir, others: others, programs: programs, way: &tcx{dir: dir, others: others},
		hooks: map[place]hook{}, current: map[place]*ebpf.Program{},
	}, nil
}

// Apply makes the devices with programs those of the list that are Hooked. What an
// earlier process has attached gets the programs of this one, each in one step.
// It goes on after an error; Check tries again what has failed. A device
// that goes away meanwhile is no error. attached is how many devices have both of
// their programs now.
//
// The kernel takes some 10 ms to add or remove a tcx link, one after the other: on
// a node with hundreds of devices the first Apply takes seconds. Devices of
// pods come last. Later ones, also of later processes, find links and are quick.
func (t *TC) Apply(devices []Device) (attached int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.want = map[place]Device{}
	for _, d := range devices {
		if d.Hooked {
			for _, at := range placesOf(d.Index) {
				t.want[at] = d
			}
		}
	}
	errs := []error{t.adopt(), t.dropUnwanted()}
	if _, ok := t.way.(*clsact); !ok && len(t.want) == 0 {
		// Nothing will be attached that could tell whether the kernel has tcx.
		_, err := takeAway(&clsact{dir: t.dir})
		errs = append(errs, err)
	}
	_, err = t.fill()
	for _, d := range devices {
		if t.hooks[place{d.Index, egress}] != nil && t.hooks[place{d.Index, ingress}] != nil {
			attached++
		}
	}
	return attached, errors.Join(append(errs, err)...)
}

// Check puts back the programs that somebody else has removed from the devices of
// the last Apply, or has put others in the place of, and tries again those that could not be attached. restored
// names the former, like "eth0 ingress".
func (t *TC) Check() (restored []string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.want == nil {
		return nil, nil
	}
	lost, replaced, err := t.way.inspect(t.hooks)
	errs := []error{err}
	for _, at := range lost {
		errs = append(errs, t.drop(at))
	}
	added, err := t.fill()
	for _, at := range append(replaced, added...) {
		if d, there := t.want[at]; there && (slices.Contains(lost, at) || slices.Contains(replaced, at)) {
			restored = append(restored, d.Name+" "+string(at.dir))
		}
	}
	return restored, errors.Join(append(errs, err)...)
}

// Replace puts other programs in the place of those that NewTC was given, which may be
// closed then. Each device changes over in one step. Where that fails Check tries again:
// until then the old program goes on.
func (t *TC) Replace(programs Programs) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.programs = programs
	for at := range t.current {
		d, wanted := t.want[at]
		if !wanted {
			continue
		}
		if _, err := t.put(at, d); err != nil {
			delete(t.current, at)
		}
	}
}

// Close gives up what is held here and leaves all programs in place.
func (t *TC) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	errs := []error{t.way.close()}
	for _, h := range t.hooks {
		errs = append(errs, h.close())
	}
	t.hooks, t.want = map[place]hook{}, nil
	return errors.Join(errs...)
}

// adopt takes over, once, what an earlier process has left.
func (t *TC) adopt() error {
	if t.adopted {
		return nil
	}
	found, err := t.way.adopt()
	for at, h := range found {
		if t.hooks[at] != nil { // from an earlier attempt
			_ = h.close()
			continue
		}
		t.hooks[at] = h
	}
	t.adopted = err == nil
	return err
}

// fill attaches what is wanted and missing, and replaces programs that are not
// ours. added are the places that had none of ours.
func (t *TC) fill() (added []place, err error) {
	var errs []error
	for _, at := range t.order() {
		d, ok := t.want[at]
		if !ok {
			continue // it went away with the device's other place
		}
		fresh, err := t.put(at, d)
		switch {
		case errors.Is(err, unix.ENODEV):
			// Whoever watches devices will tell.
			for _, at := range placesOf(d.Index) {
				delete(t.want, at)
				errs = append(errs, t.drop(at))
			}
		case err != nil:
			errs = append(errs, fmt.Errorf("attach to %s %s: %w", d.Name, at.dir, err))
		case fresh:
			added = append(added, at)
		}
	}
	return added, errors.Join(errs...)
}

// order returns the wanted places: first those of devices where other machines
// are, since attaching to many devices takes seconds.
func (t *TC) order() []place {
	return slices.SortedFunc(maps.Keys(t.want), func(a, b place) int {
		pod := func(at place) int {
			if t.want[at].Pod {
				return 1
			}
			return 0
		}
		return cmp.Or(cmp.Compare(pod(a), pod(b)), cmp.Compare(a.index, b.index), cmp.Compare(a.dir, b.dir))
	})
}

// put sees to it that the device's program is in its place. added tells whether
// none of ours was.
func (t *TC) put(at place, d Device) (added bool, err error) {
	prog := t.programs.forDevice(d, at.dir)
	if h := t.hooks[at]; h != nil {
		if t.current[at] == prog {
			return false, nil
		}
		if err := h.update(prog); err != nil {
			return false, err
		}
		t.current[at] = prog
		return false, nil
	}
	h, err := t.way.attach(at, prog)
	if errors.Is(err, ebpf.ErrNotSupported) {
		if err := t.useClsact(err); err != nil {
			return false, err
		}
		return t.put(at, d)
	}
	if err != nil {
		return false, err
	}
	t.hooks[at], t.current[at] = h, prog
	return true, nil
}

// useClsact goes on without tcx, which the kernel does not have, as cause says.
func (t *TC) useClsact(cause error) error {
	if _, ok := t.way.(*clsact); ok {
		return cause
	}
	t.way, t.adopted = &clsact{dir: t.dir, others: t.others}, false
	if err := t.adopt(); err != nil {
		return err
	}
	return t.dropUnwanted() // an earlier process may have had other devices
}

// dropUnwanted takes away what is in places that are not wanted.
func (t *TC) dropUnwanted() error {
	var errs []error
	for at := range t.hooks {
		if _, ok := t.want[at]; !ok {
			errs = append(errs, t.drop(at))
		}
	}
	return errors.Join(errs...)
}

// drop takes away what is in a place, if anything is.
func (t *TC) drop(at place) error {
	h := t.hooks[at]
	if h == nil {
		return nil
	}
	if err := h.detach(); err != nil {
		return fmt.Errorf("detach from device %d %s: %w", at.index, at.dir, err)
	}
	delete(t.hooks, at)
	delete(t.current, at)
	return nil
}

// RemoveTC takes away all that a TC with this directory has attached to devices of
// the calling thread's network namespace, and the directory. It goes on after an
// error. removed is how many programs are gone.
func RemoveTC(dir string) (removed int, err error) {
	var errs []error
	filters := &clsact{dir: dir}
	for _, w := range []way{&tcx{dir: dir}, filters} {
		n, err := takeAway(w)
		removed += n
		errs = append(errs, err)
	}
	errs = append(errs, filters.removeQdiscs())
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove directory of tc links: %w", err))
	}
	return removed, errors.Join(errs...)
}

// takeAway detaches all that an earlier process has attached in a way.
func takeAway(w way) (removed int, err error) {
	hooks, err := w.adopt()
	errs := []error{err}
	for at, h := range hooks {
		if err := h.detach(); err != nil {
			errs = append(errs, fmt.Errorf("detach from device %d %s: %w", at.index, at.dir, err))
			continue
		}
		removed++
	}
	return removed, errors.Join(errs...)
}
