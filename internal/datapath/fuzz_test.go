// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"net/netip"
	"slices"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// FuzzRows decodes rows of every map from any bytes. What comes out must go back
// into the same row again: the reconciler takes rows away by what it has read.
func FuzzRows(f *testing.F) {
	rng := rand.New(rand.NewSource(1))
	for range 8 {
		data := make([]byte, 512)
		rng.Read(data)
		f.Add(data)
	}
	f.Add(make([]byte, 512))
	f.Fuzz(func(t *testing.T, data []byte) {
		decodes(t, data, decodeFrontend, func(f lb.Frontend) bpfFrontend { return encodeFrontend(f) })
		decodes(t, data, decodeSlot, func(b lb.Backend) bpfSlot { return encodeSlot(b) })
		decodes(t, data, decodeAddr, func(a netip.Addr) bpfAddr { return encodeAddr(a) })
		decodes(t, data, decodeService, func(row lb.ServiceRow) (s bpfService) {
			for side, r := range row.Sides {
				s.Range[side] = encodeRange(r)
			}
			s.Options = encodeOptions(row)
			return s
		})
		decodes(t, data, func(n bpfServiceName) lb.ServicePort { return decodeServiceName(&n) }, nil)
		decodes(t, data, func(d bpfDevice) Device { return decodeDevice(7, &d) }, encodeDevice)
		decodesKey(t, data, decodeFrontendKey, encodeFrontendKey, func(lb.FrontendKey) bool { return true })
		decodesKey(t, data, decodeMember, encodeMember, func(lb.Member) bool { return true })
		decodesKey(t, data, decodeSource, encodeSource, func(s lb.Source) bool { return s.Prefix.IsValid() })
		decodesKey(t, data, decodeCIDR, encodeCIDR, netip.Prefix.IsValid)
		decodesKey(t, data, decodeObjectKey, encodeObjectKey, func(n lb.Name) bool { return len(n.Namespace) < 64 && len(n.Name) < 64 })

		var flowKey bpfFlowKey
		var flow bpfFlow
		copy(bytesOf(&flow), data[copy(bytesOf(&flowKey), data):])
		if got := decodeFlow(&flowKey, &flow, 100); got.Idle < 0 || got.Requests == got.Answers {
			t.Errorf("flow %+v", got)
		}
		var affinityKey bpfAffinityKey
		var affinity bpfAffinity
		copy(bytesOf(&affinity), data[copy(bytesOf(&affinityKey), data):])
		if got := decodeAffinity(&affinityKey, &affinity, 100); got.Age < 0 {
			t.Errorf("affinity %+v", got)
		}
	})
}

// decodes holds a row to being the same after it has been written again. Without
// encode it need only decode.
func decodes[R any, T comparable](t *testing.T, data []byte, decode func(R) T, encode func(T) R) {
	t.Helper()
	var raw R
	copy(bytesOf(&raw), data)
	got := decode(raw)
	if encode == nil {
		return
	}
	if again := decode(encode(got)); again != got {
		t.Errorf("%+v is %+v, and %+v when it has been written again", raw, got, again)
	}
}

// decodesKey holds the key of whatever a key decodes to, if it is valid, to being
// ours: what Load returns can be written and deleted. What is not valid is no key
// of ours.
func decodesKey[R, T comparable](t *testing.T, data []byte, decode func(R) T, encode func(T) R, valid func(T) bool) {
	t.Helper()
	var raw R
	copy(bytesOf(&raw), data)
	got := decode(raw)
	if key := encode(got); valid(got) && !ours(key, decode, encode) {
		t.Errorf("%+v is %+v, whose key %+v would be a stranger's", raw, got, key)
	}
	if !valid(got) && ours(raw, decode, encode) {
		t.Errorf("%+v is %+v, which is not valid, and would be ours", raw, got)
	}
}

// junk writes rows that data describes into the maps, and words into services and
// slots, as a stranger or a defect would: some are ours with a few bytes changed,
// some are any bytes.
type junk struct {
	t    *testing.T
	d    *Datapath
	data []byte
}

func (j *junk) next() int {
	if len(j.data) == 0 {
		return 0
	}
	b := j.data[0]
	j.data = j.data[1:]
	return int(b)
}

// spoil changes some bytes of a row, or all.
func (j *junk) spoil(row []byte) {
	if j.next()%4 == 0 {
		j.data = j.data[copy(row, j.data):]
		return
	}
	for range 1 + j.next()%3 {
		row[j.next()%len(row)] = byte(j.next())
	}
}

// junkIn puts a row into a map whose keys and values are these. It is made from one
// that is there; the order of keys makes the same data do the same.
func junkIn[K, V any](j *junk, table string) {
	type row struct {
		key   K
		value V
	}
	rows := []row{{}}
	m := j.d.maps[table]
	if err := each(m, func(k *K, v *V) { rows = append(rows, row{*k, *v}) }); err != nil {
		j.t.Fatal(err)
	}
	slices.SortFunc(rows, func(a, b row) int { return bytes.Compare(bytesOf(&a.key), bytesOf(&b.key)) })
	one := rows[j.next()%len(rows)]
	key, value := one.key, one.value
	if what := j.next(); what%3 != 0 {
		j.spoil(bytesOf(&key))
	} else {
		j.spoil(bytesOf(&value))
	}
	// What the kernel does not take is not there.
	_ = m.Put(&key, &value)
}

// scatter writes one thing after the other until data is used up.
func (j *junk) scatter() {
	for rows := 0; len(j.data) > 0 && rows < 64; rows++ {
		switch j.next() % 9 {
		case 0:
			junkIn[bpfFrontendKey, bpfFrontend](j, bpfMapFrontends)
		case 1:
			junkIn[bpfMemberKey, uint8](j, bpfMapMembers)
		case 2:
			junkIn[bpfSourceKey, uint8](j, bpfMapSourceRanges)
		case 3:
			junkIn[bpfCidrKey, uint8](j, bpfMapServiceCidrs)
		case 4:
			junkIn[bpfAddr, uint8](j, bpfMapNodeAddresses)
		case 5:
			junkIn[uint32, bpfServiceName](j, bpfMapNames)
		case 6:
			junkIn[bpfObjectName, bpfProblem](j, bpfMapProblems)
		case 7:
			const size = int(unsafe.Sizeof(bpfService{}))
			at := j.next() % (len(j.d.services) / size) * size
			j.spoil(j.d.services[at : at+size])
		case 8:
			const size = int(unsafe.Sizeof(bpfSlot{}))
			at := j.next() % (len(j.d.slots) / size) * size
			j.spoil(j.d.slots[at : at+size])
		}
	}
}

// wipe makes all tables empty.
func wipe(t testing.TB, d *Datapath) {
	t.Helper()
	for _, table := range []string{
		bpfMapFrontends, bpfMapMembers, bpfMapSourceRanges, bpfMapServiceCidrs, bpfMapNodeAddresses, bpfMapNames, bpfMapProblems,
	} {
		m := d.maps[table]
		for key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize()); m.Iterate().Next(&key, &value); {
			if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				t.Fatal(err)
			}
		}
	}
	clear(d.services)
	clear(d.slots)
	if _, err := d.Load(); err != nil { // makes the gate agree
		t.Fatal(err)
	}
}

// wanted has a row in every table.
func wanted() lb.Delta {
	s := lb.NewStore(lb.Config{NodeName: "here", NodePorts: lb.NodePorts{Primary: true, Loopback: true}})
	s.SetNode(lb.Node{Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}})
	s.SetServiceCIDRs([]netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00::/112")})
	for i, protocol := range []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP} {
		svc := lb.Service{
			Name:            lb.Name{Namespace: "ns", Name: fmt.Sprint("svc", i)},
			ClusterIPs:      []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), netip.MustParseAddr(fmt.Sprint("fd00::", i+1))},
			LoadBalancerIPs: []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::9")},
			Ports:           []lb.Port{{Name: "web", Protocol: protocol, Number: 80, NodePort: 30080}, {Name: "more", Protocol: lb.TCP, Number: 81}},
			Sources:         []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/64")},
			Affinity:        uint32(10 * i),
			ExternalLocal:   i == 1,
		}
		s.SetService(svc)
		for j, family := range []lb.Family{lb.IPv4, lb.IPv6} {
			slice := lb.Slice{
				Name: lb.Name{Namespace: "ns", Name: fmt.Sprint("slice", i, j)}, Service: svc.Name.Name, Family: family,
				Ports: []lb.SlicePort{{Name: "web", Protocol: protocol, Number: 8080}},
			}
			for n := range 3 {
				addr := netip.AddrFrom4([4]byte{10, 244, byte(i), byte(n)})
				if family == lb.IPv6 {
					addr = netip.MustParseAddr(fmt.Sprintf("fd01::%d:%d", i, n+1))
				}
				slice.Endpoints = append(slice.Endpoints, lb.Endpoint{Addr: addr, Ready: true, Serving: true, Node: "here"})
			}
			s.SetSlice(slice)
		}
	}
	return s.All()
}

// FuzzLoad lets a stranger write any bytes into the kernel's tables. An agent that
// starts then reads them, makes them good, and finds nothing more to do.
func FuzzLoad(f *testing.F) {
	testutil.RequireRoot(f)
	d := openDatapath(f, testutil.BPFRoot(f), junkSizes)
	rng := rand.New(rand.NewSource(2))
	for range 5 {
		data := make([]byte, 40+rng.Intn(400))
		rng.Read(data)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) { checkJunk(t, d, data) })
}

// junkSizes leave room for as many rows as scatter writes.
var junkSizes = Sizes{Frontends: 256, Services: 128, Slots: 512, Members: 256, Affinity: 16, Flows: 16, SourceRanges: 256, Peers: 16}

func checkJunk(t *testing.T, d *Datapath, data []byte) {
	wipe(t, d)
	want := wanted()
	adopt := func() *reconciler.Reconciler {
		t.Helper()
		if _, err := d.ExpelStrangers(); err != nil {
			t.Fatal(err)
		}
		held, err := d.Load()
		if err != nil {
			t.Fatal(err)
		}
		services, slots := d.Limits()
		rec := reconciler.New(d, reconciler.Limits{Services: services, Slots: slots})
		rec.Adopt(held)
		rec.FreeIDs(func(lb.ServiceID) bool { return false })
		return rec
	}
	if res := adopt().ApplyAll(want); len(res.Failed) > 0 {
		t.Fatalf("before any damage: %v", res.Failed)
	}
	(&junk{t, d, data}).scatter()

	rec := adopt()
	if res := rec.ApplyAll(want); len(res.Failed) > 0 {
		rec = adopt() // slots to which a damaged range led are not used before the next one
	}
	if res := rec.ApplyAll(want); len(res.Failed) > 0 || rec.Pending() {
		t.Fatalf("failed %v, pending %v", res.Failed, rec.Pending())
	}
	held, err := d.Load()
	if err != nil {
		t.Fatal(err)
	}
	if n := held.Differences(rec.Tables()); n > 0 {
		t.Errorf("the reconciler is mistaken about %d rows (-kernel +reconciler):\n%s", n, cmp.Diff(held.String(), rec.Tables().String()))
	}
	for _, err := range held.Check() {
		t.Error(err)
	}
	if res := adopt().ApplyAll(want); res.Writes+res.Deletes > 0 {
		t.Errorf("a second agent writes %d rows and deletes %d", res.Writes, res.Deletes)
	}
	if left, err := d.ExpelStrangers(); len(left) > 0 || err != nil {
		t.Errorf("rows of strangers were left: %v, %v", left, err)
	}
}
