// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// connected makes a UDP socket in a namespace that is connected to an address.
func connected(t testing.TB, ns *sandbox.Namespace, v6 bool, to netip.AddrPort) int {
	t.Helper()
	domain, sa := unix.AF_INET, unix.Sockaddr(nil)
	if v6 {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	} else {
		sa = &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	var fd int
	must(t, ns.Do(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.Connect(fd, sa))
	return fd
}

// pending returns the error that the next receive would give, 0 for none.
func pending(t testing.TB, fd int) unix.Errno {
	t.Helper()
	_, _, err := unix.Recvfrom(fd, make([]byte, 1), 0)
	var errno unix.Errno
	if !errors.As(err, &errno) {
		t.Fatalf("receive: %v", err)
	}
	if errno == unix.EAGAIN {
		return 0
	}
	return errno
}

// describe returns what a walk would say about a socket.
func describe(t testing.TB, fd int, v6 bool) datapath.UDPSocket {
	t.Helper()
	local, err := unix.Getsockname(fd)
	must(t, err)
	remote, err := unix.Getpeername(fd)
	must(t, err)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	must(t, err)
	return datapath.UDPSocket{Cookie: cookie, IPv6: v6, Local: addrPort(local), Remote: addrPort(remote)}
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

// TestDestroyEndsOneSocket is how sockets are ended before Linux 6.5.
func TestDestroyEndsOneSocket(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	for _, tc := range []struct {
		name string
		v6   bool
		to   string
	}{
		{"IPv4", false, "10.244.0.1:9"},
		{"IPv6", true, "[fd00:244::1]:9"},
		{"IPv4-mapped", true, "10.244.0.1:9"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			to := netip.MustParseAddrPort(tc.to)
			fd, sibling := connected(t, ns, tc.v6, to), connected(t, ns, tc.v6, to)
			s := describe(t, fd, tc.v6)

			another := s
			another.Cookie++
			err := ns.Do(func() error { return destroy(another) })
			if errors.Is(err, unix.EOPNOTSUPP) {
				if !strings.Contains(err.Error(), "CONFIG_INET_DIAG_DESTROY") {
					t.Errorf("error %v does not say what is missing", err)
				}
				t.Skipf("kernel ends no sockets: %v", err)
			}
			if !errors.Is(err, unix.ENOENT) {
				t.Errorf("a socket that is not there: %v, want ENOENT", err)
			}
			if errno := pending(t, fd); errno != 0 {
				t.Errorf("asked to end one with its addresses and another cookie, it got %v", errno)
			}

			must(t, ns.Do(func() error { return destroy(s) }))
			if errno := pending(t, fd); errno != unix.ECONNABORTED {
				t.Errorf("the next receive gives %v, want ECONNABORTED", errno)
			}
			if errno := pending(t, sibling); errno != 0 {
				t.Errorf("its sibling got %v", errno)
			}
			if err := ns.Do(func() error { return destroy(s) }); !errors.Is(err, unix.ENOENT) {
				t.Errorf("ended once more: %v, want ENOENT", err)
			}
		})
	}
}

func TestNamespacesAreFoundAndEntered(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	var st unix.Stat_t
	must(t, unix.Stat(ns.Path(), &st))
	inode := uint32(st.Ino)
	paths := namespaces(everywhere)[inode]
	if len(paths) == 0 {
		t.Fatalf("%s, which no process is in, was not found", ns.Path())
	}
	here := func() (inode uint64, err error) {
		var st unix.Stat_t
		err = unix.Stat("/proc/thread-self/ns/net", &st)
		return st.Ino, err
	}
	enter := func(paths []string, inode uint32, f func() error) error {
		file, err := open(paths, inode)
		if err != nil {
			return err
		}
		return within(file, f)
	}
	// A process that has ended since comes before a path that is still good.
	paths = append([]string{"/proc/4194304/ns/net", "/proc/self/ns/net"}, paths...)
	must(t, enter(paths, inode, func() error {
		got, err := here()
		if err == nil && got != st.Ino {
			err = fmt.Errorf("in namespace %d, want %d", got, st.Ino)
		}
		return err
	}))
	home, err := here()
	must(t, err)
	for _, patterns := range [][]string{everywhere, threads} {
		if len(namespaces(patterns)[uint32(home)]) == 0 {
			t.Errorf("our own namespace %d was not found at %v", home, patterns)
		}
	}

	never := func() error { return errors.New("was run") }
	if err := enter(paths, inode+1, never); !errors.Is(err, errGone) {
		t.Errorf("paths that lead to other namespaces: %v, want errGone", err)
	}
	// What is left of a namespace that was bound here, or is going to be.
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, unix.Stat(file, &st))
	if err := enter([]string{file}, uint32(st.Ino), never); !errors.Is(err, errGone) {
		t.Errorf("a plain file: %v, want errGone", err)
	}
	if found := namespaces([]string{file}); len(found) != 0 {
		t.Errorf("a plain file is taken for a namespace: %v", found)
	}
	failure := errors.New("failed inside")
	if err := enter(paths, inode, func() error { return failure }); !errors.Is(err, failure) {
		t.Errorf("error from within is %v", err)
	}
}

// A task that sleeps while it holds a socket's lock keeps the walk of its
// namespace waiting; nobody else may wait for it.
func TestOneNamespaceKeepsNobodyElseWaiting(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	var st unix.Stat_t
	must(t, unix.Stat(ns.Path(), &st))
	e := NewEnder(nil, nil)
	e.setBusy(uint32(st.Ino), true)
	_, err := e.visit(uint32(st.Ino), []string{ns.Path()})
	if err == nil || !strings.Contains(err.Error(), "keeps us waiting") {
		t.Errorf("a namespace whose walk has not ended is entered again: %v", err)
	}
}

// collector keeps the reports of an Ender.
type collector struct {
	sync.Mutex
	reports []Report
}

func (c *collector) add(r Report) {
	c.Lock()
	defer c.Unlock()
	c.reports = append(c.reports, r)
}

func (c *collector) all() []Report {
	c.Lock()
	defer c.Unlock()
	return c.reports
}

// ticket returns the last report's ticket, 0 before the first one.
func (c *collector) ticket() uint64 {
	all := c.all()
	if len(all) == 0 {
		return 0
	}
	return all[len(all)-1].Ticket
}

// runEnder starts an Ender whose repeats come soon. It ends with the test, after
// which a walk that failed fails the test.
func runEnder(t *testing.T) (*Ender, *collector) {
	t.Helper()
	before := repeats
	repeats = []time.Duration{20 * time.Millisecond, 100 * time.Millisecond}
	t.Cleanup(func() { repeats = before })

	cgroup, err := attach.OpenCgroup(testutil.Cgroup(t).Path())
	must(t, err)
	d, err := datapath.Open(datapath.Config{
		Root: testutil.BPFRoot(t), CgroupID: cgroup.ID,
		Sizes: datapath.Sizes{Frontends: 64, Services: 64, Slots: 64, Members: 64, Peers: 64},
	})
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	if d.NoIterators != nil {
		t.Skipf("this kernel cannot look for UDP sockets: %v", d.NoIterators)
	}
	var reports collector
	e := NewEnder(d, reports.add)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
		for _, r := range reports.all() {
			if r.Err != nil {
				t.Errorf("walk: %v", r.Err)
			}
		}
	})
	return e, &reports
}

func TestEachRequestIsWalkedForAndRepeated(t *testing.T) {
	e, reports := runEnder(t)
	e.Ask(Request{Ticket: 1})
	testutil.Eventually(t, testutil.Patience(), "a walk and its repeats", func() error {
		if n := len(reports.all()); n < 1+len(repeats) {
			return fmt.Errorf("%d reports", n)
		}
		return nil
	})
	for i, r := range reports.all() {
		if r.Ticket != 1 || r.Gone+r.Came != 0 || len(r.InUse) != 0 {
			t.Errorf("report %d is %+v, want nothing found for ticket 1", i, r)
		}
	}
	for ticket := uint64(2); ticket <= 50; ticket++ {
		e.Ask(Request{Ticket: ticket})
	}
	testutil.Eventually(t, testutil.Patience(), "an answer to the last of many requests", func() error {
		if got := reports.ticket(); got != 50 {
			return fmt.Errorf("ticket %d", got)
		}
		return nil
	})
}

// TestAnsweredFrontendIsForgotten asks again and again, as an agent does in a busy
// cluster: a VIP that got its first backend some time ago must not cost those
// their sockets who connect to it after it has lost them all.
func TestAnsweredFrontendIsForgotten(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	e, reports := runEnder(t)
	vip := netip.AddrPortFrom(sandbox.GatewayIPv4.Addr(), 9)
	early := connected(t, ns, false, vip)
	key := lb.FrontendKey{VIP: vip.Addr(), Port: vip.Port(), Protocol: lb.UDP}
	must(t, e.datapath.SetSlots(0, []lb.Backend{{Addr: netip.MustParseAddr("10.244.0.9"), Port: 9}}))
	must(t, e.datapath.SetRange(1, lb.SideClusterIP, lb.Range{Count: 1}))
	must(t, e.datapath.SetFrontend(key, lb.Frontend{Service: 1, Kind: lb.KindClusterIP}))
	e.Ask(Request{Answered: []lb.FrontendKey{key}})
	testutil.Eventually(t, testutil.Patience(), "a socket connected to the VIP is ended", func() error {
		if errno := pending(t, early); errno != unix.ECONNABORTED {
			return fmt.Errorf("receive gives %v", errno)
		}
		return nil
	})
	for end := time.Now().Add(5 * repeats[1]); time.Now().Before(end); {
		askAndWait(t, e, reports)
	}
	late := connected(t, ns, false, vip)
	for range 3 {
		askAndWait(t, e, reports)
	}
	if errno := pending(t, late); errno != 0 {
		t.Errorf("a socket made long after the last repeat got %v", errno)
	}
}

// askAndWait asks for a walk and waits for one that began afterwards.
func askAndWait(t *testing.T, e *Ender, reports *collector) {
	t.Helper()
	ticket := reports.ticket() + 1
	e.Ask(Request{Ticket: ticket})
	testutil.Eventually(t, testutil.Patience(), "a walk", func() error {
		if got := reports.ticket(); got < ticket {
			return fmt.Errorf("ticket %d", got)
		}
		return nil
	})
}
