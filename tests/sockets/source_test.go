// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// ranges returns a change that restricts a Service to clients in these ranges.
func ranges(allowed ...string) func(*lb.Service) {
	var sources []netip.Prefix
	for _, text := range allowed {
		sources = append(sources, netip.MustParsePrefix(text))
	}
	return func(spec *lb.Service) { spec.Sources = sources }
}

// TestSourceRanges: semantics.md, loadBalancerSourceRanges.
func TestSourceRanges(t *testing.T) {
	inOneWorld(t, []worldTest{
		{"only load-balancer IPs are for clients in them", onlyBalancerIPsAreRestricted},
		{"also when the IP is listed in externalIPs", addressInBothLists},
		{"before any other verdict", rangesComeFirst},
		{"changes hold at once, for new connections", rangesChangeAtOnce},
		{"the client is the address its socket is bound to", socketThatIsBound},
		{"or that its datagram names", datagramThatNamesItsSource},
		{"a source that is not the pod's opens nothing", datagramThatLies},
		{"or the first address of the first device of its pod", podWithSeveralAddresses},
		{"the first device is the one that came first, whatever its number", podWhoseDeviceCameFromTheNode},
		{"with the node's address sources equal to the load-balancer IPs pass", sourceThatIsABalancerIP},
		{"an address that the kernel has chosen for a process is not one it is bound to", processThatConnectsAgain},
	})
}

// onlyBalancerIPsAreRestricted: semantics.md, loadBalancerSourceRanges; only load-balancer IPs
// are for the clients in them.
func onlyBalancerIPsAreRestricted(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	pod, other, node := w.pod(), w.backendPod("b"), w.process()
	for _, tc := range []struct {
		name    string
		ranges  func(*lb.Service)
		allowed [2][]client // by family
	}{
		{"without any everybody may", ranges(), [2][]client{{pod, other, node}, {pod, other, node}}},
		{"a pod's addresses", ranges("10.244.0.2/32", "fd00:244::2/128"), [2][]client{{pod}, {pod}}},
		{"a range that holds several pods", ranges("10.244.0.0/27", "fd00:244::/120"), [2][]client{{pod, other}, {pod, other}}},
		{"the node's own addresses", ranges("192.0.2.10/32", "2001:db8::10/128"), [2][]client{{node}, {node}}},
		{"other addresses of the node", ranges("192.0.2.11/32", "10.244.0.1/32", "2001:db8::11/128", "fd00:244::1/128"), [2][]client{}},
		{"nobody of ours", ranges("203.0.113.0/24", "2001:db8:ffff::/48"), [2][]client{}},
		{"one family alone", ranges("10.244.0.2/32"), [2][]client{{pod}, {pod, other, node}}},
		{"a zero prefix opens its family", ranges("0.0.0.0/0", "fd00:244::2/128"), [2][]client{{pod, other, node}, {pod}}},
		{"several ranges", ranges("10.244.0.2/32", "10.244.0.12/32", "fd00:244::2/128", "192.0.2.0/24"), [2][]client{{pod, other, node}, {pod}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s.update(t, tc.ranges)
			for _, c := range []client{pod, other, node} {
				for _, k := range kinds {
					allowed := false
					for _, a := range tc.allowed[k.family] {
						allowed = allowed || a == c
					}
					if allowed {
						c.wantReach(t, k, s.atBalancer(k), "a:8080")
					} else {
						c.wantVerdict(t, k, s.atBalancer(k), denied)
					}
					for _, f := range frontendKinds {
						if f.name != "load-balancer IP" {
							c.wantReach(t, k, f.at(s, k), "a:8080")
						}
					}
				}
			}
		})
	}
}

// addressInBothLists: semantics.md, "also when that IP is
// listed in externalIPs".
func addressInBothLists(t *testing.T, w *world) {
	s := w.expose(t, ranges("10.244.0.2/32", "fd00:244::2/128"), "a:8080")
	s.update(t, func(spec *lb.Service) { spec.ExternalIPs = s.balancers[:] })
	eachKind(t, func(t *testing.T, k kind) {
		w.pod().wantReach(t, k, s.atBalancer(k), "a:8080")
		w.backendPod("b").wantVerdict(t, k, s.atBalancer(k), denied)
	})
}

// rangesComeFirst: semantics.md, "before any other verdict".
func rangesComeFirst(t *testing.T, w *world) {
	s := w.expose(t, ranges("10.244.0.2/32", "fd00:244::2/128"))
	eachKind(t, func(t *testing.T, k kind) {
		w.pod().wantVerdict(t, k, s.atBalancer(k), noBackend)
		w.backendPod("b").wantVerdict(t, k, s.atBalancer(k), denied)
		w.process().wantVerdict(t, k, s.atBalancer(k), denied)
	})
}

// rangesChangeAtOnce for new connections; a flow that is there goes on.
func rangesChangeAtOnce(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	c := w.pod()
	eachKind(t, func(t *testing.T, k kind) {
		to := s.atBalancer(k)
		flow, tcp, connected := openUDP(t, c.ns, k), openTCP(t, c.ns, k), w.connected(t, k, to)
		must(t, tcp.connect(to))
		flow.ask(to)
		for range 3 {
			s.update(t, ranges("203.0.113.0/24", "2001:db8:ffff::/48"))
			c.wantVerdict(t, k, to, denied)
			if backend, from := flow.ask(to); backend != "a:8080" || from != to {
				t.Errorf("on a flow that is there %s answers from %v, want a:8080 from %v", backend, from, to)
			}
			s.update(t, ranges("10.244.0.2/32", "fd00:244::2/128"))
			c.wantReach(t, k, to, "a:8080")
		}
		s.update(t, ranges("203.0.113.0/24", "2001:db8:ffff::/48"))
		connected.wantUntouched(t, "a UDP socket that was connected before")
		if got, _, err := tcp.receive(); err != nil || got != "a:8080" {
			t.Errorf("on a TCP connection that was there: %q, %v; want a:8080", got, err)
		}
		s.update(t, ranges())
		c.wantReach(t, k, to, "a:8080")
	})
}

// socketThatIsBound: the address a socket is bound to is the
// client's, be it a pod's or the node's.
func socketThatIsBound(t *testing.T, w *world) {
	first := [2]netip.Addr{netip.MustParseAddr("10.244.0.8"), netip.MustParseAddr("fd00:244::8")}
	second := [2]netip.Addr{netip.MustParseAddr("10.244.0.9"), netip.MustParseAddr("fd00:244::9")}
	pod := w.addPod(t, first[0], first[1], second[0], second[1])
	s := w.expose(t, ranges("10.244.0.9/32", "fd00:244::9/128", "192.0.2.11/32", "2001:db8::11/128"), "a:8080")
	for _, tc := range []struct {
		name    string
		c       client
		bound   [2]netip.Addr
		allowed bool
	}{
		{"a pod's second address", pod, second, true},
		{"a pod's first address", pod, first, false},
		{"an address of the node that is not its own", w.process(), otherNodeAddr, true},
		{"the node's own address", w.process(), nodeAddr, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachKind(t, func(t *testing.T, k kind) {
				to := s.atBalancer(k)
				for _, way := range ways {
					socket := way.open(t, tc.c, k)
					must(t, socket.bind(netip.AddrPortFrom(tc.bound[k.family], 0)))
					if tc.allowed {
						got, err := way.reach(t, socket, to)
						if want := (answer{"a:8080", to}); err != nil || got != want {
							t.Errorf("%s: %v, %v; want %v", way.name, got, err, want)
						}
						continue
					}
					name := map[string]string{"TCP connect": "connect_tcp_denied", "UDP sendto": "send_udp_denied"}[way.name]
					if name == "" {
						continue // UDP connect is left alone
					}
					wantCounted(t, w.counters(t, func() { wantErr(t, way.name, way.begin(socket, to), unix.EHOSTUNREACH) }), name)
				}
			})
		})
	}
}

// datagramThatNamesItsSource: IP_PKTINFO and IPV6_PKTINFO choose the
// source of one datagram.
func datagramThatNamesItsSource(t *testing.T, w *world) {
	first, second := netip.MustParseAddr("10.244.0.18"), netip.MustParseAddr("10.244.0.19")
	pod := w.addPod(t, first, second)
	s := w.expose(t, ranges("10.244.0.19/32"), "a:8080")
	c := openUDP(t, pod.ns, kinds[0])
	send := func(source netip.Addr) error { return sendNaming(c, source, s.atBalancer(c.kind)) }
	wantErr(t, "from the first address", send(first), unix.EHOSTUNREACH)
	must(t, send(second))
	backend, from, err := c.receive()
	must(t, err)
	if backend != "a:8080" {
		t.Errorf("%s answers, want a:8080", backend)
	}
	wantAddr(t, "the answer's address", from, s.atBalancer(c.kind))
}

// sendNaming sends a datagram that names its IPv4 source.
func sendNaming(c *socket, source netip.Addr, to netip.AddrPort) error {
	info := unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: source.As4()})
	return unix.Sendmsg(c.fd, []byte("hello"), info, c.sockaddr(to), 0)
}

// datagramThatLies: the kernel refuses such a datagram after our hook, and what
// follows it is nobody's flow yet.
func datagramThatLies(t *testing.T, w *world) {
	s := w.expose(t, ranges("198.18.0.1/32"), "a:8080")
	c := openUDP(t, w.client, kinds[0])
	to := s.atBalancer(c.kind)
	wantErr(t, "from its own address", c.sendTo(to), unix.EHOSTUNREACH)
	wantErr(t, "naming an address in the range", sendNaming(c, netip.MustParseAddr("198.18.0.1"), to), unix.ENETUNREACH)
	wantErr(t, "from its own address again", c.sendTo(to), unix.EHOSTUNREACH)
}

// podWhoseDeviceCameFromTheNode: a device that is moved into a namespace keeps its
// number, so that one which the pod makes later may have a smaller one.
func podWhoseDeviceCameFromTheNode(t *testing.T, w *world) {
	pod := w.addPod(t)
	must(t, pod.ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(h.LinkDel(eth0),
			h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "moved", Index: 900}, PeerName: "moved-peer"}),
			h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "made", Index: 500}, PeerName: "made-peer"}))
	}))
	must(t, pod.ns.AddAddr("made", netip.MustParsePrefix("172.17.0.1/16")))
	must(t, pod.ns.AddAddr("moved", netip.MustParsePrefix("10.244.0.77/24")))
	s := w.expose(t, ranges("10.244.0.77/32"))
	pod.wantVerdict(t, kinds[0], s.atBalancer(kinds[0]), noBackend)
	s.update(t, ranges("172.17.0.1/32"))
	pod.wantVerdict(t, kinds[0], s.atBalancer(kinds[0]), denied)
}

// podWithSeveralAddresses: it is the first of those that `ip address`
// shows for its first device.
func podWithSeveralAddresses(t *testing.T, w *world) {
	pod := w.addPod(t)
	ns := pod.ns
	must(t, ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "net1"}, PeerName: "net2"}
		if err := h.LinkAdd(link); err != nil {
			return err
		}
		return h.LinkSetUp(link)
	}))
	s := w.expose(t, nil)
	wantOnly := func(t *testing.T, k kind, addrs []netip.Addr, own netip.Addr) {
		t.Helper()
		for _, addr := range addrs {
			s.update(t, ranges(netip.PrefixFrom(addr, addr.BitLen()).String()))
			want := denied
			if addr == own {
				want = noBackend // since it has none
			}
			pod.wantVerdict(t, k, s.atBalancer(k), want)
		}
	}
	// The devices get their addresses in the wrong order.
	for _, family := range []struct {
		kind                               kind
		addrs                              []netip.Addr
		lo, net1, first, second, linkLocal netip.Prefix
	}{
		{
			kind: kinds[0],
			lo:   netip.MustParsePrefix("10.244.1.1/32"), net1: netip.MustParsePrefix("10.244.1.2/24"),
			first: netip.MustParsePrefix("10.244.0.40/24"), second: netip.MustParsePrefix("10.244.0.41/24"),
		},
		{
			kind: kinds[1],
			lo:   netip.MustParsePrefix("fd00:245::1/128"), net1: netip.MustParsePrefix("fd00:245::2/64"),
			// The kernel puts a new IPv6 address before those that are there.
			second: netip.MustParsePrefix("fd00:244::40/64"), first: netip.MustParsePrefix("fd00:244::41/64"),
		},
	} {
		t.Run(family.kind.name, func(t *testing.T) {
			k := family.kind
			all := []netip.Addr{family.lo.Addr(), family.net1.Addr(), family.first.Addr(), family.second.Addr()}
			must(t, ns.AddAddr("lo", family.lo))
			wantOnly(t, k, all, netip.Addr{})
			must(t, ns.AddAddr("net1", family.net1))
			wantOnly(t, k, all, family.net1.Addr())
			order := []netip.Prefix{family.first, family.second}
			if k.v6 {
				order = []netip.Prefix{family.second, family.first}
			}
			for _, prefix := range order {
				must(t, ns.AddAddr("eth0", prefix))
			}
			wantOnly(t, k, all, family.first.Addr())
		})
	}
}

// sourceThatIsABalancerIP: semantics.md, "When a range contains
// this node's address, sources equal to the load-balancer IPs pass too".
func sourceThatIsABalancerIP(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	for _, addr := range s.balancers {
		w.addNodeAddr(t, addr)
	}
	eachKind(t, func(t *testing.T, k kind) {
		dial := func() error {
			c := openTCP(t, w.node.Namespace(), k)
			defer c.close()
			must(t, c.bind(netip.AddrPortFrom(s.balancers[k.family], 0)))
			return c.connect(s.atBalancer(k))
		}
		s.update(t, ranges("192.0.2.10/32", "2001:db8::10/128"))
		must(t, dial())
		s.update(t, ranges("10.244.0.0/24", "fd00:244::/64"))
		wantErr(t, "without the node's address", dial(), denied.errno)
	})
}

// processThatConnectsAgain: after a first UDP connect the kernel has given the
// socket an address, which it was not bound to.
func processThatConnectsAgain(t *testing.T, w *world) {
	s := w.expose(t, ranges("192.0.2.10/32", "2001:db8::10/128"), "a:8080")
	eachKind(t, func(t *testing.T, k kind) {
		c := openUDP(t, w.node.Namespace(), k)
		for range 2 {
			must(t, c.connect(s.atBalancer(k)))
			if backend, from := c.askPeer(); backend != "a:8080" || from != s.atBalancer(k) {
				t.Errorf("%s answers from %v, want a:8080 from %v", backend, from, s.atBalancer(k))
			}
		}
		must(t, c.connect(backendAddr("b:8080", k.family)))
		wantCounted(t, w.counters(t, func() { must(t, c.sendTo(s.atBalancer(k))) }), "send_udp_translate")
	})
}
