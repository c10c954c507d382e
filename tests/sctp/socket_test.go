// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sctp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// greeting is what a server says before it is asked.
const greeting = "hello from "

// open makes a one-to-one SCTP socket (RFC 6458, section 4) of a namespace, bound to
// an address: with more than one address the client would tell all of them to the
// other end.
func open(ns *sandbox.Namespace, at netip.AddrPort) (fd int, err error) {
	domain := unix.AF_INET
	if at.Addr().Is6() {
		domain = unix.AF_INET6
	}
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_SCTP)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("open SCTP socket: %w", err)
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return -1, errors.Join(fmt.Errorf("bind to %s: %w", at, err), unix.Close(fd))
	}
	return fd, nil
}

func sockaddr(at netip.AddrPort) unix.Sockaddr {
	if at.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}
	}
	return &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}
}

func addrOf(sa unix.Sockaddr) netip.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(sa.Addr)
	default:
		return netip.Addr{}
	}
}

// dial makes an association from an address of a namespace. An ICMP error that says
// that nobody listens ends it at once.
func dial(ns *sandbox.Namespace, from netip.Addr, to netip.AddrPort) (*os.File, error) {
	fd, err := open(ns, netip.AddrPortFrom(from, 0))
	if err != nil {
		return nil, err
	}
	level, option := unix.SOL_IP, unix.IP_RECVERR
	if from.Is6() {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVERR
	}
	err = unix.SetsockoptInt(fd, level, option, 1)
	if err == nil {
		err = connect(fd, to)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("dial %s from %s: %w", to, from, err), unix.Close(fd))
	}
	c := os.NewFile(uintptr(fd), to.String())
	return c, c.SetDeadline(time.Now().Add(testutil.Patience()))
}

// connect waits until the socket is connected or cannot be.
func connect(fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddr(to))
	if !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for end := time.Now().Add(testutil.Patience()); ready[0].Revents == 0; {
		left := time.Until(end)
		if left <= 0 {
			return unix.ETIMEDOUT
		}
		if _, err := unix.Poll(ready, int(left.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = syscall.Errno(code)
	}
	return err
}

// server greets who comes and says everything back that it is told.
type server struct {
	listener *os.File
	serving  sync.WaitGroup

	mu      sync.Mutex
	clients []netip.Addr // of all associations so far, as the server sees them
}

// serve starts a server that ends with the test.
func serve(t *testing.T, ns *sandbox.Namespace, at netip.AddrPort, name string) *server {
	t.Helper()
	fd, err := open(ns, at)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 16); err != nil {
		t.Fatal(err)
	}
	s := &server{listener: os.NewFile(uintptr(fd), at.String())}
	s.serving.Go(func() { s.accept(name) })
	t.Cleanup(func() {
		if err := s.listener.Close(); err != nil {
			t.Error(err)
		}
		s.serving.Wait()
	})
	return s
}

// accept serves until the listener is closed.
func (s *server) accept(name string) {
	raw, err := s.listener.SyscallConn()
	if err != nil {
		return
	}
	for {
		var (
			fd     int
			from   unix.Sockaddr
			accept error
		)
		err := raw.Read(func(listener uintptr) bool {
			fd, from, accept = unix.Accept4(int(listener), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			return !errors.Is(accept, unix.EAGAIN)
		})
		if err != nil {
			return
		}
		if accept != nil {
			continue // who came has gone again
		}
		s.mu.Lock()
		s.clients = append(s.clients, addrOf(from))
		s.mu.Unlock()
		s.serving.Go(func() { echo(os.NewFile(uintptr(fd), name), name) })
	}
}

// lastClient returns from where the last association has come.
func (s *server) lastClient() netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.clients) == 0 {
		return netip.Addr{}
	}
	return s.clients[len(s.clients)-1]
}

func echo(c *os.File, name string) {
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(3 * testutil.Patience())); err != nil {
		return
	}
	if _, err := io.WriteString(c, greeting+name); err != nil {
		return
	}
	buf := make([]byte, 1<<16)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

// sizes are those of messages: within a packet, as large as one of them can be, and
// cut into many.
var sizes = []int{1, 2, 3, 4, 100, 1000, 1399, 1400, 1401, 1402, 1403, 1404, 1452, 1453, 1500, 5000, 20000}

// say makes an association and has messages of all sizes and very many of them said
// back. It returns the server's name.
func say(ns *sandbox.Namespace, from netip.Addr, to netip.AddrPort) (name string, err error) {
	c, err := dial(ns, from, to)
	if err != nil {
		return "", err
	}
	name, err = hear(c)
	if err == nil {
		err = converse(c)
	}
	if err == nil {
		err = flood(c)
	}
	return name, errors.Join(err, c.Close())
}

// hear returns who greets.
func hear(c *os.File) (name string, err error) {
	hello := make([]byte, 256)
	n, err := c.Read(hello)
	if err != nil {
		return "", fmt.Errorf("read greeting: %w", err)
	}
	name, ok := strings.CutPrefix(string(hello[:n]), greeting)
	if !ok {
		return "", fmt.Errorf("greeting is %q", hello[:n])
	}
	return name, nil
}

// converse has messages of all sizes said back, one after the other.
func converse(c *os.File) error {
	for _, size := range sizes {
		said := randomBytes(make([]byte, size))
		if _, err := c.Write(said); err != nil {
			return fmt.Errorf("write %d bytes: %w", size, err)
		}
		heard := make([]byte, size)
		if _, err := io.ReadFull(c, heard); err != nil {
			return fmt.Errorf("read %d bytes: %w", size, err)
		}
		if !bytes.Equal(said, heard) {
			return fmt.Errorf("%d bytes come back changed", size)
		}
	}
	return nil
}

// flood says much without waiting for the answers, which must be all there and in
// order.
func flood(c *os.File) error {
	messages, size := 64, 8000
	if testing.Short() {
		messages = 16
	}
	said := randomBytes(make([]byte, messages*size))
	result := make(chan error, 1)
	go func() {
		for i := 0; i < len(said); i += size {
			if _, err := c.Write(said[i : i+size]); err != nil {
				result <- fmt.Errorf("write after %d bytes: %w", i, err)
				return
			}
		}
		result <- nil
	}()
	heard := make([]byte, len(said))
	n, err := io.ReadFull(c, heard)
	if err != nil {
		err = fmt.Errorf("read after %d of %d bytes: %w", n, len(said), err)
	} else if !bytes.Equal(said, heard) {
		err = errors.New("what was said comes back changed")
	}
	return errors.Join(err, <-result)
}
