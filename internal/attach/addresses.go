// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// addressSettle is how long changes are gathered after the first of a burst.
	addressSettle = 50 * time.Millisecond
	// ipvsDevice is where kube-proxy in IPVS mode puts the addresses of Services,
	// and leaves them when it ends.
	ipvsDevice = "kube-ipvs0"
)

// WatchAddresses calls report with the addresses of a network namespace, once
// at the start and then within a second of each change to their set, until ctx
// ends; it then returns nil. A burst of changes can be one report. The set is
// sorted, has every address once, and holds what kube-proxy counts as the
// node's, on whatever device and in whatever state that is: IPv4 (4 bytes) and
// IPv6 addresses, tentative ones too. It does not hold
//   - 127.0.0.0/8 and ::1; other addresses of a loopback device are in it
//   - IPv6 link-local addresses, which mean nothing without a device
//   - multicast addresses
//   - IPv6 addresses of which duplicate address detection has found that
//     another machine has them
//   - addresses of the device kube-ipvs0, unless another device has them too:
//     they are Services', put there by kube-proxy in IPVS mode
//
// report is called on the caller's goroutine and may keep the slice, but not
// change it.
//
// The namespace is that of the calling thread: its sockets are opened here,
// also later, when the kernel has lost messages for one. A goroutine that is
// not in the namespace of the process must be locked to its thread.
//
// An error means that addresses could not be listed or subscribed to. What was
// reported may be outdated from then on; call again, and the first report is
// the whole set as it is then.
func WatchAddresses(ctx context.Context, report func([]netip.Addr)) error {
	w := addressWatch{subscribe: subscribeAddresses, relist: relistInterval, report: report}
	return w.run(ctx)
}

// addressWatch is one call of WatchAddresses.
type addressWatch struct {
	subscribe func() (*nl.NetlinkSocket, error)
	relist    time.Duration // how long to wait for a message
	report    func([]netip.Addr)

	listed []netip.Addr
	known  bool         // something has been reported
	last   []netip.Addr // what that was
}

func (w *addressWatch) run(ctx context.Context) error {
	f := follower{
		what: "addresses", subscribe: w.subscribe, settle: addressSettle, relist: w.relist,
		list: w.list, report: w.tell,
	}
	return f.run(ctx)
}

func (w *addressWatch) list() (err error) {
	if w.listed, err = listAddresses(); err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	return nil
}

// tell reports what is listed if it is not what was last reported.
func (w *addressWatch) tell() {
	if w.known && slices.Equal(w.listed, w.last) {
		return
	}
	w.known, w.last = true, w.listed
	w.report(w.listed)
}

// subscribeAddresses returns a socket on which the kernel tells of every change
// to an address in the calling thread's network namespace.
func subscribeAddresses() (*nl.NetlinkSocket, error) {
	return nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
}

// listAddresses returns the set that WatchAddresses describes.
func listAddresses() ([]netip.Addr, error) {
	var services int
	var found []netlink.Addr
	err := whole(func() (err error) {
		services, found, err = listOnce()
		return err
	})
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range found {
		if addr, ok := nodeAddress(a); ok && a.LinkIndex != services {
			out = append(out, addr)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

// listOnce returns the addresses of all devices, and the index of the one that has
// those of Services; 0, which no device has, when there is none.
func listOnce() (services int, found []netlink.Addr, err error) {
	// The device comes first: one that goes afterwards takes its addresses along,
	// and one that comes has none yet.
	device, err := netlink.LinkByName(ipvsDevice)
	switch {
	case err == nil:
		services = device.Attrs().Index
	case !errors.As(err, &netlink.LinkNotFoundError{}):
		return 0, nil, fmt.Errorf("look for device %s: %w", ipvsDevice, err)
	}
	found, err = netlink.AddrList(nil, netlink.FAMILY_ALL)
	return services, found, err
}

// nodeAddress returns the address if WatchAddresses reports it.
func nodeAddress(a netlink.Addr) (addr netip.Addr, ok bool) {
	if a.IPNet == nil || a.Flags&unix.IFA_F_DADFAILED != 0 {
		return netip.Addr{}, false
	}
	addr, ok = netip.AddrFromSlice(a.IP)
	addr = addr.Unmap()
	// IPv4 link-local addresses need no device to mean something; DNS caches on
	// the node listen on them.
	ok = ok && (addr.IsGlobalUnicast() || addr.Is4() && addr.IsLinkLocalUnicast())
	return addr, ok
}

// NetnsCookie returns the number by which BPF programs know the network
// namespace of the calling thread. It needs Linux 5.14.
func NetnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open socket for network namespace cookie: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		err = fmt.Errorf("%w (needs Linux 5.14)", err)
	}
	if err != nil {
		return 0, fmt.Errorf("read network namespace cookie: %w", err)
	}
	return cookie, nil
}
