// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// deviceSettle is how long changes of devices are gathered after the first of a
// burst: a pod should not wait for it.
const deviceSettle = 5 * time.Millisecond

// DeviceFilter says which devices get the programs of the packet path. The zero
// value is auto: all that clients or backends can be behind.
type DeviceFilter struct {
	patterns []string
}

// ParseDevices reads "auto" or a list of names and shell patterns (*, ?, [a-z])
// with commas between them.
func ParseDevices(s string) (DeviceFilter, error) {
	if strings.TrimSpace(s) == "auto" {
		return DeviceFilter{}, nil
	}
	var f DeviceFilter
	for pattern := range strings.SplitSeq(s, ",") {
		pattern = strings.TrimSpace(pattern)
		if err := checkPattern(pattern); err != nil {
			return DeviceFilter{}, fmt.Errorf("devices %q: %w", s, err)
		}
		f.patterns = append(f.patterns, pattern)
	}
	return f, nil
}

func checkPattern(pattern string) error {
	switch {
	case pattern == "":
		return errors.New("an empty name (write auto for all devices)")
	case pattern == "auto":
		return errors.New("auto stands alone")
	case pattern == "lo":
		return errors.New("lo carries no packets of clients")
	}
	if _, err := path.Match(pattern, ""); err != nil || strings.ContainsAny(pattern, "/\\ \t") {
		return fmt.Errorf("%q is no name or pattern of a device", pattern)
	}
	return nil
}

// String returns what ParseDevices reads.
func (f DeviceFilter) String() string {
	if f.auto() {
		return "auto"
	}
	return strings.Join(f.patterns, ",")
}

func (f DeviceFilter) auto() bool { return len(f.patterns) == 0 }

// names tells whether the filter is a list and holds the device by its name or
// one of its other names.
func (f DeviceFilter) names(link *netlink.LinkAttrs) bool {
	return slices.ContainsFunc(f.patterns, func(pattern string) bool {
		return slices.ContainsFunc(append([]string{link.Name}, link.AltNames...), func(name string) bool {
			ok, err := path.Match(pattern, name)
			return ok && err == nil
		})
	})
}

// Device is a network device that packets of clients or backends can come by.
type Device struct {
	Index int
	Name  string
	Kind  string // as ip-link(8) names it; "device" for hardware
	// Hooked says that programs belong on it. A bridge usually has none: its
	// ports do, but routes are the bridge's, so it is in the list as well.
	Hooked bool
	L2     bool // frames begin with an Ethernet header
	// Pod says that pods of this node are behind it and nothing else.
	Pod     bool
	L3Index int // the device that its routes and addresses are of: its bridge, or itself
	// Source4 and Source6 are what the node sends from by this device: an address
	// of the device L3Index or else the node's. The zero Addr when there is none.
	Source4, Source6 netip.Addr
	MAC              net.HardwareAddr // of the device L3Index; nil without an Ethernet header
	Up               bool             // as its administrator wants it
	// Unsupported says why it has no programs although packets of clients may
	// come by it; "" otherwise.
	Unsupported string
}

// WatchDevices calls changed with the devices of a network namespace, once at the
// start and then soon after each change to what it reports, until ctx ends; it then
// returns nil. A burst of changes can be one call. The list is sorted by Index.
// Devices that no packets of clients come by, like lo or dummies, and those that
// are part of another one, like the ports of a bond, are not in it.
//
// With the filter auto programs belong on hardware, bonds and teams, VLANs, tunnels,
// veths, netkits, taps and internal ports of Open vSwitch, among them the ports of
// bridges. They do not belong on macvlans and ipvlans, ports of Open vSwitch and
// InfiniBand, which are in the list as unsupported. With a filter that is a list they belong
// on those it names, whatever their kind, but not on lo nor on a port of a
// bond that is named too; the others are in the list without them.
//
// A device is a pod's when it is a veth or netkit with its other end in another
// namespace, or a tap, unless it is the node's own way out: unless it or its bridge
// has one of nodeAddresses or a route through a gateway. A bridge is when all its
// ports are and there is one. nodeAddresses is asked at every change and twice a
// minute. It may be called on the caller's goroutine only, as changed, which
// may keep the slice but not change it.
//
// The namespace is that of the calling thread: its sockets are opened here,
// also later, when the kernel has lost messages for one. A goroutine that is
// not in the namespace of the process must be locked to its thread.
//
// An error means that devices could not be listed or subscribed to. What was
// reported may be outdated from then on; call again, and the first report is
// the whole list as it is then.
func WatchDevices(ctx context.Context, filter DeviceFilter, nodeAddresses func() []netip.Addr, changed func([]Device)) error {
	w := deviceWatch{
		filter: filter, nodeAddresses: nodeAddresses, changed: changed,
		subscribe: subscribeDevices, relist: relistInterval,
	}
	return w.run(ctx)
}

// deviceWatch is one call of WatchDevices.
type deviceWatch struct {
	filter        DeviceFilter
	nodeAddresses func() []netip.Addr
	changed       func([]Device)
	subscribe     func() (*nl.NetlinkSocket, error)
	relist        time.Duration

	listed []Device
	known  bool     // something has been reported
	last   []Device // what that was
}

func (w *deviceWatch) run(ctx context.Context) error {
	f := follower{
		what: "devices", subscribe: w.subscribe, settle: deviceSettle, relist: w.relist,
		list: w.list, report: w.tell,
	}
	return f.run(ctx)
}

func (w *deviceWatch) list() error {
	found, err := takeInventory()
	if err != nil {
		return err
	}
	w.listed = newTopology(found, w.nodeAddresses()).devices(w.filter)
	return nil
}

// tell reports what is listed if it is not what was last reported.
func (w *deviceWatch) tell() {
	if w.known && reflect.DeepEqual(w.listed, w.last) {
		return
	}
	w.known, w.last = true, w.listed
	w.changed(w.listed)
}

// subscribeDevices returns a socket on which the kernel tells of all changes to
// links, addresses and routes of the calling thread's network namespace.
func subscribeDevices() (*nl.NetlinkSocket, error) {
	return nl.Subscribe(unix.NETLINK_ROUTE,
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEXTHOP)
}

// inventory is what the kernel says of a network namespace.
type inventory struct {
	links  []netlink.Link
	addrs  []netlink.Addr
	routes []netlink.Route // of all tables, those through a gateway and default routes
}

func takeInventory() (inventory, error) {
	var found inventory
	for _, list := range []struct {
		what string
		take func() error
	}{
		{"links", func() (err error) { found.links, err = netlink.LinkList(); return err }},
		{"addresses", func() (err error) { found.addrs, err = netlink.AddrList(nil, netlink.FAMILY_ALL); return err }},
		{"routes", func() (err error) { found.routes, err = listRoutes(); return err }},
	} {
		if err := whole(list.take); err != nil {
			return inventory{}, fmt.Errorf("list %s: %w", list.what, err)
		}
	}
	return found, nil
}

func listRoutes() ([]netlink.Route, error) {
	var out []netlink.Route
	keep := func(r netlink.Route) bool {
		if isDefault(&r) || len(gatewayDevices(&r)) > 0 {
			out = append(out, r)
		}
		return true
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		every := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		if err := netlink.RouteListFilteredIter(family, every, netlink.RT_FILTER_TABLE, keep); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// gatewayDevices returns the devices by which the route leads to gateways.
func gatewayDevices(r *netlink.Route) []int {
	var out []int
	if r.Via != nil || len(r.Gw) > 0 && !r.Gw.IsUnspecified() {
		out = append(out, r.LinkIndex)
	}
	for _, hop := range r.MultiPath {
		if hop.Via != nil || len(hop.Gw) > 0 && !hop.Gw.IsUnspecified() {
			out = append(out, hop.LinkIndex)
		}
	}
	return out
}

// isDefault tells whether the route leads wherever no other one does.
func isDefault(r *netlink.Route) bool {
	if r.Type != unix.RTN_UNICAST || r.Table != unix.RT_TABLE_MAIN {
		return false
	}
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0
}
