// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -type addr -type request -type target -type choice -type verdict -type lookup_io -type spread_io -type peer_io -type peer_op -type origin_io -type origin_op -type stress_io -type stress_result bpftest ../../bpf/tests/lookup_test.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu

import (
	"math"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// loadTests loads the test programs with the datapath's own maps. options may
// change the specification.
func loadTests(t testing.TB, d *Datapath, options func(*ebpf.CollectionSpec)) *bpftestObjects {
	t.Helper()
	spec, err := loadBpftest()
	fatal(t, err)
	fatal(t, spec.Variables[bpftestVarPeersMask].Set(d.maps[bpfMapPeers].MaxEntries()-1))
	replace := map[string]*ebpf.Map{}
	for name, m := range d.maps {
		if s, ok := spec.Maps[name]; ok && name[0] != '.' {
			s.MaxEntries = m.MaxEntries()
			replace[name] = m
		}
	}
	if options != nil {
		options(spec)
	}
	var objects bpftestObjects
	fatal(t, spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{MapReplacements: replace}))
	t.Cleanup(func() { fatal(t, objects.Close()) })
	return &objects
}

// ethernet is how many bytes a packet has before the question.
const ethernet = 14

// ask runs a test program once and returns its answer.
func ask[T any](t testing.TB, prog *ebpf.Program, question T) T {
	t.Helper()
	in := append(make([]byte, ethernet), bytesOf(&question)...)
	out := make([]byte, len(in)+256) // the kernel's own room
	code, err := prog.Run(&ebpf.RunOptions{Data: in, DataOut: out})
	fatal(t, err)
	if code != 0 {
		t.Fatalf("%s returned %d", prog, code)
	}
	var answer T
	copy(bytesOf(&answer), out[ethernet:])
	return answer
}

// request returns what a client asks for who dials ap.
func request(ap netip.AddrPort, p lb.Protocol) bpftestRequest {
	return bpftestRequest{
		Addr: bpftestAddr(encodeAddr(ap.Addr())), Port: networkPort(ap.Port()), Proto: uint8(p),
	}
}

func (r bpftestRequest) addrPort() netip.AddrPort {
	return netip.AddrPortFrom(decodeAddr(bpfAddr(r.Addr)), networkPort(r.Port))
}

func choice(ap netip.AddrPort) bpftestChoice {
	return bpftestChoice{Addr: bpftestAddr(encodeAddr(ap.Addr())), Port: networkPort(ap.Port())}
}

func (c bpftestChoice) addrPort() netip.AddrPort {
	return netip.AddrPortFrom(decodeAddr(bpfAddr(c.Addr)), networkPort(c.Port))
}

// TestPrograms shares one datapath, since the verifier takes its time.
func TestPrograms(t *testing.T) {
	d := openDatapath(t, testutil.BPFRoot(t), small)
	objects := loadTests(t, d, nil)
	for _, tc := range []struct {
		name string
		test func(*testing.T, *Datapath, *bpftestObjects)
	}{
		{"verdicts", testVerdicts},
		{"places are picked equally often", testSpread},
		{"peers", testPeers},
		{"origins", testOrigins},
		{"which backend a socket avoids", testAvoid},
		{"which entry is usable", testUsable},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, d, objects) })
	}
}

func testVerdicts(t *testing.T, d *Datapath, objects *bpftestObjects) {
	rows := sample()
	rows.Names[4] = lb.ServicePort{Service: lb.Name{Namespace: "default", Name: "web"}, Protocol: lb.TCP, Family: lb.IPv6}
	rows.Services[4] = lb.Range{Base: 20, Count: 1, Generation: 1}
	rows.Slots[20] = backend("[fd00:244::2]:8080")
	rows.Frontends[frontendKey("[fd00:96::b]:80", lb.TCP)] = lb.Frontend{Service: 4, Kind: lb.KindClusterIP}
	rows.Frontends[lb.FrontendKey{VIP: netip.MustParseAddr("fd00:96::b")}] = lb.Frontend{Kind: lb.KindClusterIP}
	// No wildcard belongs to this address.
	rows.Frontends[frontendKey("192.0.2.1:80", lb.TCP)] = lb.Frontend{Service: 2, Kind: lb.KindClusterIP}
	write(t, d.Tables, rows)

	const (
		pass      = bpftestVerdictVERDICT_PASS
		translate = bpftestVerdictVERDICT_TRANSLATE
		noBackend = bpftestVerdictVERDICT_NO_BACKEND
		noPort    = bpftestVerdictVERDICT_NO_PORT
	)
	for _, tc := range []struct {
		name     string
		dial     string
		protocol lb.Protocol
		verdict  bpftestVerdict
		service  uint32
		backends []string
	}{
		{"nobody's address", "10.244.0.2:5353", lb.TCP, pass, 0, nil},
		{"nobody's IPv6 address", "[fd00:244::2]:5353", lb.UDP, pass, 0, nil},
		{"UDP of a port that TCP has too", "10.96.0.10:53", lb.UDP, translate, 1, []string{"10.244.0.2:5353", "10.244.0.3:5353"}},
		{"TCP of a port that UDP has too", "10.96.0.10:53", lb.TCP, translate, 2, []string{"10.244.0.2:5353"}},
		{"IPv6", "[fd00:96::b]:80", lb.TCP, translate, 4, []string{"[fd00:244::2]:8080"}},
		{"an IPv4-mapped address is the IPv4 one", "[::ffff:10.96.0.10]:53", lb.TCP, translate, 2, []string{"10.244.0.2:5353"}},
		{"a service without backends", "[fd00:96::a]:53", lb.UDP, noBackend, 3, nil},
		{"a port that the ClusterIP does not have", "10.96.0.10:54", lb.TCP, noPort, 0, nil},
		{"a protocol that the port does not have", "[fd00:96::b]:80", lb.UDP, noPort, 0, nil},
		{"port 0 of a ClusterIP", "10.96.0.10:0", lb.TCP, noPort, 0, nil},
		{"another port of an address without a wildcard", "192.0.2.1:81", lb.TCP, pass, 0, nil},
		{"an IPv6 address that ends like an IPv4 VIP", "[::a60:a]:53", lb.TCP, pass, 0, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			io := ask(t, objects.TestLookup, bpftestLookupIo{Req: request(netip.MustParseAddrPort(tc.dial), tc.protocol)})
			if io.Verdict != tc.verdict || io.Target.ServiceId != tc.service {
				t.Errorf("verdict %d for service %d, want %d for %d", io.Verdict, io.Target.ServiceId, tc.verdict, tc.service)
			}
			got := io.Choice.addrPort().String()
			if tc.verdict == translate && !slices.Contains(tc.backends, got) {
				t.Errorf("backend %s, want one of %v", got, tc.backends)
			}
			if want := rows.Services[lb.ServiceID(tc.service)]; tc.verdict == translate &&
				(io.Target.Base != want.Base || io.Target.Count != uint32(want.Count) || io.Target.Generation != want.Generation) {
				t.Errorf("target %+v, want %+v", io.Target, want)
			}
		})
	}
	erase(t, d.Tables, rows)
	io := ask(t, objects.TestLookup, bpftestLookupIo{Req: request(netip.MustParseAddrPort("10.96.0.10:53"), lb.UDP)})
	if io.Verdict != pass {
		t.Errorf("verdict %d after the frontend was deleted, want pass", io.Verdict)
	}
}

func testSpread(t *testing.T, _ *Datapath, objects *bpftestObjects) {
	for _, count := range []uint32{1, 2, 3, 7, 100, 256} {
		picked := make([]uint64, objects.Spread.MaxEntries())
		for place := range picked {
			fatal(t, objects.Spread.Put(uint32(place), uint64(0)))
		}
		const picks = 100_000
		ask(t, objects.TestSpread, bpftestSpreadIo{Count: count, Picks: picks})
		for place := range picked {
			fatal(t, objects.Spread.Lookup(uint32(place), &picked[place]))
		}
		for place, n := range picked[count:] {
			if n != 0 {
				t.Errorf("place %d was picked of %d", int(count)+place, count)
			}
		}
		if chi2, limit := chiSquared(picked[:count]); chi2 > limit {
			t.Errorf("%d places: chi-squared is %.1f, more than %.1f: %v", count, chi2, limit, picked[:count])
		}
	}
}

// chiSquared compares counts with a uniform distribution. One in a million
// samples of a uniform one is above the limit (Wilson and Hilferty).
func chiSquared(counts []uint64) (chi2, limit float64) {
	var total uint64
	for _, n := range counts {
		total += n
	}
	mean := float64(total) / float64(len(counts))
	for _, n := range counts {
		chi2 += (float64(n) - mean) * (float64(n) - mean) / mean
	}
	const z = 4.75
	df := float64(len(counts) - 1)
	if df == 0 {
		return chi2, 0
	}
	return chi2, df * math.Pow(1-2/(9*df)+z*math.Sqrt(2/(9*df)), 3)
}

func testPeers(t *testing.T, d *Datapath, objects *bpftestObjects) {
	vip, other := netip.MustParseAddrPort("10.96.0.1:80"), netip.MustParseAddrPort("[fd00:96::1]:443")
	b1, b2 := netip.MustParseAddrPort("10.244.0.2:8080"), netip.MustParseAddrPort("[fd00:244::2]:8443")
	places := uint64(d.maps[bpfMapPeers].MaxEntries())
	remember := func(cookie uint64, vip, backend netip.AddrPort) {
		t.Helper()
		ask(t, objects.TestPeer, bpftestPeerIo{
			Cookie: cookie, Op: bpftestPeerOpPEER_REMEMBER, Req: request(vip, lb.TCP), Choice: choice(backend),
		})
	}
	// recall returns what getpeername shows of a socket that is connected to backend.
	recall := func(cookie uint64, backend netip.AddrPort) netip.AddrPort {
		t.Helper()
		io := ask(t, objects.TestPeer, bpftestPeerIo{
			Cookie: cookie, Op: bpftestPeerOpPEER_RECALL, Req: request(backend, lb.TCP),
		})
		if seen := io.Req.addrPort(); (io.Found != 0) == (seen == backend) {
			t.Errorf("found is %d and the address %v", io.Found, seen)
		}
		return io.Req.addrPort()
	}
	want := func(what string, got, want netip.AddrPort) {
		t.Helper()
		if got != want {
			t.Errorf("%s: the peer is %v, want %v", what, got, want)
		}
	}

	want("nothing remembered", recall(5, b1), b1)
	remember(5, vip, b1)
	want("remembered", recall(5, b1), vip)
	want("remembered, asked again", recall(5, b1), vip)
	want("connected to another backend", recall(5, b2), b2)
	want("connected to another port", recall(5, netip.AddrPortFrom(b1.Addr(), 1)), netip.AddrPortFrom(b1.Addr(), 1))
	want("another socket with the same place", recall(5+places, b1), b1)
	remember(5+places, other, b2)
	want("a socket that took the place", recall(5+places, b2), other)
	want("a socket whose place was taken", recall(5, b1), b1)
	remember(5, vip, b1)
	want("a place taken back", recall(5, b1), vip)
	want("a neighbour's place", recall(6, b1), b1)

	// A writer that is at work on another core.
	place := bpfPeer{}
	fatal(t, d.maps[bpfMapPeers].Lookup(uint32(5), &place))
	place.Cookie = ^uint64(0)
	fatal(t, d.maps[bpfMapPeers].Put(uint32(5), &place))
	lost := counter(t, d, "peer_lost")
	want("a place being written", recall(5, b1), b1)
	remember(5, other, b2)
	want("a place that another writer has", recall(5, b2), b2)
	if n := counter(t, d, "peer_lost") - lost; n != 1 {
		t.Errorf("peer_lost grew by %d, want 1", n)
	}
}

func counter(t testing.TB, d *Datapath, name string) uint64 {
	t.Helper()
	counters, err := d.Counters()
	fatal(t, err)
	for _, c := range counters {
		if c.Name == name {
			return c.Value
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// originTest asks test_origin.
type originTest struct {
	t    *testing.T
	prog *ebpf.Program
}

// entry says that a socket asked for a VIP and got a backend.
func entry(vip, backend string, service, now uint32) bpftestOriginEntry {
	v, b := netip.MustParseAddrPort(vip), netip.MustParseAddrPort(backend)
	return bpftestOriginEntry{
		Vip: bpftestAddr(encodeAddr(v.Addr())), VipPort: networkPort(v.Port()),
		Backend: bpftestAddr(encodeAddr(b.Addr())), BackendPort: networkPort(b.Port()),
		ServiceId: service, Generation: 1, LastSec: now,
	}
}

func (e bpftestOriginEntry) backendAddr() string {
	return netip.AddrPortFrom(decodeAddr(bpfAddr(e.Backend)), networkPort(e.BackendPort)).String()
}

// put stores an entry and returns the backend that stands then, "" when there
// was no room.
func (o originTest) put(e bpftestOriginEntry, rejected *bpftestOriginEntry) string {
	o.t.Helper()
	io := bpftestOriginIo{Op: bpftestOriginOpORIGIN_SENT_PUT, Entry: e}
	if rejected != nil {
		io.Reject, io.Rejected = 1, *rejected
	}
	io = ask(o.t, o.prog, io)
	if io.Found == 0 {
		return ""
	}
	return io.Entry.backendAddr()
}

// find returns the backend that datagrams for a VIP went to, "" for none.
func (o originTest) find(vip string, now uint32) string {
	o.t.Helper()
	io := ask(o.t, o.prog, bpftestOriginIo{
		Op: bpftestOriginOpORIGIN_SENT_FIND, Now: now, Req: request(netip.MustParseAddrPort(vip), lb.UDP),
	})
	if io.Found == 0 {
		return ""
	}
	return io.Entry.backendAddr()
}

// recall returns whom a datagram from an address seems to come from, on a socket
// that is not connected.
func (o originTest) recall(from string, now uint32) string {
	o.t.Helper()
	io := ask(o.t, o.prog, bpftestOriginIo{
		Op: bpftestOriginOpORIGIN_RECALL, Now: now, Req: request(netip.MustParseAddrPort(from), lb.UDP),
	})
	return io.Req.addrPort().String()
}

// peer returns whom a socket that is connected to an address seems to have dialled.
func (o originTest) peer(remote string) string {
	o.t.Helper()
	io := ask(o.t, o.prog, bpftestOriginIo{
		Op: bpftestOriginOpORIGIN_PEER, Req: request(netip.MustParseAddrPort(remote), lb.UDP),
	})
	return io.Req.addrPort().String()
}

// connectDirectly connects to an address that is nobody's frontend.
func (o originTest) connectDirectly(to string) {
	o.t.Helper()
	ask(o.t, o.prog, bpftestOriginIo{
		Op: bpftestOriginOpORIGIN_CONNECTED_FORGET, Req: request(netip.MustParseAddrPort(to), lb.UDP),
	})
}

func (o originTest) connect(e bpftestOriginEntry) {
	o.t.Helper()
	ask(o.t, o.prog, bpftestOriginIo{Op: bpftestOriginOpORIGIN_CONNECTED_PUT, Entry: e})
}

func (o originTest) want(what, got, want string) {
	o.t.Helper()
	if got != want {
		o.t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func forgetOrigin(t *testing.T, objects *bpftestObjects) {
	t.Helper()
	fatal(t, objects.OneOrigin.Put(uint32(0), &bpftestOrigin{}))
}

func testOrigins(t *testing.T, _ *Datapath, objects *bpftestObjects) {
	forgetOrigin(t, objects)
	o := originTest{t, objects.TestOrigin}
	const (
		vip1, vip2, vip3, vip4, vip5 = "10.96.0.1:53", "10.96.0.2:53", "[fd00:96::3]:53", "10.96.0.4:53", "10.96.0.5:53"
		b1, b2, b3                   = "10.244.0.1:5353", "10.244.0.2:5353", "[fd00:244::3]:5353"
		now, idle                    = 1000, 120
	)
	o.want("nothing sent yet", o.find(vip1, now), "")
	o.want("nothing asked yet", o.recall(b1, now), b1)

	o.want("first datagram", o.put(entry(vip1, b1, 1, now), nil), b1)
	o.want("remembered", o.find(vip1, now), b1)
	o.want("its answer", o.recall(b1, now), vip1)
	o.want("a stranger's datagram", o.recall(b2, now), b2)
	o.want("another VIP", o.find(vip2, now), "")
	o.want("another thread chose for the same VIP in between", o.put(entry(vip1, b2, 1, now), nil), b1)
	gone := entry(vip1, b1, 1, now)
	o.want("the backend that was remembered may not be used", o.put(entry(vip1, b2, 1, now), &gone), b2)
	o.want("another thread chose anew in between", o.put(entry(vip1, b3, 1, now), &gone), b2)
	o.want("the VIP has another owner", o.put(entry(vip1, b1, 9, now), nil), b1)

	o.want("second VIP", o.put(entry(vip2, b2, 2, now), nil), b2)
	o.want("third VIP", o.put(entry(vip3, b3, 3, now), nil), b3)
	o.want("fourth VIP", o.put(entry(vip4, b1, 4, now+1), nil), b1)
	o.want("fifth VIP", o.put(entry(vip5, b1, 5, now+1), nil), "")
	o.want("two VIPs share a backend: the one used last", o.recall(b1, now), vip4)
	o.want("IPv6", o.recall(b3, now), vip3)

	o.want("silent for as long as allowed", o.find(vip2, now+idle), b2)
	o.want("silent for longer since that", o.find(vip2, now+2*idle+1), "")
	o.want("the clock of another core is behind", o.find(vip4, now), b1)
	o.want("a silent VIP's place is used again", o.put(entry(vip5, b1, 5, now+2*idle+1), nil), b1)
	o.want("the VIP that was silent", o.find(vip1, now+2*idle+1), "")

	forgetOrigin(t, objects)
	o.connect(entry(vip1, b1, 1, now))
	o.want("connected", o.peer(b1), vip1)
	o.want("a connection says nothing of datagrams sent", o.find(vip1, now), "")
	o.want("a connection says nothing of datagrams received", o.recall(b1, now), b1)
	o.connect(entry(vip2, b2, 2, now))
	o.want("connected anew", o.peer(b2), vip2)
	o.want("the kernel has refused that and the socket kept its peer", o.peer(b1), vip1)
	o.connect(entry(vip3, b2, 3, now))
	o.want("another VIP with the same backend", o.peer(b2), vip3)
	o.want("still the one before", o.peer(b1), vip1)
	o.connectDirectly(b2)
	o.want("connected to the pod itself", o.peer(b2), b2)
	o.want("which leaves others alone", o.peer(b1), vip1)
}

func testAvoid(t *testing.T, d *Datapath, objects *bpftestObjects) {
	rows := lb.NewTables()
	for i := range 4 {
		rows.Slots[uint32(8+i)] = lb.Backend{Addr: netip.AddrFrom4([4]byte{10, 244, 0, byte(i)}), Port: 53}
	}
	write(t, d.Tables, rows)
	o := originTest{t, objects.TestOrigin}
	choose := func(vip string, count uint32) string {
		t.Helper()
		io := ask(t, objects.TestOrigin, bpftestOriginIo{
			Op: bpftestOriginOpORIGIN_CHOOSE, Req: request(netip.MustParseAddrPort(vip), lb.UDP),
			Target: bpftestTarget{ServiceId: 1, Base: 8, Count: count},
		})
		if io.Found == 0 {
			t.Fatal("no choice")
		}
		return io.Choice.addrPort().String()
	}
	const vip, other, third = "10.96.0.1:53", "10.96.0.2:53", "10.96.0.3:53"
	forgetOrigin(t, objects)
	seen := map[string]int{}
	for range 400 {
		seen[choose(vip, 4)]++
	}
	if len(seen) != 4 {
		t.Errorf("a new socket gets %v, want all four backends", seen)
	}

	o.put(entry(other, "10.244.0.0:53", 1, 1), nil)
	o.put(entry(third, "10.244.0.1:53", 1, 1), nil)
	clear(seen)
	for range 400 {
		seen[choose(vip, 4)]++
	}
	if len(seen) != 2 || seen["10.244.0.2:53"] == 0 || seen["10.244.0.3:53"] == 0 {
		t.Errorf("a socket that has two of four backends for other VIPs gets %v, want the two others", seen)
	}
	for range 20 {
		if got := choose(vip, 1); got != "10.244.0.0:53" {
			t.Fatalf("without a way out it gets %s", got)
		}
	}
	clear(seen)
	for range 400 {
		seen[choose(other, 1)]++
	}
	if seen["10.244.0.0:53"] != 400 {
		t.Errorf("its own backend for the same VIP is avoided: %v", seen)
	}
}

func testUsable(t *testing.T, d *Datapath, objects *bpftestObjects) {
	const member, stranger = "10.244.0.2:5353", "10.244.0.9:5353"
	row := lb.Member{Service: 1, Backend: backend(member)}
	fatal(t, d.SetMember(row))
	defer func() { fatal(t, d.DeleteMember(row)) }()
	for _, tc := range []struct {
		name    string
		backend string
		target  bpftestTarget
		want    uint32
	}{
		{"the set has not changed since", stranger, bpftestTarget{ServiceId: 1, Generation: 1}, 1},
		{"the set has changed and the backend serves", member, bpftestTarget{ServiceId: 1, Generation: 2}, 1},
		{"the set has changed and the backend is gone", stranger, bpftestTarget{ServiceId: 1, Generation: 2}, 0},
		{"the VIP has another owner", member, bpftestTarget{ServiceId: 2, Generation: 1}, 0},
		{"a range without backends, the old one serves", member, bpftestTarget{ServiceId: 1, Generation: 5}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			io := ask(t, objects.TestOrigin, bpftestOriginIo{
				Op: bpftestOriginOpORIGIN_USABLE, Entry: entry("10.96.0.1:53", tc.backend, 1, 1), Target: tc.target,
			})
			if io.Found != tc.want {
				t.Errorf("usable is %d, want %d", io.Found, tc.want)
			}
		})
	}
}
