// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sctp

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// addrs are the addresses of something: IPv4's, IPv6's.
type addrs [2]netip.Addr

func both(v4, v6 string) addrs { return addrs{netip.MustParseAddr(v4), netip.MustParseAddr(v6)} }

func (a addrs) port(family int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(a[family], port)
}

// families are the indexes of addrs.
var families = []string{"IPv4", "IPv6"}

// Two machines outside, each behind a link of its own, and two pods behind the node's
// bridge.
var (
	outsideAddrs = both("192.0.2.1", "2001:db8:2::1")
	nodeAddrs    = both("192.0.2.10", "2001:db8:2::10") // the node's own, towards outside
	wiredAddrs   = both("198.51.100.2", "2001:db8:51::2")
	nodeWired    = both("198.51.100.10", "2001:db8:51::10") // towards wired
	podAddrs     = both("10.244.0.11", "fd00:244::11")
	askingAddrs  = both("10.244.0.12", "fd00:244::12")
)

// Where backends listen.
const backendPort = 9899

// kind is what the link between the node and a machine is made of.
type kind string

const (
	// veth leaves checksums out where packets do not leave the machine, as devices
	// do that put them in themselves.
	veth kind = "veth"
	// wire is the devices that are wired to each other in the machines of tests/vm.
	// They leave checksums to the kernel, and the receiver looks at each.
	wire kind = "wire"
)

// wired are the addresses of these devices.
var wired = [2]net.HardwareAddr{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}}

// world is a node with what is around it. Servers are everywhere but in the asking
// pod and on the node.
type world struct {
	node           *sandbox.Node
	outside, wired *sandbox.Namespace
	pod, asking    *sandbox.Namespace
	servers        map[string]*server // by name and family
	datapath       *datapath.Datapath // once startPath was called
}

func newWorld(t *testing.T) *world {
	t.Helper()
	needSCTP(t)
	w := &world{node: testutil.Node(t), servers: map[string]*server{}}
	node := w.node.Namespace()
	network, err := sandbox.NewNetwork("fairlead-test")
	must(t, err)
	t.Cleanup(func() { must(t, network.Close()) })
	w.outside, err = network.AddNamespace("outside")
	must(t, err)
	w.wired, err = network.AddNamespace("wired")
	must(t, err)
	w.pod, err = w.node.AddPod("pod", podAddrs[0], podAddrs[1])
	must(t, err)
	w.asking, err = w.node.AddPod("asking", askingAddrs[0], askingAddrs[1])
	must(t, err)
	veth.connect(t, node, "uplink0", nodeAddrs, w.outside, outsideAddrs)
	wire.connect(t, node, "uplink1", nodeWired, w.wired, wiredAddrs)
	for f, family := range families {
		must(t, addDefaultRoute(w.outside, nodeAddrs[f]))
		must(t, addDefaultRoute(w.wired, nodeWired[f]))
		// What a process sends to a ClusterIP must have a way to begin with.
		must(t, addDefaultRoute(node, outsideAddrs[f]))
		w.servers["pod"+family] = serve(t, w.pod, podAddrs.port(f, backendPort), "pod")
		w.servers["outside"+family] = serve(t, w.outside, outsideAddrs.port(f, backendPort), "outside")
		w.servers["wired"+family] = serve(t, w.wired, wiredAddrs.port(f, backendPort), "wired")
	}
	// The kernel takes no ICMP error while the call is going on that has sent the
	// INIT, so a test waits for the next one.
	for _, ns := range w.namespaces() {
		must(t, ns.SetSysctl("sctp/rto_initial", "300"))
	}
	t.Cleanup(func() { w.wantNoChecksumErrors(t) })
	return w
}

func (w *world) namespaces() map[string]*sandbox.Namespace {
	return map[string]*sandbox.Namespace{
		"node": w.node.Namespace(), "outside": w.outside, "wired": w.wired, "pod": w.pod, "asking pod": w.asking,
	}
}

// needSCTP skips a test where the kernel does not have the protocol. Only the
// machines of tests/vm must have it.
func needSCTP(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err == nil {
		must(t, unix.Close(fd))
		return
	}
	needMachine(t, fmt.Sprintf("the kernel has no SCTP: %v", err))
}

// needMachine skips a test outside of the machines of tests/vm, and there fails.
func needMachine(t *testing.T, why string) {
	t.Helper()
	if testutil.Emulated() {
		t.Fatal(why)
	}
	t.Skip(why)
}

// connect makes a link of the kind, with a name and addresses on the node and uplink
// there. It is taken away when the test ends.
func (k kind) connect(t *testing.T, node *sandbox.Namespace, name string, atNode addrs, there *sandbox.Namespace, at addrs) {
	t.Helper()
	if k == wire {
		takeWired(t, wired[0], node, name)
		takeWired(t, wired[1], there, "uplink")
	} else {
		must(t, node.Do(func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = name
			peer, err := os.Open(there.Path())
			if err != nil {
				return err
			}
			defer peer.Close()
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "uplink", PeerNamespace: netlink.NsFd(int(peer.Fd()))})
		}))
	}
	must(t, setUp(node, name))
	must(t, setUp(there, "uplink"))
	for _, addr := range atNode {
		must(t, node.AddAddr(name, netip.PrefixFrom(addr, addr.BitLen()*3/4)))
	}
	for _, addr := range at {
		must(t, there.AddAddr("uplink", netip.PrefixFrom(addr, addr.BitLen()*3/4)))
	}
}

// takeWired moves a device of the machine into a namespace until the test ends.
func takeWired(t *testing.T, mac net.HardwareAddr, to *sandbox.Namespace, name string) {
	t.Helper()
	link, err := findLink(mac)
	if err != nil {
		needMachine(t, err.Error())
	}
	there, err := os.Open(to.Path())
	must(t, err)
	defer there.Close()
	home, err := os.Open("/proc/self/ns/net")
	must(t, err)
	must(t, netlink.LinkSetDown(link))
	must(t, netlink.LinkSetNsFd(link, int(there.Fd())))
	old := link.Attrs().Name
	t.Cleanup(func() {
		defer home.Close()
		must(t, to.Do(func() error {
			link, err := findLink(mac)
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetDown(link), netlink.LinkSetName(link, old), netlink.LinkSetNsFd(link, int(home.Fd())))
		}))
	})
	must(t, to.Do(func() error {
		link, err := findLink(mac)
		if err != nil {
			return err
		}
		return netlink.LinkSetName(link, name)
	}))
}

// findLink returns the device with a hardware address in the calling thread's
// namespace.
func findLink(mac net.HardwareAddr) (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if l.Attrs().HardwareAddr.String() == mac.String() {
			return l, nil
		}
	}
	return nil, fmt.Errorf("no network device has the address %s", mac)
}

func setUp(ns *sandbox.Namespace, name string) error {
	return ns.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
}

func addDefaultRoute(ns *sandbox.Namespace, via netip.Addr) error {
	return ns.Do(func() error { return netlink.RouteAdd(&netlink.Route{Gw: via.AsSlice()}) })
}

// checksumErrors returns how many packets of a namespace had a wrong CRC32c when
// they came to SCTP.
func checksumErrors(ns *sandbox.Namespace) (n int, err error) {
	err = ns.Do(func() error {
		f, err := os.Open("/proc/thread-self/net/sctp/snmp")
		if err != nil {
			return err
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if name, value, ok := strings.Cut(lines.Text(), "\t"); ok && strings.TrimSpace(name) == "SctpChecksumErrors" {
				n, err = strconv.Atoi(strings.TrimSpace(value))
				return err
			}
		}
		return errors.New("no SctpChecksumErrors in /proc/net/sctp/snmp")
	})
	return n, err
}

// wantNoChecksumErrors: a packet with a wrong one is dropped and sent again, which
// tests would not notice.
func (w *world) wantNoChecksumErrors(t *testing.T) {
	t.Helper()
	for name, ns := range w.namespaces() {
		n, err := checksumErrors(ns)
		must(t, err)
		if n != 0 {
			t.Errorf("%d packets had a wrong checksum when they came to the %s", n, name)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
