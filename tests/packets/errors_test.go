// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// icmpKind is a kind of ICMP error.
type icmpKind struct {
	name       string
	kind, code uint8
	rest       uint32
}

var icmpKinds = [2][]icmpKind{
	{
		{"port unreachable", 3, 3, 0},
		{"fragmentation needed", 3, 4, 1400},
		{"administratively prohibited", 3, 13, 0},
		{"time exceeded", 11, 0, 0},
		{"parameter problem", 12, 0, 20 << 24},
	},
	{
		{"port unreachable", 1, 4, 0},
		{"packet too big", 2, 0, 1400},
		{"time exceeded", 3, 0, 0},
		{"parameter problem", 4, 1, 40},
	},
}

// icmpError returns an ICMP error that quotes size bytes of a packet.
func icmpError(f family, k icmpKind, from, to netip.Addr, about packet.Packet, size int) packet.Packet {
	p := packet.Packet{
		Src: from, Dst: to, Proto: f.icmp(), TTL: 60, Type: k.kind, Code: k.code, Rest: k.rest,
		Payload: about.Quote(size),
	}
	if f == ipv4 {
		p.ID, p.TrafficClass = 99, 0xc0
	} else {
		p.TrafficClass = class6
	}
	return p
}

// headers is how many bytes the IP header has.
func (f family) headers() int { return []int{20, 40}[f] }

// quotes are how much of a packet an error quotes behind its IP header: all of it,
// what is always quoted, with the UDP or TCP checksum and without it, an odd number.
var quotes = []int{-1, 8, 18, 20, 23}

// testErrors sends ICMP errors about packets of both directions of every kind of
// flow. They are met where a packet of the other direction would be.
func testErrors(t *testing.T, w *world) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			for _, f := range families {
				for _, proto := range protocols {
					for _, toPort := range []uint16{port, backendPort} {
						w.errors(t, f, way, proto, toPort)
					}
				}
			}
		})
	}
}

func (w *world) errors(t *testing.T, f family, way way, proto lb.Protocol, toPort uint16) {
	s := &service{
		proto:     proto,
		frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
		backends:  everywhere(at(way.backend[f], toPort)),
	}
	t.Run(f.String()+" "+proto.String()+" to port "+at(way.backend[f], toPort).String(), func(t *testing.T) {
		w.add(t, f, s)
		fl := w.begin(t, f, way, s, at(clusterIP[f], port))
		for _, kind := range icmpKinds[f] {
			for _, size := range quotes {
				// The checksum of a quoted SCTP packet is left as it was: it is no
				// sum, and nobody looks at it.
				if proto == lb.SCTP && size != 8 && (toPort != port || way.hidden[f].IsValid()) {
					continue
				}
				if size >= 0 {
					size += f.headers()
				}
				w.aboutRequest(t, fl, kind, size)
				w.aboutAnswer(t, fl, kind, size)
			}
		}
	})
}

// aboutRequest sends errors about what the client has sent. The backend's own come
// from the VIP then, a router's from the router.
func (w *world) aboutRequest(t *testing.T, fl *flow, kind icmpKind, size int) {
	t.Helper()
	request := fl.request("payload")
	arrived := between(request, fl.seen, fl.backend)
	for from, shown := range map[netip.Addr]netip.Addr{
		fl.backend.Addr():   fl.vip.Addr(),
		backendRouter[fl.f]: backendRouter[fl.f],
	} {
		p := icmpError(fl.f, kind, from, fl.seen.Addr(), arrived, size)
		want := fl.back(icmpError(fl.f, kind, shown, fl.from.Addr(), request, size))
		for _, at := range fl.way.passing {
			w.run(t, at, p).untouched(t)
		}
		var r result
		count := map[string]uint64{"flow_error": 1}
		if fl.way.answerAction() == actRedirect && !fl.way.isLocal() {
			count["flow_redirect"] = 1
		}
		w.counts(t, count, func() { r = w.run(t, fl.way.answer, p) })
		r.wants(t, fl.way.answerAction(), want)
	}
}

// aboutAnswer sends errors about what the client was sent. Where the node stands for
// the client it does also for routers in front of it.
func (w *world) aboutAnswer(t *testing.T, fl *flow, kind icmpKind, size int) {
	t.Helper()
	answer := fl.answer("payload")
	arrived := between(answer, fl.vip, fl.from)
	for _, from := range []netip.Addr{fl.from.Addr(), clientRouter[fl.f]} {
		shown := from
		if fl.way.hidden[fl.f].IsValid() || from == fl.from.Addr() {
			shown = fl.seen.Addr()
		}
		p := icmpError(fl.f, kind, from, fl.vip.Addr(), arrived, size)
		want := icmpError(fl.f, kind, shown, fl.backend.Addr(), answer, size)
		if fl.way.around && !fl.way.isLocal() {
			want = hop(want)
		}
		w.run(t, fl.way.request, p).wants(t, fl.way.action(), want)
	}
}

// testErrorsOfOthers sends errors that have nothing to do with a flow.
func testErrorsOfOthers(t *testing.T, w *world) {
	for _, f := range families {
		s := &service{
			proto: lb.TCP, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
			backends: everywhere(at(pod[f], backendPort)),
		}
		w.add(t, f, s)
		fl := w.begin(t, f, ways[0], s, at(clusterIP[f], port))
		kind := icmpKinds[f][0]
		answer := between(fl.answer(""), fl.vip, fl.from)
		for name, p := range map[string]packet.Packet{
			"no flow has these ports": icmpError(f, kind, client[f], clusterIP[f], between(answer, fl.vip, at(client[f], 1)), -1),
			"about another protocol": icmpError(f, kind, client[f], clusterIP[f], func() packet.Packet {
				return packet.Packet{Src: clusterIP[f], Dst: client[f], Proto: 47, TTL: 1, Payload: "not TCP at all"}
			}(), -1),
			"about a later fragment":   icmpError(f, kind, client[f], clusterIP[f], answer.Split(8)[1], -1),
			"about the request itself": icmpError(f, kind, client[f], clusterIP[f], fl.request(""), -1),
			"for somebody else":        icmpError(f, kind, client[f], external[f], answer, -1),
			"without a quotation":      icmpError(f, kind, client[f], clusterIP[f], answer, 0),
			"with half an IP header":   icmpError(f, kind, client[f], clusterIP[f], answer, f.headers()/2),
			"without the ports":        icmpError(f, kind, client[f], clusterIP[f], answer, f.headers()+3),
		} {
			t.Run(f.String()+" "+name, func(t *testing.T) {
				frame := w.frame(in("eth0"), p)
				w.runBytes(t, in("eth0"), frame.Marshal()).untouched(t)
			})
		}
	}
}

// testErrorsAboutUnusual sends errors about packets with more headers than usual.
func testErrorsAboutUnusual(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			size := -1
			if proto == lb.SCTP {
				size = 8 // not the checksum, see errors
			}
			s := &service{
				proto: proto, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
				backends: everywhere(at(remotePod[f], port)),
			}
			w.add(t, f, s)
			fl := w.begin(t, f, wayTo(t, remotePod), s, at(clusterIP[f], port))
			change := func(what string, change func(packet.Packet) packet.Packet) {
				t.Run(f.String()+" "+proto.String()+" "+what, func(t *testing.T) {
					request := change(fl.request("payload and more"))
					arrived := change(between(fl.request("payload and more"), fl.seen, fl.backend))
					quoted := size
					if quoted > 0 {
						quoted += len(request.Quote(-1)) - len(fl.request("payload and more").Quote(-1)) + f.headers()
					}
					p := icmpError(f, icmpKinds[f][0], remotePod[f], fl.seen.Addr(), arrived, quoted)
					want := fl.back(icmpError(f, icmpKinds[f][0], fl.vip.Addr(), fl.from.Addr(), request, quoted))
					w.run(t, in("eth0"), p).redirected(t, want)
				})
			}
			for what, f := range unusual(f) {
				change(what, f)
			}
			if proto != lb.SCTP {
				change("a first fragment", func(p packet.Packet) packet.Packet { return p.Split(24)[0] })
			}
		}
	}
}

// wayTo returns the way from the outside to a backend.
func wayTo(t testing.TB, backend addrs) way {
	t.Helper()
	for _, way := range ways {
		if way.client == client && way.backend == backend {
			return way
		}
	}
	t.Fatalf("no way to %v", backend)
	return way{}
}
