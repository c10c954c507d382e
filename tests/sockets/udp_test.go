// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// wantAnswer sends a datagram to a Service and checks who answers, and that the
// answer seems to come from the Service.
func wantAnswer(t testing.TB, what string, c *socket, s *service, backend string) {
	t.Helper()
	got, from := c.ask(s.dial(c.kind))
	if got != backend {
		t.Errorf("%s: %s answers, want %s", what, got, backend)
	}
	wantAddr(t, what+": the answer's address", from, s.dial(c.kind))
}

func TestUnconnectedSocketKeepsItsBackend(t *testing.T) {
	w := newWorld(t)
	s := w.service(t, lb.UDP)
	const kept = "b:8081"
	all := []string{"a:8080", "b:8081", "c:8080", "a:8081"}
	eachKind(t, func(t *testing.T, k kind) {
		s.set(t, kept)
		c := openUDP(t, w.client, k)
		wantAnswer(t, "the only backend", c, s, kept)
		for _, step := range []struct {
			name string
			do   func()
		}{
			{"backends were added", func() { s.set(t, all...) }},
			{"a backend was taken away", func() { s.set(t, all[1:]...) }},
			{"it terminates and serves", func() {
				s.condition(t, kept, lb.Endpoint{Serving: true, Terminating: true})
			}},
			{"it is not ready and serves", func() { s.condition(t, kept, lb.Endpoint{Serving: true}) }},
			{"it is the last one, terminates and serves", func() {
				s.set(t)
				s.condition(t, kept, lb.Endpoint{Serving: true, Terminating: true})
			}},
			{"it is back", func() { s.set(t, all...) }},
		} {
			step.do()
			counted := w.counters(t, func() {
				for range 10 {
					wantAnswer(t, step.name, c, s, kept)
				}
			})
			if counted["send_udp_kept"] != 10 {
				t.Errorf("%s: counters are %v, want 10 datagrams to the backend kept", step.name, counted)
			}
		}

		s.set(t, "c:8080")
		wantAnswer(t, "it is gone", c, s, "c:8080")
		s.set(t, kept, "c:8080")
		wantAnswer(t, "it is back, but another was chosen", c, s, "c:8080")
		s.set(t)
		wantErr(t, "the last backend is gone", c.sendTo(s.dial(k)), unix.ECONNREFUSED)
		s.set(t, "a:8082")
		wantAnswer(t, "there is one again", c, s, "a:8082")
	})
}

// TestSocketFollowsTheVIPToItsNewOwner: the address is given to another Service
// whose set of backends holds the old one's, too.
func TestSocketFollowsTheVIPToItsNewOwner(t *testing.T) {
	w := newWorld(t)
	old := w.service(t, lb.UDP, "a:8080")
	c := openUDP(t, w.client, kinds[0])
	wantAnswer(t, "before", c, old, "a:8080")
	owner := lb.Service{Name: lb.Name{Namespace: "default", Name: "new"}, ClusterIPs: old.vips[:], Ports: old.spec.Ports}
	w.store.DeleteService(old.spec.Name)
	w.store.SetService(owner)
	for _, name := range []string{"b:8080", "c:8080"} {
		at := backendAddr(name, 0)
		w.store.SetSlice(lb.Slice{
			Name: lb.Name{Namespace: "default", Name: "new-" + name}, Service: "new", Family: lb.IPv4,
			Ports:     []lb.SlicePort{{Protocol: lb.UDP, Number: at.Port()}},
			Endpoints: []lb.Endpoint{{Addr: at.Addr(), Ready: true, Serving: true}},
		})
	}
	w.apply(t)
	first, _ := c.ask(old.dial(c.kind))
	if first != "b:8080" && first != "c:8080" {
		t.Errorf("%s answers, want a backend of the new owner", first)
	}
	for range 10 {
		wantAnswer(t, "after", c, old, first)
	}
}

func TestOneSocketOfSeveralServices(t *testing.T) {
	w := newWorld(t)
	backends := []string{"a:8080", "b:8080", "c:8080", "a:8081"}
	eachKind(t, func(t *testing.T, k kind) {
		t.Run("each gets a backend of its own", func(t *testing.T) {
			one, two := w.service(t, lb.UDP, backends...), w.service(t, lb.UDP, backends...)
			for range 20 {
				c := openUDP(t, w.client, k)
				first, _ := c.ask(one.dial(k))
				second, from := c.ask(two.dial(k))
				if first == second {
					t.Fatalf("%s answers for both", first)
				}
				wantAddr(t, "the answer's address", from, two.dial(k))
				wantAnswer(t, "first again", c, one, first)
				wantAnswer(t, "second again", c, two, second)
				// Answers that come in the other order.
				must(t, c.sendTo(two.dial(k)))
				must(t, c.sendTo(one.dial(k)))
				for range 2 {
					backend, from, err := c.receive()
					must(t, err)
					want := map[string]netip.AddrPort{first: one.dial(k), second: two.dial(k)}[backend]
					wantAddr(t, "the address of an answer from "+backend, from, want)
				}
			}
		})

		t.Run("a connection that has ended changes no answer", func(t *testing.T) {
			if k == kinds[1] {
				t.Skip("the kernel lets an IPv6 socket receive from its former peer alone, also after a connect to AF_UNSPEC")
			}
			one, two := w.service(t, lb.UDP, "a:8080"), w.service(t, lb.UDP, "a:8080")
			c := openUDP(t, w.client, k)
			must(t, c.connect(one.dial(k)))
			_, from := c.askPeer()
			wantAddr(t, "the answer's address", from, one.dial(k))
			must(t, c.disconnect())
			_, from = c.ask(two.dial(k))
			wantAddr(t, "the answer's address", from, two.dial(k))
		})

		t.Run("two that share their only backend are told apart by who was asked last", func(t *testing.T) {
			one, two := w.service(t, lb.UDP, "a:8080"), w.service(t, lb.UDP, "a:8080")
			c := openUDP(t, w.client, k)
			for range 5 {
				for _, s := range []*service{one, two} {
					_, from := c.ask(s.dial(k))
					wantAddr(t, "the answer's address", from, s.dial(k))
				}
			}
		})

		t.Run("a connected socket that names the VIP as well stays with its backend", func(t *testing.T) {
			s := w.service(t, lb.UDP, backends...)
			for range 20 {
				c := openUDP(t, w.client, k)
				must(t, c.connect(s.dial(k)))
				first, _ := c.askPeer()
				// Any other backend's answer would not be let in.
				wantAnswer(t, "with the address", c, s, first)
				again, from := c.askPeer()
				if again != first {
					t.Fatalf("answered by %s, then by %s", first, again)
				}
				wantAddr(t, "the answer's address", from, s.dial(k))
			}
		})
	})
}

// TestMoreServicesThanTheStorageHolds uses more VIPs on one socket than its
// storage has places for.
func TestMoreServicesThanTheStorageHolds(t *testing.T) {
	w := newWorld(t)
	const count, places = 6, 4
	var many [count]*service
	pairs := map[*service][2]string{} // the backends of each, which no other one has
	for i := range many {
		port := 8080 + i%3
		pair := [2]string{fmt.Sprintf("a:%d", port), fmt.Sprintf("b:%d", port)}
		if i >= 3 {
			pair = [2]string{fmt.Sprintf("c:%d", port), fmt.Sprintf("%c:8083", "abc"[i-3])}
		}
		many[i] = w.service(t, lb.UDP, pair[:]...)
		pairs[many[i]] = pair
	}
	eachKind(t, func(t *testing.T, k kind) {
		c := openUDP(t, w.client, k)
		chosen := map[*service]string{}
		counted := w.counters(t, func() {
			for _, s := range many {
				backend, from := c.ask(s.dial(k))
				wantAddr(t, "the answer's address", from, s.dial(k))
				chosen[s] = backend
			}
		})
		if counted["origin_overflow"] != count-places || counted["origin_lost"] != 0 {
			t.Errorf("counters are %v, want %d in origins_overflow and none lost", counted, count-places)
		}
		counted = w.counters(t, func() {
			for range 3 {
				for _, s := range many {
					wantAnswer(t, "again", c, s, chosen[s])
				}
			}
		})
		if counted["send_udp_kept"] != 3*count || counted["origin_overflow"] != 0 {
			t.Errorf("counters are %v, want every backend kept", counted)
		}
		last := many[count-1]
		other := pairs[last][0]
		if other == chosen[last] {
			other = pairs[last][1]
		}
		last.set(t, other)
		wantAnswer(t, "the backend of one in origins_overflow is gone", c, last, other)
		both := pairs[last]
		last.set(t, both[:]...)
	})
}

// TestWithoutOptionMemory fills what the kernel lets a socket spend on options,
// so that nothing can be remembered in its storage.
func TestWithoutOptionMemory(t *testing.T) {
	w := newWorld(t)
	s := w.service(t, lb.UDP, "a:8080", "b:8080", "c:8080")
	eachKind(t, func(t *testing.T, k kind) {
		c := openUDP(t, w.client, k)
		exhaust(t, c)
		var backend string
		counted := w.counters(t, func() { backend, _ = c.ask(s.dial(k)) })
		if counted["origin_overflow"] != 1 || counted["origin_lost"] != 0 {
			t.Errorf("counters are %v, want one in origins_overflow and none lost", counted)
		}
		for range 10 {
			wantAnswer(t, "sent to", c, s, backend)
		}
		must(t, c.connect(s.dial(k)))
		_, from := c.askPeer()
		wantAddr(t, "a connected socket's answer", from, s.dial(k))
		wantAddr(t, "getpeername", c.peer(), s.dial(k))
		direct := backendAddr("a:8081", k.family)
		must(t, c.connect(direct))
		wantAddr(t, "getpeername after a connect to somebody else", c.peer(), direct)
	})
}

// exhaust attaches socket storage of its own to the socket, in ever smaller
// pieces, until not even the smallest fits.
func exhaust(t *testing.T, c *socket) {
	t.Helper()
	for size := uint32(32 << 10); size >= 8; {
		m, err := ebpf.NewMap(&ebpf.MapSpec{
			Type: ebpf.SkStorage, KeySize: 4, ValueSize: size, Flags: unix.BPF_F_NO_PREALLOC,
			Key: &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed},
			Value: &btf.Array{
				Index: &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed},
				Type:  &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}, Nelems: size,
			},
		})
		must(t, err)
		t.Cleanup(func() { m.Close() })
		err = m.Put(int32(c.fd), make([]byte, size))
		switch {
		case errors.Is(err, unix.ENOMEM):
			size /= 2
		case err != nil:
			t.Fatal(err)
		}
	}
}

// TestConnectThatIsNotOurs forgets which VIP the socket was connected to.
func TestConnectThatIsNotOurs(t *testing.T) {
	w := newWorld(t)
	s, empty := w.service(t, lb.UDP, "a:8080"), w.service(t, lb.UDP)
	eachKind(t, func(t *testing.T, k kind) {
		direct := backendAddr("a:8080", k.family) // the backend's own address
		for name, to := range map[string]netip.AddrPort{"the backend itself": direct, "a VIP without a backend": empty.dial(k)} {
			t.Run(name, func(t *testing.T) {
				c := openUDP(t, w.client, k)
				must(t, c.connect(s.dial(k)))
				wantAddr(t, "getpeername", c.peer(), s.dial(k))
				must(t, c.connect(to))
				wantAddr(t, "getpeername after the second connect", c.peer(), to)
				if to == direct {
					_, from := c.askPeer()
					wantAddr(t, "the answer's address", from, direct)
				}
			})
		}
		t.Run("another VIP", func(t *testing.T) {
			other := w.service(t, lb.UDP, "b:8080")
			c := openUDP(t, w.client, k)
			must(t, c.connect(s.dial(k)))
			must(t, c.connect(other.dial(k)))
			backend, from := c.askPeer()
			if backend != "b:8080" {
				t.Errorf("%s answers, want b:8080", backend)
			}
			wantAddr(t, "the answer's address", from, other.dial(k))
			wantAddr(t, "getpeername", c.peer(), other.dial(k))
		})
		t.Run("the backend itself, after a datagram through the VIP", func(t *testing.T) {
			c := openUDP(t, w.client, k)
			wantAnswer(t, "sendto", c, s, "a:8080")
			must(t, c.connect(direct))
			wantAddr(t, "getpeername", c.peer(), direct)
		})
	})
}

// TestThreadsOfOneSocket sends from eight threads at once on a socket that has
// remembered nothing so far.
func TestThreadsOfOneSocket(t *testing.T) {
	w := newWorld(t)
	s := w.service(t, lb.UDP, "a:8080", "b:8080", "c:8080", "a:8081", "b:8081", "c:8081")
	const threads, rounds = 8, 30
	for round := range rounds {
		k := kinds[round%len(kinds)]
		c := openUDP(t, w.client, k)
		counted := w.counters(t, func() { sendAtOnce(t, c, s.dial(k), threads) })
		if counted["origin_overflow"] != 0 || counted["origin_lost"] != 0 {
			t.Errorf("round %d: counters are %v, want everything in the socket's storage", round, counted)
		}
		seen := map[string]int{}
		for range threads {
			backend, from, err := c.receive()
			must(t, err)
			wantAddr(t, "the answer's address", from, s.dial(k))
			seen[backend]++
		}
		if len(seen) != 1 {
			t.Errorf("round %d: backends %v answer, want one", round, seen)
		}
		if t.Failed() {
			return
		}
	}
}

func sendAtOnce(t *testing.T, c *socket, to netip.AddrPort, threads int) {
	t.Helper()
	begin := make(chan struct{})
	var sending sync.WaitGroup
	for range threads {
		sending.Go(func() {
			<-begin
			if err := c.sendTo(to); err != nil {
				t.Error(err)
			}
		})
	}
	close(begin)
	sending.Wait()
}
