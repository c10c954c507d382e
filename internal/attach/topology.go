// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"cmp"
	"math"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// topology knows what the devices of a network namespace are to each other.
type topology struct {
	links  map[int]netlink.Link
	ports  map[int][]netlink.Link // of each device that has some
	addrs  map[int][]netlink.Addr // of each device
	own    map[netip.Addr]bool    // the Node's addresses
	wayOut map[int]bool           // devices that lead beyond the node's own networks
	spare  map[bool]netip.Addr    // the node's address of a family, by whether it is IPv4
}

func newTopology(found inventory, nodeAddresses []netip.Addr) *topology {
	t := &topology{
		links: map[int]netlink.Link{}, ports: map[int][]netlink.Link{}, addrs: map[int][]netlink.Addr{},
		own: map[netip.Addr]bool{}, wayOut: map[int]bool{}, spare: map[bool]netip.Addr{},
	}
	for _, link := range found.links {
		t.links[link.Attrs().Index] = link
		if master := link.Attrs().MasterIndex; master != 0 {
			t.ports[master] = append(t.ports[master], link)
		}
	}
	for _, a := range nodeAddresses {
		t.own[a.Unmap()] = true
	}
	for _, a := range found.addrs {
		t.addrs[a.LinkIndex] = append(t.addrs[a.LinkIndex], a)
		if addr, ok := addressOf(a); ok && t.own[addr] {
			t.wayOut[a.LinkIndex] = true
		}
	}
	for _, r := range found.routes {
		for _, index := range gatewayDevices(&r) {
			t.wayOut[index] = true
		}
	}
	for _, is4 := range []bool{true, false} {
		t.spare[is4] = t.nodeSource(is4, nodeAddresses, found.routes)
	}
	return t
}

// devices returns what WatchDevices reports.
func (t *topology) devices(filter DeviceFilter) []Device {
	var out []Device
	for _, link := range t.links {
		if d, ok := t.device(link, filter); ok {
			out = append(out, d)
		}
	}
	slices.SortFunc(out, func(a, b Device) int { return cmp.Compare(a.Index, b.Index) })
	return out
}

func (t *topology) device(link netlink.Link, filter DeviceFilter) (d Device, ok bool) {
	attrs := link.Attrs()
	l2, known := header(attrs.EncapType)
	use, why := t.use(link, known)
	switch {
	case filter.auto():
	case t.named(link, filter):
		if use, why = hooked, ""; !known {
			use, why = unsupported, noHeader
		}
	case use == hooked || use == unsupported:
		use, why = listed, ""
	}
	if use == absent {
		return Device{}, false
	}
	l3 := t.l3(link)
	d = Device{
		Index: attrs.Index, Name: attrs.Name, Kind: kindOf(link), Hooked: use == hooked, Unsupported: why,
		L2: l2, Pod: t.isPod(link), L3Index: l3.Attrs().Index, Up: attrs.RawFlags&unix.IFF_UP != 0,
		Source4: t.source(l3.Attrs().Index, true), Source6: t.source(l3.Attrs().Index, false),
	}
	if hasHeader, _ := header(l3.Attrs().EncapType); hasHeader && len(l3.Attrs().HardwareAddr) == 6 {
		d.MAC = l3.Attrs().HardwareAddr
	}
	return d, true
}

// named tells whether a list gives the device programs. Of a bond and its ports,
// which see the same packets, only the bond has them.
func (t *topology) named(link netlink.Link, filter DeviceFilter) bool {
	attrs := link.Attrs()
	if attrs.RawFlags&unix.IFF_LOOPBACK != 0 || !filter.names(attrs) {
		return false
	}
	master := t.master(link)
	return master == nil || !isBond(master) || !t.named(master, filter)
}

// use is what becomes of a device.
type use int

const (
	absent      use = iota // not in the list
	listed                 // in it, without programs
	unsupported            // the same, and that may be missed
	hooked                 // with programs
)

const noHeader = "its packets begin neither with an Ethernet header nor with an IP header"

// use tells what becomes of a device with the filter auto, and why it is
// unsupported. known tells whether packets begin with something that programs
// understand.
func (t *topology) use(link netlink.Link, known bool) (u use, why string) {
	attrs := link.Attrs()
	if attrs.RawFlags&unix.IFF_LOOPBACK != 0 {
		return absent, ""
	}
	master := t.master(link)
	switch kind := kindOf(link); kind {
	case "dummy", "ifb", "nlmon", "vrf", "vcan", "can", "vxcan":
		return absent, ""
	case "bridge":
		return listed, ""
	case "macvlan", "macvtap", "ipvlan", "ipvtap":
		return unsupported, "pods on " + kind + " have no link on the host"
	case "openvswitch":
		// An internal port is the switch's link to this node. The switch itself has ports.
		if len(t.ports[attrs.Index]) > 0 {
			return absent, ""
		}
	}
	switch {
	case master != nil && isBond(master):
		return absent, ""
	case master != nil && kindOf(master) == "openvswitch":
		return unsupported, "its Open vSwitch decides by addresses that programs would have translated before"
	case attrs.EncapType == "infiniband":
		return unsupported, noHeader
	case !known:
		return absent, ""
	}
	return hooked, ""
}

// header tells by the kernel's name for a type of links (ARPHRD_*) whether packets
// begin with an Ethernet header, and whether they begin with that or with the IP
// header.
func header(linkType string) (ethernet, known bool) {
	switch linkType {
	case "ether":
		return true, true
	case "none", "ppp", "ipip", "tunnel6", "sit", "gre", "unknown823" /* GRE over IPv6 */, "unknown519" /* bare IP */ :
		return false, true
	default:
		return false, false
	}
}

func kindOf(link netlink.Link) string {
	if tap, ok := link.(*netlink.Tuntap); ok && tap.Mode == netlink.TUNTAP_MODE_TAP {
		return "tap"
	} else if ok {
		return "tun"
	}
	return link.Type()
}

// master returns the device that the link is a port of, nil when there is none.
func (t *topology) master(link netlink.Link) netlink.Link {
	return t.links[link.Attrs().MasterIndex] // no device has index 0
}

func isBond(link netlink.Link) bool {
	kind := kindOf(link)
	return kind == "bond" || kind == "team"
}

// l3 returns the device that packets of the link belong to where they are routed.
func (t *topology) l3(link netlink.Link) netlink.Link {
	for {
		master := t.master(link)
		if master == nil || !isBond(master) && kindOf(master) != "bridge" {
			return link
		}
		link = master
	}
}

// isPod tells whether pods of this node are behind the device and nothing else.
func (t *topology) isPod(link netlink.Link) bool {
	if kindOf(link) != "bridge" {
		return t.isPodLink(link)
	}
	ports := t.ports[link.Attrs().Index]
	return len(ports) > 0 && !slices.ContainsFunc(ports, func(port netlink.Link) bool { return !t.isPodLink(port) })
}

func (t *topology) isPodLink(link netlink.Link) bool {
	switch kindOf(link) {
	case "veth", "netkit":
		if link.Attrs().NetNsID < 0 { // both ends are here
			return false
		}
	case "tap":
	default:
		return false
	}
	// The node itself may be in a container, with a veth as its uplink.
	return !t.wayOut[link.Attrs().Index] && !t.wayOut[t.l3(link).Attrs().Index]
}

// source returns what the node sends from by a device.
func (t *topology) source(index int, is4 bool) netip.Addr {
	if a := t.deviceSource(index, is4); a.IsValid() {
		return a
	}
	return t.spare[is4]
}

// deviceSource returns the address of a device that is best to send from: one of
// the Node's, else the first one that is no other's secondary and not temporary,
// else the first. The zero Addr when the device has none of the family that other
// machines can answer to.
func (t *topology) deviceSource(index int, is4 bool) netip.Addr {
	var best netip.Addr
	rank := math.MaxInt
	for _, a := range t.addrs[index] {
		addr, ok := addressOf(a)
		if !ok || addr.Is4() != is4 || !isSource(a, addr) {
			continue
		}
		r := 1
		switch {
		case t.own[addr]:
			r = 0
		case a.Flags&unix.IFA_F_SECONDARY != 0: // of IPv6: temporary
			r = 2
		}
		if r < rank {
			best, rank = addr, r
		}
	}
	return best
}

// isSource tells whether packets that other machines answer can come from an
// address.
func isSource(a netlink.Addr, addr netip.Addr) bool {
	const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
	return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&unusable == 0 && addr.IsGlobalUnicast()
}

func addressOf(a netlink.Addr) (netip.Addr, bool) {
	if a.IPNet == nil {
		return netip.Addr{}, false
	}
	addr, ok := netip.AddrFromSlice(a.IP)
	return addr.Unmap(), ok
}

// nodeSource returns what the node sends from by devices that have no address of
// the family: the first of nodeAddresses that a device has, else an address of
// the default route's device, else of any other one. The zero Addr when there is none.
func (t *topology) nodeSource(is4 bool, nodeAddresses []netip.Addr, routes []netlink.Route) netip.Addr {
	here := map[netip.Addr]bool{}
	for index := range t.addrs {
		for _, a := range t.addrs[index] {
			if addr, ok := addressOf(a); ok && isSource(a, addr) {
				here[addr] = true
			}
		}
	}
	for _, a := range nodeAddresses {
		if a = a.Unmap(); a.Is4() == is4 && here[a] {
			return a
		}
	}
	for _, index := range t.byWayOut(is4, routes) {
		if a := t.deviceSource(index, is4); a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}

// byWayOut returns all devices with those of the family's default routes first,
// the best route's before others, and loopback devices last.
func (t *topology) byWayOut(is4 bool, routes []netlink.Route) []int {
	metrics := map[int]int{}
	for _, r := range routes {
		if !isDefault(&r) || (r.Family == netlink.FAMILY_V4) != is4 {
			continue
		}
		for _, index := range append(gatewayDevices(&r), r.LinkIndex) {
			metric, seen := metrics[index]
			if !seen || r.Priority < metric {
				metrics[index] = r.Priority
			}
		}
	}
	rank := func(index int) int {
		if metric, ok := metrics[index]; ok {
			return metric
		}
		if t.links[index].Attrs().RawFlags&unix.IFF_LOOPBACK != 0 {
			return math.MaxInt
		}
		return math.MaxInt - 1
	}
	var out []int
	for index := range t.links {
		out = append(out, index)
	}
	slices.SortFunc(out, func(a, b int) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b)) })
	return out
}
