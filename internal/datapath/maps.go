// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// StateABI is the version of the layout of those maps that are state: what
// connections depend on, and the service IDs that they remember. All ABIs with the
// same one share them, so a change of the tables' layout, in either direction,
// takes nothing from a connection. A state of another version is left alone.
const StateABI = 1

// stateMaps are the maps that are state. All others are tables, which each ABI
// makes from what its source says.
var stateMaps = map[string]bool{
	bpfMapOrigins: true, bpfMapOriginsOverflow: true, bpfMapControl: true,
	bpfMapAffinity: true, bpfMapPods: true, bpfMapPeers: true,
	bpfMapFlows: true, bpfMapFragments: true, bpfMapFlowGate: true,
	bpfMapNames: true, mapGenerations: true,
}

// mapGenerations is the map of the generations that ranges have had last, which no
// program reads: sockets and flows remember them, so tables that are made anew go
// on counting where others have ended. A service ID that has any was in use, and is
// not free because no table has rows of it.
const mapGenerations = "generations"

// generations are those of a service ID, one for each side. Mapped arrays have a
// stride of 8 bytes.
type generations [(lb.Sides + 1) / 2 * 2]uint32

// loadSpec reads the embedded object and adds the maps that only the agent uses.
func loadSpec() (*ebpf.CollectionSpec, error) {
	spec, err := loadBpf()
	if err != nil {
		return nil, err
	}
	spec.Maps[mapGenerations] = &ebpf.MapSpec{
		Name: mapGenerations, Type: ebpf.Array, Flags: unix.BPF_F_MMAPABLE,
		KeySize: 4, ValueSize: uint32(unsafe.Sizeof(generations{})), MaxEntries: spec.Maps[bpfMapNames].MaxEntries,
	}
	return spec, nil
}

// isPinned says whether a map outlives the agent: not options, nor what is there only
// while a packet is looked at, which is each build's own.
func isPinned(name string) bool { return name[0] != '.' && name != bpfMapWork }

const mapsDir = "maps"

func stateDir(root string) string { return filepath.Join(root, "state"+strconv.Itoa(StateABI)) }

// MapPath returns where a map is pinned.
func MapPath(root, name string) string {
	if stateMaps[name] {
		return filepath.Join(stateDir(root), name)
	}
	return filepath.Join(versionDir(root), mapsDir, name)
}

// openMaps takes up the maps of a specification that are pinned below root, and makes
// and pins those that are not. The caller closes them.
func openMaps(root string, spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	maps := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		if !isPinned(name) {
			continue
		}
		_ = os.Remove(MapPath(root, name) + asideSuffix) // of one that was killed in Grow
		m = m.Copy()
		m.Pinning = ebpf.PinByName
		opened, err := ebpf.NewMapWithOptions(m, ebpf.MapOptions{PinPath: filepath.Dir(MapPath(root, name))})
		if err != nil {
			closeMaps(maps)
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
		maps[name] = opened
	}
	return maps, nil
}

// servingPath is a symbolic link beside the state: to the directory of the version
// whose tables say what the service IDs in the state mean.
func servingPath(root string) string { return filepath.Join(stateDir(root), "serving") }

// serving returns the name of the version that servingPath leads to; "" before
// anybody has served.
func serving(root string) (string, error) {
	target, err := os.Readlink(servingPath(root))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read which version serves: %w", err)
	}
	return filepath.Base(target), nil
}

// setServing makes servingPath lead to our tables.
func setServing(root string) error {
	if now, err := serving(root); err == nil && now == versionName(ABI) {
		return nil
	}
	aside := servingPath(root) + "_new"
	_ = os.Remove(aside) // left by one that was killed here
	err := os.Symlink(filepath.Join("..", versionName(ABI)), aside)
	if err == nil {
		err = os.Rename(aside, servingPath(root))
	}
	if err != nil {
		return fmt.Errorf("note that %s serves: %w", versionName(ABI), err)
	}
	return nil
}

// makeDirs makes the directories for pins. Tables of ours from before another version
// has served are removed: they say what service IDs meant then. switching tells that
// the programs of another version may be in use.
func makeDirs(root string) (switching bool, err error) {
	now, err := serving(root)
	if err != nil {
		return false, err
	}
	others, err := OtherLinks(root)
	if err != nil {
		return false, err
	}
	tables := filepath.Join(versionDir(root), mapsDir)
	replaced := now != "" && now != versionName(ABI)
	if replaced {
		// Programs that use them go on.
		if err := os.RemoveAll(tables); err != nil {
			return false, fmt.Errorf("remove outdated tables: %w", err)
		}
	}
	for _, dir := range []string{tables, filepath.Dir(LinkPath(root, "any")), DevicesPath(root), stateDir(root)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return false, fmt.Errorf("create pin directory: %w", err)
		}
	}
	return replaced || len(others) > 0, nil
}
