// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// firstSizes are what maps that can grow begin with, unless they may not have as many rows:
// room for some thousands of Services.
var firstSizes = map[string]uint32{
	bpfMapFrontends:    16384,
	bpfMapServices:     8192,
	bpfMapNames:        8192,
	mapGenerations:     8192,
	bpfMapSlots:        65536,
	bpfMapMembers:      32768,
	bpfMapSourceRanges: 4096,
}

// growWith names the maps that have as many rows as a table and grow with it.
var growWith = map[string][]string{bpfMapServices: {bpfMapNames, mapGenerations}}

// asideSuffix ends the name of a pin that is made before it takes another's place. A
// BPF file system refuses names with dots.
const asideSuffix = "_new"

// ceilings returns how many rows maps that can grow may have.
func ceilings(sizes Sizes) (map[string]uint32, error) {
	spec, err := loadSpec()
	if err != nil {
		return nil, err
	}
	out := map[string]uint32{}
	for name, size := range sizes.byMap() {
		if _, grows := firstSizes[name]; grows {
			out[name] = cmp.Or(size, spec.Maps[name].MaxEntries)
		}
	}
	return out, nil
}

// tableOf returns the table that grows when a map is full.
func tableOf(name string) string {
	for table, others := range growWith {
		if slices.Contains(others, name) {
			return table
		}
	}
	return name
}

// Growth is a table that has grown.
type Growth struct {
	Table    string
	From, To uint32 // rows
}

// Fill is how full a table that can grow is.
type Fill struct {
	Rows uint32 // 0 of slots: who hands them out knows
	Size uint32 // rows there is room for now
	Max  uint32 // ... at most
}

// Tables that can grow.
const (
	TableFrontends    = bpfMapFrontends
	TableServices     = bpfMapServices
	TableSlots        = bpfMapSlots
	TableMembers      = bpfMapMembers
	TableSourceRanges = bpfMapSourceRanges
)

// Fill tells how full the tables are that can grow. It may be called from any goroutine.
func (d *Datapath) Fill() map[string]Fill {
	d.mu.RLock()
	defer d.mu.RUnlock()
	services, slots := d.Limits()
	out := map[string]Fill{
		TableServices: {Rows: uint32(d.rows[bpfMapNames].Load()), Size: uint32(services), Max: d.ceilings[bpfMapServices]},
		TableSlots:    {Size: uint32(slots), Max: d.ceilings[bpfMapSlots]},
	}
	for _, table := range []string{TableFrontends, TableMembers, TableSourceRanges} {
		out[table] = Fill{Rows: uint32(d.rows[table].Load()), Size: d.maps[table].MaxEntries(), Max: d.ceilings[table]}
	}
	return out
}

// Grow doubles tables that have not reached their ceiling, and again until they have
// room for the rows that are wanted of each; others it leaves alone. Only who writes the
// tables may call it, and nothing is written meanwhile.
//
// Larger maps are filled with the rows there are, and programs loaded with them. attach
// puts these in the place of those before, wherever they are; while it does so either may run,
// for their tables hold the same. Then the larger maps get the pins of the smaller. Who is
// killed on the way leaves either pinned. After an error everything is as it was: attach has
// been called with the old programs, if it had been called with new ones.
func (d *Datapath) Grow(wanted map[string]uint32, attach func(program func(name string) *ebpf.Program) error) ([]Growth, error) {
	sizes, grown := d.larger(wanted)
	if len(grown) == 0 {
		return nil, nil
	}
	next, err := d.enlarge(sizes)
	if err != nil {
		return nil, err
	}
	if err := d.exchange(next, attach); err != nil {
		next.close()
		return nil, err
	}
	return grown, nil
}

// larger returns the sizes that maps are to have.
func (d *Datapath) larger(wanted map[string]uint32) (sizes map[string]uint32, grown []Growth) {
	sizes = map[string]uint32{}
	for _, table := range slices.Sorted(maps.Keys(wanted)) {
		from, ceiling := d.maps[table].MaxEntries(), d.ceilings[table]
		for _, other := range growWith[table] {
			from = min(from, d.maps[other].MaxEntries())
		}
		to := from
		for to < ceiling && (to == from || to < wanted[table]) {
			to = min(2*to, ceiling)
		}
		if to == from {
			continue
		}
		for _, name := range append([]string{table}, growWith[table]...) {
			if d.maps[name].MaxEntries() < to {
				sizes[name] = to
			}
		}
		grown = append(grown, Growth{table, from, to})
	}
	return sizes, grown
}

// generation is a set of maps and the programs that use them.
type generation struct {
	maps                map[string]*ebpf.Map // those that are larger
	memory              map[string][]byte    // of those that are mapped
	programs, iterators map[string]*ebpf.Program
}

func (g *generation) close() {
	for name, mem := range g.memory {
		_ = unix.Munmap(mem)
		delete(g.memory, name)
	}
	closeMaps(g.maps)
	closePrograms(g.programs)
	closePrograms(g.iterators)
}

// enlarge makes maps of these sizes with the rows there are, and programs for them.
func (d *Datapath) enlarge(sizes map[string]uint32) (g *generation, err error) {
	g = &generation{maps: map[string]*ebpf.Map{}, memory: map[string][]byte{}}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	spec, _, err := buildSpec(d.config)
	if err != nil {
		return nil, err
	}
	all := maps.Clone(d.maps)
	for name := range spec.Maps {
		if !isPinned(name) {
			continue
		}
		spec.Maps[name].MaxEntries = d.maps[name].MaxEntries()
		if size, grows := sizes[name]; grows {
			spec.Maps[name].MaxEntries = size
			m, err := ebpf.NewMap(spec.Maps[name])
			if err != nil {
				return nil, fmt.Errorf("make map %s with %d rows: %w", name, size, err)
			}
			g.maps[name], all[name] = m, m
			if err := d.copyRows(g, name, m); err != nil {
				return nil, fmt.Errorf("copy map %s: %w", name, err)
			}
		}
	}
	parts := split(spec)
	var types *btf.Spec
	if d.NoClientAddress != nil {
		if types, err = emptyTypes(); err != nil {
			return nil, err
		}
	}
	if g.programs, err = loadPrograms(parts.hooks, all, types); err != nil {
		return nil, err
	}
	if d.NoIterators == nil {
		if g.iterators, err = loadPrograms(parts.iterators, all, nil); err != nil {
			return nil, err
		}
	}
	if d.config.PacketPath && d.NoPacketPath == nil {
		packets, err := loadPrograms(parts.packets, all, nil)
		if err != nil {
			return nil, err
		}
		maps.Copy(g.programs, packets)
	}
	return g, nil
}

// copyRows fills a larger map.
func (d *Datapath) copyRows(g *generation, name string, to *ebpf.Map) error {
	from := d.maps[name]
	switch name {
	case bpfMapFrontends:
		return copyEach[bpfFrontendKey, bpfFrontend](from, to)
	case bpfMapMembers:
		return copyEach[bpfMemberKey, uint8](from, to)
	case bpfMapSourceRanges:
		return copyEach[bpfSourceKey, uint8](from, to)
	case bpfMapNames:
		return copyEach[uint32, bpfServiceName](from, to)
	}
	mem, err := mapMemory(to, unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return err
	}
	g.memory[name] = mem
	copy(mem, *d.mapped()[name])
	return nil
}

func copyEach[K, V any](from, to *ebpf.Map) error {
	var errs []error
	err := each(from, func(k *K, v *V) {
		if err := to.Put(k, v); err != nil && len(errs) == 0 {
			errs = append(errs, err)
		}
	})
	return errors.Join(append(errs, err)...)
}

// exchange puts a generation in the place of the one there is.
func (d *Datapath) exchange(next *generation, attach func(func(string) *ebpf.Program) error) (err error) {
	names := slices.Sorted(maps.Keys(next.maps))
	aside := func(name string) string { return MapPath(d.config.Root, name) + asideSuffix }
	attached := false
	defer func() {
		if err == nil {
			return
		}
		for _, name := range names {
			_ = next.maps[name].Unpin() // a pin that was not made
		}
		if attached {
			err = errors.Join(err, attach(d.Program))
		}
	}()
	for _, name := range names {
		_ = os.Remove(aside(name)) // left by one that was killed here
		if err := next.maps[name].Pin(aside(name)); err != nil {
			return fmt.Errorf("pin larger map %s: %w", name, err)
		}
	}
	attached = true
	if err := attach(func(name string) *ebpf.Program { return next.programs[name] }); err != nil {
		return err
	}
	for i, name := range names {
		if err := os.Rename(aside(name), MapPath(d.config.Root, name)); err != nil {
			for _, renamed := range names[:i] {
				err = errors.Join(err, d.repin(renamed))
			}
			return fmt.Errorf("pin larger map %s: %w", name, err)
		}
	}
	d.commit(next)
	return nil
}

// repin puts the map that is in use at its pin.
func (d *Datapath) repin(name string) error {
	aside := MapPath(d.config.Root, name) + asideSuffix
	m, err := d.maps[name].Clone() // the pin that is lost is not ours to move
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.Pin(aside); err != nil {
		return err
	}
	return os.Rename(aside, MapPath(d.config.Root, name))
}

// commit makes a generation the one there is and lets go of the other.
func (d *Datapath) commit(next *generation) {
	old := &generation{maps: map[string]*ebpf.Map{}, memory: map[string][]byte{}, programs: d.programs, iterators: d.iterators}
	memory := d.mapped()
	d.mu.Lock()
	defer d.mu.Unlock()
	held := maps.Clone(d.maps)
	for name, m := range next.maps {
		old.maps[name], held[name] = held[name], m
	}
	for name, mem := range next.memory {
		old.memory[name], *memory[name] = *memory[name], mem
	}
	d.maps, d.programs, d.iterators = held, next.programs, next.iterators
	old.close()
}
