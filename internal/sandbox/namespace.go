// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// netnsDir is where ip-netns(8) keeps its namespaces, so that `ip netns list`
// and `nsenter --net=` find ours too.
const netnsDir = "/run/netns"

// threadNetns is the network namespace of the calling thread.
const threadNetns = "/proc/thread-self/ns/net"

// kernelTimeout is how long the kernel may take for what it does from a work
// queue after the call that asked for it has returned.
const kernelTimeout = 10 * time.Second

// Namespace is a network namespace that stays until it is closed. Its methods
// may be called from several goroutines.
type Namespace struct {
	name string
	fd   *os.File
}

// newNamespace makes a namespace with its loopback link up and mounts it under
// netnsDir. The caller must close it.
func newNamespace(name string) (*Namespace, error) {
	path := filepath.Join(netnsDir, name)
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	_ = file.Close()

	err = onOwnThread(func() error { return unshareTo(path) })
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make namespace %s: %w", name, err), removeNamespace(path))
	}
	fd, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make namespace %s: %w", name, err), removeNamespace(path))
	}
	ns := &Namespace{name: name, fd: fd}
	if err := ns.setUp(); err != nil {
		return nil, errors.Join(fmt.Errorf("set up namespace %s: %w", name, err), ns.close())
	}
	return ns, nil
}

// unshareTo gives the calling thread a new network namespace and mounts that
// at path.
func unshareTo(path string) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount(threadNetns, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

// setUp switches off what would make IPv6 addresses wait or let the namespace
// configure itself from router advertisements, and brings the loopback link up.
func (ns *Namespace) setUp() error {
	return ns.Do(func() error {
		for _, scope := range []string{"all", "default"} {
			for _, key := range []string{"accept_dad", "accept_ra", "autoconf", "router_solicitations"} {
				if err := writeSysctl("ipv6/conf/"+scope+"/"+key, "0"); err != nil {
					return err
				}
			}
		}
		return setLinkUp("lo")
	})
}

// Name returns the namespace's name, the last element of Path.
func (ns *Namespace) Name() string { return ns.name }

// Path returns the file that names the namespace for setns(2) and nsenter(1).
func (ns *Namespace) Path() string { return filepath.Join(netnsDir, ns.name) }

// Do runs f in the namespace, on an operating-system thread of its own, and
// returns what f returns. Sockets f opens and processes it starts belong to the
// namespace; goroutines it starts do not.
func (ns *Namespace) Do(f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(int(ns.fd.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", ns.name, err)
		}
		return f()
	})
}

// onOwnThread runs f on a locked thread, waits for it, and puts the thread back
// into the network namespace it came from.
func onOwnThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		// What the caller gets when f ends its goroutine, as t.FailNow does.
		err := errors.New("the function did not return")
		defer func() { result <- err }()

		runtime.LockOSThread()
		home, homeErr := os.Open(threadNetns)
		if homeErr != nil {
			runtime.UnlockOSThread()
			err = homeErr
			return
		}
		defer func() {
			// Without the unlock the runtime ends the thread along with this
			// goroutine, so nobody runs in the wrong namespace by accident.
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			_ = home.Close()
		}()
		err = f()
	}()
	return <-result
}

// Listen announces on a TCP address of the namespace. The host in addr must be
// an IP address or empty, since looking up a name would leave the namespace.
func (ns *Namespace) Listen(network, addr string) (net.Listener, error) {
	var l net.Listener
	err := ns.withLiteral(addr, func() (err error) {
		l, err = new(net.ListenConfig).Listen(context.Background(), network, addr)
		return err
	})
	return l, err
}

// ListenPacket is Listen for UDP.
func (ns *Namespace) ListenPacket(network, addr string) (net.PacketConn, error) {
	var c net.PacketConn
	err := ns.withLiteral(addr, func() (err error) {
		c, err = new(net.ListenConfig).ListenPacket(context.Background(), network, addr)
		return err
	})
	return c, err
}

// Dial connects a TCP or UDP socket of the namespace to addr, which must hold
// an IP address. It fits http.Transport.DialContext.
func (ns *Namespace) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := ns.withLiteral(addr, func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// withLiteral runs f in the namespace when addr holds an IP address or no host.
// With one address package net opens the socket on the calling goroutine; with
// a name it may use others, whose threads are in another namespace.
func (ns *Namespace) withLiteral(addr string, f func() error) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("address %q in namespace %s: %w", addr, ns.name, err)
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" {
		return fmt.Errorf("address %q in namespace %s: not an IP address", addr, ns.name)
	}
	return ns.Do(f)
}

// AddAddr gives a link of the namespace an address and waits until the link
// answers for it.
func (ns *Namespace) AddAddr(link string, prefix netip.Prefix) error {
	return ns.withLink(link, func(h *netlink.Handle, l netlink.Link) error {
		if err := h.AddrAdd(l, netlinkAddr(prefix)); err != nil {
			return fmt.Errorf("add %s to %s in %s: %w", prefix, link, ns.name, err)
		}
		// The kernel joins the multicast group in which neighbours ask for an
		// IPv6 address from a work queue; after that, with duplicate address
		// detection off, the address is no longer tentative. The flag
		// IFA_F_NODAD would hide when that is.
		return poll(func() (bool, error) {
			addrs, err := h.AddrList(l, netlink.FAMILY_V6)
			if errors.Is(err, netlink.ErrDumpInterrupted) {
				return false, nil
			}
			if err != nil {
				return false, fmt.Errorf("list addresses of %s in %s: %w", link, ns.name, err)
			}
			return !slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
				return a.Flags&unix.IFA_F_TENTATIVE != 0
			}), nil
		})
	})
}

// RemoveAddr takes an address from a link of the namespace.
func (ns *Namespace) RemoveAddr(link string, prefix netip.Prefix) error {
	return ns.withLink(link, func(h *netlink.Handle, l netlink.Link) error {
		if err := h.AddrDel(l, netlinkAddr(prefix)); err != nil {
			return fmt.Errorf("remove %s from %s in %s: %w", prefix, link, ns.name, err)
		}
		return nil
	})
}

// withLink runs f in the namespace with a netlink handle of it and the named
// link.
func (ns *Namespace) withLink(name string, f func(*netlink.Handle, netlink.Link) error) error {
	return ns.withNetlink(func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find link %s in %s: %w", name, ns.name, err)
		}
		return f(h, link)
	})
}

// withNetlink runs f in the namespace with a netlink handle of it.
func (ns *Namespace) withNetlink(f func(*netlink.Handle) error) error {
	return ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in %s: %w", ns.name, err)
		}
		defer h.Close()
		return f(h)
	})
}

// close removes the namespace's name. The namespace itself ends with the last
// process or socket in it.
func (ns *Namespace) close() error {
	return errors.Join(ns.fd.Close(), removeNamespace(ns.Path()))
}

// removeNamespace undoes what newNamespace has done at path, however far it
// got.
func removeNamespace(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func netlinkAddr(prefix netip.Prefix) *netlink.Addr {
	addr := prefix.Addr()
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(prefix.Bits(), addr.BitLen())},
	}
}

// setLinkUp brings a link of the calling thread's namespace up.
func setLinkUp(name string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

// writeSysctl sets a key below net/ in the calling thread's namespace.
func writeSysctl(key, value string) error {
	return os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644)
}

// poll calls done until it returns true or an error.
func poll(done func() (bool, error)) error {
	for end := time.Now().Add(kernelTimeout); ; time.Sleep(time.Millisecond) {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("not done after %s", kernelTimeout)
		}
	}
}
