// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type packet_io bpfaffinity ../../bpf/tests/affinity_test.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// twelve are all backends there are, so many that two clients seldom have the same
// by chance.
var twelve = []string{
	"a:8080", "a:8081", "a:8082", "a:8083", "b:8080", "b:8081", "b:8082", "b:8083", "c:8080", "c:8081", "c:8082", "c:8083",
}

// long is the API's default timeout.
const long = 10800

// clientIP returns a change to sessionAffinity ClientIP, or to None for 0 seconds.
func clientIP(seconds uint32) func(*lb.Service) {
	return func(spec *lb.Service) { spec.Affinity = seconds }
}

// rounds is how often a test tries what must hold each time: seldom where somebody
// waits for emulated processors.
func rounds(often, seldom int) int {
	if testing.Short() {
		return seldom
	}
	return often
}

// ask dials in one way and returns which backend answers.
func (c client) ask(t testing.TB, w way, k kind, to netip.AddrPort) string {
	t.Helper()
	got, err := c.reach(t, w, k, to)
	if err != nil {
		t.Fatalf("%s by %s to %v: %v", w.name, c.name, to, err)
	}
	return got.backend
}

// entries returns the affinity entries of the Service's clients.
func (s *service) entries(t testing.TB) []datapath.AffinityEntry {
	t.Helper()
	all, err := s.w.datapath.Affinities()
	must(t, err)
	names := s.w.reconciler.Tables().Names
	return slices.DeleteFunc(all, func(e datapath.AffinityEntry) bool { return names[e.Service].Service != s.spec.Name })
}

// waitOld waits until all entries of the Service's clients are older than some
// seconds. Meanwhile it calls f.
func (s *service) waitOld(t *testing.T, seconds int, f func()) {
	t.Helper()
	testutil.Eventually(t, testutil.Patience(), "entries grow old", func() error {
		f()
		for _, e := range s.entries(t) {
			if e.Age <= time.Duration(seconds)*time.Second {
				return fmt.Errorf("the one for %v is %v old", e.Client, e.Age)
			}
		}
		return nil
	})
}

// wantChoices checks how often f leads to a backend that the client has and how
// often to one it is given anew.
func (w *world) wantChoices(t *testing.T, what string, kept, anew uint64, f func()) {
	t.Helper()
	counted := w.counters(t, f)
	if counted["affinity_hit"] != kept || counted["affinity_new"] != anew || counted["affinity_lost"] != 0 {
		t.Errorf("%s: counters are %v, want %d times the backend it has and %d times another", what, counted, kept, anew)
	}
}

// TestAffinity: semantics.md, sessionAffinity in "How one is chosen".
func TestAffinity(t *testing.T) {
	inOneWorld(t, []worldTest{
		{"one entry for each client, Service port and family", affinityOfClientAndPort},
		{"the entry names the pod", affinityNamesThePod},
		{"it comes before telling the answers of two VIPs apart", affinityOfOneSocket},
		{"until the timeout after the last new connection", affinityTimeout},
		{"on and off at once", affinitySwitchedAtOnce},
		{"until the backend leaves the set", affinityToABackendThatLeaves},
		{"not to a backend that is in another frontend's set alone", affinityWhereSetsDiffer},
		{"one for a pod's sockets and packets", affinityOnBothPaths},
		{"one for sockets and packets of the node", affinityOfTheNodeOnBothPaths},
		{"not for a socket with somebody else's address", affinityOfAForeignAddress},
		{"it survives an agent restart", affinitySurvivesARestart},
		{"hundreds of first connections at once get one backend", affinityOfManyAtOnce},
		{"and so do two at the same moment", affinityOfTwoAtOnce},
		{"spread over clients is even", affinityIsSpreadEvenly},
	})
}

// affinityOfClientAndPort: one entry for all kinds of frontend,
// IPv4 and IPv6 apart, each pod for itself (semantics.md, "How one is chosen";
// peers.md, "all pods of a node share one ClientIP affinity").
func affinityOfClientAndPort(t *testing.T, w *world) {
	type owner struct {
		s        *service
		who      string
		protocol lb.Protocol
		family   int
	}
	backends := map[owner]string{}
	for range rounds(3, 1) {
		s := w.expose(t, clientIP(long), twelve...)
		for _, c := range []client{w.pod(), w.process(), w.backendPod("a")} {
			for _, k := range kinds {
				at := []netip.AddrPort{s.dial(k), s.atNode(k), s.atBalancer(k), s.atExternal(k)}
				if c == w.process() {
					at = append(at, s.atLoopback(k))
				}
				for _, to := range at {
					for _, way := range ways {
						o := owner{s, c.name, way.protocol, k.family}
						got := c.ask(t, way, k, to)
						if had := backends[o]; had != "" && got != had {
							t.Errorf("%s by %s to %v: answered by %s, want %s as before", way.name, c.name, to, got, had)
						}
						backends[o] = got
					}
				}
			}
		}
		if n := len(s.entries(t)); n != 3*2*2 {
			t.Errorf("%d entries, want one for each of 3 clients, 2 protocols and 2 families", n)
		}
	}
	for name, other := range map[string]func(owner) owner{
		"two pods":                      func(o owner) owner { o.who = "pod a"; return o },
		"a pod and the node":            func(o owner) owner { o.who = w.process().name; return o },
		"two ports of one Service":      func(o owner) owner { o.protocol = lb.TCP; return o },
		"the two families of a Service": func(o owner) owner { o.family = 0; return o },
	} {
		pairs, differ := 0, 0
		for o, backend := range backends {
			if p := other(o); p != o {
				pairs++
				if backends[p] != backend {
					differ++
				}
			}
		}
		if differ == 0 {
			t.Errorf("%s always have the same backend, %d times", name, pairs)
		}
	}
}

// affinityNamesThePod for those who look at it.
func affinityNamesThePod(t *testing.T, w *world) {
	w.needClientAddress(t)
	for _, k := range kinds[:2] {
		for _, tc := range []struct {
			c    client
			want netip.Addr
		}{{w.pod(), clientAddr[k.family]}, {w.backendPod("b"), pods["b"][k.family]}, {w.process(), netip.Addr{}}} {
			s := w.expose(t, clientIP(long), twelve...)
			backend := tc.c.ask(t, ways[0], k, s.atNode(k))
			entries := s.entries(t)
			if len(entries) != 1 {
				t.Fatalf("%s: entries are %v, want one", tc.c.name, entries)
			}
			at := backendAddr(backend, k.family)
			e := entries[0]
			if e.Client != tc.want || e.Backend != (lb.Backend{Addr: at.Addr(), Port: at.Port()}) {
				t.Errorf("%s: client %v has backend %v, want %v with %v", tc.c.name, e.Client, e.Backend, tc.want, at)
			}
		}
	}
}

// affinityOfOneSocket: an affinity comes before telling the answers of two
// VIPs apart.
func affinityOfOneSocket(t *testing.T, w *world) {
	s := w.expose(t, clientIP(long), twelve...)
	eachKind(t, func(t *testing.T, k kind) {
		c := openUDP(t, w.client, k)
		first, _ := c.ask(s.dial(k))
		for _, to := range []netip.AddrPort{s.atNode(k), s.atBalancer(k), s.atExternal(k)} {
			if got, from := c.ask(to); got != first || from != to {
				t.Errorf("to %v: %s answers from %v, want %s from there", to, got, from, first)
			}
		}
	})
}

// affinityTimeout: a client keeps its backend "until timeoutSeconds after its
// last new connection or UDP flow"; and a new timeout holds at once.
func affinityTimeout(t *testing.T, w *world) {
	c, tcp := w.pod(), ways[0]
	v4, v6 := kinds[0], kinds[1]
	short, put := w.expose(t, clientIP(1), twelve...), w.expose(t, clientIP(1), twelve...)
	changed := w.expose(t, clientIP(long), twelve...)

	askShort := func() {
		for _, k := range kinds[:2] {
			for _, way := range ways[:3] {
				c.ask(t, way, k, short.atNode(k))
			}
		}
	}
	askShort()
	c.ask(t, tcp, v4, changed.dial(v4))
	c.ask(t, tcp, v6, changed.dial(v6))
	flow := openUDP(t, c.ns, v4)
	flowBackend, _ := flow.ask(short.dial(v4))
	putBackend := c.ask(t, tcp, v4, put.dial(v4))
	meanwhile := func() {
		if got, _ := flow.ask(short.dial(v4)); got != flowBackend {
			t.Errorf("a flow that goes on is answered by %s, want %s", got, flowBackend)
		}
		if got := c.ask(t, tcp, v4, put.dial(v4)); got != putBackend {
			t.Errorf("who keeps connecting is answered by %s, want %s", got, putBackend)
		}
	}
	short.waitOld(t, 1, meanwhile)
	changed.waitOld(t, 1, meanwhile)

	// For each family a connection over TCP and two flows over UDP.
	w.wantChoices(t, "after the timeout", 2, 4, askShort)
	w.wantChoices(t, "under a long one", 1, 0, func() { c.ask(t, tcp, v4, changed.dial(v4)) })
	changed.update(t, clientIP(1))
	w.wantChoices(t, "under one that has become shorter", 0, 1, func() { c.ask(t, tcp, v6, changed.dial(v6)) })
}

// affinitySwitchedAtOnce: "on and off at once".
func affinitySwitchedAtOnce(t *testing.T, w *world) {
	c := w.pod()
	s := w.expose(t, nil, twelve...)
	for _, k := range kinds[:2] {
		for _, way := range ways[:3] {
			ask := func() string { return c.ask(t, way, k, s.dial(k)) }
			several := func(name string) {
				w.wantChoices(t, way.name+" "+name, 0, 0, func() {
					seen := map[string]bool{}
					for range 10 {
						seen[ask()] = true
					}
					if len(seen) < 2 {
						t.Errorf("%s %s: always answered by the same: %v", way.name, name, seen)
					}
				})
			}
			several("without an affinity")
			s.update(t, clientIP(long))
			var first string
			w.wantChoices(t, way.name+" when it is switched on", 0, 1, func() { first = ask() })
			w.wantChoices(t, way.name+" when it is on", 5, 0, func() {
				for range 5 {
					if got := ask(); got != first {
						t.Errorf("%s: answered by %s, want %s as before", way.name, got, first)
					}
				}
			})
			s.update(t, clientIP(0))
			several("when it is switched off")
			s.update(t, clientIP(long))
			w.wantChoices(t, way.name+" when it is on again", 0, 1, func() { ask() })
			s.update(t, clientIP(0))
		}
	}
}

// affinityToABackendThatLeaves: "or until the backend leaves the set".
func affinityToABackendThatLeaves(t *testing.T, w *world) {
	c := w.pod()
	for _, tc := range []struct {
		name  string
		leave func(t *testing.T, s *service, backend string)
	}{
		{"it is gone", func(t *testing.T, s *service, backend string) {
			s.set(t, slices.DeleteFunc(slices.Clone(twelve), func(b string) bool { return b == backend })...)
		}},
		{"it terminates and serves", func(t *testing.T, s *service, backend string) {
			s.condition(t, backend, lb.Endpoint{Serving: true, Terminating: true})
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := w.expose(t, clientIP(long), twelve...)
			for _, k := range kinds[:2] {
				for _, way := range ways[:3] {
					ask := func() string { return c.ask(t, way, k, s.atNode(k)) }
					first := ask()
					tc.leave(t, s, first)
					var second string
					w.wantChoices(t, way.name, 0, 1, func() { second = ask() })
					if second == first {
						t.Errorf("%s: still answered by %s", way.name, first)
					}
					s.set(t, twelve...)
					if got := ask(); got != second {
						t.Errorf("%s: answered by %s after the return of %s, want %s", way.name, got, first, second)
					}

					// Its clients do not come back to it, whether or not they
					// have connected meanwhile.
					tc.leave(t, s, second)
					s.set(t, twelve...)
					w.wantChoices(t, way.name+", after a return unseen", 0, 1, func() { ask() })
				}
			}
		})
	}

	t.Run("it stays in the set of one kind of frontend", func(t *testing.T) {
		s := w.expose(t, clientIP(long))
		s.on(t, "other", "b:8080")
		k, way := kinds[0], ways[0]
		c.ask(t, way, k, s.dial(k))
		s.update(t, internalLocal)
		s.on(t, nodeName, "a:8080")
		if got := c.ask(t, way, k, s.dial(k)); got != "a:8080" {
			t.Errorf("the ClusterIP is answered by %s, want the one on this node", got)
		}
		s.update(t, func(spec *lb.Service) { spec.InternalLocal = false })
		if got := c.ask(t, way, k, s.atNode(k)); got != "a:8080" {
			t.Errorf("the NodePort is answered by %s, want the same as the ClusterIP", got)
		}
	})
}

// affinityWhereSetsDiffer: the entry is one, but under
// internalTrafficPolicy Local not each backend is good for each frontend.
func affinityWhereSetsDiffer(t *testing.T, w *world) {
	c, k := w.pod(), kinds[0]
	for range rounds(5, 2) {
		s := w.expose(t, func(spec *lb.Service) { internalLocal(spec); clientIP(long)(spec) })
		s.on(t, "other", twelve[4:]...)
		s.on(t, nodeName, "a:8080")
		for _, way := range ways[:3] {
			c.ask(t, way, k, s.atNode(k))
			if got := c.ask(t, way, k, s.dial(k)); got != "a:8080" {
				t.Errorf("%s: the ClusterIP is answered by %s, want the one on this node", way.name, got)
			}
			if got := c.ask(t, way, k, s.atNode(k)); got != "a:8080" {
				t.Errorf("%s: the NodePort is answered by %s, want the client's backend", way.name, got)
			}
		}
	}
}

// packetPath is what the packet path does for a client with an affinity, over the
// world's own tables.
type packetPath struct{ program *ebpf.Program }

func (w *world) packetPath(t *testing.T) packetPath {
	t.Helper()
	spec, err := loadBpfaffinity()
	must(t, err)
	pinned := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		if name[0] == '.' {
			continue
		}
		if pinned[name], err = ebpf.LoadPinnedMap(datapath.MapPath(w.root, name), nil); err != nil {
			t.Fatal(err)
		}
		defer pinned[name].Close()
		m.MaxEntries = pinned[name].MaxEntries()
	}
	var cookie uint64
	must(t, w.node.Namespace().Do(func() (err error) { cookie, err = attach.NetnsCookie(); return err }))
	must(t, spec.Variables["host_netns_cookie"].Set(cookie))
	var programs struct {
		Packet *ebpf.Program `ebpf:"test_packet"`
	}
	must(t, spec.LoadAndAssign(&programs, &ebpf.CollectionOptions{MapReplacements: pinned}))
	t.Cleanup(func() { must(t, programs.Packet.Close()) })
	return packetPath{programs.Packet}
}

// ask returns which backend a packet over TCP from a client would go to. local: it is
// one of a process on the node.
func (p packetPath) ask(t *testing.T, from netip.Addr, local bool, to netip.AddrPort) string {
	t.Helper()
	var io bpfaffinityPacketIo
	io.Client.B = from.As16()
	io.Req.Addr.B = to.Addr().As16()
	io.Req.Port = networkOrder(to.Port())
	io.Req.Proto = unix.IPPROTO_TCP
	if local {
		io.Local = 1
	}
	in, err := binary.Append(make([]byte, 14), binary.LittleEndian, io)
	must(t, err)
	out := make([]byte, len(in))
	code, err := p.program.Run(&ebpf.RunOptions{Data: in, DataOut: out})
	if err != nil || code != 0 {
		t.Fatalf("packet from %v to %v: program returns %d, %v", from, to, code, err)
	}
	_, err = binary.Decode(out[14:], binary.LittleEndian, &io)
	must(t, err)
	got := netip.AddrPortFrom(netip.AddrFrom16(io.Choice.Addr.B).Unmap(), networkOrder(io.Choice.Port))
	for _, b := range twelve {
		if got == backendAddr(b, 0) || got == backendAddr(b, 1) {
			return b
		}
	}
	t.Fatalf("packet from %v to %v goes to %v, want a backend", from, to, got)
	return ""
}

// networkOrder turns a port to or from the order of packets.
func networkOrder(port uint16) uint16 {
	return binary.LittleEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
}

// needClientAddress skips a test of what follows from a pod's address.
func (w *world) needClientAddress(t *testing.T) {
	t.Helper()
	if err := w.datapath.NoClientAddress; err != nil {
		t.Skipf("this kernel does not tell pods' addresses: %v", err)
	}
}

// wantOne checks that the Service's one client of a family has one entry.
func (s *service) wantOne(t *testing.T) {
	t.Helper()
	if e := s.entries(t); len(e) != 1 {
		t.Errorf("entries are %v, want one", e)
	}
}

// affinityOnBothPaths: the packet path sees a pod's address, the hooks its
// namespace, and whichever is first decides for both.
func affinityOnBothPaths(t *testing.T, w *world) {
	w.needClientAddress(t)
	packets, way := w.packetPath(t), ways[0]
	addrs := []netip.Addr{netip.MustParseAddr("10.244.0.20"), netip.MustParseAddr("fd00:244::20")}
	c := w.addPod(t, addrs...)
	for _, k := range kinds[:2] {
		at := addrs[k.family]
		before, after := w.expose(t, clientIP(long), twelve...), w.expose(t, clientIP(long), twelve...)

		first := packets.ask(t, at, false, before.dial(k))
		for range 3 {
			if got := c.ask(t, way, k, before.dial(k)); got != first {
				t.Errorf("%s: a socket after a packet has backend %s, want %s", k.name, got, first)
			}
		}
		before.wantOne(t)

		second := c.ask(t, way, k, after.dial(k))
		if got := packets.ask(t, at, false, after.dial(k)); got != second {
			t.Errorf("%s: a packet after a socket has backend %s, want %s", k.name, got, second)
		}
		after.wantOne(t)

		// Now the address stands for the namespace, and what it had still holds.
		if got := packets.ask(t, at, false, before.dial(k)); got != first {
			t.Errorf("%s: a packet of the pod that is known now has backend %s, want %s", k.name, got, first)
		}
		before.wantOne(t)
	}
}

// affinityOfTheNodeOnBothPaths: a process on the node has no address before the
// kernel gives its socket one, so its packets are told by where they come from.
func affinityOfTheNodeOnBothPaths(t *testing.T, w *world) {
	packets := w.packetPath(t)
	for _, k := range kinds[:2] {
		s := w.expose(t, clientIP(long), twelve...)
		first := w.process().ask(t, ways[0], k, s.dial(k))
		for _, at := range []netip.Addr{nodeAddr[k.family], otherNodeAddr[k.family]} {
			if got := packets.ask(t, at, true, s.dial(k)); got != first {
				t.Errorf("%s: a packet from %v has backend %s, want %s as a socket", k.name, at, got, first)
			}
		}
		s.wantOne(t)
	}
}

// affinityOfAForeignAddress: who binds to another pod's address does not become that
// pod's packets' client. The hook is asked before the kernel refuses.
func affinityOfAForeignAddress(t *testing.T, w *world) {
	packets, k := w.packetPath(t), kinds[0]
	victim := netip.MustParseAddr("10.244.0.21")
	s := w.expose(t, clientIP(long), twelve...)
	thief := openUDP(t, w.client, k)
	must(t, unix.SetsockoptInt(thief.fd, unix.SOL_IP, unix.IP_FREEBIND, 1))
	must(t, thief.bind(netip.AddrPortFrom(victim, 0)))
	wantErr(t, "connect from a foreign address", thief.connect(s.dial(k)), unix.ENETUNREACH)
	packets.ask(t, victim, false, s.dial(k))
	byAddress := 0
	for _, e := range s.entries(t) {
		if e.Netns == 0 && e.Client == victim {
			byAddress++
		}
	}
	if byAddress != 1 {
		t.Errorf("entries are %v, want one of %v itself", s.entries(t), victim)
	}
}

// affinitySurvivesARestart of the agent.
func affinitySurvivesARestart(t *testing.T, w *world) {
	c := w.pod()
	s := w.expose(t, clientIP(long), twelve...)
	first := map[kind]string{}
	for _, k := range kinds {
		first[k] = c.ask(t, ways[0], k, s.dial(k))
	}
	w.stop(t)
	for _, k := range kinds {
		if got := c.ask(t, ways[0], k, s.dial(k)); got != first[k] {
			t.Errorf("%s without an agent: answered by %s, want %s", k.name, got, first[k])
		}
	}
	w.start(t)
	w.forgetAffinities(t)
	for _, k := range kinds {
		if got := c.ask(t, ways[0], k, s.dial(k)); got != first[k] {
			t.Errorf("%s after a restart: answered by %s, want %s", k.name, got, first[k])
		}
	}
}

// affinityOfManyAtOnce: hundreds of a client's first connections
// get one backend.
func affinityOfManyAtOnce(t *testing.T, w *world) {
	each := rounds(100, 25)
	for round := range rounds(4, len(kinds)) {
		k := kinds[round%len(kinds)]
		s := w.expose(t, clientIP(long), twelve...)
		begin := make(chan struct{})
		var (
			dialling sync.WaitGroup
			mu       sync.Mutex
		)
		seen := map[lb.Protocol]map[string]int{lb.TCP: {}, lb.UDP: {}}
		for _, way := range ways[:3] {
			for i := range each {
				socket := way.open(t, w.pod(), k)
				to := frontendKinds[i%len(frontendKinds)].at(s, k)
				dialling.Go(func() {
					defer socket.close()
					<-begin
					got, err := way.reach(t, socket, to)
					if err != nil {
						t.Errorf("%s to %v: %v", way.name, to, err)
						return
					}
					mu.Lock()
					defer mu.Unlock()
					seen[way.protocol][got.backend]++
				})
			}
		}
		close(begin)
		dialling.Wait()
		for protocol, backends := range seen {
			if len(backends) != 1 {
				t.Errorf("round %d: over %v backends %v answer, want one", round, protocol, backends)
			}
		}
	}
}

// affinityOfTwoAtOnce has two threads connect for the first time, each round anew,
// so close to each other that neither finds an entry.
func affinityOfTwoAtOnce(t *testing.T, w *world) {
	k := kinds[0]
	s := w.expose(t, clientIP(long), twelve...)
	sockets := []*socket{openUDP(t, w.client, k), openUDP(t, w.client, k)}
	for round := range rounds(400, 40) {
		_, err := w.datapath.ForgetAffinities(func(datapath.AffinityEntry) bool { return true })
		must(t, err)
		var waiting atomic.Int32
		var connecting sync.WaitGroup
		for _, c := range sockets {
			connecting.Go(func() {
				for waiting.Add(1); int(waiting.Load()) < len(sockets); {
					runtime.Gosched()
				}
				if err := c.connect(s.dial(k)); err != nil {
					t.Error(err)
				}
			})
		}
		connecting.Wait()
		first, _ := sockets[0].askPeer()
		if second, _ := sockets[1].askPeer(); first != second {
			t.Fatalf("round %d: answered by %s and %s, want one backend", round, first, second)
		}
	}
}

// affinityIsSpreadEvenly: semantics.md, "Uniformly at random"; peers.md,
// "unequal spread". The clients are namespaces without a network: the choice is
// made, and remembered, before the kernel finds that there is no route.
func affinityIsSpreadEvenly(t *testing.T, w *world) {
	clients := rounds(300, 60)
	backends := twelve[:5]
	s := w.expose(t, clientIP(long), backends...)
	must(t, w.client.Do(func() error {
		for range clients {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := dialNowhere(s.dial(kinds[0])); err != nil {
				return err
			}
		}
		return nil
	}))
	seen := map[string]int{}
	for _, b := range backends {
		seen[b] = 0
	}
	for _, e := range s.entries(t) {
		for _, b := range backends {
			if backendAddr(b, 0) == netip.AddrPortFrom(e.Backend.Addr, e.Backend.Port) {
				seen[b]++
			}
		}
	}
	total := 0
	for _, n := range seen {
		total += n
	}
	if total != clients {
		t.Fatalf("%d clients have a backend, want %d: %v", total, clients, seen)
	}
	// One in a million uniform samples is above (chi-squared, 4 degrees of freedom).
	const limit = 33.4
	if chi2 := chiSquared(seen); chi2 > limit || math.IsNaN(chi2) {
		t.Errorf("chi-squared is %.1f, more than %.1f: %v", chi2, limit, seen)
	}
}

// dialNowhere connects a socket of the calling thread's namespace, which has no
// routes.
func dialNowhere(to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if !errors.Is(err, unix.ENETUNREACH) {
		return fmt.Errorf("connect where there is no network: %w", err)
	}
	return nil
}
