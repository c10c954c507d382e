// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// way is where the packets of a flow are met, from its client to its backend.
type way struct {
	name            string
	client, backend addrs
	request         place // where the client's packets are translated
	// hidden is the node's address that the backend sees as the client's, if any.
	hidden addrs
	// around says that packets go around the node's stack.
	around bool
	// passing are the places that an answer passes untouched, answer is where it is
	// translated.
	passing []place
	answer  place
	// direct says that the backend finds the client on its own link: answers are not
	// for the node's hardware address.
	direct bool
}

var ways = []way{
	{
		name: "outside to a pod of this node", client: client, backend: pod, request: in("eth0"),
		passing: []place{in("pod0")}, answer: out("eth0", "pod0"),
	},
	{
		name: "outside to a pod behind a bridge", client: client, backend: bridged, request: in("eth0"),
		passing: []place{in("port0")}, answer: out("eth0", "cni0"),
	},
	{
		name: "outside to a process of this node", client: client, backend: nodeAddr, request: in("eth0"),
		answer: local("eth0"),
	},
	{
		name: "outside to a pod of another node by the same device", client: client, backend: remotePod,
		request: in("eth0"), hidden: nodeAddr, around: true, answer: in("eth0"),
	},
	{
		name: "outside to a pod of another node by another device", client: client, backend: farPod,
		request: in("eth0"), hidden: nodeAddr1, around: true, answer: in("eth1"),
	},
	{
		name: "outside to a pod behind a tunnel", client: client, backend: tunnelPod, request: in("eth0"),
		hidden: tunnelAddr, around: true, answer: in("tun0"),
	},
	{
		name: "outside by a tunnel to a pod of another node", client: tunnelClient, backend: remotePod,
		request: in("tun0"), hidden: nodeAddr, around: true, answer: in("eth0"),
	},
	{
		name: "outside by a tunnel to a pod behind it", client: tunnelClient, backend: tunnelPod,
		request: in("tun0"), hidden: tunnelAddr, around: true, answer: in("tun0"),
	},
	{
		name: "outside by a tunnel to a process of this node", client: tunnelClient, backend: tunnelAddr,
		request: in("tun0"), answer: local("tun0"),
	},
	{
		name: "pod to a pod of this node", client: pod, backend: podB, request: in("pod0"),
		passing: []place{in("pod1")}, answer: out("pod0", "pod1"),
	},
	{
		name: "pod to a pod of another node", client: pod, backend: remotePod, request: in("pod0"),
		passing: []place{in("eth0")}, answer: out("pod0", "eth0"),
	},
	{
		name: "pod to itself", client: pod, backend: pod, request: in("pod0"),
		hidden: nodeAddr, around: true, answer: in("pod0"),
	},
	{
		name: "pod to a pod behind its bridge", client: bridged, backend: bridgedB, request: in("port0"),
		around: true, answer: in("port1"), direct: true,
	},
	{
		name: "pod behind a bridge to itself", client: bridged, backend: bridged, request: in("port0"),
		hidden: bridgeAddr, around: true, answer: in("port0"),
	},
	{
		name: "pod to a process of this node", client: pod, backend: nodeAddr, request: in("pod0"),
		answer: local("pod0"),
	},
	{
		name: "process of this node to a pod", client: nodeAddr, backend: pod, request: local("eth0"),
		around: true, answer: in("pod0"),
	},
	{
		name: "process of this node to a pod of another node", client: nodeAddr, backend: remotePod,
		request: local("eth0"), around: true, answer: in("eth0"),
	},
	{
		name: "process of this node by a tunnel to a pod of another node", client: tunnelAddr, backend: remotePod,
		request: local("tun0"), hidden: nodeAddr, around: true, answer: in("eth0"),
	},
	{
		name: "process of this node to a pod where it has another address", client: nodeAddr, backend: farPod,
		request: local("eth0"), hidden: nodeAddr1, around: true, answer: in("eth1"),
	},
}

// isLocal tells whether the client is a process of the node.
func (w way) isLocal() bool { return w.request.out }

// seen returns the client as the backend sees it in a packet that came to it.
func (w way) seen(f family, arrived packet.Packet) netip.AddrPort {
	if w.hidden[f].IsValid() {
		return at(w.hidden[f], arrived.SrcPort)
	}
	return at(w.client[f], clientPort)
}

func (w way) action() uint32 {
	if w.around {
		return actRedirect
	}
	return actNext
}

// answerAction is what is done with answers: those to processes of the node are the
// stack's, as if they had come in by the device of the request.
func (w way) answerAction() uint32 {
	if w.isLocal() && w.answer.device == w.request.device {
		return actNext
	}
	return w.action()
}

// frontendKinds are the frontends a case has, with the address that is dialled.
var frontendKinds = []struct {
	kind lb.FrontendKind
	addr addrs
	port uint16
}{
	{lb.KindClusterIP, clusterIP, port},
	{lb.KindNodePort, nodeAddr, nodePort},
	{lb.KindLoadBalancer, balancer, port},
	{lb.KindExternalIP, external, port},
}

// testRewrites sends packets of every kind of flow in both directions.
func testRewrites(t *testing.T, w *world) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			for _, f := range families {
				for _, kind := range frontendKinds {
					if kind.kind == lb.KindNodePort && way.isLocal() {
						continue // never leaves the node
					}
					for _, proto := range protocols {
						for _, toPort := range []uint16{backendPort, kind.port} {
							name := fmt.Sprintf("%s %s %s to port %d", f, kind.kind, proto, toPort)
							t.Run(name, func(t *testing.T) {
								s := &service{
									proto:     proto,
									frontends: []frontend{{kind.kind, kind.addr[f], kind.port}},
									backends:  everywhere(at(way.backend[f], toPort)),
								}
								w.add(t, f, s)
								w.rewrites(t, f, way, s, at(kind.addr[f], kind.port))
							})
						}
					}
				}
			}
		})
	}
}

// flow is one that has begun.
type flow struct {
	way                      way
	f                        family
	proto                    lb.Protocol
	from, vip, backend, seen netip.AddrPort // seen is the client as the backend sees it
	first                    result         // of its first packet
}

// begin begins a flow from the way's client to a service with one backend. All flows
// before are forgotten.
func (w *world) begin(t testing.TB, f family, way way, s *service, vip netip.AddrPort) *flow {
	t.Helper()
	w.forget(t)
	from := at(way.client[f], clientPort)
	fl := &flow{way: way, f: f, proto: s.proto, from: from, vip: vip, backend: s.backends[0][0]}
	fl.first = w.run(t, way.request, opening(s.proto, from, vip))
	arrived := fl.first.packet(t)
	fl.seen = way.seen(f, arrived)
	if way.hidden[f].IsValid() && (fl.seen.Port() < snatPorts.First || fl.seen.Port() > snatPorts.Last) {
		t.Fatalf("in   %v\ngot  %v\nwant a source port of %d-%d", fl.first.in, arrived, snatPorts.First, snatPorts.Last)
	}
	fl.first.wants(t, way.action(), fl.requested(opening(s.proto, from, vip)))
	return fl
}

// request returns a later packet of the client's, answer one of the backend's.
func (fl *flow) request(payload string) packet.Packet {
	return later(fl.proto, fl.from, fl.vip, payload)
}
func (fl *flow) answer(payload string) packet.Packet {
	p := later(fl.proto, fl.backend, fl.seen, payload)
	if fl.way.direct {
		p.SrcMAC, p.DstMAC = bridgedBMAC, bridgedMAC
	}
	return p
}

// requested returns what becomes of a packet of the client's. Around the stack it is
// one hop further on; what a process has sent has made none.
func (fl *flow) requested(p packet.Packet) packet.Packet {
	p = between(p, fl.seen, fl.backend)
	if fl.way.around && !fl.way.isLocal() {
		p = hop(p)
	}
	return p
}

// answered returns what becomes of a packet of the backend's. Around the stack it
// goes to where the client's came from.
func (fl *flow) answered(p packet.Packet) packet.Packet {
	return fl.back(between(p, fl.vip, fl.from))
}

// back returns a packet on its way to the client.
func (fl *flow) back(p packet.Packet) packet.Packet {
	if fl.way.around && !fl.way.isLocal() {
		p = hop(p)
		p.SrcMAC, p.DstMAC = fl.first.in.DstMAC, fl.first.in.SrcMAC
	}
	return p
}

// translates sends a packet in both directions.
func (w *world) translates(t testing.TB, fl *flow, payload string) {
	t.Helper()
	w.run(t, fl.way.request, fl.request(payload)).wants(t, fl.way.action(), fl.requested(fl.request(payload)))
	for _, at := range fl.way.passing {
		w.run(t, at, fl.answer(payload)).untouched(t)
	}
	w.run(t, fl.way.answer, fl.answer(payload)).wants(t, fl.way.answerAction(), fl.answered(fl.answer(payload)))
}

// rewrites sends the packets of one flow from the way's client to a service with
// one backend.
func (w *world) rewrites(t *testing.T, f family, way way, s *service, vip netip.AddrPort) {
	var fl *flow
	count := map[string]uint64{"packet_translate": 1, "flow_request": 1}
	if way.around {
		count["flow_redirect"] = 1
	}
	if way.hidden[f].IsValid() {
		count["snat_new"] = 1
	}
	w.counts(t, count, func() { fl = w.begin(t, f, way, s, vip) })

	delete(count, "packet_translate")
	delete(count, "snat_new")
	count["flow_answer"] = 1
	if way.around && !way.isLocal() {
		count["flow_redirect"] = 2
	}
	w.counts(t, count, func() { w.translates(t, fl, "even payload") })
	for _, payload := range []string{"", "odd payload", string(make([]byte, 1200))} {
		if payload == "" && w.link(way.request)+w.link(way.answer) != 2*packet.Ethernet {
			continue // a test run wants an IP header behind what it takes for Ethernet's
		}
		w.translates(t, fl, payload)
	}
	if s.proto == lb.UDP && f == ipv4 {
		p := fl.request("who cares")
		p.NoChecksum = true
		w.run(t, way.request, p).wants(t, way.action(), fl.requested(p))
		p = fl.answer("nobody")
		p.NoChecksum = true
		w.run(t, way.answer, p).wants(t, way.answerAction(), fl.answered(p))
	}
}
