// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// TestFrontends: semantics.md, "Which frontends a Service has", and rows of
// peers.md.
func TestFrontends(t *testing.T) {
	inOneWorld(t, []worldTest{
		{"every kind is served to inside clients", everyFrontendIsServedInside},
		{"every kind without a usable endpoint is refused", noUsableEndpointIsRefused},
		{"an undefined port is refused at ClusterIPs only", undefinedPortIsRefusedAtClusterIPs},
		{"the same port of two protocols is two frontends", protocolsAreFrontendsOfTheirOwn},
		{"a load-balancer IP that equals a node address works", balancerIPThatIsTheNodes},
		{"an address and port beat a NodePort on that address", addressAndPortBeatNodePort},
		{"an address in a ServiceCIDR that nobody owns is dropped", serviceCIDR},
		{"a pod reaches itself through its own Service", podThatReachesItself},
	})
}

// podThatReachesItself: semantics.md, "Source address".
func podThatReachesItself(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	itself := w.backendPod("a")
	eachKind(t, func(t *testing.T, k kind) {
		for _, f := range frontendKinds {
			t.Run(f.name, func(t *testing.T) { itself.wantReach(t, k, f.at(s, k), "a:8080") })
		}
	})
}

// everyFrontendIsServedInside: semantics.md, "Which frontends a Service has".
func everyFrontendIsServedInside(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	w.eachClient(t, func(t *testing.T, c client, k kind) {
		for _, f := range frontendKinds {
			t.Run(f.name, func(t *testing.T) { c.wantReach(t, k, f.at(s, k), "a:8080") })
		}
	})
}

// noUsableEndpointIsRefused: also when there were endpoints.
func noUsableEndpointIsRefused(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	s.condition(t, "a:8080", lb.Endpoint{Terminating: true})
	w.eachClient(t, func(t *testing.T, c client, k kind) {
		for _, f := range frontendKinds {
			c.wantVerdict(t, k, f.at(s, k), noBackend)
		}
	})
	eachKind(t, func(t *testing.T, k kind) { w.process().wantVerdict(t, k, s.atLoopback(k), noBackend) })
}

// undefinedPortIsRefusedAtClusterIPs: peers.md, "a wildcard drop broke
// load-balancer addresses equal to node addresses".
func undefinedPortIsRefusedAtClusterIPs(t *testing.T, w *world) {
	const undefined = servicePort + 1
	s := w.expose(t, nil, "a:8080")
	elsewhere := [][2]netip.Addr{nodeAddr, s.balancers, s.externals}
	for _, addrs := range elsewhere {
		for _, addr := range addrs {
			w.listenOnNode(t, netip.AddrPortFrom(addr, undefined), "node")
		}
	}
	w.eachClient(t, func(t *testing.T, c client, k kind) {
		c.wantVerdict(t, k, netip.AddrPortFrom(s.vips[k.family], undefined), noPort)
		for _, addrs := range elsewhere {
			c.wantReach(t, k, netip.AddrPortFrom(addrs[k.family], undefined), "node")
		}
	})
}

// protocolsAreFrontendsOfTheirOwn: TCP, UDP and SCTP are three frontends
// (peers.md, "TCP/53 and UDP/53 of one Service collide").
func protocolsAreFrontendsOfTheirOwn(t *testing.T, w *world) {
	s := w.expose(t, func(spec *lb.Service) { spec.Ports = spec.Ports[:1] }, "a:8080")
	other := w.expose(t, func(spec *lb.Service) {
		spec.Ports = []lb.Port{{Name: "udp", Protocol: lb.UDP, Number: servicePort, NodePort: s.nodePort}}
		spec.LoadBalancerIPs = s.balancers[:]
	}, "b:8080")
	w.eachClient(t, func(t *testing.T, c client, k kind) {
		for _, to := range []netip.AddrPort{s.atNode(k), s.atBalancer(k)} {
			for _, way := range ways {
				want := answer{"a:8080", to}
				if way.protocol == lb.UDP {
					want.backend = "b:8080"
				}
				if got, err := c.reach(t, way, k, to); got != want || err != nil {
					t.Errorf("%s to %v: %v, %v; want %v", way.name, to, got, err, want)
				}
			}
		}
		wantErr(t, "UDP sendto to the ClusterIP of one for TCP", openUDP(t, c.ns, k).sendTo(s.dial(k)), noPort.errno)
		wantErr(t, "TCP connect to the ClusterIP of one for UDP", openTCP(t, c.ns, k).connect(other.dial(k)), noPort.errno)
	})
}

// balancerIPThatIsTheNodes: it is legal and works, and the node's other
// ports are untouched (peers.md, "a wildcard drop broke load-balancer addresses
// equal to node addresses").
func balancerIPThatIsTheNodes(t *testing.T, w *world) {
	for _, addr := range nodeAddr {
		w.listenOnNode(t, netip.AddrPortFrom(addr, 22), "node")
		w.listenOnNode(t, netip.AddrPortFrom(addr, servicePort), "node")
	}
	other := w.expose(t, nil, "c:8080")
	for name, change := range map[string]func(*lb.Service){
		"load-balancer IP": func(spec *lb.Service) { spec.LoadBalancerIPs, spec.ExternalIPs = nodeAddr[:], nil },
		"external IP":      func(spec *lb.Service) { spec.LoadBalancerIPs, spec.ExternalIPs = nil, nodeAddr[:] },
	} {
		t.Run(name, func(t *testing.T) {
			s := w.expose(t, change, "a:8080")
			w.eachClient(t, func(t *testing.T, c client, k kind) {
				at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(nodeAddr[k.family], port) }
				c.wantReach(t, k, at(servicePort), "a:8080")
				c.wantReach(t, k, at(22), "node")
				c.wantReach(t, k, s.atNode(k), "a:8080")
				c.wantReach(t, k, other.atNode(k), "c:8080")
			})
			s.remove(t)
			c := w.pod()
			eachKind(t, func(t *testing.T, k kind) {
				c.wantReach(t, k, netip.AddrPortFrom(nodeAddr[k.family], servicePort), "node")
			})
		})
	}
}

// addressAndPortBeatNodePort: semantics.md, "an (address, port) frontend beats
// a NodePort on the same node address".
func addressAndPortBeatNodePort(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	atNode := func(spec *lb.Service) {
		spec.Ports = []lb.Port{
			{Name: "tcp", Protocol: lb.TCP, Number: s.nodePort}, {Name: "udp", Protocol: lb.UDP, Number: s.nodePort},
		}
	}
	for name, change := range map[string]func(*lb.Service){
		"load-balancer IP": func(spec *lb.Service) { atNode(spec); spec.LoadBalancerIPs = nodeAddr[:] },
		"external IP":      func(spec *lb.Service) { atNode(spec); spec.ExternalIPs = nodeAddr[:] },
	} {
		t.Run(name, func(t *testing.T) {
			winner := w.expose(t, change, "b:8080")
			w.eachClient(t, func(t *testing.T, c client, k kind) { c.wantReach(t, k, s.atNode(k), "b:8080") })
			eachKind(t, func(t *testing.T, k kind) { w.process().wantReach(t, k, s.atLoopback(k), "a:8080") })
			winner.set(t)
			eachKind(t, func(t *testing.T, k kind) { w.pod().wantVerdict(t, k, s.atNode(k), noBackend) })
			winner.remove(t)
			eachKind(t, func(t *testing.T, k kind) { w.pod().wantReach(t, k, s.atNode(k), "a:8080") })
		})
	}
}

// serviceCIDR: semantics.md, "An address inside a ServiceCIDR object that
// belongs to no Service is dropped"; and a ClusterIP that another proxy serves
// belongs to one.
func serviceCIDR(t *testing.T, w *world) {
	s := w.expose(t, nil, "a:8080")
	foreign, nobodys, outside := w.vip(), w.vip(), w.expose(t, nil).externals
	w.store.SetService(lb.Service{Name: lb.Name{Namespace: "default", Name: "foreign"}, Foreign: true, ClusterIPs: foreign[:]})
	for _, addrs := range [][2]netip.Addr{foreign, nobodys, outside} {
		for _, addr := range addrs {
			w.listenOnNode(t, netip.AddrPortFrom(addr, 81), "node")
		}
	}
	at := func(addrs [2]netip.Addr, k kind) netip.AddrPort { return netip.AddrPortFrom(addrs[k.family], 81) }

	w.store.SetServiceCIDRs([]netip.Prefix{netip.MustParsePrefix("10.96.0.0/24"), netip.MustParsePrefix("fd00:96::/112")})
	w.apply(t)
	w.eachClient(t, func(t *testing.T, c client, k kind) {
		c.wantVerdict(t, k, at(nobodys, k), noService)
		c.wantVerdict(t, k, at(s.vips, k), noPort)
		c.wantReach(t, k, at(foreign, k), "node")
		c.wantReach(t, k, at(outside, k), "node")
		for _, f := range frontendKinds {
			c.wantReach(t, k, f.at(s, k), "a:8080")
		}
	})

	t.Run("an address that comes to belong to a Service and back", func(t *testing.T) {
		c := w.pod()
		taken := w.service(t, lb.TCP, "a:8080")
		eachKind(t, func(t *testing.T, k kind) { c.wantVerdict(t, k, at(taken.vips, k), noPort) })
		taken.remove(t)
		eachKind(t, func(t *testing.T, k kind) { c.wantVerdict(t, k, taken.dial(k), noService) })
	})

	t.Run("an address of the node's own is not dropped", func(t *testing.T) {
		w.store.SetLocalAddresses([]netip.Addr{nobodys[0], nobodys[1]})
		w.apply(t)
		w.eachClient(t, func(t *testing.T, c client, k kind) { c.wantReach(t, k, at(nobodys, k), "node") })
		w.store.SetLocalAddresses(nil)
		w.apply(t)
		eachKind(t, func(t *testing.T, k kind) { w.pod().wantVerdict(t, k, at(nobodys, k), noService) })
	})

	t.Run("a ServiceCIDR that is gone", func(t *testing.T) {
		w.store.SetServiceCIDRs(nil)
		w.apply(t)
		eachKind(t, func(t *testing.T, k kind) { w.pod().wantReach(t, k, at(nobodys, k), "node") })
	})
}
