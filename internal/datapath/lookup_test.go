// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -type addr -type request -type target -type choice -type verdict -type lookup_io -type gate_io -type spread_io -type peer_io -type peer_op -type origin_io -type origin_op -type affinity_io -type affinity_state -type client_io -type stress_io -type stress_result bpftest ../../bpf/tests/lookup_test.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu

import (
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
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
	sizes := small
	// Of an LRU map each processor keeps 128 rows for itself and rather takes
	// those in use than another's.
	sizes.Affinity = 4096
	d := openDatapath(t, testutil.BPFRoot(t), sizes)
	objects := loadTests(t, d, nil)
	for _, tc := range []struct {
		name string
		test func(*testing.T, *Datapath, *bpftestObjects)
	}{
		{"verdicts", testVerdicts},
		{"the bits of a gate", testGateBits},
		{"places are picked equally often", testSpread},
		{"peers", testPeers},
		{"origins", testOrigins},
		{"which backend a socket avoids", testAvoid},
		{"which entry is usable", testUsable},
		{"affinities", testAffinity},
		{"connections at once get one backend", testAffinityRace},
		{"source ranges", testSourceRanges},
		{"addresses of pods", testPodAddress},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, d, objects) })
	}
}

// verdictRows are what testVerdicts asks about. Service 1 has another set on each
// side, 2 is a restricted one, 3 has no backends, 4 has none on this node.
func verdictRows() lb.Tables {
	rows := lb.NewTables()
	name := lb.Name{Namespace: "default", Name: "web"}
	for id, row := range map[lb.ServiceID]lb.ServiceRow{
		1: {Sides: [lb.Sides]lb.Range{{Base: 10, Count: 2, Generation: 7}, {Base: 12, Count: 1, Generation: 8}, {Base: 13, Count: 1, Generation: 9}}, Affinity: 10800},
		2: {Sides: [lb.Sides]lb.Range{{Base: 14, Count: 1}, {Base: 14, Count: 1}, {Base: 14, Count: 1}}, Restricted: true, NodeAllowed: true},
		3: {Sides: [lb.Sides]lb.Range{{Generation: 1}, {}, {}}},
		4: {Sides: [lb.Sides]lb.Range{lb.Range{}.NextEmpty(true), lb.Range{}.NextEmpty(true), {Base: 14, Count: 1}}},
	} {
		rows.Names[id] = lb.ServicePort{Service: name, Port: "p" + strconv.Itoa(int(id)), Protocol: lb.TCP, Family: lb.IPv4}
		rows.Services[id] = row
	}
	for slot, b := range map[uint32]string{
		10: "10.244.0.2:5353", 11: "10.244.0.3:5353", 12: "10.244.0.4:5353", 13: "10.244.0.5:5353", 14: "[fd00:244::2]:8080",
	} {
		rows.Slots[slot] = backend(b)
	}
	for _, f := range []struct {
		dial     string
		protocol lb.Protocol
		service  lb.ServiceID
		kind     lb.FrontendKind
	}{
		{"10.96.0.10:53", lb.UDP, 1, lb.KindClusterIP},
		{"10.96.0.10:53", lb.TCP, 3, lb.KindClusterIP},
		{"[fd00:96::b]:80", lb.TCP, 2, lb.KindClusterIP},
		{"10.96.0.11:80", lb.TCP, 4, lb.KindClusterIP},
		{"0.0.0.0:30053", lb.UDP, 1, lb.KindNodePort},
		{"0.0.0.0:30080", lb.TCP, 4, lb.KindNodePort},
		{"[::]:30080", lb.TCP, 2, lb.KindNodePort},
		{"198.51.100.1:53", lb.UDP, 1, lb.KindLoadBalancer},
		{"198.51.100.1:80", lb.TCP, 2, lb.KindLoadBalancer},
		{"198.51.100.2:80", lb.TCP, 2, lb.KindExternalIP},
		{"203.0.113.1:30080", lb.TCP, 3, lb.KindExternalIP}, // a node address, too
	} {
		rows.Frontends[frontendKey(f.dial, f.protocol)] = lb.Frontend{Service: f.service, Kind: f.kind}
	}
	for vip, kind := range map[string]lb.FrontendKind{
		"10.96.0.10": lb.KindClusterIP, "10.96.0.11": lb.KindClusterIP, "fd00:96::b": lb.KindClusterIP, "10.96.0.20": lb.KindForeign,
	} {
		rows.Frontends[lb.FrontendKey{VIP: netip.MustParseAddr(vip)}] = lb.Frontend{Kind: kind}
	}
	for addr, kind := range map[string]lb.NodeAddress{
		"203.0.113.1": lb.NodeAddressOpen, "2001:db8::1": lb.NodeAddressOpen,
		"127.0.0.1": lb.NodeAddressLoopback, "::1": lb.NodeAddressLoopback,
	} {
		rows.NodeAddresses[netip.MustParseAddr(addr)] = kind
	}
	for _, cidr := range []string{"10.96.0.0/16", "fd00:96::/112"} {
		rows.ServiceCIDRs[netip.MustParsePrefix(cidr)] = struct{}{}
	}
	return rows
}

func testVerdicts(t *testing.T, d *Datapath, objects *bpftestObjects) {
	rows := verdictRows()
	write(t, d.Tables, rows)
	const (
		pass      = bpftestVerdictVERDICT_PASS
		translate = bpftestVerdictVERDICT_TRANSLATE
		noBackend = bpftestVerdictVERDICT_NO_BACKEND
		noPort    = bpftestVerdictVERDICT_NO_PORT
		noLocal   = bpftestVerdictVERDICT_NO_LOCAL
		noService = bpftestVerdictVERDICT_NO_SERVICE
	)
	for _, tc := range []struct {
		name     string
		dial     string
		protocol lb.Protocol
		verdict  bpftestVerdict
		service  uint32
		kind     lb.FrontendKind // and by it the side
		loopback uint8
	}{
		{"nobody's address", "10.244.0.2:5353", lb.TCP, pass, 0, 0, 0},
		{"nobody's IPv6 address", "[fd00:244::2]:5353", lb.UDP, pass, 0, 0, 0},
		{"a ClusterIP", "10.96.0.10:53", lb.UDP, translate, 1, lb.KindClusterIP, 0},
		{"an IPv4-mapped address is the IPv4 one", "[::ffff:10.96.0.10]:53", lb.UDP, translate, 1, lb.KindClusterIP, 0},
		{"TCP of a port that UDP has too, without backends", "10.96.0.10:53", lb.TCP, noBackend, 3, lb.KindClusterIP, 0},
		{"IPv6", "[fd00:96::b]:80", lb.TCP, translate, 2, lb.KindClusterIP, 0},
		{"a policy Local and no backend on this node", "10.96.0.11:80", lb.TCP, noLocal, 4, lb.KindClusterIP, 0},
		{"a port that the ClusterIP does not have", "10.96.0.10:54", lb.TCP, noPort, 0, 0, 0},
		{"a protocol that the port does not have", "[fd00:96::b]:80", lb.UDP, noPort, 0, 0, 0},
		{"port 0 of a ClusterIP", "10.96.0.10:0", lb.TCP, noPort, 0, 0, 0},
		{"a ClusterIP that another proxy serves", "10.96.0.20:80", lb.TCP, pass, 0, 0, 0},
		{"nobody's address in a service CIDR", "10.96.7.7:80", lb.TCP, noService, 0, 0, 0},
		{"nobody's IPv6 address in a service CIDR", "[fd00:96::c]:80", lb.UDP, noService, 0, 0, 0},
		{"an address beside the service CIDRs", "10.97.0.10:53", lb.UDP, pass, 0, 0, 0},
		{"an IPv6 address that ends like an IPv4 VIP", "[::a60:a]:53", lb.UDP, pass, 0, 0, 0},
		{"a load-balancer IP", "198.51.100.1:53", lb.UDP, translate, 1, lb.KindLoadBalancer, 0},
		{"a load-balancer IP of a restricted service", "198.51.100.1:80", lb.TCP, translate, 2, lb.KindLoadBalancer, 0},
		{"an external IP", "198.51.100.2:80", lb.TCP, translate, 2, lb.KindExternalIP, 0},
		{"another port of an external IP", "198.51.100.2:81", lb.TCP, pass, 0, 0, 0},
		{"a NodePort at an address of the node", "203.0.113.1:30053", lb.UDP, translate, 1, lb.KindNodePort, 0},
		{"a NodePort at an IPv6 address of the node", "[2001:db8::1]:30080", lb.TCP, translate, 2, lb.KindNodePort, 0},
		{"a NodePort at a mapped address of the node", "[::ffff:203.0.113.1]:30053", lb.UDP, translate, 1, lb.KindNodePort, 0},
		{"a NodePort of the other family", "[2001:db8::1]:30053", lb.UDP, pass, 0, 0, 0},
		{"an address with a frontend of its own beats the NodePort", "203.0.113.1:30080", lb.TCP, noBackend, 3, lb.KindExternalIP, 0},
		{"a NodePort at another node's address", "203.0.113.2:30053", lb.UDP, pass, 0, 0, 0},
		{"no NodePort at an address of the node", "203.0.113.1:443", lb.TCP, pass, 0, 0, 0},
		{"a NodePort at a loopback address", "127.0.0.1:30053", lb.UDP, translate, 1, lb.KindNodePort, 1},
		{"a NodePort without backends at a loopback address", "127.0.0.1:30080", lb.TCP, noLocal, 4, lb.KindNodePort, 1},
		{"a NodePort at the IPv6 loopback address", "[::1]:30080", lb.TCP, translate, 2, lb.KindNodePort, 1},
		{"no NodePort at a loopback address", "127.0.0.1:443", lb.TCP, pass, 0, 0, 0},
		{"the unspecified address is not a node's", "0.0.0.0:30053", lb.UDP, pass, 0, 0, 0},
		{"the unspecified IPv6 address is not a node's", "[::]:30080", lb.TCP, pass, 0, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			io := ask(t, objects.TestLookup, bpftestLookupIo{Req: request(netip.MustParseAddrPort(tc.dial), tc.protocol)})
			if io.Verdict != tc.verdict || io.Target.ServiceId != tc.service {
				t.Errorf("verdict %d for service %d, want %d for %d", io.Verdict, io.Target.ServiceId, tc.verdict, tc.service)
			}
			if io.Target.Kind != uint8(tc.kind) || io.Target.Loopback != tc.loopback {
				t.Errorf("a frontend of kind %v, loopback %d; want %v, %d",
					lb.FrontendKind(io.Target.Kind), io.Target.Loopback, tc.kind, tc.loopback)
			}
			if tc.service != 0 {
				wantTarget(t, io, rows, tc.kind.Inside())
			}
		})
	}
	erase(t, d.Tables, rows)
	io := ask(t, objects.TestLookup, bpftestLookupIo{Req: request(netip.MustParseAddrPort("10.96.0.10:53"), lb.UDP)})
	if io.Verdict != pass {
		t.Errorf("verdict %d after everything was deleted, want pass", io.Verdict)
	}
}

// wantTarget checks what the program has read of a service, and that its choice is
// in the set of the side.
func wantTarget(t *testing.T, io bpftestLookupIo, rows lb.Tables, side lb.Side) {
	t.Helper()
	row := rows.Services[lb.ServiceID(io.Target.ServiceId)]
	want := bpftestTarget{
		ServiceId: io.Target.ServiceId, Options: encodeOptions(row), Kind: io.Target.Kind, Side: uint8(side),
		Base: row.Sides[side].Base, Count: uint32(row.Sides[side].Count),
		Generation: row.Sides[side].Generation | uint32(side)<<24, Loopback: io.Target.Loopback,
	}
	if io.Target != want {
		t.Errorf("target %+v, want %+v", io.Target, want)
	}
	if io.Target.Count == 0 {
		return
	}
	got := lb.Backend{Addr: io.Choice.addrPort().Addr(), Port: io.Choice.addrPort().Port()}
	if set := rows.Backends(row.Sides[side]); !slices.Contains(set, got) {
		t.Errorf("backend %v, want one of %v", got, set)
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

// affinityTest asks test_affinity about one client and service 1, on the inside,
// whose backends are in slots 8 to 11.
type affinityTest struct {
	t       testing.TB
	d       *Datapath
	prog    *ebpf.Program
	netns   uint64 // the client
	timeout uint64
	slot    uint32 // where the range begins
	count   uint32
}

func newAffinityTest(t *testing.T, d *Datapath, objects *bpftestObjects) *affinityTest {
	rows := lb.NewTables()
	for i := range uint32(4) {
		b := lb.Backend{Addr: netip.AddrFrom4([4]byte{10, 244, 0, byte(i)}), Port: 80}
		rows.Slots[8+i] = b
		rows.Members[lb.Member{Service: 1, Backend: b, Use: lb.UseOn(lb.SideInside)}] = struct{}{}
	}
	write(t, d.Tables, rows)
	t.Cleanup(func() { erase(t, d.Tables, rows) })
	return &affinityTest{t: t, d: d, prog: objects.TestAffinity, netns: 4711, timeout: 100, slot: 8, count: 4}
}

func (a *affinityTest) ask(connect, now uint32) bpftestAffinityIo {
	a.t.Helper()
	return ask(a.t, a.prog, bpftestAffinityIo{
		Connect: connect, Now: now,
		Key:    bpftestAffinityKey{Netns: a.netns, ServiceId: 1},
		Client: bpftestAddr(encodeAddr(netip.MustParseAddr("10.244.0.77"))),
		Target: bpftestTarget{
			Options: a.timeout, ServiceId: 1, Base: a.slot, Count: a.count, Generation: 3, Side: uint8(lb.SideInside),
		},
	})
}

// recall returns the backend that the client has, "" for none.
func (a *affinityTest) recall(now uint32) string {
	a.t.Helper()
	io := a.ask(0, now)
	if io.Found == 0 {
		return ""
	}
	if io.Target.Generation != math.MaxUint32 {
		a.t.Errorf("a remembered backend counts as one of generation %d", io.Target.Generation)
	}
	return io.Choice.addrPort().String()
}

// connect returns the backend that a new connection gets from the four.
func (a *affinityTest) connect(now uint32) string {
	a.t.Helper()
	io := a.ask(1, now)
	if io.Found == 0 {
		a.t.Fatal("no backend")
	}
	return io.Choice.addrPort().String()
}

func (a *affinityTest) want(what, got, want string) {
	a.t.Helper()
	if got != want {
		a.t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

// row returns the client's row.
func (a *affinityTest) row() (v bpfAffinity) {
	a.t.Helper()
	fatal(a.t, a.d.maps[bpfMapAffinity].Lookup(&bpfAffinityKey{Netns: a.netns, ServiceId: 1}, &v))
	return v
}

func (a *affinityTest) forget() {
	a.t.Helper()
	_, err := a.d.ForgetAffinities(func(AffinityEntry) bool { return true })
	fatal(a.t, err)
}

func testAffinity(t *testing.T, d *Datapath, objects *bpftestObjects) {
	a := newAffinityTest(t, d, objects)
	a.want("nothing remembered", a.recall(1000), "")
	first := a.connect(1000)
	a.want("remembered", a.recall(1000), first)
	for range 50 {
		a.want("the next connection", a.connect(1000), first)
	}
	if v := a.row(); decodeAddr(v.Client).String() != "10.244.0.77" || v.LastSec != 1000 {
		t.Errorf("the row is %+v", v)
	}

	a.want("the clock of another core is behind", a.connect(998), first)
	a.connect(1000)
	a.want("as long as allowed", a.connect(1100), first)
	a.want("as long as allowed since the last connection", a.recall(1200), first)
	a.want("longer than that", a.recall(1301), "")

	a.testTimeouts()
	a.testSets()
	a.testSpread()
	a.forget()
}

func (a *affinityTest) testTimeouts() {
	a.t.Helper()
	a.forget()
	a.connect(1000)
	a.timeout = 10
	a.want("a timeout made shorter counts at once", a.recall(1011), "")
	b := a.connect(2000)
	a.timeout = math.MaxUint32
	a.want("the longest timeout", a.recall(2000+1<<30), b)
	a.timeout = 100
}

func (a *affinityTest) testSets() {
	a.t.Helper()
	a.forget()
	first := a.connect(1000)
	row := lb.Member{Service: 1, Backend: backend(first), Use: lb.UseOn(lb.SideInside)}
	serving, cluster := row, row
	serving.Use, cluster.Use = lb.UseServing, lb.UseOn(lb.SideClusterIP)
	fatal(a.t, a.d.SetMember(serving))
	fatal(a.t, a.d.SetMember(cluster))
	a.slot, a.count = a.slot+1, a.count-1
	a.want("in the set while the range has changed already", a.connect(1000), first)
	fatal(a.t, a.d.DeleteMember(row))
	a.want("serving, and in the set of another side only", a.recall(1000), "")
	second := a.connect(1000)
	fatal(a.t, a.d.SetMember(row))
	fatal(a.t, a.d.DeleteMember(serving))
	fatal(a.t, a.d.DeleteMember(cluster))
	a.want("the first one is back in the set", a.connect(1000), second)
	a.slot, a.count = a.slot-1, a.count+1
}

// testSpread sees that backends are spread evenly over new clients, over clients
// whose backend goes, and over the times that one client comes back too late.
func (a *affinityTest) testSpread() {
	a.t.Helper()
	const clients = 4000
	fresh, moved, late := map[string]uint64{}, map[string]uint64{}, map[string]uint64{}
	for a.netns = 1; a.netns <= clients; a.netns++ {
		a.forget()
		fresh[a.connect(1000)]++
		a.slot, a.count, a.timeout = a.slot+1, a.count-1, 0
		moved[a.connect(1001)]++
		a.slot, a.count, a.timeout = a.slot-1, a.count+1, 100
	}
	for i := range uint32(clients) {
		late[a.connect(2000+101*i)]++
	}
	for _, tc := range []struct {
		what string
		seen map[string]uint64
		want int
	}{{"new clients", fresh, 4}, {"clients that must move", moved, 3}, {"one client that is always late", late, 4}} {
		counts := slices.Collect(maps.Values(tc.seen))
		if chi2, limit := chiSquared(counts); len(tc.seen) != tc.want || chi2 > limit {
			a.t.Errorf("%s got %v: chi-squared is %.1f, more than %.1f", tc.what, tc.seen, chi2, limit)
		}
	}
}

// testAffinityRace lets a client connect several times at once: when it has no
// backend, and when it has one that it may not keep.
func testAffinityRace(t *testing.T, d *Datapath, objects *bpftestObjects) {
	a := newAffinityTest(t, d, objects)
	defer a.forget()
	now := uint32(1000)
	for round := range 2000 {
		if round%2 == 0 {
			a.forget()
		}
		now += uint32(a.timeout) + 1
		var got [4]string
		var connections sync.WaitGroup
		for i := range got {
			connections.Go(func() { got[i] = a.connect(now) })
		}
		connections.Wait()
		if slices.ContainsFunc(got[:], func(s string) bool { return s != got[0] }) {
			t.Fatalf("round %d: connections at once went to %v", round, got)
		}
		a.want("the connection after them", a.connect(now), got[0])
	}
}

func testSourceRanges(t *testing.T, d *Datapath, objects *bpftestObjects) {
	rows := lb.NewTables()
	for prefix, service := range map[string]lb.ServiceID{
		"192.0.2.0/24": 1, "192.0.2.128/25": 2, "2001:db8::/32": 1, "0.0.0.0/0": 3, "::/0": 4, "198.51.100.7/32": 1,
	} {
		rows.Sources[lb.Source{Service: service, Prefix: netip.MustParsePrefix(prefix)}] = struct{}{}
	}
	write(t, d.Tables, rows)
	defer erase(t, d.Tables, rows)
	for _, tc := range []struct {
		name    string
		client  string
		service uint32
		want    uint32
	}{
		{"in a range", "192.0.2.1", 1, 1},
		{"outside all ranges", "192.0.3.1", 1, 0},
		{"in a range of another service", "192.0.2.1", 2, 0},
		{"in a range that is inside another service's", "192.0.2.129", 2, 1},
		{"in the other service's range as well", "192.0.2.129", 1, 1},
		{"in an IPv6 range", "2001:db8::1", 1, 1},
		{"outside the IPv6 range", "2001:db9::1", 1, 0},
		{"the one address", "198.51.100.7", 1, 1},
		{"its neighbour", "198.51.100.6", 1, 0},
		{"all IPv4 addresses", "203.0.113.1", 3, 1},
		{"which says nothing of IPv6", "2001:db8::1", 3, 0},
		{"all IPv6 addresses", "2001:db8::1", 4, 1},
		{"a service without ranges", "192.0.2.1", 5, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			io := ask(t, objects.TestClient, bpftestClientIo{
				ServiceId: tc.service, Addr: bpftestAddr(encodeAddr(netip.MustParseAddr(tc.client))),
			})
			if io.Allowed != tc.want {
				t.Errorf("allowed is %d, want %d", io.Allowed, tc.want)
			}
		})
	}
}

func testPodAddress(t *testing.T, _ *Datapath, objects *bpftestObjects) {
	node := testutil.Node(t)
	v4, v6 := netip.MustParseAddr("10.244.0.9"), netip.MustParseAddr("fd00:244::9")
	// find returns the address that a socket of the namespace would be taken for.
	find := func(ns *sandbox.Namespace, family lb.Family) string {
		t.Helper()
		number := uint32(unix.AF_INET)
		if family == lb.IPv6 {
			number = unix.AF_INET6
		}
		var io bpftestClientIo
		fatal(t, ns.Do(func() error {
			io = ask(t, objects.TestClient, bpftestClientIo{Family: number})
			return nil
		}))
		if io.Found == 0 {
			return ""
		}
		return decodeAddr(bpfAddr(io.Addr)).String()
	}
	want := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: got %q, want %q", what, got, want)
		}
	}

	pod, err := node.AddPod("dual", v4, v6)
	fatal(t, err)
	want("IPv4", find(pod, lb.IPv4), v4.String())
	want("IPv6, not the link-local address", find(pod, lb.IPv6), v6.String())
	fatal(t, pod.AddAddr("eth0", netip.MustParsePrefix("10.244.0.99/24")))
	want("with a secondary address", find(pod, lb.IPv4), v4.String())
	fatal(t, pod.AddAddr("lo", netip.MustParsePrefix("192.0.2.1/32")))
	want("with an address on lo", find(pod, lb.IPv4), v4.String())

	single, err := node.AddPod("single", netip.MustParseAddr("10.244.0.10"))
	fatal(t, err)
	want("IPv4 alone", find(single, lb.IPv4), "10.244.0.10")
	want("no IPv6", find(single, lb.IPv6), "")
	fatal(t, single.RemoveAddr("eth0", netip.MustParsePrefix("10.244.0.10/24")))
	want("no address left", find(single, lb.IPv4), "")
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
		{"the set of another side has the same generation", stranger, bpftestTarget{ServiceId: 1, Generation: 1 | 1<<24}, 0},
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
