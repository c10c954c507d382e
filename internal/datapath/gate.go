// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// What frontend_gate has: bits that are found by a hash, and then 65,536 places for the
// NodePorts of each protocol and for the blocks of IPv4, as in bpf/gate.h.
const (
	gateBits    = 8 * int(unsafe.Sizeof(bpfFrontendGate{}))
	gateHashed  = 1 << 18
	gatePorts   = gateHashed
	gateBlocks4 = gatePorts + 3<<16
)

// The hashes are those of bpf/gate.h, on the words that a program would load.

func gateHash(x uint64) uint32 { return uint32(x * 0x9e3779b97f4a7c15 >> (64 - 18)) }

// gateWord4 returns an IPv4 address as the word that it is in a packet.
func gateWord4(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

// gateWords6 returns an IPv6 address as two words.
func gateWords6(a netip.Addr) (high, low uint64) {
	b := a.As16()
	return binary.NativeEndian.Uint64(b[:8]), binary.NativeEndian.Uint64(b[8:])
}

// gateAddr returns the bit of an address that has a frontend.
func gateAddr(a netip.Addr) uint32 {
	if a.Is4() {
		return gateHash(uint64(gateWord4(a)))
	}
	high, low := gateWords6(a)
	x := high*0xff51afd7ed558ccd ^ low
	return gateHash(x ^ x>>32)
}

// gatePort returns the bit of a NodePort.
func gatePort(p lb.Protocol, port uint16) uint32 {
	return gatePorts + uint32(p)&3<<16 + uint32(networkPort(port))
}

// The blocks of addresses that have a bit each.
const (
	gateBlock4 = 16
	gateBlock6 = 64
)

// gateBlock returns the bit of the block that an address is in.
func gateBlock(a netip.Addr) uint32 {
	if a.Is4() {
		return gateBlocks4 + gateWord4(a)&0xffff
	}
	high, _ := gateWords6(a)
	return gateHash(high ^ 0x8ebc6af09c88c6a3)
}

// gateFrontend returns the bit without which no program looks for a frontend.
func gateFrontend(k lb.FrontendKey) uint32 {
	if k.VIP.IsUnspecified() {
		return gatePort(k.Protocol, k.Port)
	}
	return gateAddr(k.VIP)
}

// gateMaxFree is how many bits may tell the blocks of a range apart; a larger range
// stands for every bit of the gate.
const gateMaxFree = 16

// gateCIDR calls f with the bit of each block that p, masked, touches. It returns false,
// without a call, when there are too many.
func gateCIDR(p netip.Prefix, f func(uint32)) bool {
	block := gateBlock6
	if p.Addr().Is4() {
		block = gateBlock4
	}
	free := max(0, block-p.Bits())
	if free > gateMaxFree {
		return false
	}
	for i := range uint64(1) << free {
		f(gateBlock(addBlocks(p.Addr(), i)))
	}
	return true
}

// addBlocks returns the address n blocks after a.
func addBlocks(a netip.Addr, n uint64) netip.Addr {
	if a.Is4() {
		b := a.As4()
		binary.BigEndian.PutUint16(b[:], binary.BigEndian.Uint16(b[:])+uint16(n))
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(b[:])+n)
	return netip.AddrFrom16(b)
}

// gate keeps frontend_gate: a bit is set before the first row that needs it is
// written and cleared after the last one has been deleted, so a program that finds
// no bit need not look for a row. Rows that share a bit are counted.
//
// mu is held while a row is written, so that who reads the rows to repair the gate
// can tell whether they have changed meanwhile.
type gate struct {
	mu      sync.Mutex
	words   []uint64 // the map, in memory; programs read it
	needs   []uint32 // how many rows need a bit
	cidrs   map[netip.Prefix]bool
	all     int    // how many of cidrs need every bit
	changes uint64 // rows written or deleted so far
	mended  int    // words that repair has found wrong so far
}

// newGate returns the gate of a map that is in memory. It knows no rows yet: see
// repair.
func newGate(mem []byte) *gate {
	return &gate{
		words: unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), gateBits/64),
		needs: make([]uint32, gateBits), cidrs: map[netip.Prefix]bool{},
	}
}

func (g *gate) set(bit uint32)   { atomic.OrUint64(&g.words[bit/64], 1<<(bit%64)) }
func (g *gate) clear(bit uint32) { atomic.AndUint64(&g.words[bit/64], ^(uint64(1) << (bit % 64))) }

// hold notes that one more row needs a bit.
func (g *gate) hold(bit uint32) {
	g.needs[bit]++
	if g.needs[bit] == 1 {
		g.set(bit)
	}
}

// release notes that one row less needs a bit. A row that somebody else has
// written needs none here.
func (g *gate) release(bit uint32) {
	if g.needs[bit] == 0 {
		return
	}
	g.needs[bit]--
	if g.needs[bit] == 0 && g.all == 0 {
		g.clear(bit)
	}
}

// holdCIDR is hold for a service CIDR; once for each.
func (g *gate) holdCIDR(p netip.Prefix) {
	if g.cidrs[p] {
		return
	}
	g.cidrs[p] = true
	if !gateCIDR(p, g.hold) {
		g.all++
		g.restore()
	}
}

// releaseCIDR is release for a service CIDR.
func (g *gate) releaseCIDR(p netip.Prefix) {
	if !g.cidrs[p] {
		return
	}
	delete(g.cidrs, p)
	if !gateCIDR(p, g.release) {
		g.all--
		g.restore()
	}
}

// restore makes every word what the rows need: bits that are missing first, then
// those that nobody needs. Words that are right are not written. It returns how many
// were not.
func (g *gate) restore() (wrong int) {
	for i := range g.words {
		want, is := g.want(i), atomic.LoadUint64(&g.words[i])
		if want != is {
			wrong++
		}
		if want&^is != 0 {
			atomic.OrUint64(&g.words[i], want)
		}
	}
	for i := range g.words {
		if want := g.want(i); atomic.LoadUint64(&g.words[i]) != want {
			atomic.AndUint64(&g.words[i], want)
		}
	}
	return wrong
}

func (g *gate) want(word int) (bits uint64) {
	if g.all > 0 {
		return ^uint64(0)
	}
	for i, n := range g.needs[word*64 : word*64+64] {
		if n > 0 {
			bits |= 1 << i
		}
	}
	return bits
}

// change begins the writing of a row and returns what ends it.
func (g *gate) change() (end func()) {
	g.mu.Lock()
	g.changes++
	return g.mu.Unlock
}

// version returns what repair wants to know from before the rows were read.
func (g *gate) version() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changes
}

// repair makes the gate what the rows of the kernel need, whatever became of it. It
// does nothing when a row has been written since version: the rows may be older.
func (g *gate) repair(version uint64, frontends map[lb.FrontendKey]lb.Frontend, cidrs map[netip.Prefix]struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.changes != version {
		return
	}
	clear(g.needs)
	clear(g.cidrs)
	g.all = 0
	count := func(bit uint32) { g.needs[bit]++ }
	for k := range frontends {
		count(gateFrontend(k))
	}
	for p := range cidrs {
		g.cidrs[p] = true
		if !gateCIDR(p, count) {
			g.all++
		}
	}
	g.mended += g.restore()
}

// GateRepairs returns how many words of the gate Load has found wrong so far. It is
// for the process that writes.
func (t *Tables) GateRepairs() int {
	t.gate.mu.Lock()
	defer t.gate.mu.Unlock()
	return t.gate.mended
}
