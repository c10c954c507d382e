// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// namePrefix begins the names of namespaces; testutil removes what killed runs left.
const namePrefix = "fairlead-test"

// family is an index into addrs.
type family int

const (
	ipv4 family = iota
	ipv6
)

var families = []family{ipv4, ipv6}

func (f family) String() string { return []string{"IPv4", "IPv6"}[f] }

// icmp returns the family's ICMP.
func (f family) icmp() uint8 { return []uint8{packet.ICMP, packet.ICMPv6}[f] }

// bits returns the length of the family's addresses.
func (f family) bits() int { return []int{32, 128}[f] }

// addrs are the addresses of something, one in each family.
type addrs [2]netip.Addr

func both(v4, v6 string) addrs { return addrs{netip.MustParseAddr(v4), netip.MustParseAddr(v6)} }

// Everybody there is. Each is behind one device of the node:
//
//	eth0   uplink: router (and the client behind it), the node otherNode and its pod
//	eth1   second uplink: a third node and its pod farPod
//	pod0   pod      } routed, each by a link of its own
//	pod1   podB     }
//	port0  bridged  } ports of the bridge cni0
//	port1  bridgedB }
//	tun0   a tunnel without Ethernet: tunnelClient and tunnelPod
var (
	client       = both("198.51.100.10", "2001:db8:51::10")
	otherClient  = both("198.51.100.20", "2001:db8:51::20")
	router       = both("192.0.2.1", "2001:db8:2::1")
	nodeAddr     = both("192.0.2.11", "2001:db8:2::11")
	otherNode    = both("192.0.2.12", "2001:db8:2::12")
	remotePod    = both("10.244.2.2", "fd00:244:2::2")
	remotePodB   = both("10.244.2.3", "fd00:244:2::3")
	nodeAddr1    = both("192.0.3.11", "2001:db8:3::11")
	thirdNode    = both("192.0.3.12", "2001:db8:3::12")
	farPod       = both("10.244.3.2", "fd00:244:3::2")
	pod          = both("10.244.1.2", "fd00:244:1::2")
	podB         = both("10.244.1.3", "fd00:244:1::3")
	bridgeAddr   = both("10.244.5.1", "fd00:244:5::1")
	bridged      = both("10.244.5.2", "fd00:244:5::2")
	bridgedB     = both("10.244.5.3", "fd00:244:5::3")
	tunnelAddr   = both("8.0.1.11", "2001:db8:86dd:1::11")
	tunnelClient = both("8.0.2.10", "2001:db8:86dd:2::10")
	tunnelPod    = both("8.0.4.2", "fd00:244:86dd:4::2")
	// Routers on the way to backends and to clients, which no table knows.
	backendRouter = both("8.0.255.1", "fd00:255:86dd::1")
	clientRouter  = both("8.0.254.1", "2001:db8:86dd:ff::1")
)

// A program that is run for a test is always given an Ethernet header. What has none
// must look as if it had: where a header says that IP follows, these addresses, as
// sources, have the same bytes. They are those of everybody behind the tunnel.

// Addresses of Services.
var (
	clusterIP    = both("10.96.0.80", "fd00:96::80")
	otherCluster = both("10.96.0.81", "fd00:96::81")
	balancer     = both("203.0.113.80", "2001:db8:80::80")
	external     = both("203.0.113.90", "2001:db8:80::90")
	nobody       = both("10.96.1.1", "fd00:96::1:1") // in a service CIDR, no Service's
	serviceCIDR  = [2]netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/64")}
)

// device is a device of the node.
type device struct {
	name    string
	index   uint32
	mac     packet.MAC // zero without Ethernet
	isPod   bool
	l3      string // the device that routes are of
	address addrs  // the node's there
}

// mac returns the n-th hardware address of ours.
func mac(n byte) packet.MAC { return packet.MAC{0x0a, 0x58, 0, 0, 0, n} }

// Hardware addresses: the node's devices have 1 to 9, neighbours these.
var (
	routerMAC, otherNodeMAC, thirdNodeMAC = mac(0x11), mac(0x12), mac(0x13)
	podMAC, podBMAC                       = mac(0x21), mac(0x22)
	bridgedMAC, bridgedBMAC               = mac(0x23), mac(0x24)
)

// neighbours says by which device and at which hardware address the node finds
// others.
var neighbours = []struct {
	device string
	addrs  addrs
	mac    packet.MAC
}{
	{"eth0", router, routerMAC},
	{"eth0", otherNode, otherNodeMAC},
	{"eth1", thirdNode, thirdNodeMAC},
	{"pod0", pod, podMAC},
	{"pod1", podB, podBMAC},
	{"cni0", bridged, bridgedMAC},
	{"cni0", bridgedB, bridgedBMAC},
}

// routes are the node's beside those that follow from its addresses. Without a
// gateway the destination is on the link itself.
var routes = []struct {
	device string
	to     [2]string
	via    addrs
	source addrs
}{
	{device: "eth0", to: [2]string{"0.0.0.0/0", "::/0"}, via: router},
	{device: "eth0", to: [2]string{"10.244.2.0/24", "fd00:244:2::/64"}, via: otherNode},
	{device: "eth1", to: [2]string{"10.244.3.0/24", "fd00:244:3::/64"}, via: thirdNode},
	{device: "pod0", to: [2]string{"10.244.1.2/32", "fd00:244:1::2/128"}, source: nodeAddr},
	{device: "pod1", to: [2]string{"10.244.1.3/32", "fd00:244:1::3/128"}, source: nodeAddr},
	{device: "unreachable", to: [2]string{"10.250.0.0/16", "fd00:250::/64"}},
	{device: "tun0", to: [2]string{"8.0.4.0/24", "fd00:244:86dd:4::/64"}},
	{device: "tun0", to: [2]string{"8.0.2.0/24", "2001:db8:86dd:2::/64"}},
}

// world is a node without an agent, and a namespace with the other ends of its
// links, where nobody answers.
type world struct {
	node, far *sandbox.Namespace
	root      string
	devices   map[string]*device
	datapath  *datapath.Datapath
	flows     *ebpf.Map

	services uint32 // IDs handed out
	slots    uint32
}

// snatPorts is the usual range.
var snatPorts = datapath.PortRange{First: 61000, Last: 65535}

// newWorld builds a world whose tables are empty but for the node's addresses, the
// devices and the service CIDRs. change may alter how the datapath is opened.
func newWorld(t testing.TB, change func(*datapath.Config)) *world {
	t.Helper()
	testutil.RequireRoot(t)
	network, err := sandbox.NewNetwork(namePrefix)
	must(t, err)
	t.Cleanup(func() { must(t, network.Close()) })
	w := &world{root: testutil.BPFRoot(t), devices: map[string]*device{}}
	w.node, err = network.AddNamespace("node")
	must(t, err)
	w.far, err = network.AddNamespace("far")
	must(t, err)
	w.connect(t)
	w.open(t, change)
	return w
}

func (w *world) open(t testing.TB, change func(*datapath.Config)) {
	t.Helper()
	config := datapath.Config{
		Root: w.root, PacketPath: true, SNATPorts: snatPorts, ReplyRate: 100_000, ReplyBurst: 100_000,
		// Of an LRU map each processor keeps rows for itself and rather takes those
		// in use than another's.
		Sizes: datapath.Sizes{Frontends: 4096, Services: 4096, Slots: 8192, Flows: 65536},
	}
	if change != nil {
		change(&config)
	}
	d, err := datapath.Open(config)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	must(t, d.NoPacketPath)
	w.datapath = d
	w.flows, err = ebpf.LoadPinnedMap(datapath.MapPath(w.root, "flows"), nil)
	must(t, err)
	t.Cleanup(func() { must(t, w.flows.Close()) })
	w.fill(t)
}

// fill writes what all cases have in common.
func (w *world) fill(t testing.TB) {
	t.Helper()
	var devices []datapath.Device
	for _, d := range w.devices {
		devices = append(devices, datapath.Device{
			Index: d.index, Pod: d.isPod, L3Index: w.devices[d.l3].index, MAC: w.devices[d.l3].mac,
			Source4: d.address[ipv4], Source6: d.address[ipv6],
		})
	}
	must(t, w.datapath.SetDevices(devices))
	for _, f := range families {
		must(t, w.datapath.SetServiceCIDR(serviceCIDR[f]))
		must(t, w.datapath.SetNodeAddress(nodeAddr[f], nodeAddressOpen))
	}
}

// connect makes the node's devices.
func (w *world) connect(t testing.TB) {
	t.Helper()
	for _, ns := range []*sandbox.Namespace{w.node, w.far} {
		for _, key := range []string{"all/rp_filter", "default/rp_filter", "all/send_redirects", "default/send_redirects"} {
			must(t, ns.SetSysctl("ipv4/conf/"+key, "0"))
		}
	}
	for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding"} {
		must(t, w.node.SetSysctl(key, "1"))
	}
	must(t, w.far.SetSysctl("ipv6/conf/all/disable_ipv6", "1"))
	must(t, w.far.SetSysctl("ipv6/conf/default/disable_ipv6", "1"))

	tunnel, err := sandbox.ConnectL3(w.node, "tun0", w.far, "tun0")
	must(t, err)
	t.Cleanup(func() { must(t, tunnel.Close()) })
	far, err := os.Open(w.far.Path())
	must(t, err)
	defer far.Close()
	must(t, w.node.Do(func() error { return w.addLinks(int(far.Fd())) }))
	must(t, w.far.Do(bringUp))
	must(t, w.node.Do(func() error {
		if err := bringUp(); err != nil {
			return err
		}
		return w.addRoutes()
	}))
}

// addLinks makes the links of the calling thread's namespace, all but tun0, with
// their other ends in the namespace that far is open on.
func (w *world) addLinks(far int) error {
	for i, d := range []device{
		{name: "eth0", address: nodeAddr},
		{name: "eth1", address: nodeAddr1},
		{name: "pod0", isPod: true},
		{name: "pod1", isPod: true},
		{name: "cni0", isPod: true, address: bridgeAddr}, // its ports have the programs
		{name: "port0", isPod: true, l3: "cni0", address: bridgeAddr},
		{name: "port1", isPod: true, l3: "cni0", address: bridgeAddr},
		{name: "tun0", address: tunnelAddr},
	} {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = d.name
		if d.name != "tun0" {
			d.mac = mac(byte(i + 1))
			attrs.HardwareAddr = d.mac[:]
		}
		if d.l3 == "" {
			d.l3 = d.name
		} else {
			attrs.MasterIndex = int(w.devices[d.l3].index)
		}
		var link netlink.Link = &netlink.Veth{LinkAttrs: attrs, PeerName: d.name, PeerNamespace: netlink.NsFd(far)}
		switch d.name {
		case "cni0":
			link = &netlink.Bridge{LinkAttrs: attrs}
		case "eth1":
			attrs.MTU = narrow
			link = &netlink.Veth{LinkAttrs: attrs, PeerName: d.name, PeerNamespace: netlink.NsFd(far)}
		}
		if d.name != "tun0" {
			if err := netlink.LinkAdd(link); err != nil {
				return fmt.Errorf("make %s: %w", d.name, err)
			}
		}
		made, err := netlink.LinkByName(d.name)
		if err != nil {
			return fmt.Errorf("find %s: %w", d.name, err)
		}
		d.index = uint32(made.Attrs().Index)
		w.devices[d.name] = &d
	}
	return nil
}

// bringUp brings all links of the calling thread's namespace up.
func bringUp() error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, link := range links {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring %s up: %w", link.Attrs().Name, err)
		}
	}
	return nil
}

// addRoutes gives the node its addresses, neighbours and routes.
func (w *world) addRoutes() error {
	for _, d := range w.devices {
		for _, f := range families {
			if !d.address[f].IsValid() || d.l3 != d.name {
				continue
			}
			prefix := netip.PrefixFrom(d.address[f], []int{24, 64}[f])
			addr := &netlink.Addr{IPNet: ipNet(prefix), Flags: unix.IFA_F_NODAD}
			if err := netlink.AddrAdd(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: int(d.index)}}, addr); err != nil {
				return fmt.Errorf("add %s to %s: %w", prefix, d.name, err)
			}
		}
	}
	for _, f := range families {
		for _, n := range neighbours {
			neigh := &netlink.Neigh{
				LinkIndex: int(w.devices[n.device].index), IP: n.addrs[f].AsSlice(),
				HardwareAddr: net.HardwareAddr(n.mac[:]), State: netlink.NUD_PERMANENT,
			}
			if err := netlink.NeighAdd(neigh); err != nil {
				return fmt.Errorf("add neighbour %s: %w", n.addrs[f], err)
			}
		}
		for _, r := range routes {
			route := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(r.to[f]))}
			if d := w.devices[r.device]; d != nil {
				route.LinkIndex = int(d.index)
			} else {
				route.Type = unix.RTN_UNREACHABLE
			}
			if r.source[f].IsValid() {
				route.Src = r.source[f].AsSlice()
			}
			if r.via[f].IsValid() {
				route.Gw = r.via[f].AsSlice()
			} else if f == ipv4 && route.LinkIndex != 0 {
				route.Scope = netlink.SCOPE_LINK
			}
			if err := netlink.RouteAdd(route); err != nil {
				return fmt.Errorf("add route to %s: %w", r.to[f], err)
			}
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// forget empties the flows.
func (w *world) forget(t testing.TB) {
	t.Helper()
	for {
		key := make([]byte, w.flows.KeySize())
		if err := w.flows.NextKey(nil, key); err != nil {
			return
		}
		must(t, w.flows.Delete(key))
	}
}

// patience bounds the wait for what must happen.
const patience = 10 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
