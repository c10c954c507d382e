// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// client is somebody who dials: a pod, or a process on the node.
type client struct {
	name string
	w    *world
	ns   *sandbox.Namespace
}

func (w *world) pod() client { return client{"a pod", w, w.client} }

func (w *world) process() client { return client{"a process on the node", w, w.node.Namespace()} }

// addPod makes another pod, which stays until the test ends. An IPv4 address after
// the first is none that the kernel would choose.
func (w *world) addPod(t *testing.T, addrs ...netip.Addr) client {
	t.Helper()
	ns, err := w.node.AddPod("another", addrs...)
	must(t, err)
	t.Cleanup(func() { must(t, w.node.RemovePod(ns)) })
	return client{"another pod", w, ns}
}

// backendPod is a backend's pod as a client.
func (w *world) backendPod(name string) client { return client{"pod " + name, w, w.pods[name]} }

// eachClient runs a subtest for each client and way to dial.
func (w *world) eachClient(t *testing.T, f func(t *testing.T, c client, k kind)) {
	t.Helper()
	for _, c := range []client{w.pod(), w.process()} {
		t.Run(c.name, func(t *testing.T) {
			eachKind(t, func(t *testing.T, k kind) { f(t, c, k) })
		})
	}
}

// way is how a client begins to talk.
type way struct {
	name     string
	protocol lb.Protocol
	typ      int
	begin    func(s *socket, to netip.AddrPort) error
}

// ways are all of them. In each the other end has heard something when begin has
// returned nil.
var ways = []way{
	{"TCP connect", lb.TCP, unix.SOCK_STREAM, (*socket).connect},
	{"UDP connect", lb.UDP, unix.SOCK_DGRAM, func(s *socket, to netip.AddrPort) error {
		return errors.Join(s.connect(to), s.send())
	}},
	{"UDP sendto", lb.UDP, unix.SOCK_DGRAM, (*socket).sendTo},
	{"UDP sendto on a connected socket", lb.UDP, unix.SOCK_DGRAM, func(s *socket, to netip.AddrPort) error {
		return errors.Join(s.connect(to), s.sendTo(to))
	}},
}

// open makes a socket of the client that the way is for.
func (w way) open(t testing.TB, c client, k kind) *socket {
	t.Helper()
	s, err := open(t, c.ns, k, w.typ, 0)
	must(t, err)
	return s
}

// answer is who has answered a client, and from where as the client sees it:
// recvfrom's address for UDP, getpeername's for TCP.
type answer struct {
	backend string
	from    netip.AddrPort
}

// reach dials in one way and returns the answer. It checks that a connected
// socket's peer has the answer's address.
func (c client) reach(t testing.TB, w way, k kind, to netip.AddrPort) (answer, error) {
	t.Helper()
	s := w.open(t, c, k)
	defer s.close()
	return w.reach(t, s, to)
}

// reach is client.reach on a socket that is there.
func (w way) reach(t testing.TB, s *socket, to netip.AddrPort) (answer, error) {
	t.Helper()
	if err := w.begin(s, to); err != nil {
		return answer{}, err
	}
	backend, from, err := s.receive()
	if err != nil {
		return answer{}, err
	}
	peer := s.peer()
	if w.protocol == lb.TCP {
		from = peer
	}
	if peer != (netip.AddrPort{}) && peer != from {
		t.Errorf("%s to %v: getpeername says %v, the answer is from %v", w.name, to, peer, from)
	}
	return answer{backend, from}, nil
}

// wantReach checks for every way that who dials an address is answered by a
// backend, and that the answer seems to come from that address.
func (c client) wantReach(t testing.TB, k kind, to netip.AddrPort, backend string) {
	t.Helper()
	c.wantAnswer(t, k, to, answer{backend, to})
}

// wantAnswer is wantReach for an answer from another address than the one dialled.
func (c client) wantAnswer(t testing.TB, k kind, to netip.AddrPort, want answer) {
	t.Helper()
	for _, way := range ways {
		got, err := c.reach(t, way, k, to)
		if err != nil {
			// No further way, each of which would wait as long for an answer.
			t.Fatalf("%s by %s to %v: %v, want an answer of %s", way.name, c.name, to, err, want.backend)
		} else if got != want {
			t.Errorf("%s by %s to %v: answered by %s from %v, want %s from %v",
				way.name, c.name, to, got.backend, got.from, want.backend, want.from)
		}
	}
}

// verdict is a decision that gives a client no backend: what TCP connect and UDP
// sendto fail with, and how it is counted.
type verdict struct {
	counter string
	errno   unix.Errno
}

var (
	noBackend = verdict{"no_backend", unix.ECONNREFUSED}
	noPort    = verdict{"no_port", unix.ECONNREFUSED}
	noLocal   = verdict{"no_local", unix.EHOSTUNREACH}
	denied    = verdict{"denied", unix.EHOSTUNREACH}
	noService = verdict{"no_service", unix.EHOSTUNREACH}
)

// wantVerdict checks what becomes of a client that dials an address: TCP connect
// and UDP sendto fail at once, UDP connect is left alone.
func (c client) wantVerdict(t *testing.T, k kind, to netip.AddrPort, want verdict) {
	t.Helper()
	for _, call := range []struct {
		name, counter string
		typ           int
		do            func(*socket, netip.AddrPort) error
		fails         bool
	}{
		{"TCP connect", "connect_tcp_", unix.SOCK_STREAM, (*socket).connect, true},
		{"UDP connect", "connect_udp_", unix.SOCK_DGRAM, (*socket).connect, false},
		{"UDP sendto", "send_udp_", unix.SOCK_DGRAM, (*socket).sendTo, true},
	} {
		what := call.name + " by " + c.name + " to " + to.String()
		s, err := open(t, c.ns, k, call.typ, 0)
		must(t, err)
		counted := c.w.counters(t, func() { err = call.do(s, to) })
		if counted[call.counter+want.counter] != 1 {
			t.Errorf("%s: counters are %v, want %s", what, counted, call.counter+want.counter)
		}
		switch {
		case call.fails:
			wantErr(t, what, err, want.errno)
		case err == nil:
			wantAddr(t, what+": getpeername", s.peer(), to)
		case c.ns == c.w.client || !errors.Is(err, unix.ENETUNREACH): // of all the node alone has no default route
			t.Errorf("%s: %v, want it to be left alone", what, err)
		}
		s.close()
	}
}

// frontendKinds are the places at which a Service of expose is to be had.
var frontendKinds = []struct {
	name string
	at   func(s *service, k kind) netip.AddrPort
}{
	{"ClusterIP", (*service).dial},
	{"NodePort", (*service).atNode},
	{"load-balancer IP", (*service).atBalancer},
	{"external IP", (*service).atExternal},
}

// atNode is the Service's NodePort at the node's own address.
func (s *service) atNode(k kind) netip.AddrPort {
	return netip.AddrPortFrom(nodeAddr[k.family], s.nodePort)
}

func (s *service) atBalancer(k kind) netip.AddrPort {
	return netip.AddrPortFrom(s.balancers[k.family], servicePort)
}

func (s *service) atExternal(k kind) netip.AddrPort {
	return netip.AddrPortFrom(s.externals[k.family], servicePort)
}

// loopback is the address by which everybody means itself, by family.
var loopback = [2]netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// atLoopback is the Service's NodePort at 127.0.0.1 or ::1.
func (s *service) atLoopback(k kind) netip.AddrPort {
	return netip.AddrPortFrom(loopback[k.family], s.nodePort)
}

// listen answers on TCP and UDP in a namespace until the test ends. The sockets
// are not below the hooks.
func (w *world) listen(t *testing.T, ns *sandbox.Namespace, at netip.AddrPort, name string) {
	t.Helper()
	w.outside(t, func() { w.serve(t, ns, at, name) })
}

// listenTo is listen for one protocol.
func (w *world) listenTo(t *testing.T, protocol lb.Protocol, ns *sandbox.Namespace, at netip.AddrPort, name string) {
	t.Helper()
	w.outside(t, func() { w.serveOne(t, protocol, ns, at, name) })
}

// listenOnNode answers at an address that the node gets if it has not got it.
func (w *world) listenOnNode(t *testing.T, at netip.AddrPort, name string) {
	t.Helper()
	w.addNodeAddr(t, at.Addr())
	w.listen(t, w.node.Namespace(), at, name)
}
