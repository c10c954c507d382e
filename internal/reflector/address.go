// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"net/netip"

	netutils "k8s.io/utils/net"
)

// parseAddr reads an address as Kubernetes does: leading zeros are decimal
// (netip refuses them) and ::ffff:a.b.c.d is IPv4.
func parseAddr(text string) (addr netip.Addr, ok bool) {
	addr, ok = netip.AddrFromSlice(netutils.ParseIPSloppy(text))
	return addr.Unmap(), ok
}

// parsePrefix reads a CIDR as parseAddr reads an address, and masks it. A mask
// that covers less than the ::ffff: before an IPv4 address leaves an IPv6 one.
func parsePrefix(text string) (prefix netip.Prefix, ok bool) {
	ip, network, err := netutils.ParseCIDRSloppy(text)
	if err != nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(ip)
	bits, size := network.Mask.Size()
	const mapped = 96 // bits of ::ffff:
	switch {
	case addr.Is4In6() && size == 32:
		addr = addr.Unmap()
	case addr.Is4In6() && bits >= mapped:
		addr, bits = addr.Unmap(), bits-mapped
	}
	return netip.PrefixFrom(addr, bits).Masked(), ok
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// reserved says why no Service can have this address; it is empty when one can.
// Taking such an address over would cut the node and its pods off from
// themselves or from their network.
func reserved(a netip.Addr) string {
	switch {
	case a.IsUnspecified():
		return "unspecified address"
	case a.IsLoopback():
		return "loopback address"
	case a.IsMulticast():
		return "multicast address"
	case a == broadcast:
		return "broadcast address"
	default:
		return ""
	}
}

// unusable says why no endpoint can have this address; it is empty when one can.
func unusable(a netip.Addr) string {
	if a.IsLinkLocalUnicast() {
		return "link-local address"
	}
	return reserved(a)
}

// distinct returns list without repetitions, in its order. It may change list.
func distinct[T comparable](list []T) []T {
	seen := make(map[T]bool, len(list))
	out := list[:0]
	for _, item := range list {
		if !seen[item] {
			seen[item] = true
			out = append(out, item)
		}
	}
	return out
}
