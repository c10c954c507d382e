// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Bridge is the name of the node's link that pods are behind.
const Bridge = "cni0"

// The node's addresses on the bridge, with the networks of its pods.
var (
	GatewayIPv4 = netip.MustParsePrefix("10.244.0.1/24")
	GatewayIPv6 = netip.MustParsePrefix("fd00:244::1/64")
)

// Node is a cluster node: a namespace that forwards between its pods.
type Node struct {
	ns   *Namespace
	base string // what the names of everything the node makes begin with

	mu       sync.Mutex
	pods     map[*Namespace]string // to the name of the link on the node
	nextLink int
}

// NewNode makes a node whose names begin with prefix, which must not be empty
// or contain a slash. The caller must close it.
func NewNode(prefix string) (*Node, error) {
	if prefix == "" || strings.Contains(prefix, "/") {
		return nil, fmt.Errorf("make node: %q is no prefix for file names", prefix)
	}
	base := uniqueName(prefix)
	ns, err := newNamespace(base + "-node")
	if err != nil {
		return nil, err
	}
	n := &Node{ns: ns, base: base, pods: map[*Namespace]string{}}
	if err := n.setUp(); err != nil {
		return nil, errors.Join(fmt.Errorf("set up node %s: %w", ns.Name(), err), n.Close())
	}
	return n, nil
}

// setUp makes the node a router with a bridge.
func (n *Node) setUp() error {
	err := n.ns.Do(func() error {
		for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding"} {
			if err := writeSysctl(key, "1"); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = n.ns.withNetlink(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = Bridge
		// Without an address of its own a bridge takes the lowest of its ports',
		// and who knows the node by the old one loses it for seconds.
		attrs.HardwareAddr = hardwareAddr(GatewayIPv4.Addr())
		bridge := &netlink.Bridge{LinkAttrs: attrs}
		if err := h.LinkAdd(bridge); err != nil {
			return linkError("bridge", Bridge, err)
		}
		return setLinkUp(Bridge)
	})
	if err != nil {
		return err
	}
	return errors.Join(n.ns.AddAddr(Bridge, GatewayIPv4), n.ns.AddAddr(Bridge, GatewayIPv6))
}

// Namespace returns the node's own namespace. It is closed with the node.
func (n *Node) Namespace() *Namespace { return n.ns }

// AddPod makes a namespace behind the node's bridge whose link eth0 has the
// given addresses and whose default routes lead to the node. Addresses must lie
// in the networks of GatewayIPv4 and GatewayIPv6. When AddPod returns, packets
// flow. The pod is removed with RemovePod or with the node.
func (n *Node) AddPod(name string, addrs ...netip.Addr) (*Namespace, error) {
	gateways := map[netip.Prefix]bool{}
	for _, addr := range addrs {
		gateway := gatewayOf(addr)
		if !gateway.Masked().Contains(addr) {
			return nil, fmt.Errorf("add pod %s: %s is not in %s", name, addr, gateway.Masked())
		}
		gateways[gateway] = true
	}
	ns, err := newNamespace(n.base + "-" + name)
	if err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, err)
	}
	n.mu.Lock()
	link := fmt.Sprintf("veth%d", n.nextLink)
	n.nextLink++
	n.pods[ns] = link
	n.mu.Unlock()

	if err := n.connect(ns, link, addrs, gateways); err != nil {
		return nil, errors.Join(fmt.Errorf("add pod %s: %w", name, err), n.RemovePod(ns))
	}
	return ns, nil
}

// connect puts a pod behind the bridge and waits until its link works.
func (n *Node) connect(ns *Namespace, link string, addrs []netip.Addr, gateways map[netip.Prefix]bool) error {
	var mac net.HardwareAddr
	if len(addrs) > 0 {
		mac = hardwareAddr(addrs[0])
	}
	if err := n.addPort(ns, link, mac); err != nil {
		return err
	}
	if err := ns.Do(func() error { return setLinkUp("eth0") }); err != nil {
		return err
	}
	// A link drops everything until its carrier has been seen.
	for _, end := range []struct {
		ns   *Namespace
		link string
	}{{n.ns, link}, {ns, "eth0"}, {n.ns, Bridge}} {
		if err := end.ns.waitUp(end.link); err != nil {
			return err
		}
	}
	for _, addr := range addrs {
		if err := ns.AddAddr("eth0", netip.PrefixFrom(addr, gatewayOf(addr).Bits())); err != nil {
			return err
		}
	}
	return ns.withLink("eth0", func(h *netlink.Handle, eth0 netlink.Link) error {
		for gateway := range gateways {
			route := &netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: gateway.Addr().AsSlice()}
			if err := h.RouteAdd(route); err != nil {
				return fmt.Errorf("add default route via %s: %w", gateway.Addr(), err)
			}
		}
		return nil
	})
}

// addPort makes a veth pair from a bridge port of the node to eth0 of the pod.
// In hairpin mode a pod may reach itself through its own Service. The pod's link
// gets the hardware address mac, any when it is nil.
func (n *Node) addPort(pod *Namespace, link string, mac net.HardwareAddr) error {
	return n.ns.withLink(Bridge, func(h *netlink.Handle, bridge netlink.Link) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = link
		attrs.MasterIndex = bridge.Attrs().Index
		veth := &netlink.Veth{
			LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: mac,
			PeerNamespace: netlink.NsFd(int(pod.fd.Fd())),
		}
		if err := h.LinkAdd(veth); err != nil {
			return linkError("veth", link, err)
		}
		if err := h.LinkSetHairpin(veth, true); err != nil {
			return fmt.Errorf("set hairpin mode of %s: %w", link, err)
		}
		return setLinkUp(link)
	})
}

// RemovePod takes a pod off the network at once, as if its machine had lost
// power, and removes its namespace. Removing a pod twice does nothing.
func (n *Node) RemovePod(pod *Namespace) error {
	n.mu.Lock()
	link, found := n.pods[pod]
	delete(n.pods, pod)
	n.mu.Unlock()
	if !found {
		return nil
	}
	// The namespace may outlive its name in somebody's socket, so the link is
	// not left for it to take along.
	err := n.ns.withLink(link, func(h *netlink.Handle, l netlink.Link) error { return h.LinkDel(l) })
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("remove pod %s: %w", pod.Name(), err)
	}
	return errors.Join(err, pod.close())
}

// Close removes the node with all its pods.
func (n *Node) Close() error {
	n.mu.Lock()
	pods := maps.Clone(n.pods)
	n.mu.Unlock()
	var errs []error
	for pod := range pods {
		errs = append(errs, n.RemovePod(pod))
	}
	return errors.Join(append(errs, n.ns.close())...)
}

// waitUp waits until a link has a carrier and its queue takes packets.
func (ns *Namespace) waitUp(link string) error {
	return ns.withNetlink(func(h *netlink.Handle) error {
		err := poll(func() (bool, error) {
			l, err := h.LinkByName(link)
			return err == nil && l.Attrs().OperState == netlink.OperUp, err
		})
		if err != nil {
			return fmt.Errorf("wait for link %s in %s to come up: %w", link, ns.name, err)
		}
		return nil
	})
}

// hardwareAddr returns a hardware address that follows from an IP address: who
// gets the IP address of a removed pod is found where that pod was.
func hardwareAddr(addr netip.Addr) net.HardwareAddr {
	b := addr.As16()
	return net.HardwareAddr{0x0a, 0x58, b[12], b[13], b[14], b[15]}
}

func gatewayOf(addr netip.Addr) netip.Prefix {
	if addr.Is4() {
		return GatewayIPv4
	}
	return GatewayIPv6
}

// linkError explains why a link could not be made.
func linkError(kind, name string, err error) error {
	err = fmt.Errorf("make %s %s: %w", kind, name, err)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = fmt.Errorf("%w (the kernel has no %s links; load its module %s)", err, kind, kind)
	}
	return err
}

// uniqueName returns prefix with the process ID and a random part.
func uniqueName(prefix string) string {
	return fmt.Sprintf("%s-%d-%s", prefix, os.Getpid(), strings.ToLower(rand.Text()[:6]))
}
