// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"errors"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// waiting is a socket with a reader in recvfrom.
type waiting struct {
	*socket
	result chan error
}

// wait starts a reader. The socket must be connected.
func wait(c *socket) waiting {
	w := waiting{c, make(chan error, 1)}
	go func() {
		_, _, err := c.receive()
		w.result <- err
	}()
	return w
}

// wantEnded waits until the reader gets ECONNABORTED.
func (w waiting) wantEnded(t *testing.T, what string) {
	t.Helper()
	select {
	case err := <-w.result:
		wantErr(t, what, err, unix.ECONNABORTED)
	case <-time.After(testutil.Patience()):
		t.Errorf("%s: the reader is still waiting", what)
	}
}

// wantUntouched checks that the reader waits on and that the socket works: the
// answer of backend reaches the reader.
func (w waiting) wantUntouched(t *testing.T, what string) {
	t.Helper()
	select {
	case err := <-w.result:
		t.Errorf("%s: the reader got %v", what, err)
		return
	default:
	}
	if err := w.send(); err != nil {
		t.Errorf("%s: send: %v", what, err)
		return
	}
	select {
	case err := <-w.result:
		if err != nil {
			t.Errorf("%s: the reader got %v, want an answer", what, err)
		}
	case <-time.After(testutil.Patience()):
		t.Errorf("%s: no answer", what)
	}
}

// connected returns a socket that is connected to an address and has a reader.
func (w *world) connected(t *testing.T, k kind, to netip.AddrPort) waiting {
	t.Helper()
	c := openUDP(t, w.client, k)
	must(t, c.connect(to))
	return wait(c)
}

// again connects the socket once more and checks who answers.
func (w waiting) again(t *testing.T, s *service, backend string) {
	t.Helper()
	must(t, w.connect(s.dial(w.kind)))
	if got, from := w.askPeer(); got != backend || from != s.dial(w.kind) {
		t.Errorf("after a new connect %s answers from %v, want %s from the VIP", got, from, backend)
	}
}

// TestSocketsOfABackendThatIsGoneAreEnded runs in the node's network namespace,
// as far as the Ender is concerned in none of the pods': it must find the sockets
// in theirs. The sockets are older than the agent that ends them.
func TestSocketsOfABackendThatIsGoneAreEnded(t *testing.T) {
	w := newWorld(t)
	w.needIterators(t)
	for _, tc := range []struct {
		name  string
		leave func(t *testing.T, s *service)
		next  string // "" when there is none
	}{
		{"another takes its place", func(t *testing.T, s *service) { s.set(t, "b:8080") }, "b:8080"},
		{"its port changes", func(t *testing.T, s *service) { s.set(t, "a:8081") }, "a:8081"},
		{"it stops serving", func(t *testing.T, s *service) {
			s.set(t, "a:8080", "b:8080")
			s.condition(t, "a:8080", lb.Endpoint{Terminating: true})
		}, "b:8080"},
		{"it was the last", func(t *testing.T, s *service) { s.set(t) }, ""},
		{"the Service is deleted", func(t *testing.T, s *service) { s.remove(t) }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, other := w.service(t, lb.UDP, "a:8080"), w.service(t, lb.UDP, "c:8080", "a:8080")
			other.set(t, "c:8080")
			type sockets struct{ stale, sibling, direct, disconnected waiting }
			var all []sockets
			for _, k := range kinds {
				all = append(all, sockets{
					stale:   w.connected(t, k, s.dial(k)),
					sibling: w.connected(t, k, other.dial(k)),
					// To the same address as the stale one, but not through us.
					direct:       w.connected(t, k, backendAddr("a:8080", k.family)),
					disconnected: w.disconnected(t, k, s),
				})
			}

			w.stop(t)
			w.start(t)
			tc.leave(t, s)
			for i, k := range kinds {
				all[i].stale.wantEnded(t, k.name)
			}

			for i, k := range kinds {
				all[i].sibling.wantUntouched(t, k.name+" connected to another Service")
				all[i].direct.wantUntouched(t, k.name+" connected to the backend itself")
				all[i].disconnected.wantDisconnected(t, k.name)
				wantErr(t, k.name+": send on an ended socket", all[i].stale.send(), unix.EDESTADDRREQ)
				if tc.next != "" {
					all[i].stale.again(t, s, tc.next)
				}
			}
		})
	}
}

// disconnected returns a socket that was connected to the Service and is not any
// more, without a reader.
func (w *world) disconnected(t *testing.T, k kind, s *service) waiting {
	t.Helper()
	c := openUDP(t, w.client, k)
	must(t, c.connect(s.dial(k)))
	must(t, c.disconnect())
	return waiting{socket: c}
}

// wantDisconnected checks that the socket has no error pending and can be used.
func (w waiting) wantDisconnected(t *testing.T, name string) {
	t.Helper()
	if errno, err := unix.GetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
		t.Errorf("%s: a disconnected socket has error %v, %v", name, unix.Errno(errno), err)
	}
	direct := backendAddr("b:8082", w.kind.family)
	must(t, w.connect(direct))
	if got, _ := w.askPeer(); got != "b:8082" {
		t.Errorf("%s: a disconnected socket reaches %s, want b:8082", name, got)
	}
}

func TestSocketsOfABackendThatServesAreLeft(t *testing.T) {
	w := newWorld(t)
	w.needIterators(t)
	s, other := w.service(t, lb.UDP, "a:8080"), w.service(t, lb.UDP, "b:8080")
	var keep, stale []waiting
	for _, k := range kinds {
		keep = append(keep, w.connected(t, k, s.dial(k)))
		stale = append(stale, w.connected(t, k, other.dial(k)))
	}
	s.set(t, "a:8080", "c:8080")
	s.condition(t, "a:8080", lb.Endpoint{Serving: true, Terminating: true})
	// Once these are ended, the walk has been done.
	other.set(t, "c:8081")
	for i, k := range kinds {
		stale[i].wantEnded(t, k.name)
		keep[i].wantUntouched(t, k.name+" connected to a backend that terminates and serves")
	}
}

// TestSocketsOfAVIPThatGetsABackendAreEnded: UDP connect is never refused, so a
// client that was early is connected to the VIP itself and would stay so.
func TestSocketsOfAVIPThatGetsABackendAreEnded(t *testing.T) {
	w := newWorld(t)
	w.needIterators(t)
	eachKind(t, func(t *testing.T, k kind) {
		t.Run("the first backend comes", func(t *testing.T) {
			s, empty := w.service(t, lb.UDP), w.service(t, lb.UDP)
			c := w.connected(t, k, s.dial(k))
			otherVIP := w.connected(t, k, empty.dial(k))
			otherPort := w.connected(t, k, netip.AddrPortFrom(s.vips[k.family], 81))
			var outside waiting
			w.outside(t, func() { outside = w.connected(t, k, s.dial(k)) })
			s.set(t, "a:8080")
			c.wantEnded(t, "connected to the VIP")
			c.again(t, s, "a:8080")
			for name, left := range map[string]waiting{
				"connected to another VIP": otherVIP, "to a port nobody defined": otherPort, "made outside our cgroup": outside,
			} {
				select {
				case err := <-left.result:
					t.Errorf("a socket %s got %v", name, err)
				default:
				}
				if left.peer() == (netip.AddrPort{}) {
					t.Errorf("a socket %s is not connected any more", name)
				}
				// Its reader must not outlive the test.
				must(t, unix.Shutdown(left.fd, unix.SHUT_RDWR))
			}
		})
		t.Run("the Service comes", func(t *testing.T) {
			vips := w.vip()
			w.vips--
			c := w.connected(t, k, netip.AddrPortFrom(vips[k.family], servicePort))
			s := w.service(t, lb.UDP, "a:8080")
			c.wantEnded(t, "connected to an address that was nobody's")
			c.again(t, s, "a:8080")
		})
		t.Run("the backend comes back", func(t *testing.T) {
			s := w.service(t, lb.UDP, "a:8080")
			s.set(t)
			c := w.connected(t, k, s.dial(k))
			s.set(t, "a:8080")
			c.wantEnded(t, "connected while there was none")
		})
	})
}

// TestSocketsOlderThanTheHooks: no program has ever seen these, and none has asked
// for their cookies.
func TestSocketsOlderThanTheHooks(t *testing.T) {
	w := newWorld(t)
	w.needIterators(t)
	s := w.service(t, lb.UDP)
	w.stop(t)
	must(t, attach.DetachAll(filepath.Dir(datapath.LinkPath(w.root, "connect4"))))
	var all []waiting
	for _, k := range kinds {
		all = append(all, w.connected(t, k, s.dial(k)))
	}
	w.start(t)
	s.set(t, "a:8080")
	for i, k := range kinds {
		all[i].wantEnded(t, k.name)
		all[i].again(t, s, "a:8080")
	}
}

// TestSocketWithoutStorageIsEnded: what is remembered in origins_overflow counts
// as well.
func TestSocketWithoutStorageIsEnded(t *testing.T) {
	w := newWorld(t)
	w.needIterators(t)
	s := w.service(t, lb.UDP, "a:8080")
	var all []waiting
	for _, k := range kinds {
		c := openUDP(t, w.client, k)
		exhaust(t, c)
		must(t, c.connect(s.dial(k)))
		all = append(all, wait(c))
	}
	s.set(t, "b:8080")
	for i, k := range kinds {
		all[i].wantEnded(t, k.name)
		all[i].again(t, s, "b:8080")
	}
}

// TestTCPIsNeverEnded: a connection learns from its peer what becomes of it.
func TestTCPIsNeverEnded(t *testing.T) {
	w := newWorld(t)
	w.needIterators(t)
	tcp, udp := w.service(t, lb.TCP, "a:8080"), w.service(t, lb.UDP, "a:8080")
	c := openTCP(t, w.client, kinds[0])
	must(t, c.connect(tcp.dial(kinds[0])))
	_, _, err := c.receive()
	must(t, err)
	stale := w.connected(t, kinds[0], udp.dial(kinds[0]))
	tcp.set(t)
	udp.set(t)
	stale.wantEnded(t, "UDP")
	must(t, unix.SetNonblock(c.fd, true))
	if _, _, err := c.receive(); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("the TCP connection got %v, want nothing to read", err)
	}
	if err := c.send(); err != nil {
		t.Errorf("send: %v", err)
	}
}

// connected is world.connected for any client.
func (c client) connected(t *testing.T, k kind, to netip.AddrPort) waiting {
	t.Helper()
	s := openUDP(t, c.ns, k)
	must(t, s.connect(to))
	return wait(s)
}

// wantLeft checks that the socket is as it was, then ends its reader.
func (w waiting) wantLeft(t *testing.T, what string) {
	t.Helper()
	select {
	case err := <-w.result:
		t.Errorf("%s: the reader got %v", what, err)
		return
	default:
	}
	if w.peer() == (netip.AddrPort{}) {
		t.Errorf("%s: it is not connected any more", what)
	}
	must(t, unix.Shutdown(w.fd, unix.SHUT_RDWR))
	<-w.result
}

// TestSocketsOfEveryFrontend: semantics.md, "What survives" for UDP.
func TestSocketsOfEveryFrontend(t *testing.T) {
	inOneWorld(t, []worldTest{
		{"they are ended when their backend goes", goneAtEveryFrontend},
		{"those from before the first endpoint are ended when it comes", cameAtEveryFrontend},
		{"those of denied clients are left", deniedClients},
	})
}

// goneAtEveryFrontend when their backend goes: those of pods and of
// processes on the node.
func goneAtEveryFrontend(t *testing.T, w *world) {
	w.needIterators(t)
	for _, k := range kinds {
		s := w.expose(t, nil, "a:8080")
		stale := map[string]waiting{"the node's socket at loopback": w.process().connected(t, k, s.atLoopback(k))}
		for _, f := range frontendKinds {
			for _, c := range []client{w.pod(), w.process()} {
				stale[c.name+" at the "+f.name] = c.connected(t, k, f.at(s, k))
			}
		}
		s.set(t, "b:8080")
		for name, c := range stale {
			c.wantEnded(t, k.name+": "+name)
		}
		again := stale["a pod at the NodePort"]
		must(t, again.connect(s.atNode(k)))
		if got, from := again.askPeer(); got != "b:8080" || from != s.atNode(k) {
			t.Errorf("%s: after a new connect %s answers from %v, want b:8080 from %v", k.name, got, from, s.atNode(k))
		}
	}
}

// cameAtEveryFrontend: semantics.md, "a UDP socket
// connected … before the Service or its first endpoint existed".
func cameAtEveryFrontend(t *testing.T, w *world) {
	w.needIterators(t)
	for _, k := range kinds {
		s, local, other := w.expose(t, nil), w.expose(t, bothLocal), w.expose(t, nil)
		local.on(t, "other", "b:8080")
		early := map[string]waiting{
			"a process at the NodePort":                    w.process().connected(t, k, s.atNode(k)),
			"at a ClusterIP with endpoints elsewhere only": w.pod().connected(t, k, local.dial(k)),
		}
		for _, f := range frontendKinds {
			early["at the "+f.name] = w.pod().connected(t, k, f.at(s, k))
		}
		w.listen(t, w.node.Namespace(), s.atLoopback(k), "node")
		left := map[string]waiting{
			"at another NodePort":                  w.pod().connected(t, k, other.atNode(k)),
			"at that port of another address":      w.pod().connected(t, k, netip.AddrPortFrom(otherNodeAddr[k.family], s.nodePort)),
			"at another port of the address":       w.pod().connected(t, k, netip.AddrPortFrom(s.balancers[k.family], 81)),
			"at a local listener on the loopback":  w.process().connected(t, k, s.atLoopback(k)),
			"at the local endpoint, by a NodePort": w.pod().connected(t, k, local.atNode(k)),
		}
		s.set(t, "a:8080")
		local.on(t, nodeName, "a:8080")
		for name, c := range early {
			c.wantEnded(t, k.name+": "+name)
		}
		w.waitWalk(t)
		for name, c := range left {
			c.wantLeft(t, k.name+": "+name)
		}
	}
}

// deniedClients are not ended for a backend they cannot have.
func deniedClients(t *testing.T, w *world) {
	w.needIterators(t)
	for _, k := range kinds {
		s := w.expose(t, ranges("10.244.0.2/32", "fd00:244::2/128"))
		allowed, deniedPod := w.pod().connected(t, k, s.atBalancer(k)), w.backendPod("b").connected(t, k, s.atBalancer(k))
		s.set(t, "a:8080")
		allowed.wantEnded(t, k.name)
		w.waitWalk(t)
		deniedPod.wantLeft(t, k.name+" of a pod outside of the ranges")
	}
}
