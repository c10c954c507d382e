// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// dialFrom makes a TCP connection from a local address that others may use as well,
// or from any when local is nil.
func dialFrom(from *host, local net.Addr, to netip.AddrPort) (net.Conn, error) {
	dialer := net.Dialer{LocalAddr: local, Timeout: patience, Control: withOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)}
	var c net.Conn
	err := from.ns.Do(func() (err error) {
		c, err = dialer.DialContext(context.Background(), "tcp", to.String())
		return err
	})
	return c, err
}

// withOption is for net.Dialer's Control.
func withOption(level, option, value int) func(string, string, syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) error {
		var err error
		if outer := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, value) }); outer != nil {
			return outer
		}
		return err
	}
}

// timeExceeded sends datagrams with little time to live and looks at who answers
// that it was over, about which datagram.
func timeExceeded(t *testing.T, w *world) {
	router, ours, theirs := allAddrs(t, &host{ns: w.router}), allAddrs(t, &w.a.host), allAddrs(t, &w.b.host)
	beyond := 3
	if w.shape.name == tunnels.name {
		beyond = 4 // the router is between the nodes
	}
	for _, tt := range []struct {
		service string
		ttl     int
		by      []netip.Addr
	}{
		{"local", 1, router}, {"local", 2, ours},
		{"remote", 1, router}, {"remote", 2, ours}, {"remote", beyond, theirs},
		{"remote-host", 2, ours},
	} {
		for _, f := range families {
			to := w.services[tt.service].nodePort(f, w.a)
			err := w.retried(t, func() error {
				by, err := probe(w.client, to, f, tt.ttl)
				if err == nil && !slices.Contains(tt.by, by) {
					err = fmt.Errorf("time exceeded at %s, want one of %s", by, tt.by)
				}
				return err
			})
			if err != nil {
				t.Errorf("%s with %d hops: %v", to, tt.ttl, err)
			}
		}
	}
}

// probe sends a datagram and returns who says that its time to live was over. The
// kernel gives errors to the socket whose datagram is inside.
func probe(from *host, to netip.AddrPort, f family, ttl int) (netip.Addr, error) {
	c, err := dialUDP(from.ns, to)
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		return netip.Addr{}, err
	}
	options := [][3]int{{unix.SOL_IP, unix.IP_RECVERR, 1}, {unix.SOL_IP, unix.IP_TTL, ttl}}
	if f == ipv6 {
		options = [][3]int{{unix.SOL_IPV6, unix.IPV6_RECVERR, 1}, {unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, ttl}}
	}
	for _, o := range options {
		if err := withOption(o[0], o[1], o[2])("", "", raw); err != nil {
			return netip.Addr{}, err
		}
	}
	if _, err := c.Write([]byte("?")); err != nil {
		return netip.Addr{}, err
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		var by netip.Addr
		outer := raw.Control(func(fd uintptr) { by, err = readError(int(fd)) })
		if outer != nil || !errors.Is(err, unix.EAGAIN) {
			return by, errors.Join(outer, err)
		}
		if time.Now().After(end) {
			return netip.Addr{}, errors.New("no error came back")
		}
	}
}

// readError takes an ICMP error from a socket's queue and returns who sent it.
func readError(fd int) (netip.Addr, error) {
	payload, control := make([]byte, 512), make([]byte, 512)
	_, n, _, _, err := unix.Recvmsg(fd, payload, control, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err != nil {
		return netip.Addr{}, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return netip.Addr{}, err
	}
	for _, m := range messages {
		const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
		if len(m.Data) < size+8 {
			continue
		}
		e := (*unix.SockExtendedErr)(unsafe.Pointer(&m.Data[0]))
		isTime := e.Origin == unix.SO_EE_ORIGIN_ICMP && e.Type == 11 || e.Origin == unix.SO_EE_ORIGIN_ICMP6 && e.Type == 3
		if !isTime {
			return netip.Addr{}, fmt.Errorf("ICMP type %d code %d, want time exceeded", e.Type, e.Code)
		}
		// The sender's sockaddr follows.
		sender := m.Data[size:]
		if e.Origin == unix.SO_EE_ORIGIN_ICMP {
			return netip.AddrFrom4([4]byte(sender[4:8])), nil
		}
		return netip.AddrFrom16([16]byte(sender[8:24])), nil
	}
	return netip.Addr{}, errors.New("an error without its sender")
}

// backendGoes takes backends away, one after the other, from under flows.
func backendGoes(t *testing.T, w *world) {
	a1, a2, b1 := endpoint{w.a1, w.a}, endpoint{w.a2, w.a}, endpoint{w.b1, w.b}
	s := service{name: "changing", number: 20, endpoints: []endpoint{a1}}
	w.apply(t, s)
	defer w.write(t, s.name+".yaml", "")
	for _, f := range families {
		for _, from := range []*host{w.client, w.a3} {
			s.endpoints = []endpoint{a1}
			w.apply(t, s)
			at := func(network string) netip.AddrPort { return clusterIPEntry.vip(s, f, network, w.a) }
			testutil.Eventually(t, 10*time.Second, fmt.Sprintf("%s answers", at("tcp")), func() error {
				for _, network := range networks {
					if got, err := ask(from.ns, network, at(network), time.Second); err != nil || got.name != w.a1.name {
						return fmt.Errorf("answered by %q, %w", got.name, errors.Join(err))
					}
				}
				return nil
			})
			t.Run(fmt.Sprintf("%s by %s", from.name, f), func(t *testing.T) {
				flow := &changingFlow{w: w, from: from, tcp: at("tcp"), udp: at("udp")}
				flow.begin(t, w.a1)
				s.endpoints = []endpoint{b1}
				w.apply(t, s)
				flow.moves(t, w.b1)
				s.endpoints = []endpoint{a2}
				w.apply(t, s)
				flow.moves(t, w.a2)
				s.endpoints = nil
				w.apply(t, s)
				flow.isRefused(t)
				s.endpoints = []endpoint{a2}
				w.apply(t, s)
				flow.moves(t, w.a2)
			})
		}
	}
}

// changingFlow is a connection and a UDP socket that use a Service whose backends
// change. The connection must go on all the time.
type changingFlow struct {
	w        *world
	from     *host
	tcp, udp netip.AddrPort
	kept     *conn
	socket   net.Conn
}

func (c *changingFlow) begin(t *testing.T, backend *host) {
	t.Helper()
	kept, err := open(c.from.ns, c.tcp, "echo", patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kept.Close() })
	socket, err := dialUDP(c.from.ns, c.udp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = socket.Close() })
	c.kept, c.socket = kept, socket
	c.moves(t, backend)
}

// moves waits until datagrams of the same socket are answered by another backend.
func (c *changingFlow) moves(t *testing.T, to *host) {
	t.Helper()
	testutil.Eventually(t, 5*time.Second, "UDP moves to "+to.name, func() error {
		got, err := exchange(c.socket, 16, time.Second)
		if err == nil && got.name != to.name {
			err = fmt.Errorf("answered by %s", got.name)
		}
		return err
	})
	c.goesOn(t)
}

// isRefused waits until new clients and old UDP sockets learn that nobody is there.
func (c *changingFlow) isRefused(t *testing.T) {
	t.Helper()
	testutil.Eventually(t, 5*time.Second, "UDP and new connections are refused", func() error {
		if got, err := exchange(c.socket, 16, time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("UDP: answered by %q, %w", got.name, errors.Join(err))
		}
		if got, err := ask(c.from.ns, "tcp", c.tcp, time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("TCP: answered by %q, %w", got.name, errors.Join(err))
		}
		return nil
	})
	c.goesOn(t)
}

func (c *changingFlow) goesOn(t *testing.T) {
	t.Helper()
	if err := c.kept.echo(patience); err != nil {
		t.Errorf("a connection whose backend has left the Service but lives: %v", err)
	}
}
