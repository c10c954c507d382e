// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// gateOf returns the bits that rows need, in the plainest way.
func gateOf(rows lb.Tables) (words [gateBits / 64]uint64) {
	set := func(bit uint32) { words[bit/64] |= 1 << (bit % 64) }
	for k := range rows.Frontends {
		set(gateFrontend(k))
	}
	for p := range rows.ServiceCIDRs {
		if !gateCIDR(p, set) {
			for i := range words {
				words[i] = ^uint64(0)
			}
		}
	}
	return words
}

// wantGate compares the map, as programs read it, with what its rows need.
func wantGate(t *testing.T, d *Datapath) {
	t.Helper()
	rows := lb.NewTables()
	fatal(t, (&Tables{maps: d.maps}).loadGated(rows)) // without repairing
	want := gateOf(rows)
	var got bpfFrontendGate
	fatal(t, d.maps[bpfMapFrontendGate].Lookup(uint32(0), &got))
	var missing, stray int
	for i, word := range got.Words {
		missing += bits.OnesCount64(want[i] &^ word)
		stray += bits.OnesCount64(word &^ want[i])
	}
	if missing+stray > 0 {
		t.Errorf("%d bits are missing, %d too many", missing, stray)
	}
}

// gateRow is a row that has a bit or more, and a way to write and to delete it.
type gateRow struct {
	name        string
	set, delete func(*Tables) error
}

func frontendRow(k lb.FrontendKey) gateRow {
	return gateRow{
		k.String(),
		func(t *Tables) error { return t.SetFrontend(k, lb.Frontend{Service: 1, Kind: lb.KindClusterIP}) },
		func(t *Tables) error { return t.DeleteFrontend(k) },
	}
}

func cidrRow(p netip.Prefix) gateRow {
	return gateRow{
		p.String(),
		func(t *Tables) error { return t.SetServiceCIDR(p) },
		func(t *Tables) error { return t.DeleteServiceCIDR(p) },
	}
}

// gateRows are rows of every kind, many of which share a bit.
func gateRows() []gateRow {
	var rows []gateRow
	for i := range 300 {
		v4 := netip.AddrFrom4([4]byte{10, 96, byte(i / 7), byte(i / 3)})
		v6 := netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x96, 14: byte(i / 7), 15: byte(i / 3)})
		port, protocol := uint16(30000+i/2), []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP}[i%3]
		for _, k := range []lb.FrontendKey{
			{VIP: v4, Port: port, Protocol: protocol}, {VIP: v6, Port: port, Protocol: protocol}, {VIP: v4},
			{VIP: netip.IPv4Unspecified(), Port: port, Protocol: protocol},
			{VIP: netip.IPv6Unspecified(), Port: port, Protocol: protocol},
		} {
			rows = append(rows, frontendRow(k))
		}
	}
	for _, p := range []string{
		"10.96.0.0/12", "10.96.0.0/16", "10.97.128.0/17", "192.0.2.1/32", "10.0.0.0/7",
		"fd00:96::/112", "fd00:96::/64", "fd00:96::/60", "fd00::/50",
	} {
		rows = append(rows, cidrRow(netip.MustParsePrefix(p)))
	}
	slices.SortFunc(rows, func(a, b gateRow) int { return strings.Compare(a.name, b.name) })
	return slices.CompactFunc(rows, func(a, b gateRow) bool { return a.name == b.name })
}

func testGate(t *testing.T, d *Datapath) {
	wantGate(t, d)
	rows := gateRows()
	rows = append(rows, cidrRow(netip.MustParsePrefix("fd00::/40")), cidrRow(netip.MustParsePrefix("0.0.0.0/0")))
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range 6 {
		for range 500 {
			row := rows[random.IntN(len(rows))]
			step := row.set
			if random.IntN(2) == 0 {
				step = row.delete
			}
			if err := step(d.Tables); err != nil {
				t.Fatalf("%s: %v", row.name, err)
			}
		}
		t.Run(fmt.Sprintf("after %d changes, seed %d", 500*(i+1), seed), func(t *testing.T) { wantGate(t, d) })
	}

	t.Run("a range that is too large for bits of its own has them all", func(t *testing.T) {
		all := cidrRow(netip.MustParsePrefix("2000::/3"))
		fatal(t, all.set(d.Tables))
		wantGate(t, d)
		for _, row := range rows[:100] {
			fatal(t, row.set(d.Tables))
			fatal(t, row.delete(d.Tables))
		}
		wantGate(t, d)
		fatal(t, all.delete(d.Tables))
		wantGate(t, d)
	})

	t.Run("a row that cannot be written leaves no bit", func(t *testing.T) {
		rows, err := d.Load()
		fatal(t, err)
		erase(t, d.Tables, rows)
		var full error
		for i := 0; full == nil; i++ {
			full = d.SetFrontend(numbered(i), lb.Frontend{})
		}
		wantGate(t, d)
		for i := 0; i < 1024; i++ {
			fatal(t, d.SetServiceCIDR(netip.PrefixFrom(numbered(i).VIP, 32)))
		}
		if err := d.SetServiceCIDR(netip.MustParsePrefix("172.16.0.0/12")); err == nil {
			t.Error("service CIDR 1025 fits")
		}
		wantGate(t, d)
	})

	t.Run("reading the rows repairs it", func(t *testing.T) {
		k := numbered(0)
		d.gate.clear(gateFrontend(k))
		d.gate.set(gateFrontend(numbered(50000)))
		_, err := d.Load()
		fatal(t, err)
		wantGate(t, d)
		fatal(t, d.DeleteFrontend(k))
		wantGate(t, d)
	})

	t.Run("a stranger's row that is replaced gets its bit", func(t *testing.T) {
		k := frontendKey("203.0.113.77:80", lb.TCP)
		key, value := encodeFrontendKey(k), encodeFrontend(lb.Frontend{Service: 1})
		fatal(t, d.DeleteFrontend(numbered(1)))
		fatal(t, d.maps[bpfMapFrontends].Put(&key, &value))
		fatal(t, d.SetFrontend(k, lb.Frontend{Service: 2}))
		wantGate(t, d)
		fatal(t, d.DeleteFrontend(k))
		wantGate(t, d)
	})

	t.Run("rows that are older than the last one repair nothing", func(t *testing.T) {
		version, old := d.gate.version(), lb.NewTables()
		fatal(t, d.SetFrontend(numbered(0), lb.Frontend{}))
		d.gate.repair(version, old.Frontends, old.ServiceCIDRs)
		wantGate(t, d)
	})
}

// testGateReader polls the bits of rows that stay while others, and rows that share
// their bits, come and go.
func testGateReader(t *testing.T, d *Datapath) {
	rows := gateRows()
	var stay, change []gateRow
	kept := lb.NewTables()
	for i, row := range rows {
		if i%3 == 0 {
			fatal(t, row.set(d.Tables))
			stay = append(stay, row)
		} else {
			change = append(change, row)
		}
	}
	fatal(t, d.loadGated(kept))
	needed := gateOf(kept)

	var wg sync.WaitGroup
	var stop atomic.Bool
	var lost atomic.Uint64
	wg.Go(func() {
		for !stop.Load() {
			for i, want := range needed {
				if want&^atomic.LoadUint64(&d.gate.words[i]) != 0 {
					lost.Add(1)
				}
			}
		}
	})
	all := cidrRow(netip.MustParsePrefix("fd00::/40"))
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 4000 {
		row := change[random.IntN(len(change))]
		fatal(t, row.set(d.Tables))
		if i%2 == 0 {
			fatal(t, row.delete(d.Tables))
		}
		// Again, and as another row.
		fatal(t, stay[random.IntN(len(stay))].set(d.Tables))
		switch {
		case i%500 == 0:
			_, err := d.Load()
			fatal(t, err)
		case i%700 == 0:
			fatal(t, all.set(d.Tables))
			fatal(t, all.delete(d.Tables))
		}
	}
	stop.Store(true)
	wg.Wait()
	if n := lost.Load(); n > 0 {
		t.Errorf("%d times a reader missed a bit that rows need all the time", n)
	}
	wantGate(t, d)
}

// testGateBits asks the programs' side for what gate.go computes as well.
func testGateBits(t *testing.T, d *Datapath, o *bpftestObjects) {
	ask := func(ap netip.AddrPort, p lb.Protocol) bpftestGateIo {
		return ask(t, o.TestGate, bpftestGateIo{Req: request(ap, p)})
	}
	check := func(ap netip.AddrPort, p lb.Protocol) {
		t.Helper()
		got := ask(ap, p)
		for _, bit := range []struct {
			of        string
			got, want uint32
		}{
			{"the address", got.Addr, gateAddr(ap.Addr())},
			{"the port", got.Port, gatePort(p, ap.Port())},
			{"the block", got.Block, gateBlock(ap.Addr())},
		} {
			if bit.got != bit.want {
				t.Errorf("%v/%v: programs have bit %d for %s, the agent has bit %d", ap, p, bit.got, bit.of, bit.want)
			}
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 500 {
		var b [16]byte
		binary.NativeEndian.PutUint64(b[:], random.Uint64())
		binary.NativeEndian.PutUint64(b[8:], random.Uint64())
		port := uint16(random.Uint32())
		for _, p := range []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP} {
			check(netip.AddrPortFrom(netip.AddrFrom16(b), port), p)
			check(netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), port), p)
		}
	}

	const addr, port, block = 1, 2, 4
	write(t, d.Tables, sample())
	defer erase(t, d.Tables, sample())
	for _, tc := range []struct {
		name     string
		dial     string
		protocol lb.Protocol
		open     uint32
	}{
		{"a VIP, in a service CIDR", "10.96.0.10:53", lb.UDP, addr | block},
		{"another port of it", "10.96.0.10:54", lb.UDP, addr | block},
		{"another address of the CIDR", "10.111.255.255:53", lb.UDP, block},
		{"an IPv6 VIP", "[fd00:96::a]:53", lb.UDP, addr | block},
		{"an address in the CIDR's /64", "[fd00:96::1:0:0:1]:53", lb.UDP, block},
		{"an address outside the CIDR", "10.112.0.1:53", lb.UDP, 0},
		{"a load-balancer IP", "198.51.100.1:53", lb.TCP, addr},
		{"a NodePort", "203.0.113.1:30053", lb.TCP, port},
		{"its number, but another protocol", "203.0.113.1:30053", lb.SCTP, 0},
		{"nothing of ours", "203.0.113.1:443", lb.TCP, 0},
	} {
		if got := ask(end(tc.dial), tc.protocol).Open; got != tc.open {
			t.Errorf("%s: %s/%v has the bits %03b, want %03b", tc.name, tc.dial, tc.protocol, got, tc.open)
		}
	}
}

func TestGateOutlivesTheProcessThatMadeIt(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	write(t, d.Tables, sample())
	wantGate(t, d)
	// What an agent leaves that ends between a bit and its row.
	d.gate.set(gateFrontend(numbered(1)))
	lost := frontendKey("10.96.0.10:53", lb.UDP)
	d.gate.clear(gateFrontend(lost))
	closeDatapath(t, d)

	again := openDatapath(t, root, small)
	wantGate(t, again)
	for _, k := range []lb.FrontendKey{lost, frontendKey("10.96.0.10:53", lb.TCP)} {
		fatal(t, again.DeleteFrontend(k))
		wantGate(t, again) // the address's wildcard has the bit as well
	}
	erase(t, again.Tables, sample())
	wantGate(t, again)
}
