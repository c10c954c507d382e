// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// pin is where a map is pinned.
type pin struct {
	name, path string
	file       pinnedFile // what KeepPins has found there or made
}

// pinnedFile is the file of a pin. It tells pins apart without opening them.
type pinnedFile struct{ device, inode uint64 }

// pinnedAt returns the zero pinnedFile when there is no such file.
func pinnedAt(path string) pinnedFile {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return pinnedFile{}
	}
	return pinnedFile{st.Dev, st.Ino}
}

// KeepPins sees to it that the maps are pinned below the root, which may have been
// removed or be on another BPF file system by now: the next agent would begin with
// empty maps. restored names, sorted, the maps that were not, or whose pins led to
// other maps. Links and programs are not looked at. It is for the goroutine that
// writes, and costs a system call for each map while nothing changes.
//
// The error is about the root itself when restored is nil: it is no BPF file system,
// say, or another agent has it.
func (d *Datapath) KeepPins() (restored []string, err error) {
	if err := d.keepRoot(); err != nil {
		return nil, err
	}
	restored = []string{}
	if d.pins == nil {
		for _, name := range slices.Sorted(maps.Keys(d.maps)) {
			if isPinned(name) {
				d.pins = append(d.pins, pin{name: name, path: MapPath(d.config.Root, name)})
			}
		}
	}
	var errs []error
	for i := range d.pins {
		changed, err := d.keepPin(&d.pins[i])
		if err != nil {
			errs = append(errs, err)
		} else if changed {
			restored = append(restored, d.pins[i].name)
		}
	}
	return restored, errors.Join(errs...)
}

// keepRoot sees to it that the root directory is ours: on another one we have no
// lock yet.
func (d *Datapath) keepRoot() error {
	if sameFile(d.lock, d.config.Root) {
		return nil
	}
	if err := checkRoot(d.config.Root); err != nil {
		return err
	}
	lock, err := tryLock(d.config.Root)
	if err != nil {
		return err
	}
	_ = d.lock.Close()
	d.lock = lock
	return nil
}

// keepPin pins a map if its pin does not lead to it.
func (d *Datapath) keepPin(p *pin) (changed bool, err error) {
	m, now := d.maps[p.name], pinnedAt(p.path)
	if now != (pinnedFile{}) && now == p.file {
		return false, nil
	}
	if same, err := leadsTo(p.path, m); err != nil {
		return false, err
	} else if same {
		p.file = now
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(p.path), 0o700); err != nil {
		return false, fmt.Errorf("make pin directory: %w", err)
	}
	// The map's own idea of where it is pinned may be out of date.
	if err := errors.Join(m.Unpin(), os.RemoveAll(p.path)); err != nil {
		return false, fmt.Errorf("remove pin of map %s: %w", p.name, err)
	}
	if err := m.Pin(p.path); err != nil {
		return false, fmt.Errorf("pin map %s: %w", p.name, err)
	}
	p.file = pinnedAt(p.path)
	return true, nil
}

// leadsTo tells whether a pin leads to a map.
func leadsTo(path string, m *ebpf.Map) (bool, error) {
	pinned, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return false, nil // nothing, or something else
	}
	defer pinned.Close()
	there, err := mapID(pinned)
	if err != nil {
		return false, err
	}
	ours, err := mapID(m)
	return there == ours, err
}

func mapID(m *ebpf.Map) (ebpf.MapID, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("look at map %s: %w", m, err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, fmt.Errorf("look at map %s: the kernel does not tell its ID", m)
	}
	return id, nil
}

// tryLock is Lock without waiting.
func tryLock(root string) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("open bpf root: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock bpf root %s (is another agent using it?): %w", root, err), dir.Close())
	}
	return dir, nil
}

// SetCgroup tells the programs that the hooks are on another cgroup now: those that
// look for sockets, since they pass over what was made elsewhere. They are loaded
// anew with the same maps. It is for the goroutine that writes.
func (d *Datapath) SetCgroup(id uint64) error {
	if d.NoIterators != nil {
		return nil
	}
	config := d.config
	config.CgroupID = id
	spec, _, err := buildSpec(config)
	if err != nil {
		return err
	}
	loaded, err := loadPrograms(split(spec).iterators, d.maps, nil)
	if err != nil {
		return fmt.Errorf("load iterators for another cgroup: %w", err)
	}
	d.config = config
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, old := range d.iterators {
		_ = old.Close()
	}
	d.iterators = loaded
	return nil
}
