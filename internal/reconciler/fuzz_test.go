// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// FuzzAdopt lets an agent start on tables that any bytes describe, with some of what
// is wanted in between. It makes them good and then finds nothing more to do; the
// fake kernel watches every write.
func FuzzAdopt(f *testing.F) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 40 {
		data := make([]byte, 20+rng.IntN(300))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		f.Add(uint64(rng.IntN(100)), data)
	}
	f.Fuzz(func(t *testing.T, seed uint64, data []byte) {
		w := newWorld(t, seed)
		for range steps {
			w.change()
		}
		w.applyAll()
		w.kernel.damage()
		w.scribble(data)
		w.restart()
		// Readers meet what was scribbled until it is made good.
		if res := w.rec.ApplyAll(w.store.All()); len(res.Failed) > 0 {
			t.Fatalf("failed: %v", res.Failed)
		}
		w.settled()
		w.restart() // what it wrote is what it reads
		w.settled()
	})
}

// scribble writes rows that data describes into the tables. Half of them are near
// those that are there.
func (w *world) scribble(data []byte) {
	next := func() int {
		if len(data) == 0 {
			return 0
		}
		b := data[0]
		data = data[1:]
		return int(b)
	}
	addr := func() netip.Addr {
		switch b := byte(next()); next() % 3 {
		case 0:
			return netip.AddrFrom4([4]byte{10, 96, 0, b})
		case 1:
			return netip.AddrFrom4([4]byte{10, 0, 0, b % 8})
		default:
			return netip.AddrFrom16([16]byte{0: 0xfd, 15: b})
		}
	}
	protocol := func() lb.Protocol { return []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP, lb.Any, 99}[next()%5] }
	// IDs and slots reach beyond the limits, as words in memory do.
	id := func() lb.ServiceID { return lb.ServiceID(next() % (testLimits.Services + 8)) }
	backend := func() lb.Backend { return lb.Backend{Addr: addr(), Port: uint16(next())} }
	k := w.kernel
	for rows := 0; len(data) > 0 && rows < 48; rows++ {
		switch next() % 8 {
		case 0:
			k.frontends[lb.FrontendKey{VIP: addr(), Port: uint16(next() % 3 * 80), Protocol: protocol()}] =
				lb.Frontend{Service: id(), Kind: lb.FrontendKind(next() % 8)}
		case 1:
			row := lb.ServiceRow{Affinity: uint32(next()), Restricted: next()%2 == 0, NodeAllowed: next()%2 == 0, OutsideLocal: next()%2 == 0}
			for side := range row.Sides {
				row.Sides[side] = lb.Range{Base: uint32(next() * next()), Count: uint16(next() % 40), Generation: uint32(next()) << 16}
			}
			if i := id(); i != lb.NoService && int(i) < testLimits.Services {
				k.rows[i] = row
			}
		case 2:
			k.slots[uint32(next()%testLimits.Slots)] = backend()
		case 3:
			k.members[lb.Member{Service: id(), Backend: backend(), Use: lb.Use(next() % 6)}] = struct{}{}
		case 4:
			a := addr()
			k.sources[lb.Source{Service: id(), Prefix: netip.PrefixFrom(a, next()%(a.BitLen()+1)).Masked()}] = struct{}{}
		case 5:
			k.names[id()] = lb.ServicePort{
				Service: lb.Name{Namespace: "ns", Name: []string{"svc0", "svc1", "svc2", ""}[next()%4]}, Port: []string{"web", "dns", ""}[next()%3],
				Protocol: protocol(), Family: []lb.Family{lb.IPv4, lb.IPv6, 0}[next()%3],
			}
		case 6:
			k.addresses[addr()] = lb.NodeAddress(next() % 5)
		case 7:
			a := addr()
			k.cidrs[netip.PrefixFrom(a, next()%(a.BitLen()+1)).Masked()] = struct{}{}
			k.problems[[]lb.Name{nsName("svc0"), nsName("svc1"), nsName("gone"), {}}[next()%4]] = lb.Problem([]string{"", "x"}[next()%2])
		}
	}
}
