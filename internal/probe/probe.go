// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// connectWithin bounds a connection that never leaves the machine.
const connectWithin = 2 * time.Second

// ErrCannot says that nothing was proved, neither that connections are translated
// nor that they are not.
var ErrCannot = errors.New("cannot be probed")

// Target is a TCP frontend and where connections to it may lead. All have one
// family.
type Target struct {
	Frontend netip.AddrPort
	Backends []netip.AddrPort
}

// Prober makes connections. Its methods may be called from any goroutine.
type Prober struct {
	tasks chan func()
}

// New makes the network namespace, on a thread that ends with Close. It needs
// CAP_SYS_ADMIN and CAP_NET_ADMIN; the error wraps ErrCannot.
func New() (*Prober, error) {
	p := &Prober{tasks: make(chan func())}
	ready := make(chan error)
	go func() {
		// Never unlocked: the thread and its namespace end with this goroutine.
		runtime.LockOSThread()
		err := makeNamespace()
		ready <- err
		if err != nil {
			return
		}
		for task := range p.tasks {
			task()
		}
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCannot, err)
	}
	return p, nil
}

// Close ends the namespace. Nothing else may be called any more.
func (p *Prober) Close() { close(p.tasks) }

// Connect returns nil when a connection to the target's frontend led to one of its
// backends. The error wraps ErrCannot when it does not tell of that.
func (p *Prober) Connect(t Target) error {
	done := make(chan error)
	p.tasks <- func() { done <- connect(t) }
	return <-done
}

// makeNamespace puts the calling thread into a network namespace in which every
// address is local. IPv6 is left out where the kernel does not have it.
func makeNamespace() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback device: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring loopback device up: %w", err)
	}
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		_, dst, err := net.ParseCIDR(all)
		if err != nil {
			return err
		}
		err = netlink.RouteAdd(&netlink.Route{
			LinkIndex: lo.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_HOST,
			Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL,
		})
		if err != nil && dst.IP.To4() != nil {
			return fmt.Errorf("make all addresses local: %w", err)
		}
	}
	return nil
}

// connect is Connect on the thread that is in the namespace.
func connect(t Target) error {
	ctx, cancel := context.WithTimeout(context.Background(), connectWithin)
	defer cancel()
	accepted := make(chan net.Addr, 1) // the address it was led to
	stop, err := listen(ctx, t, accepted)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCannot, err)
	}
	defer stop()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", t.Frontend.String())
	if err != nil {
		return fmt.Errorf("a connection to %v was not translated: %w", t.Frontend, cause(err))
	}
	defer func() { _ = conn.Close() }()
	select {
	case addr := <-accepted:
		return judge(t, addr)
	case <-ctx.Done():
		return fmt.Errorf("%w: a connection to %v was made and nobody was told", ErrCannot, t.Frontend)
	}
}

// judge tells whether a connection was led where it should be.
func judge(t Target, to net.Addr) error {
	addr, err := netip.ParseAddrPort(to.String())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCannot, err)
	}
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	switch {
	case slices.Contains(t.Backends, addr):
		return nil
	case addr == t.Frontend:
		return fmt.Errorf("a connection to %v was not translated", t.Frontend)
	default:
		return fmt.Errorf("a connection to %v was led to %v, which is not a backend of it", t.Frontend, addr)
	}
}

// listen accepts a connection at the ports of all backends, at every address, and
// says at which it came. stop ends that.
func listen(ctx context.Context, t Target, accepted chan<- net.Addr) (stop func(), err error) {
	var listeners []net.Listener
	stop = func() {
		for _, l := range listeners {
			_ = l.Close()
		}
	}
	config := net.ListenConfig{KeepAlive: -1}
	config.SetMultipathTCP(false)
	network := "tcp6"
	if t.Frontend.Addr().Is4() {
		network = "tcp4"
	}
	seen := map[uint16]bool{}
	for _, b := range t.Backends {
		if seen[b.Port()] {
			continue
		}
		seen[b.Port()] = true
		l, err := config.Listen(ctx, network, fmt.Sprintf(":%d", b.Port()))
		if err != nil {
			stop()
			return nil, err
		}
		listeners = append(listeners, l)
		go func() {
			if conn, err := l.Accept(); err == nil {
				accepted <- conn.LocalAddr()
				_ = conn.Close()
			}
		}()
	}
	return stop, nil
}

// cause takes away what the net package says of addresses that matter to nobody.
func cause(err error) error {
	var failed *net.OpError
	if errors.As(err, &failed) {
		return failed.Err
	}
	return err
}
