// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"testing"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// shape is how a CNI plugin and an underlay connect pods and nodes.
type shape struct {
	name    string
	connect func(t *testing.T, w *world)                   // gives nodes their uplinks and routes
	pod     func(t *testing.T, n *node, h *host, last int) // connects a pod
	// sysctls of both nodes, set after all links are there.
	sysctls string
	// masquerade hides pods behind their node from whoever is not a pod.
	masquerade bool
	// noFirewall leaves connection tracking out.
	noFirewall bool
	// sources are node a's addresses on the way to node b's pods, when they are not
	// the node's own.
	sources addrs
	// slow shapes move less.
	slow bool
	args []string // of the agents
}

// withoutBridgeFilter lets frames that only cross a bridge go around connection
// tracking. The overlay has it since a bridge's netfilter makes whole datagrams of
// IPv6 fragments and forgets what size these had: the next link gets larger ones.
const withoutBridgeFilter = "bridge/bridge-nf-call-iptables 0\nbridge/bridge-nf-call-ip6tables 0\n"

var (
	routed = shape{name: "routed", connect: connectRouted, pod: routedPod}

	bridged = shape{
		name: "bridge", connect: connectBridged, pod: bridgedPod, masquerade: true,
		sysctls: withoutBridgeFilter,
	}
	// Frames that only cross a bridge pass connection tracking, too.
	filteredBridge = shape{
		name: "bridge with netfilter", connect: connectBridged, pod: bridgedPod, masquerade: true,
		sysctls: "bridge/bridge-nf-call-iptables 1\nbridge/bridge-nf-call-ip6tables 1\n",
	}

	overlay = shape{
		name: "overlay", connect: connectOverlay, pod: overlayPod, masquerade: true,
		sources: both("10.244.1.0", "fd00:244:1:ffff::1"), sysctls: withoutBridgeFilter,
	}
	severalUplinks = shape{
		name: "several uplinks", connect: connectSeveral, pod: routedPod,
		args: []string{"--nodeport-addresses=192.0.2.0/23,2001:db8:2::/47"},
	}
	tunnels = shape{name: "tunnels without L2", connect: connectTunnels, pod: routedPod, slow: true}
)

// connectRouted puts both nodes on one bridge of the router with routes to each
// other's pods.
func connectRouted(t *testing.T, w *world) {
	t.Helper()
	w.underlay(t, w.a)
	w.underlay(t, w.b)
	w.routePods(t, w.a, w.b)
	w.routePods(t, w.b, w.a)
	w.routeServices(t)
}

// routedPod connects a pod as Calico does: a veth pair, a route to it, and a node
// that answers for every address.
func routedPod(t *testing.T, n *node, h *host, _ int) {
	t.Helper()
	configure(t, n.ns, `
		link add %[1]s type veth peer name eth0 netns %[2]s
		addr add fe80::1/64 dev %[1]s nodad
		link set %[1]s up
		route add %[3]s/32 dev %[1]s
		route add %[4]s/128 dev %[1]s`, h.link, h.ns.Name(), h.addrs[ipv4], h.addrs[ipv6])
	sysctl(t, n.ns, `
		ipv4/conf/`+h.link+`/proxy_arp 1
		ipv4/neigh/`+h.link+`/proxy_delay 0
	`)
	configure(t, h.ns, `
		link set eth0 up
		addr add %s/32 dev eth0
		addr add %s/128 dev eth0 nodad
		route add 169.254.1.1 dev eth0 scope link
		route add default via 169.254.1.1
		route add ::/0 via fe80::1 dev eth0`, h.addrs[ipv4], h.addrs[ipv6])
}

// connectBridged is connectRouted for nodes with two bridges for pods.
func connectBridged(t *testing.T, w *world) {
	t.Helper()
	connectRouted(t, w)
	addBridges(t, w.a, 1500)
	addBridges(t, w.b, 1500)
}

func addBridges(t *testing.T, n *node, mtu int) {
	t.Helper()
	configure(t, n.ns, `
		link add cni0 mtu %[2]d type bridge mcast_snooping 0
		addr add 10.244.%[1]d.1/25 dev cni0
		addr add fd00:244:%[1]d:0::1/64 dev cni0 nodad
		link set cni0 up
		link add cni1 mtu %[2]d type bridge mcast_snooping 0
		addr add 10.244.%[1]d.129/25 dev cni1
		addr add fd00:244:%[1]d:1::1/64 dev cni1 nodad
		link set cni1 up`, n.number, mtu)
}

// bridgedPod connects a pod as the bridge plugin does: a port of a bridge, which is
// the pod's gateway.
func bridgedPod(t *testing.T, n *node, h *host, last int) {
	t.Helper()
	bridgePod(t, n, h, last, 1500)
}

func bridgePod(t *testing.T, n *node, h *host, last, mtu int) {
	t.Helper()
	index := last / 128
	h.bridge = []string{"cni0", "cni1"}[index]
	configure(t, n.ns, `
		link add %[1]s mtu %[4]d type veth peer name eth0 mtu %[4]d netns %[2]s
		link set %[1]s master %[3]s up`, h.link, h.ns.Name(), h.bridge, mtu)
	configure(t, h.ns, `
		link set eth0 up
		addr add %[1]s/25 dev eth0
		addr add %[2]s/64 dev eth0 nodad
		route add default via 10.244.%[3]d.%[4]d
		route add ::/0 via fd00:244:%[3]d:%[5]d::1`,
		h.addrs[ipv4], h.addrs[ipv6], n.number, 128*index+1, index)
}

// What is left of the underlay's MTU in VXLAN over IPv4.
const overlayMTU = 1450

// connectOverlay connects the nodes' pods as Flannel does: nobody but the nodes
// knows where they are.
func connectOverlay(t *testing.T, w *world) {
	t.Helper()
	w.underlay(t, w.a)
	w.underlay(t, w.b)
	w.routeServices(t)
	for _, way := range [][2]*node{{w.a, w.b}, {w.b, w.a}} {
		n, other := way[0], way[1]
		addBridges(t, n, overlayMTU)
		configure(t, n.ns, `
			link add flannel.1 address 0a:58:00:00:00:%02[1]d mtu %[5]d type vxlan id 1 dev eth0 local %[2]s remote %[3]s dstport 8472 nolearning
			addr add 10.244.%[1]d.0/32 dev flannel.1
			addr add fd00:244:%[1]d:ffff::1/128 dev flannel.1 nodad
			link set flannel.1 up
			neigh add 10.244.%[4]d.0 lladdr 0a:58:00:00:00:%02[4]d dev flannel.1 nud permanent
			neigh add fd00:244:%[4]d:ffff::1 lladdr 0a:58:00:00:00:%02[4]d dev flannel.1 nud permanent
			route add 10.244.%[4]d.0/24 via 10.244.%[4]d.0 dev flannel.1 onlink
			route add fd00:244:%[4]d::/48 via fd00:244:%[4]d:ffff::1 dev flannel.1 onlink`,
			n.number, n.addrs[ipv4], other.addrs[ipv4], other.number, overlayMTU)
	}
}

func overlayPod(t *testing.T, n *node, h *host, last int) {
	t.Helper()
	bridgePod(t, n, h, last, overlayMTU)
}

// connectSeveral gives node a second uplink which, as on AWS, everything leaves by
// that comes from a pod's address. The router takes nothing from an address that it
// knows behind the other uplink.
func connectSeveral(t *testing.T, w *world) {
	t.Helper()
	connectRouted(t, w)
	n := w.a
	configure(t, w.router, `
		link add second type bridge mcast_snooping 0
		addr add 192.0.3.1/24 dev second
		addr add 2001:db8:3::1/64 dev second nodad
		link set second up`)
	w.plug(t, w.router, "second", "node-a-2", &n.host, "eth1")
	configure(t, n.ns, `
		addr add 192.0.3.11/24 dev eth1
		addr add 2001:db8:3::11/64 dev eth1 nodad
		route add default via 192.0.3.1 table 100
		route add ::/0 via 2001:db8:3::1 table 100
		rule add to 10.244.0.0/16 lookup main priority 100
		rule add from 10.244.0.0/16 lookup 100 priority 200
		rule add from 192.0.3.11 lookup 100 priority 201`)
	err := n.ns.Configure(`
		rule add to fd00:244::/32 lookup main priority 100
		rule add from fd00:244::/32 lookup 100 priority 200
		rule add from 2001:db8:3::11 lookup 100 priority 201`, "-6")
	if err != nil {
		t.Fatal(err)
	}
	// Pods are known behind the second uplink.
	configure(t, w.router, `
		route add 10.244.1.0/24 via 192.0.3.11
		route add fd00:244:1::/48 via 2001:db8:3::11`)
	err = w.router.Firewall(`
table inet filter {
	chain prerouting {
		type filter hook prerouting priority raw; policy accept;
		iif { "underlay", "second" } fib saddr . iif oif missing counter drop
	}
}
`)
	if err != nil {
		t.Fatal(err)
	}
}

// secondUplink are node a's addresses on it.
var secondUplink = both("192.0.3.11", "2001:db8:3::11")

// connectTunnels connects each node to the router by links that carry packets
// without an Ethernet header.
func connectTunnels(t *testing.T, w *world) {
	t.Helper()
	for _, n := range []*node{w.a, w.b} {
		port := "tun-" + n.name
		tunnel, err := sandbox.ConnectL3(n.ns, "tun0", w.router, port)
		if err != nil {
			t.Fatal(err)
		}
		w.tunnels = append(w.tunnels, tunnel)
		configure(t, n.ns, `
			addr add %s/32 dev tun0
			addr add %s/128 dev tun0 nodad
			link set tun0 mtu 1420 up
			route add default dev tun0
			route add ::/0 dev tun0`, n.addrs[ipv4], n.addrs[ipv6])
		configure(t, w.router, `
			link set %[1]s mtu 1420 up
			route add %[2]s dev %[1]s
			route add 10.244.%[4]d.0/24 dev %[1]s
			route add %[3]s dev %[1]s
			route add fd00:244:%[4]d::/48 dev %[1]s`, port, n.addrs[ipv4], n.addrs[ipv6], n.number)
	}
	configure(t, w.router, `
		route add 10.96.0.0/16 dev tun-a
		route add 203.0.113.0/24 dev tun-a
		route add fd00:96::/112 dev tun-a
		route add 2001:db8:113::/64 dev tun-a`)
}
