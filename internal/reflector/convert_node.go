// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// taintToBeDeleted is how the cluster autoscaler marks a node that it is about
// to remove.
const taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// ConvertNode reduces the Node we run on to what matters here. Whatever is
// invalid or missing is named in warnings.
func ConvertNode(n *corev1.Node) (node lb.Node, warnings []Warning) {
	c := complaints{object: title(kindNode, lb.Name{Name: n.Name})}
	node.Zone = n.Labels[corev1.LabelTopologyZone]
	if node.Zone == "" {
		c.add("it has no label %s: topology hints for zones have no effect here", corev1.LabelTopologyZone)
	}
	node.Addresses = nodeAddresses(n.Status.Addresses, &c)
	if len(node.Addresses) == 0 {
		c.add("it has no InternalIP or ExternalIP in status.addresses: which address is its own is unknown")
	}
	node.Eligible = n.DeletionTimestamp.IsZero() &&
		!slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taintToBeDeleted })
	return node, c.warnings
}

// nodeAddresses returns the first usable address of each family, internal ones
// before external ones.
func nodeAddresses(in []corev1.NodeAddress, c *complaints) []netip.Addr {
	var out []netip.Addr
	var bad []string
	for _, t := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range in {
			if a.Type != t {
				continue
			}
			addr, ok := parseAddr(a.Address)
			switch {
			case !ok:
				bad = append(bad, fmt.Sprintf("%q (not an IP address)", a.Address))
			case reserved(addr) != "":
				bad = append(bad, fmt.Sprintf("%q (%s)", a.Address, reserved(addr)))
			case !slices.ContainsFunc(out, func(o netip.Addr) bool { return lb.FamilyOf(o) == lb.FamilyOf(addr) }):
				out = append(out, addr)
			}
		}
	}
	if len(bad) > 0 {
		c.add("addresses left out: %s", firstFew(bad))
	}
	return out
}

// beyondServices are ranges that hold addresses no Service can have.
var beyondServices = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("ff00::/8"),
}

// ConvertServiceCIDR returns the ranges that ClusterIPs are taken from, masked.
// A ServiceCIDR counts from its creation until it is gone, whatever its
// conditions say. Invalid ranges are left out and named in warnings.
func ConvertServiceCIDR(s *networkingv1.ServiceCIDR) (prefixes []netip.Prefix, warnings []Warning) {
	c := complaints{object: title(kindServiceCIDR, lb.Name{Name: s.Name})}
	for _, text := range s.Spec.CIDRs {
		prefix, ok := parsePrefix(text)
		switch {
		case !ok:
			c.add("range %q left out: not a CIDR", text)
		// What nobody owns in these ranges is dropped: that must not be the node's
		// own traffic.
		case slices.ContainsFunc(beyondServices, prefix.Overlaps):
			c.add("range %q left out: it holds loopback or multicast addresses", text)
		default:
			prefixes = append(prefixes, prefix)
		}
	}
	return prefixes, c.warnings
}
