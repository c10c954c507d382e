// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"slices"
)

// IDs hands out service IDs. An ID that is given back rests first: programs
// and sockets in the kernel may remember it for long, and would take what a new
// service does for the old one's. Each ID is handed out once before any is
// handed out again, and those that have been free for longest go first.
type IDs struct {
	state []idState
	fresh ServiceID // from here on nobody has had an ID, except by Adopt
	// free and resting list the IDs in that state in the order they got there.
	// Adopt does not look for an ID here, so an entry counts only if state
	// agrees.
	free    []ServiceID
	resting []ServiceID
	taken   int // in use or at rest
}

type idState uint8

const (
	idFree idState = iota
	idUsed
	idResting
)

// NewIDs returns an allocator of the IDs from 1 to max-1.
func NewIDs(max int) *IDs { return &IDs{state: make([]idState, max), fresh: NoService + 1} }

// Grow makes it an allocator of the IDs from 1 to max-1, of which none is lost.
func (a *IDs) Grow(max int) {
	a.state = append(a.state, make([]idState, max-len(a.state))...)
}

// Taken returns how many IDs are in use or at rest.
func (a *IDs) Taken() int { return a.taken }

// set puts an ID into a state.
func (a *IDs) set(id ServiceID, state idState) {
	if a.state[id] != idFree {
		a.taken--
	}
	if state != idFree {
		a.taken++
	}
	a.state[id] = state
}

// Alloc returns an ID for a new service; ok is false when all are in use or at
// rest.
func (a *IDs) Alloc() (id ServiceID, ok bool) {
	for int(a.fresh) < len(a.state) {
		id := a.fresh
		a.fresh++
		if a.state[id] == idFree {
			a.set(id, idUsed)
			return id, true
		}
	}
	for len(a.free) > 0 {
		id := a.free[0]
		a.free = a.free[1:]
		if a.state[id] == idFree {
			a.set(id, idUsed)
			return id, true
		}
	}
	return NoService, false
}

// Adopt marks id as in use. It returns false when there is no such ID.
func (a *IDs) Adopt(id ServiceID) bool {
	if id == NoService || int(id) >= len(a.state) {
		return false
	}
	a.set(id, idUsed)
	return true
}

// Return makes an ID free that was allocated and that nobody has seen since.
func (a *IDs) Return(id ServiceID) {
	if a.inUse(id) {
		a.set(id, idFree)
		a.free = append(a.free, id)
	}
}

// Release puts an ID in use to rest; any other stays what it is.
func (a *IDs) Release(id ServiceID) {
	if a.inUse(id) {
		a.set(id, idResting)
		a.resting = append(a.resting, id)
	}
}

// Free ends the rest of those IDs that, as remembered says, nobody remembers.
func (a *IDs) Free(remembered func(ServiceID) bool) {
	a.resting = slices.DeleteFunc(a.resting, func(id ServiceID) bool {
		if a.state[id] != idResting {
			return true
		}
		if remembered(id) {
			return false
		}
		a.set(id, idFree)
		if id < a.fresh {
			a.free = append(a.free, id)
		}
		return true
	})
}

func (a *IDs) inUse(id ServiceID) bool {
	return int(id) < len(a.state) && a.state[id] == idUsed
}

// Blocks hands out runs of slots. A block that is given back rests until
// Settle, which its owner calls when no program can be reading it any more.
//
// The smallest free run that is long enough is cut, of equal ones the first.
// Two sorted lists make that a binary search; to insert means moving at most
// eight bytes for each free run, of which there is never more than one between
// two blocks.
type Blocks struct {
	byBase  []run // the free runs by base; no two of them touch
	bySize  []run // the same runs by length, then base
	resting []run
	max     int
	idle    int // slots in free runs
}

// run is a run of slots.
type run struct{ base, count uint32 }

func (r run) end() uint32 { return r.base + r.count }

func compareBase(a, b run) int { return cmp.Compare(a.base, b.base) }

func compareSize(a, b run) int {
	return cmp.Or(cmp.Compare(a.count, b.count), cmp.Compare(a.base, b.base))
}

// NewBlocks returns an allocator of the slots from 0 to max-1.
func NewBlocks(max int) *Blocks {
	b := &Blocks{max: max}
	if max > 0 {
		b.add(run{0, uint32(max)})
	}
	return b
}

// Grow makes it an allocator of the slots from 0 to max-1, of which none is lost.
func (b *Blocks) Grow(max int) {
	if max > b.max {
		b.free(run{uint32(b.max), uint32(max - b.max)})
		b.max = max
	}
}

// Taken returns how many slots are in use or at rest.
func (b *Blocks) Taken() int { return b.max - b.idle }

// Alloc returns the first slot of a block of n slots, n above 0; ok is false
// when no free run is long enough.
func (b *Blocks) Alloc(n int) (base uint32, ok bool) {
	i, _ := slices.BinarySearchFunc(b.bySize, run{0, uint32(n)}, compareSize)
	if i == len(b.bySize) {
		return 0, false
	}
	base = b.bySize[i].base
	b.cut(b.bySize[i], run{base, uint32(n)})
	return base, true
}

// Adopt marks the block of n slots at base as in use. It returns false, and
// does nothing, when n is 0 or a slot of it is not free.
func (b *Blocks) Adopt(base uint32, n int) bool {
	want := run{base, uint32(n)}
	i, found := slices.BinarySearchFunc(b.byBase, want, compareBase)
	if !found {
		i-- // the run that begins before base
	}
	if n == 0 || i < 0 || b.byBase[i].end() < want.end() {
		return false
	}
	b.cut(b.byBase[i], want)
	return true
}

// Return makes a block free that was allocated and that no program can have
// seen since.
func (b *Blocks) Return(base uint32, n int) { b.free(run{base, uint32(n)}) }

// Release puts the block of n slots at base to rest.
func (b *Blocks) Release(base uint32, n int) {
	b.resting = append(b.resting, run{base, uint32(n)})
}

// Settle ends the rest of all blocks.
func (b *Blocks) Settle() {
	for _, r := range b.resting {
		b.free(r)
	}
	b.resting = b.resting[:0]
}

// cut takes part out of the free run from.
func (b *Blocks) cut(from, part run) {
	b.remove(from)
	if part.base > from.base {
		b.add(run{from.base, part.base - from.base})
	}
	if part.end() < from.end() {
		b.add(run{part.end(), from.end() - part.end()})
	}
}

// free adds r to the free runs and joins it with its neighbours.
func (b *Blocks) free(r run) {
	i, _ := slices.BinarySearchFunc(b.byBase, r, compareBase)
	if i < len(b.byBase) && b.byBase[i].base == r.end() {
		next := b.byBase[i]
		b.remove(next)
		r.count += next.count
	}
	if i > 0 && b.byBase[i-1].end() == r.base {
		previous := b.byBase[i-1]
		b.remove(previous)
		r = run{previous.base, previous.count + r.count}
	}
	b.add(r)
}

func (b *Blocks) add(r run) {
	b.idle += int(r.count)
	i, _ := slices.BinarySearchFunc(b.byBase, r, compareBase)
	b.byBase = slices.Insert(b.byBase, i, r)
	i, _ = slices.BinarySearchFunc(b.bySize, r, compareSize)
	b.bySize = slices.Insert(b.bySize, i, r)
}

func (b *Blocks) remove(r run) {
	b.idle -= int(r.count)
	i, _ := slices.BinarySearchFunc(b.byBase, r, compareBase)
	b.byBase = slices.Delete(b.byBase, i, i+1)
	i, _ = slices.BinarySearchFunc(b.bySize, r, compareSize)
	b.bySize = slices.Delete(b.bySize, i, i+1)
}
