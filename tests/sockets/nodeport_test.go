// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// TestNodePort: semantics.md, nodePort in "Which frontends a Service has".
func TestNodePort(t *testing.T) {
	inOneWorld(t, []worldTest{
		{"the loopback addresses lead processes on the node there", nodePortAtLoopback},
		{"not where a local listener has the port", nodePortBehindAListener},
		{"the unspecified address means the client itself", unspecifiedAddress},
		{"at the addresses of --nodeport-addresses", nodePortAddresses},
	})
}

// nodePorts changes at which addresses NodePorts are reached until the test ends.
func (w *world) nodePorts(t *testing.T, ports lb.NodePorts) {
	t.Helper()
	set := func(ports lb.NodePorts) {
		w.store.SetNodePorts(ports)
		w.apply(t)
	}
	set(ports)
	t.Cleanup(func() { set(usualNodePorts) })
}

// nodePortAddresses: semantics.md, --nodeport-addresses. What is not the
// NodePort's belongs to whoever listens there.
func nodePortAddresses(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	gateway := [2]netip.Addr{sandbox.GatewayIPv4.Addr(), sandbox.GatewayIPv6.Addr()}
	all := [][2]netip.Addr{nodeAddr, otherNodeAddr, gateway}
	var local []netip.Addr
	for _, addrs := range all {
		local = append(local, addrs[:]...)
		for _, addr := range addrs {
			w.listenOnNode(t, netip.AddrPortFrom(addr, s.nodePort), "node")
		}
	}
	w.store.SetLocalAddresses(local)
	other4 := netip.PrefixFrom(otherNodeAddr[0], 32)
	for _, tc := range []struct {
		name  string
		ports lb.NodePorts
		at    [2][][2]netip.Addr // by family, where NodePorts are reached
	}{
		{
			"the node's own address of each family", lb.NodePorts{Primary: true},
			[2][][2]netip.Addr{{nodeAddr}, {nodeAddr}},
		},
		{"every local address", lb.NodePorts{}, [2][][2]netip.Addr{all, all}},
		{
			"those in a range, and all of the family without one", lb.NodePorts{CIDRs: []netip.Prefix{other4}},
			[2][][2]netip.Addr{{otherNodeAddr}, all},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w.nodePorts(t, tc.ports)
			w.eachClient(t, func(t *testing.T, c client, k kind) {
				for _, addrs := range all {
					want := "node"
					for _, at := range tc.at[k.family] {
						if at == addrs {
							want = "a:8080"
						}
					}
					c.wantReach(t, k, netip.AddrPortFrom(addrs[k.family], s.nodePort), want)
				}
			})
		})
	}
}

// nodePortAtLoopback: semantics.md, "127.0.0.1 and [::1] for processes on the
// node".
func nodePortAtLoopback(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	t.Run("leads processes on the node to the backend", func(t *testing.T) {
		eachKind(t, func(t *testing.T, k kind) { w.process().wantReach(t, k, s.atLoopback(k), "a:8080") })
	})

	t.Run("is a pod's own", func(t *testing.T) {
		eachKind(t, func(t *testing.T, k kind) {
			wantCounted(t, w.counters(t, func() {
				wantErr(t, "TCP connect", openTCP(t, w.client, k).connect(s.atLoopback(k)), unix.ECONNREFUSED)
			}), "connect_tcp_pass")
			wantCounted(t, w.counters(t, func() { must(t, openUDP(t, w.client, k).connect(s.atLoopback(k))) }), "connect_udp_pass")
		})
		for _, addr := range loopback {
			w.listen(t, w.client, netip.AddrPortFrom(addr, s.nodePort), "the pod itself")
		}
		eachKind(t, func(t *testing.T, k kind) { w.pod().wantReach(t, k, s.atLoopback(k), "the") })
	})

	t.Run("is nothing at other loopback addresses", func(t *testing.T) {
		at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), s.nodePort)
		w.listen(t, w.node.Namespace(), at, "node")
		w.process().wantReach(t, kinds[0], at, "node")
	})

	t.Run("is left alone by a socket that is bound there", func(t *testing.T) {
		eachKind(t, func(t *testing.T, k kind) {
			udp := openUDP(t, w.node.Namespace(), k)
			must(t, udp.bind(netip.AddrPortFrom(loopback[k.family], 0)))
			wantCounted(t, w.counters(t, func() { must(t, udp.sendTo(s.atLoopback(k))) }), "send_udp_pass")
			tcp := openTCP(t, w.node.Namespace(), k)
			must(t, tcp.bind(netip.AddrPortFrom(loopback[k.family], 0)))
			wantCounted(t, w.counters(t, func() {
				wantErr(t, "TCP connect", tcp.connect(s.atLoopback(k)), unix.ECONNREFUSED)
			}), "connect_tcp_pass")
		})
	})

	t.Run("can be switched off", func(t *testing.T) {
		w.nodePorts(t, lb.NodePorts{Primary: true})
		eachKind(t, func(t *testing.T, k kind) {
			c := openTCP(t, w.node.Namespace(), k)
			wantCounted(t, w.counters(t, func() {
				wantErr(t, "TCP connect", c.connect(s.atLoopback(k)), unix.ECONNREFUSED)
			}), "connect_tcp_pass")
			w.process().wantReach(t, k, s.atNode(k), "a:8080")
		})
	})
}

// wantAtLoopback checks who answers at the Service's loopback NodePort: the named
// ones in some families, backend a:8080 in the others.
func wantAtLoopback(t *testing.T, c client, s *service, families []int, named map[lb.Protocol]string) {
	t.Helper()
	for _, k := range kinds {
		for _, way := range ways {
			want := answer{"a:8080", s.atLoopback(k)}
			if slices.Contains(families, k.family) {
				want.backend = named[way.protocol]
			}
			if got, err := c.reach(t, way, k, s.atLoopback(k)); err != nil || got != want {
				t.Errorf("%s %s: %v, %v; want %v", k.name, way.name, got, err, want)
			}
		}
	}
}

// nodePortBehindAListener: semantics.md, "unless … a local
// listener has the port".
func nodePortBehindAListener(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	node := w.node.Namespace()
	c := w.process()
	want := func(t *testing.T, families []int, tcp, udp string) {
		t.Helper()
		wantAtLoopback(t, c, s, families, map[lb.Protocol]string{lb.TCP: tcp, lb.UDP: udp})
	}
	both := []int{0, 1}
	for _, tc := range []struct {
		name     string
		at       []string
		families []int
	}{
		{"on the loopback addresses", []string{"127.0.0.1", "::1"}, both},
		{"on the wildcard of IPv4", []string{"0.0.0.0"}, both[:1]},
		{"on the wildcard of both families", []string{"::"}, both},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
				t.Run(protocol.String(), func(t *testing.T) {
					for _, addr := range tc.at {
						w.listenTo(t, protocol, node, netip.AddrPortFrom(netip.MustParseAddr(addr), s.nodePort), "node")
					}
					if protocol == lb.TCP {
						want(t, tc.families, "node", "a:8080")
					} else {
						want(t, tc.families, "a:8080", "node")
					}
				})
				want(t, nil, "", "")
			}
		})
	}

	t.Run("while one listens at another address of the node", func(t *testing.T) {
		for _, addr := range nodeAddr {
			w.listen(t, node, netip.AddrPortFrom(addr, s.nodePort), "node")
		}
		want(t, nil, "", "")
		eachKind(t, func(t *testing.T, k kind) { c.wantReach(t, k, s.atNode(k), "a:8080") })
	})

	t.Run("that comes while a flow goes on", func(t *testing.T) {
		eachKind(t, func(t *testing.T, k kind) {
			udp := openUDP(t, node, k)
			backend, _ := udp.ask(s.atLoopback(k))
			if backend != "a:8080" {
				t.Errorf("%s answers, want a:8080", backend)
			}
			w.listen(t, node, s.atLoopback(k), "node")
			if backend, _ = udp.ask(s.atLoopback(k)); backend != "node" {
				t.Errorf("%s answers, want the listener", backend)
			}
		})
	})
}

// unspecifiedAddress: a NodePort's frontend has that
// address in the tables.
func unspecifiedAddress(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	w.eachClient(t, func(t *testing.T, c client, k kind) {
		unspecified := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}[k.family]
		to := netip.AddrPortFrom(unspecified, s.nodePort)
		wantCounted(t, w.counters(t, func() {
			wantErr(t, "TCP connect", openTCP(t, c.ns, k).connect(to), unix.ECONNREFUSED)
		}), "connect_tcp_pass")
		w.listen(t, c.ns, s.atLoopback(k), "itself")
		c.wantAnswer(t, k, to, answer{"itself", s.atLoopback(k)})
	})
}
