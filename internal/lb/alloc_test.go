// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func alloc(t *testing.T, ids *lb.IDs, want lb.ServiceID) {
	t.Helper()
	if id, ok := ids.Alloc(); id != want || ok != (want != lb.NoService) {
		t.Errorf("Alloc() = %d, %v, want %d", id, ok, want)
	}
}

func nobody(lb.ServiceID) bool { return false }

func TestIDs(t *testing.T) {
	ids := lb.NewIDs(5)
	if !ids.Adopt(2) || ids.Adopt(5) || ids.Adopt(lb.NoService) {
		t.Error("Adopt takes the IDs from 1 to 4")
	}
	alloc(t, ids, 1) // 0 is no service
	alloc(t, ids, 3) // 2 is adopted
	ids.Release(3)
	ids.Release(1)
	alloc(t, ids, 4) // one that nobody has had comes first
	alloc(t, ids, lb.NoService)
	ids.Free(func(id lb.ServiceID) bool { return id == 3 })
	alloc(t, ids, 1)
	alloc(t, ids, lb.NoService) // 3 is remembered
	ids.Release(1)
	ids.Free(nobody)
	alloc(t, ids, 3) // free for longest, though released together
	alloc(t, ids, 1)
	ids.Return(1) // nobody has seen it
	alloc(t, ids, 1)
	ids.Release(4)
	if !ids.Adopt(4) {
		t.Error("an ID at rest can be adopted")
	}
	ids.Free(nobody)
	alloc(t, ids, lb.NoService)
	alloc(t, lb.NewIDs(0), lb.NoService)
}

// FuzzIDs compares with a map that says what each ID is.
func FuzzIDs(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 1, 2, 0, 3, 3, 0, 0, 4, 2, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		const max = 8
		const used, resting = 1, 2
		ids, state := lb.NewIDs(max), map[lb.ServiceID]int{}
		for _, b := range data {
			id := lb.ServiceID(b>>4) % max
			switch b % 5 {
			case 0:
				got, ok := ids.Alloc()
				if _, taken := state[got]; taken {
					t.Fatalf("ID %d is in use or at rest", got)
				}
				if !ok && len(state) < max-1 {
					t.Fatalf("no ID free, but only %v are taken", state)
				}
				if ok {
					state[got] = used
				}
			case 1:
				ids.Release(id)
				if state[id] == used {
					state[id] = resting
				}
			case 2:
				ids.Return(id)
				if state[id] == used {
					delete(state, id)
				}
			case 3:
				remembered := func(id lb.ServiceID) bool { return id%2 == 0 }
				ids.Free(remembered)
				maps.DeleteFunc(state, func(id lb.ServiceID, s int) bool { return s == resting && !remembered(id) })
			case 4:
				if ids.Adopt(id) {
					state[id] = used
				}
			}
		}
	})
}

func TestBlocks(t *testing.T) {
	blocks := lb.NewBlocks(10)
	expect := func(n int, want uint32, ok bool) {
		t.Helper()
		if base, got := blocks.Alloc(n); base != want || got != ok {
			t.Errorf("Alloc(%d) = %d, %v, want %d, %v", n, base, got, want, ok)
		}
	}
	if !blocks.Adopt(4, 2) || blocks.Adopt(5, 2) || blocks.Adopt(3, 2) || blocks.Adopt(9, 2) || blocks.Adopt(0, 0) || blocks.Adopt(1<<23, 1) {
		t.Error("Adopt takes free slots only")
	}
	// Free: 0-3 and 6-9.
	expect(5, 0, false)
	expect(3, 0, true)
	expect(1, 3, true) // the smallest run that is long enough
	expect(4, 6, true)
	expect(1, 0, false)
	blocks.Release(0, 3)
	blocks.Release(4, 2)
	expect(1, 0, false) // they rest
	blocks.Settle()
	expect(2, 4, true)
	blocks.Return(3, 1)
	expect(4, 0, true) // 0-2 and 3 have become one
	blocks = lb.NewBlocks(0)
	expect(1, 0, false)
}

// FuzzBlocks compares with a table that says what each slot is.
func FuzzBlocks(f *testing.F) {
	f.Add([]byte{0x30, 0x10, 0x50, 1, 1, 2, 0x80, 3, 0x44, 0, 1, 2, 0xf0})
	f.Fuzz(func(t *testing.T, data []byte) { checkBlocks(t, data) })
}

func checkBlocks(t *testing.T, data []byte) {
	const size = 32
	const free, used, resting = 0, 1, 2
	type block struct {
		base uint32
		n    int
	}
	var slots [size]int
	var live []block
	blocks := lb.NewBlocks(size)
	mark := func(b block, from, to int) {
		for i := b.base; i < b.base+uint32(b.n); i++ {
			if slots[i] != from {
				t.Fatalf("slot %d is %d, want %d", i, slots[i], from)
			}
			slots[i] = to
		}
	}
	fits := func(base, n int) bool {
		return n > 0 && base+n <= size && !slices.ContainsFunc(slots[base:base+n], func(s int) bool { return s != free })
	}
	for _, b := range data {
		arg := int(b >> 3)
		switch b % 5 {
		case 0, 1:
			n := 1 + arg%9
			base, ok := blocks.Alloc(n)
			room := false
			for i := range size {
				room = room || fits(i, n)
			}
			if ok != room {
				t.Fatalf("Alloc(%d) = %v in %v", n, ok, slots)
			}
			if ok {
				mark(block{base, n}, free, used)
				live = append(live, block{base, n})
			}
		case 2, 3:
			if len(live) == 0 {
				continue
			}
			i := arg % len(live)
			if b%5 == 2 {
				blocks.Release(live[i].base, live[i].n)
				mark(live[i], used, resting)
			} else {
				blocks.Return(live[i].base, live[i].n)
				mark(live[i], used, free)
			}
			live = slices.Delete(live, i, i+1)
		case 4:
			if arg%2 == 0 {
				blocks.Settle()
				for i, s := range slots {
					if s == resting {
						slots[i] = free
					}
				}
				continue
			}
			base, n := arg, len(live)%4
			if got, want := blocks.Adopt(uint32(base), n), fits(base, n); got != want {
				t.Fatalf("Adopt(%d, %d) = %v in %v", base, n, got, slots)
			} else if got {
				mark(block{uint32(base), n}, free, used)
				live = append(live, block{uint32(base), n})
			}
		}
	}
}

func TestBlocksThroughLongHistories(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		data := make([]byte, 300)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		checkBlocks(t, data)
	}
}

// BenchmarkBlocks replaces one of 10,000 blocks in fragmented slots.
func BenchmarkBlocks(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	blocks := lb.NewBlocks(1 << 19)
	type block struct {
		base uint32
		n    int
	}
	live := make([]block, 10_000)
	for i := range live {
		live[i].n = 1 + rng.IntN(40)
		live[i].base, _ = blocks.Alloc(live[i].n)
	}
	b.ReportAllocs()
	for b.Loop() {
		i := rng.IntN(len(live))
		n := 1 + rng.IntN(40)
		base, ok := blocks.Alloc(n)
		if !ok {
			b.Fatal("no room")
		}
		blocks.Release(live[i].base, live[i].n)
		blocks.Settle()
		live[i] = block{base, n}
	}
}

func TestIDsGrow(t *testing.T) {
	ids := lb.NewIDs(3)
	for want := range lb.ServiceID(2) {
		if id, ok := ids.Alloc(); id != want+1 || !ok {
			t.Errorf("got %d, %v; want %d", id, ok, want+1)
		}
	}
	ids.Release(1)
	ids.Grow(5)
	if n := ids.Taken(); n != 2 {
		t.Errorf("%d are taken, want the one in use and the one at rest", n)
	}
	for _, want := range []lb.ServiceID{3, 4} {
		if id, ok := ids.Alloc(); id != want || !ok {
			t.Errorf("got %d, %v; want %d, which is new", id, ok, want)
		}
	}
	if id, ok := ids.Alloc(); ok {
		t.Errorf("got %d, of which somebody may know", id)
	}
	ids.Free(func(lb.ServiceID) bool { return false })
	if id, ok := ids.Alloc(); id != 1 || !ok || ids.Taken() != 4 {
		t.Errorf("got %d, %v, and %d are taken; want 1 and 4", id, ok, ids.Taken())
	}
}

func TestBlocksGrow(t *testing.T) {
	b := lb.NewBlocks(4)
	if _, ok := b.Alloc(3); !ok {
		t.Fatal("no room")
	}
	b.Grow(8)
	if n := b.Taken(); n != 3 {
		t.Errorf("%d slots are taken, want 3", n)
	}
	// The last old slot and the new ones are one run.
	if base, ok := b.Alloc(5); base != 3 || !ok || b.Taken() != 8 {
		t.Errorf("got %d, %v, and %d slots are taken; want 3 and 8", base, ok, b.Taken())
	}
	b.Release(0, 3)
	if n := b.Taken(); n != 8 {
		t.Errorf("%d slots are taken while a block rests, want 8", n)
	}
	b.Settle()
	if n := b.Taken(); n != 5 {
		t.Errorf("%d slots are taken, want 5", n)
	}
}
