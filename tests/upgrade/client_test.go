// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package upgrade

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// patience is how long a client waits for an answer: the machine may be busy.
const patience = 10 * time.Second

// pace is the pause between two exchanges of a kind.
const pace = 5 * time.Millisecond

// targets are what a client uses.
type targets struct {
	TCP, UDP, Sticky string // address and port
	// Peers says that sockets show the Service as their peer, which they do where a
	// hook sees them.
	Peers bool
}

// tally is what clients have done, by kind.
type tally struct {
	Exchanges map[string]int
	Failed    []string
}

// clients exchange messages until stop is called.
type clients struct {
	network networker
	to      targets
	done    chan struct{}
	running sync.WaitGroup

	mu    sync.Mutex
	tally tally
}

// networker makes sockets.
type networker interface {
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
	ListenPacket(network, addr string) (net.PacketConn, error)
}

// here makes sockets of this process.
type here struct{ net.Dialer }

func (h *here) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return h.DialContext(ctx, network, addr)
}

func (h *here) ListenPacket(network, addr string) (net.PacketConn, error) {
	return net.ListenPacket(network, addr)
}

// startClients starts a client of each kind.
func startClients(network networker, to targets) *clients {
	c := &clients{network: network, to: to, done: make(chan struct{})}
	c.tally.Exchanges = map[string]int{}
	sticky := ""
	keptTCP, keptUDP, unconnected := &kept{}, &kept{}, &datagrams{}
	for kind, exchange := range map[string]func() error{
		"new TCP connections":    func() error { _, err := c.ask("tcp", to.TCP); return err },
		"new UDP sockets":        func() error { _, err := c.ask("udp", to.UDP); return err },
		"a TCP connection":       func() error { return keptTCP.exchange(c, "tcp", to.TCP) },
		"a connected UDP socket": func() error { return keptUDP.exchange(c, "udp", to.UDP) },
		"an unconnected socket":  func() error { return unconnected.exchange(c) },
		"with an affinity": func() error {
			name, err := c.ask("tcp", to.Sticky)
			if err == nil && sticky != "" && name != sticky {
				err = fmt.Errorf("answered by %s, then by %s", sticky, name)
			}
			sticky = name
			return err
		},
	} {
		c.running.Go(func() { c.repeat(kind, exchange) })
	}
	return c
}

func (c *clients) repeat(kind string, exchange func() error) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-tick.C:
		}
		err := exchange()
		c.mu.Lock()
		c.tally.Exchanges[kind]++
		if err != nil {
			c.tally.Failed = append(c.tally.Failed, fmt.Sprintf("%s at %s: %v", kind, time.Now().Format(time.StampMilli), err))
		}
		c.mu.Unlock()
	}
}

// progress returns what has been done so far.
func (c *clients) progress() (t tally) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t = tally{Exchanges: map[string]int{}, Failed: c.tally.Failed}
	for kind, n := range c.tally.Exchanges {
		t.Exchanges[kind] = n
	}
	return t
}

func (c *clients) stop() tally {
	close(c.done)
	c.running.Wait()
	return c.tally
}

func (c *clients) dial(network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return c.network.Dial(ctx, network, addr)
}

// ask sends one message over a new socket and returns who has answered.
func (c *clients) ask(network, addr string) (name string, err error) {
	conn, err := c.dial(network, addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	return speak(conn)
}

// speak sends one message over a socket that is connected and returns who has
// answered.
func speak(conn net.Conn) (name string, err error) {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, "?\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReaderSize(conn, 256).ReadString('\n')
	return strings.TrimSpace(line), err
}

// kept is a socket that is connected once, and then always has the same backend.
type kept struct {
	conn net.Conn
	name string
}

func (k *kept) exchange(c *clients, network, addr string) error {
	if k.conn == nil {
		conn, err := c.dial(network, addr)
		if err != nil {
			return err
		}
		k.conn = conn // until the process ends
		if k.name, err = speak(conn); err != nil {
			return err
		}
	}
	name, err := speak(k.conn)
	if err == nil && name != k.name {
		err = fmt.Errorf("answered by %s, then by %s", k.name, name)
	}
	if err == nil && c.to.Peers {
		err = samePeer(k.conn, addr)
	}
	return err
}

// samePeer asks the kernel: package net remembers what it heard once.
func samePeer(conn net.Conn, want string) error {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var got string
	controlErr := raw.Control(func(fd uintptr) {
		var sa unix.Sockaddr
		if sa, err = unix.Getpeername(int(fd)); err == nil {
			got = addrPort(sa).String()
		}
	})
	if err := errors.Join(controlErr, err); err != nil {
		return fmt.Errorf("getpeername: %w", err)
	}
	if got != want {
		return fmt.Errorf("the peer is %s, want %s", got, want)
	}
	return nil
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// datagrams is a socket that sends to a VIP without being connected.
type datagrams struct{ conn net.PacketConn }

func (d *datagrams) exchange(c *clients) (err error) {
	if d.conn == nil {
		if d.conn, err = c.network.ListenPacket("udp4", "0.0.0.0:0"); err != nil {
			return err
		}
	}
	if err := d.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	vip := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(c.to.UDP))
	if _, err := d.conn.WriteTo([]byte("?\n"), vip); err != nil {
		return err
	}
	buf := make([]byte, 256)
	_, from, err := d.conn.ReadFrom(buf)
	if err == nil && from.String() != vip.String() {
		err = fmt.Errorf("the answer comes from %v, want %v", from, vip)
	}
	return err
}

// serve starts a backend in a pod: it answers each line and each datagram with its
// name. It runs until the test ends.
func serve(t *testing.T, pod *sandbox.Namespace, addr, name string) {
	t.Helper()
	l, err := pod.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				go answer(conn, name)
			}
		}
	}()
	c, err := pod.ListenPacket("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		buf := make([]byte, 256)
		for {
			_, client, err := c.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteTo([]byte(name+"\n"), client)
			}
		}
	}()
}

func answer(conn net.Conn, name string) {
	defer conn.Close()
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		if _, err := io.WriteString(conn, name+"\n"); err != nil {
			return
		}
	}
}

// clientEnv, when it is set, makes this program the clients of a namespace.
const clientEnv = "FAIRLEAD_UPGRADE_CLIENT"

func TestMain(m *testing.M) {
	if os.Getenv(clientEnv) != "" {
		if err := beClients(); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// beClients begins when a line with targets comes on standard input, answers each
// further line with the tally so far and ends with the input.
func beClients() error {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var to targets
	if err := in.Decode(&to); err != nil {
		return fmt.Errorf("read targets: %w", err)
	}
	c := startClients(&here{}, to)
	for {
		var question struct{}
		switch err := in.Decode(&question); {
		case errors.Is(err, io.EOF):
			return out.Encode(c.stop())
		case err != nil:
			return err
		}
		if err := out.Encode(c.progress()); err != nil {
			return err
		}
	}
}
