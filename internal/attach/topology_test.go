// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// attrs returns those of a link as the kernel tells them, for the kinds of links
// that not every kernel can make.
func attrs(name string) *netlink.LinkAttrs {
	return &netlink.LinkAttrs{
		Name: name, NetNsID: -1, EncapType: "ether", HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1},
	}
}

// lab makes links with indexes from 1 on.
type lab struct{ found inventory }

func (l *lab) add(link netlink.Link, change ...func(*netlink.LinkAttrs)) netlink.Link {
	l.found.links = append(l.found.links, link)
	link.Attrs().Index = len(l.found.links)
	for _, f := range change {
		f(link.Attrs())
	}
	return link
}

func portOf(master netlink.Link) func(*netlink.LinkAttrs) {
	return func(a *netlink.LinkAttrs) { a.MasterIndex = master.Attrs().Index }
}

func linkType(name string) func(*netlink.LinkAttrs) {
	return func(a *netlink.LinkAttrs) { a.EncapType = name }
}

func peerElsewhere(a *netlink.LinkAttrs) { a.NetNsID = 0 }

func loopback(a *netlink.LinkAttrs) { a.RawFlags = unix.IFF_LOOPBACK | unix.IFF_UP }

// address gives a link an address.
func (l *lab) address(link netlink.Link, prefix string, flags int) {
	ip, network, err := net.ParseCIDR(prefix)
	if err != nil {
		panic(err)
	}
	l.found.addrs = append(l.found.addrs, netlink.Addr{
		IPNet: &net.IPNet{IP: ip, Mask: network.Mask}, Flags: flags, LinkIndex: link.Attrs().Index,
	})
}

// everyKind returns one device of each kind.
func everyKind() *lab {
	l := &lab{}
	generic := func(name, kind string) netlink.Link {
		return &netlink.GenericLink{LinkAttrs: *attrs(name), LinkType: kind}
	}
	l.add(&netlink.Device{LinkAttrs: *attrs("lo")}, linkType("loopback"), loopback)
	l.add(&netlink.Device{LinkAttrs: *attrs("nic0")})
	bond := l.add(&netlink.Bond{LinkAttrs: *attrs("bond0")})
	l.add(&netlink.Device{LinkAttrs: *attrs("slave0")}, portOf(bond))
	team := l.add(generic("team0", "team"))
	l.add(&netlink.Device{LinkAttrs: *attrs("slave1")}, portOf(team))
	l.add(&netlink.Vlan{LinkAttrs: *attrs("bond0.10")})
	l.add(&netlink.Wireguard{LinkAttrs: *attrs("wg0")}, linkType("none"))
	l.add(&netlink.Iptun{LinkAttrs: *attrs("tunl0")}, linkType("ipip"))
	l.add(&netlink.Ip6tnl{LinkAttrs: *attrs("ip6tnl0")}, linkType("tunnel6"))
	l.add(&netlink.Sittun{LinkAttrs: *attrs("sit0")}, linkType("sit"))
	l.add(&netlink.Gretun{LinkAttrs: *attrs("gre0")}, linkType("gre"))
	l.add(&netlink.Gretun{LinkAttrs: *attrs("ip6gre0")}, linkType("unknown823"))
	l.add(&netlink.Gretap{LinkAttrs: *attrs("gretap0")})
	l.add(&netlink.Geneve{LinkAttrs: *attrs("geneve0")})
	l.add(&netlink.Xfrmi{LinkAttrs: *attrs("xfrm0")}, linkType("none"))
	l.add(generic("ppp0", "ppp"), linkType("ppp"))
	l.add(generic("wwan0", "wwan"), linkType("unknown519"))
	l.add(&netlink.Netkit{LinkAttrs: *attrs("nk0")}, peerElsewhere)
	l.add(&netlink.Dummy{LinkAttrs: *attrs("dummy0")})
	l.add(generic("nlmon0", "nlmon"), linkType("unknown824"))
	vrf := l.add(&netlink.Vrf{LinkAttrs: *attrs("vrf0")})
	l.add(&netlink.Device{LinkAttrs: *attrs("nic1")}, portOf(vrf))
	l.add(&netlink.Macvlan{LinkAttrs: *attrs("macvlan0")})
	l.add(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: *attrs("macvtap0")}})
	l.add(&netlink.IPVlan{LinkAttrs: *attrs("ipvlan0")})
	l.add(&netlink.IPoIB{LinkAttrs: *attrs("ib0")}, linkType("infiniband"))
	l.add(&netlink.Can{LinkAttrs: *attrs("can0")}, linkType("unknown280"))
	ovs := l.add(generic("ovs-system", "openvswitch"))
	l.add(generic("br-ex", "openvswitch"))
	l.add(&netlink.Device{LinkAttrs: *attrs("nic2")}, portOf(ovs))
	bridge := l.add(&netlink.Bridge{LinkAttrs: *attrs("br0")})
	bond1 := l.add(&netlink.Bond{LinkAttrs: *attrs("bond1")}, portOf(bridge))
	l.add(&netlink.Device{LinkAttrs: *attrs("slave2")}, portOf(bond1))
	return l
}

func TestDevicesOfEveryKind(t *testing.T) {
	type device struct {
		Hooked, L2, Pod bool
		L3              int
		Unsupported     string
	}
	const ovsPort = "its Open vSwitch decides by addresses that programs would have translated before"
	index := map[string]int{}
	found := everyKind().found
	for _, link := range found.links {
		index[link.Attrs().Name] = link.Attrs().Index
	}
	for _, tt := range []struct {
		filter string
		want   map[string]device
	}{
		{"auto", map[string]device{
			"nic0": {Hooked: true, L2: true}, "bond0": {Hooked: true, L2: true}, "team0": {Hooked: true, L2: true},
			"bond0.10": {Hooked: true, L2: true}, "wg0": {Hooked: true}, "tunl0": {Hooked: true}, "ip6tnl0": {Hooked: true},
			"sit0": {Hooked: true}, "gre0": {Hooked: true}, "ip6gre0": {Hooked: true}, "gretap0": {Hooked: true, L2: true},
			"geneve0": {Hooked: true, L2: true}, "xfrm0": {Hooked: true}, "ppp0": {Hooked: true}, "wwan0": {Hooked: true},
			"nk0": {Hooked: true, L2: true, Pod: true}, "nic1": {Hooked: true, L2: true},
			"macvlan0": {L2: true, Unsupported: "pods on macvlan have no link on the host"},
			"macvtap0": {L2: true, Unsupported: "pods on macvtap have no link on the host"},
			"ipvlan0":  {L2: true, Unsupported: "pods on ipvlan have no link on the host"},
			"ib0":      {Unsupported: noHeader},
			"br-ex":    {Hooked: true, L2: true},
			"nic2":     {L2: true, Unsupported: ovsPort},
			"br0":      {L2: true},
			"bond1":    {Hooked: true, L2: true, L3: index["br0"]},
		}},
		// A list decides, except on lo and twice on the same packets.
		{"l*,slave*,bond0,d*,mac*,ib0,br0,nic2,can0", map[string]device{
			"nic0": {L2: true}, "bond0": {Hooked: true, L2: true}, "team0": {L2: true},
			"slave1":   {Hooked: true, L2: true, L3: index["team0"]},
			"slave2":   {Hooked: true, L2: true, L3: index["br0"]},
			"bond0.10": {L2: true}, "wg0": {}, "tunl0": {}, "ip6tnl0": {}, "sit0": {}, "gre0": {}, "ip6gre0": {},
			"gretap0": {L2: true}, "geneve0": {L2: true}, "xfrm0": {}, "ppp0": {}, "wwan0": {},
			"nk0": {L2: true, Pod: true}, "nic1": {L2: true}, "dummy0": {Hooked: true, L2: true},
			"macvlan0": {Hooked: true, L2: true}, "macvtap0": {Hooked: true, L2: true}, "ipvlan0": {L2: true},
			"ib0": {Unsupported: noHeader}, "can0": {Unsupported: noHeader},
			"br-ex": {L2: true}, "nic2": {Hooked: true, L2: true}, "br0": {Hooked: true, L2: true},
			"bond1": {L2: true, L3: index["br0"]},
		}},
	} {
		t.Run(tt.filter, func(t *testing.T) {
			filter, err := ParseDevices(tt.filter)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]device{}
			last := 0
			for _, d := range newTopology(found, nil).devices(filter) {
				l3 := d.L3Index
				if l3 == d.Index {
					l3 = 0
				}
				got[d.Name] = device{Hooked: d.Hooked, L2: d.L2, Pod: d.Pod, L3: l3, Unsupported: d.Unsupported}
				if d.Index <= last {
					t.Errorf("device %d comes after %d", d.Index, last)
				}
				last = d.Index
				if (d.MAC != nil) != d.L2 {
					t.Errorf("%s has MAC %s", d.Name, d.MAC)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("devices (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSourcesOfADevice(t *testing.T) {
	for _, tt := range []struct {
		name string
		give func(l *lab, dev, uplink, other, lo netlink.Link)
		own  []netip.Addr
		four string // "" when there is none
		six  string
	}{
		{name: "no address anywhere", give: func(*lab, netlink.Link, netlink.Link, netlink.Link, netlink.Link) {}},
		{name: "its own before the node's", own: addrs("192.0.2.1", "2001:db8::1"),
			give: func(l *lab, dev, uplink, _, _ netlink.Link) {
				l.address(uplink, "192.0.2.1/24", 0)
				l.address(uplink, "2001:db8::1/64", 0)
				l.address(dev, "10.0.0.1/24", 0)
				l.address(dev, "fd00::1/64", 0)
			}, four: "10.0.0.1", six: "fd00::1"},
		{name: "the first of several", give: func(l *lab, dev, _, _, _ netlink.Link) {
			l.address(dev, "10.0.0.1/24", 0)
			l.address(dev, "10.0.1.1/24", 0)
		}, four: "10.0.0.1"},
		{name: "the Node's before a virtual address", own: addrs("10.0.0.5"), give: func(l *lab, dev, _, _, _ netlink.Link) {
			l.address(dev, "10.0.0.1/32", 0)
			l.address(dev, "10.0.0.5/24", unix.IFA_F_SECONDARY)
		}, four: "10.0.0.5"},
		{name: "no secondary and no temporary address while there is another", give: func(l *lab, dev, _, _, _ netlink.Link) {
			l.address(dev, "10.0.0.1/24", unix.IFA_F_SECONDARY)
			l.address(dev, "10.0.0.2/24", 0)
			l.address(dev, "2001:db8::1/64", unix.IFA_F_TEMPORARY)
			l.address(dev, "2001:db8::2/64", 0)
		}, four: "10.0.0.2", six: "2001:db8::2"},
		{name: "a temporary address rather than none", give: func(l *lab, dev, _, _, _ netlink.Link) {
			l.address(dev, "2001:db8::1/64", unix.IFA_F_TEMPORARY)
		}, six: "2001:db8::1"},
		{name: "no address that nobody answers to", give: func(l *lab, dev, _, _, _ netlink.Link) {
			l.address(dev, "169.254.1.1/16", 0)
			l.address(dev, "fe80::1/64", 0)
			l.address(dev, "2001:db8::1/64", unix.IFA_F_TENTATIVE)
			l.address(dev, "2001:db8::2/64", unix.IFA_F_DEPRECATED)
			l.address(dev, "2001:db8::3/64", unix.IFA_F_DADFAILED)
		}},
		{name: "the Node's rather than another one of the default route's device", own: addrs("192.0.2.9"),
			give: func(l *lab, _, uplink, other, _ netlink.Link) {
				l.address(uplink, "192.0.2.1/24", 0)
				l.address(other, "192.0.2.9/24", 0)
			}, four: "192.0.2.9"},
		{name: "the default route's device, if the Node has no address here", own: addrs("203.0.113.1"),
			give: func(l *lab, _, uplink, other, lo netlink.Link) {
				l.address(lo, "198.51.100.1/32", 0)
				l.address(other, "10.9.0.1/24", 0)
				l.address(uplink, "192.0.2.1/24", 0)
			}, four: "192.0.2.1"},
		{name: "any device before lo", give: func(l *lab, _, _, other, lo netlink.Link) {
			l.address(lo, "198.51.100.1/32", 0)
			l.address(other, "10.9.0.1/24", 0)
		}, four: "10.9.0.1"},
		{name: "lo's rather than none", give: func(l *lab, _, _, _, lo netlink.Link) {
			l.address(lo, "127.0.0.1/8", 0)
			l.address(lo, "198.51.100.1/32", 0)
		}, four: "198.51.100.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &lab{}
			lo := l.add(&netlink.Device{LinkAttrs: *attrs("lo")}, linkType("loopback"), loopback)
			dev := l.add(&netlink.Device{LinkAttrs: *attrs("dev")})
			other := l.add(&netlink.Device{LinkAttrs: *attrs("other")})
			backup := l.add(&netlink.Device{LinkAttrs: *attrs("backup")})
			uplink := l.add(&netlink.Device{LinkAttrs: *attrs("uplink")})
			for _, r := range []struct {
				link   netlink.Link
				metric int
				table  int
			}{{backup, 200, unix.RT_TABLE_MAIN}, {uplink, 100, unix.RT_TABLE_MAIN}, {other, 0, 100}} {
				l.found.routes = append(l.found.routes, netlink.Route{
					Family: netlink.FAMILY_V4, Type: unix.RTN_UNICAST, Table: r.table, Priority: r.metric,
					LinkIndex: r.link.Attrs().Index, Gw: net.IP{192, 0, 2, 254},
				})
			}
			l.address(backup, "169.254.7.7/16", 0) // none to send from
			tt.give(l, dev, uplink, other, lo)
			d, ok := newTopology(l.found, tt.own).device(dev, DeviceFilter{})
			if !ok {
				t.Fatal("the device is not in the list")
			}
			for _, s := range []struct {
				got  netip.Addr
				want string
			}{{d.Source4, tt.four}, {d.Source6, tt.six}} {
				if want, _ := netip.ParseAddr(s.want); s.got != want {
					t.Errorf("source is %v, want %v", s.got, want)
				}
			}
		})
	}
}
