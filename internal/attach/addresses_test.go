// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// recorder keeps what a watch has reported.
type recorder struct {
	mu      sync.Mutex
	reports [][]netip.Addr
}

func (r *recorder) report(addrs []netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reports = append(r.reports, addrs)
}

func (r *recorder) all() [][]netip.Addr {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.reports)
}

// wantSoon waits until the last report is want.
func (r *recorder) wantSoon(t *testing.T, what string, want ...netip.Addr) {
	t.Helper()
	testutil.Eventually(t, testutil.Patience(), what, func() error {
		reports := r.all()
		if len(reports) == 0 || !slices.Equal(reports[len(reports)-1], want) {
			return fmt.Errorf("reports are %v, want %v as the last", reports, want)
		}
		return nil
	})
}

// start runs a watch in the namespace until the test ends or stop is called.
func start(t *testing.T, ns *sandbox.Namespace, watch func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ns.Do(func() error { return watch(ctx) }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the watch ended with %v", err)
			}
		case <-time.After(testutil.Patience()):
			t.Errorf("the watch goes on %s after its context ended", testutil.Patience())
		}
	})
	t.Cleanup(stop)
	return stop
}

// watchAddresses starts WatchAddresses in the namespace.
func watchAddresses(t *testing.T, ns *sandbox.Namespace) (r *recorder, stop func()) {
	t.Helper()
	r = &recorder{}
	return r, start(t, ns, func(ctx context.Context) error { return WatchAddresses(ctx, r.report) })
}

// add may be called on any goroutine.
func add(t *testing.T, ns *sandbox.Namespace, link, prefix string) {
	t.Helper()
	if err := ns.AddAddr(link, netip.MustParsePrefix(prefix)); err != nil {
		t.Error(err)
	}
}

func remove(t *testing.T, ns *sandbox.Namespace, link, prefix string) {
	t.Helper()
	if err := ns.RemoveAddr(link, netip.MustParsePrefix(prefix)); err != nil {
		t.Fatal(err)
	}
}

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// nodeHas is what the node of a sandbox has from the start, with more addresses.
func nodeHas(more ...string) []netip.Addr {
	out := append(addrs(more...), sandbox.GatewayIPv4.Addr(), sandbox.GatewayIPv6.Addr())
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func TestAddressesAreReportedWithinASecond(t *testing.T) {
	node := testutil.Node(t)
	ns := node.Namespace()
	r, _ := watchAddresses(t, ns)
	r.wantSoon(t, "what is there at the start", nodeHas()...)

	add(t, ns, sandbox.Bridge, "192.0.2.1/24")
	r.wantSoon(t, "a new IPv4 address", nodeHas("192.0.2.1")...)
	add(t, ns, sandbox.Bridge, "2001:db8::1/64")
	r.wantSoon(t, "a new IPv6 address", nodeHas("192.0.2.1", "2001:db8::1")...)
	add(t, ns, "lo", "198.51.100.1/32")
	r.wantSoon(t, "a service address on the loopback device", nodeHas("192.0.2.1", "198.51.100.1", "2001:db8::1")...)

	remove(t, ns, sandbox.Bridge, "192.0.2.1/24")
	remove(t, ns, sandbox.Bridge, "2001:db8::1/64")
	r.wantSoon(t, "removed addresses", nodeHas("198.51.100.1")...)

	pod, err := node.AddPod("pod", netip.MustParseAddr("10.244.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	add(t, ns, "veth0", "203.0.113.1/32")
	r.wantSoon(t, "an address on a pod's link", nodeHas("198.51.100.1", "203.0.113.1")...)
	if err := node.RemovePod(pod); err != nil {
		t.Fatal(err)
	}
	r.wantSoon(t, "addresses that went with their link", nodeHas("198.51.100.1")...)
}

func TestAddressesAreReportedOnlyWhenTheSetChanges(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	r, _ := watchAddresses(t, ns)
	r.wantSoon(t, "the start", nodeHas()...)

	// What does not count, and an address on a second link.
	add(t, ns, "lo", "127.0.0.2/32")
	add(t, ns, sandbox.Bridge, "fe80::1234/64")
	add(t, ns, "lo", sandbox.GatewayIPv4.Addr().String()+"/32")
	add(t, ns, "lo", "192.0.2.1/32")
	r.wantSoon(t, "an address that counts", nodeHas("192.0.2.1")...)

	// An address moves to another link; there is a moment when both have it.
	add(t, ns, sandbox.Bridge, "192.0.2.1/24")
	remove(t, ns, "lo", "192.0.2.1/32")
	add(t, ns, sandbox.Bridge, "192.0.2.9/24")
	r.wantSoon(t, "the end", nodeHas("192.0.2.1", "192.0.2.9")...)
	if got := r.all(); len(got) != 3 {
		t.Errorf("reports are %v, want 3 for 3 sets", got)
	}
}

// TestServicesOfIPVSAreNotTheNodes has the device that kube-proxy in IPVS mode
// leaves, come after the agent or before it.
func TestServicesOfIPVSAreNotTheNodes(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	early, _ := watchAddresses(t, ns)
	early.wantSoon(t, "the start", nodeHas()...)

	// kube-proxy's is a dummy device, which not every kernel has.
	err := ns.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "kube-ipvs0"}})
	})
	if err != nil {
		t.Fatal(err)
	}
	add(t, ns, "kube-ipvs0", "10.96.0.1/32")
	add(t, ns, "kube-ipvs0", "fd00:96::1/128")
	add(t, ns, "kube-ipvs0", "192.0.2.1/32")
	add(t, ns, sandbox.Bridge, "192.0.2.1/24")
	late, _ := watchAddresses(t, ns)
	for _, r := range []*recorder{early, late} {
		r.wantSoon(t, "the address that another device has too", nodeHas("192.0.2.1")...)
	}
	if got := early.all(); len(got) != 2 {
		t.Errorf("reports are %v, want 2 for 2 sets", got)
	}

	remove(t, ns, sandbox.Bridge, "192.0.2.1/24")
	for _, r := range []*recorder{early, late} {
		r.wantSoon(t, "the address that only Services have now", nodeHas()...)
	}
}

func TestNoAddressIsASetToo(t *testing.T) {
	node := testutil.Node(t)
	pod, err := node.AddPod("pod")
	if err != nil {
		t.Fatal(err)
	}
	r, _ := watchAddresses(t, pod)
	r.wantSoon(t, "nothing but loopback and link-local addresses")
	add(t, pod, "eth0", "192.0.2.1/24")
	r.wantSoon(t, "the first address", addrs("192.0.2.1")...)
	remove(t, pod, "eth0", "192.0.2.1/24")
	r.wantSoon(t, "nothing again")
}

func TestAddressWatchEndsWithItsContext(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	r, stop := watchAddresses(t, ns)
	r.wantSoon(t, "the start", nodeHas()...)
	stop() // fails the test when it does not end

	ended, cancel := context.WithCancel(context.Background())
	cancel()
	err := WatchAddresses(ended, func(a []netip.Addr) { t.Errorf("%v was reported after the end", a) })
	if err != nil {
		t.Errorf("a watch that never began: %v", err)
	}
}

// faultySockets makes the sockets of a watch and remembers them, so that a test
// can break them.
type faultySockets struct {
	buffer int // bytes the first socket can hold; 0: as many as others

	mu   sync.Mutex
	made []*nl.NetlinkSocket
}

func (f *faultySockets) subscribe() (*nl.NetlinkSocket, error) {
	socket, err := subscribeAddresses()
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.made = append(f.made, socket)
	if len(f.made) == 1 && f.buffer > 0 {
		err = socket.SetReceiveBufferSize(f.buffer, false)
	}
	return socket, err
}

func (f *faultySockets) sockets() []*nl.NetlinkSocket {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.made)
}

// run starts a watch with these sockets that lists nothing without a reason.
func (f *faultySockets) run(t *testing.T, ns *sandbox.Namespace, report func([]netip.Addr)) {
	t.Helper()
	start(t, ns, func(ctx context.Context) error {
		w := addressWatch{subscribe: f.subscribe, relist: time.Hour, report: report}
		return w.run(ctx)
	})
}

func TestAnAddressAddedBeforeTheSubscriptionIsReported(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	r := &recorder{}
	start(t, ns, func(ctx context.Context) error {
		subscribe := func() (*nl.NetlinkSocket, error) {
			add(t, ns, "lo", "192.0.2.1/32")
			return subscribeAddresses()
		}
		w := addressWatch{subscribe: subscribe, relist: time.Hour, report: r.report}
		return w.run(ctx)
	})
	r.wantSoon(t, "the start", nodeHas("192.0.2.1")...)
}

// TestAddressesAfterAnOverrun changes more than the socket can hold after the
// first list and before the first message is read.
func TestAddressesAfterAnOverrun(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	sockets := &faultySockets{buffer: 1} // the kernel makes that its minimum, a few messages
	var want []string
	for i := range 100 {
		want = append(want, fmt.Sprintf("192.0.2.%d", i+1))
	}
	r := &recorder{}
	overrun := sync.OnceFunc(func() {
		for _, a := range want {
			add(t, ns, "lo", a+"/32")
		}
	})
	sockets.run(t, ns, func(a []netip.Addr) {
		r.report(a)
		overrun()
	})
	testutil.Eventually(t, testutil.Patience(), "a new socket", func() error {
		if n := len(sockets.sockets()); n < 2 {
			return fmt.Errorf("%d sockets made", n)
		}
		return nil
	})
	r.wantSoon(t, "what the socket had no room for", nodeHas(want...)...)
	add(t, ns, "lo", "198.51.100.1/32")
	r.wantSoon(t, "a change after the overrun", nodeHas(append(want, "198.51.100.1")...)...)
}

func TestAddressesAfterTheSocketIsClosed(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	sockets, r := &faultySockets{}, &recorder{}
	sockets.run(t, ns, r.report)
	r.wantSoon(t, "the start", nodeHas()...)
	sockets.sockets()[0].Close()
	add(t, ns, "lo", "192.0.2.1/32")
	r.wantSoon(t, "a change without a socket", nodeHas("192.0.2.1")...)
	add(t, ns, "lo", "192.0.2.2/32")
	r.wantSoon(t, "a change with a new socket", nodeHas("192.0.2.1", "192.0.2.2")...)
}

// TestAddressesNobodyToldOf listens to nothing, so that only the regular list,
// which is taken very often here, can show a change.
func TestAddressesNobodyToldOf(t *testing.T) {
	ns := testutil.Node(t).Namespace()
	r := &recorder{}
	start(t, ns, func(ctx context.Context) error {
		deaf := func() (*nl.NetlinkSocket, error) { return nl.Subscribe(unix.NETLINK_ROUTE) }
		w := addressWatch{subscribe: deaf, relist: time.Millisecond, report: r.report}
		return w.run(ctx)
	})
	r.wantSoon(t, "the start", nodeHas()...)
	add(t, ns, "lo", "192.0.2.1/32")
	r.wantSoon(t, "a change without a message", nodeHas("192.0.2.1")...)
	if got := r.all(); len(got) != 2 {
		t.Errorf("reports are %v, want 2 for 2 sets", got)
	}
}

// TestDuplicateAddressIsNotTheNodes gives the node an IPv6 address that a pod
// has, with duplicate address detection on.
func TestDuplicateAddressIsNotTheNodes(t *testing.T) {
	node := testutil.Node(t)
	ns := node.Namespace()
	duplicate := netip.MustParseAddr("fd00:244::5")
	if _, err := node.AddPod("pod", duplicate); err != nil {
		t.Fatal(err)
	}
	r, _ := watchAddresses(t, ns)
	r.wantSoon(t, "the start", nodeHas()...)
	err := ns.Do(func() error {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+sandbox.Bridge+"/accept_dad", []byte("1"), 0o644); err != nil {
			return err
		}
		bridge, err := netlink.LinkByName(sandbox.Bridge)
		if err != nil {
			return err
		}
		return netlink.AddrAdd(bridge, &netlink.Addr{
			IPNet: &net.IPNet{IP: duplicate.AsSlice(), Mask: net.CIDRMask(64, 128)},
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, testutil.Patience(), "the duplicate is detected", func() error {
		return ns.Do(func() error {
			found, err := netlink.AddrList(nil, netlink.FAMILY_V6)
			if err != nil || slices.ContainsFunc(found, func(a netlink.Addr) bool {
				return a.IP.Equal(duplicate.AsSlice()) && a.Flags&unix.IFA_F_DADFAILED != 0
			}) {
				return err
			}
			return fmt.Errorf("addresses are %v", found)
		})
	})
	// The next report is surely made after the detection.
	add(t, ns, "lo", "192.0.2.1/32")
	r.wantSoon(t, "an address after the detection", nodeHas("192.0.2.1")...)
}

func TestNodeAddressCounts(t *testing.T) {
	for _, tt := range []struct {
		name  string
		addr  string
		flags int
		want  bool
	}{
		{name: "IPv4", addr: "192.0.2.1", want: true},
		{name: "IPv6", addr: "2001:db8::1", want: true},
		{name: "unique local IPv6", addr: "fd00::1", want: true},
		{name: "IPv4 link-local, as DNS caches have it", addr: "169.254.20.10", want: true},
		{name: "IPv6 link-local", addr: "fe80::1"},
		{name: "IPv4 loopback", addr: "127.0.0.1"},
		{name: "any of 127.0.0.0/8", addr: "127.8.9.10"},
		{name: "IPv6 loopback", addr: "::1"},
		{name: "IPv4 multicast", addr: "224.0.0.1"},
		{name: "IPv6 multicast", addr: "ff02::1"},
		{name: "unspecified", addr: "0.0.0.0"},
		{name: "tentative", addr: "2001:db8::1", flags: unix.IFA_F_TENTATIVE, want: true},
		{name: "deprecated", addr: "2001:db8::1", flags: unix.IFA_F_DEPRECATED, want: true},
		{name: "temporary", addr: "2001:db8::1", flags: unix.IFA_F_TEMPORARY, want: true},
		{name: "another machine's", addr: "2001:db8::1", flags: unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := netip.MustParseAddr(tt.addr)
			// The 16-byte form of IPv4 is what net.ParseIP makes.
			got, ok := nodeAddress(netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(tt.addr)}, Flags: tt.flags})
			if ok != tt.want || ok && got != want {
				t.Errorf("got %v, %t; want %v, %t", got, ok, want, tt.want)
			}
		})
	}
	if got, ok := nodeAddress(netlink.Addr{}); ok {
		t.Errorf("an entry without an address counts as %v", got)
	}
}

func TestNetnsCookieTellsNamespacesApart(t *testing.T) {
	node := testutil.Node(t)
	pod, err := node.AddPod("pod")
	if err != nil {
		t.Fatal(err)
	}
	cookieIn := func(ns *sandbox.Namespace) (cookie uint64) {
		t.Helper()
		err := ns.Do(func() (err error) {
			cookie, err = NetnsCookie()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return cookie
	}
	here, err := NetnsCookie()
	if err != nil {
		t.Fatal(err)
	}
	nodes, pods := cookieIn(node.Namespace()), cookieIn(pod)
	if here == 0 || here == nodes || here == pods || nodes == pods {
		t.Errorf("cookies are %d here, %d of the node, %d of the pod; want three numbers", here, nodes, pods)
	}
	if again := cookieIn(pod); again != pods {
		t.Errorf("the pod's cookie was %d and is %d", pods, again)
	}
}
