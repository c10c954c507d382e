// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// kind is a way to dial an address.
type kind struct {
	name   string
	v6     bool // the socket is AF_INET6
	family int  // of the address: 0 for IPv4, 1 for IPv6
}

// kinds are the three ways: an IPv6 socket reaches IPv4 as ::ffff:a.b.c.d.
var kinds = []kind{
	{"IPv4", false, 0},
	{"IPv6", true, 1},
	{"IPv4-mapped", true, 0},
}

// socket is a socket of a namespace, without Go's poller in between: a test sees
// each system call's own error.
type socket struct {
	t    testing.TB
	fd   int
	kind kind
}

// open makes a socket in a namespace. Receiving gives up after testutil.Patience.
func open(t testing.TB, ns *sandbox.Namespace, k kind, typ, protocol int) (*socket, error) {
	t.Helper()
	s := &socket{t: t, kind: k}
	domain := unix.AF_INET
	if k.v6 {
		domain = unix.AF_INET6
	}
	err := ns.Do(func() (err error) {
		s.fd, err = unix.Socket(domain, typ|unix.SOCK_CLOEXEC, protocol)
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(s.close)
	limit := unix.NsecToTimeval(testutil.Patience().Nanoseconds())
	must(t, unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit))
	return s, nil
}

// close ends the socket. Closing it twice does nothing.
func (s *socket) close() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
	}
	s.fd = -1
}

func openTCP(t testing.TB, ns *sandbox.Namespace, k kind) *socket {
	t.Helper()
	s, err := open(t, ns, k, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	must(t, err)
	return s
}

func openUDP(t testing.TB, ns *sandbox.Namespace, k kind) *socket {
	t.Helper()
	s, err := open(t, ns, k, unix.SOCK_DGRAM, unix.IPPROTO_UDP)
	must(t, err)
	return s
}

// sockaddr returns an address as the socket's family spells it.
func (s *socket) sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if s.kind.v6 {
		return &unix.SockaddrInet6{Addr: ap.Addr().As16(), Port: int(ap.Port())}
	}
	return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
}

// addrPort is sockaddr backwards; IPv4-mapped addresses come out as IPv4.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	default:
		return netip.AddrPort{}
	}
}

func (s *socket) connect(to netip.AddrPort) error { return unix.Connect(s.fd, s.sockaddr(to)) }

// disconnect connects to AF_UNSPEC, which no hook sees.
func (s *socket) disconnect() error {
	sa := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	return rawConnect(s.fd, &sa)
}

func (s *socket) sendTo(to netip.AddrPort) error {
	return unix.Sendto(s.fd, []byte("hello"), unix.MSG_NOSIGNAL, s.sockaddr(to))
}

// bind gives the socket a local address.
func (s *socket) bind(to netip.AddrPort) error { return unix.Bind(s.fd, s.sockaddr(to)) }

func (s *socket) send() error {
	_, err := unix.Write(s.fd, []byte("hello"))
	return err
}

// receive returns the first word of what comes and where it says it comes from.
func (s *socket) receive() (word string, from netip.AddrPort, err error) {
	buf := make([]byte, 2048)
	n, sa, err := unix.Recvfrom(s.fd, buf, 0)
	for err == unix.EINTR { // the Go runtime's own signals
		n, sa, err = unix.Recvfrom(s.fd, buf, 0)
	}
	if err != nil {
		return "", netip.AddrPort{}, err
	}
	word, _, _ = strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
	return word, addrPort(sa), nil
}

// peer is getpeername; the zero value when the socket is not connected.
func (s *socket) peer() netip.AddrPort {
	s.t.Helper()
	sa, err := unix.Getpeername(s.fd)
	if err != nil && !errors.Is(err, unix.ENOTCONN) {
		s.t.Fatal(err)
	}
	return addrPort(sa)
}

// local is getsockname.
func (s *socket) local() netip.AddrPort {
	s.t.Helper()
	sa, err := unix.Getsockname(s.fd)
	must(s.t, err)
	return addrPort(sa)
}

// ask sends a datagram and returns which backend answers and from where.
func (s *socket) ask(to netip.AddrPort) (backend string, from netip.AddrPort) {
	s.t.Helper()
	must(s.t, s.sendTo(to))
	backend, from, err := s.receive()
	must(s.t, err)
	return backend, from
}

// askPeer is ask for a connected socket.
func (s *socket) askPeer() (backend string, from netip.AddrPort) {
	s.t.Helper()
	must(s.t, s.send())
	backend, from, err := s.receive()
	must(s.t, err)
	return backend, from
}

// dial returns the address of the Service that a socket of this kind dials.
func (s *service) dial(k kind) netip.AddrPort {
	return netip.AddrPortFrom(s.vips[k.family], servicePort)
}

// eachKind runs a subtest for each way to dial.
func eachKind(t *testing.T, f func(t *testing.T, k kind)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) { f(t, k) })
	}
}

func wantAddr(t testing.TB, what string, got, want netip.AddrPort) {
	t.Helper()
	if got != want {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

func wantErr(t testing.TB, what string, got error, want unix.Errno) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: error is %v, want %v", what, got, want)
	}
}

// rawConnect is connect(2) with an address of no family package unix knows.
func rawConnect(fd int, sa *unix.RawSockaddr) error {
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(sa)), unsafe.Sizeof(*sa))
	if errno != 0 {
		return errno
	}
	return nil
}
