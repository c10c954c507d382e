// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"strings"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// narrow is the MTU of eth1 and what is behind it.
const narrow = 1400

// The errors of the node's own.
var (
	timeExceeded = [2]icmpKind{{kind: 11}, {kind: 3}}
	tooBig       = [2]icmpKind{{kind: 3, code: 4, rest: narrow}, {kind: 2, rest: narrow}}
)

// testHops sends packets whose time to live is over.
func testHops(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			for _, way := range ways {
				t.Run(f.String()+" "+proto.String()+" "+way.name, func(t *testing.T) {
					s := clusterService(f, proto, way.backend)
					w.add(t, f, s)
					fl := w.begin(t, f, way, s, at(clusterIP[f], port))
					last := func(p packet.Packet) packet.Packet { p.TTL = 1; return p }

					request, answer := last(fl.request("request")), last(fl.answer("answer"))
					if !fl.way.around || fl.way.isLocal() { // the stack's business
						w.run(t, way.request, request).wants(t, way.action(), fl.requested(request))
						w.run(t, way.answer, answer).wants(t, way.answerAction(), fl.answered(answer))
						return
					}
					w.tellsTooFar(t, f, way.request, request)
					w.tellsTooFar(t, f, way.answer, answer)
				})
			}
		}
	}
	t.Run("counters", func(t *testing.T) {
		s := clusterService(ipv4, lb.UDP, remotePod)
		w.add(t, ipv4, s)
		fl := w.begin(t, ipv4, wayTo(t, remotePod), s, at(clusterIP[ipv4], port))
		for _, p := range []packet.Packet{fl.request("request"), fl.answer("answer")} {
			p.TTL = 1
			w.counts(t, map[string]uint64{"drop_ttl": 1, "reply_ttl": 1}, func() { w.run(t, in("eth0"), p) })
		}
	})
}

// tellsTooFar sends a packet that may go no further. The node's word comes from the
// address of the device or, if that has none, from where the packet was going.
func (w *world) tellsTooFar(t *testing.T, f family, at place, p packet.Packet) {
	t.Helper()
	r := w.run(t, at, p)
	if r.link == packet.NoLink {
		r.dropped(t) // being a group's, see class6; on the wire it is answered
		return
	}
	source := w.devices[at.device].address[f]
	if !source.IsValid() {
		source = p.Dst
	}
	r.redirected(t, ours(f, timeExceeded[f], source, r.in))
}

// testSizes sends packets that do not fit on the way to the backend, or to the client.
func testSizes(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range []lb.Protocol{lb.TCP, lb.UDP} {
			// payload fills a packet up to a size.
			payload := func(size int) string {
				return strings.Repeat("x", size-len(later(proto, at(client[f], 1), at(clusterIP[f], 1), "").Quote(-1)))
			}
			t.Run(f.String()+" "+proto.String()+" to the backend", func(t *testing.T) {
				s := clusterService(f, proto, farPod)
				w.add(t, f, s)
				fl := w.begin(t, f, wayTo(t, farPod), s, at(clusterIP[f], port))
				w.translates(t, fl, payload(narrow))
				for _, fragment := range []bool{true, false} {
					p := w.frame(in("eth0"), fl.request(payload(narrow+1)))
					p.DontFragment = f == ipv4 && !fragment
					w.counts(t, map[string]uint64{"drop_too_big": 1, "reply_too_big": 1}, func() {
						w.run(t, in("eth0"), p).redirected(t, ours(f, tooBig[f], nodeAddr[f], p))
					})
				}
			})
			t.Run(f.String()+" "+proto.String()+" to the client", func(t *testing.T) {
				s := clusterService(f, proto, remotePod)
				w.add(t, f, s)
				way := wayTo(t, remotePod)
				way.request = in("eth1")
				fl := w.begin(t, f, way, s, at(clusterIP[f], port))
				w.translates(t, fl, payload(narrow))
				p := w.frame(in("eth0"), fl.answer(payload(narrow+1)))
				w.counts(t, map[string]uint64{"drop_too_big": 1, "reply_too_big": 1}, func() {
					w.run(t, in("eth0"), p).redirected(t, ours(f, tooBig[f], nodeAddr[f], p))
				})
			})
		}
	}
}

// testNoRoute sends packets to backends that the node does not forward to.
func testNoRoute(t *testing.T, w *world) {
	for _, f := range families {
		t.Run(f.String(), func(t *testing.T) {
			s := clusterService(f, lb.UDP, both("10.250.0.1", "fd00:250::1"))
			w.add(t, f, s)
			w.forget(t)
			p := opening(lb.UDP, at(client[f], clientPort), at(clusterIP[f], port))
			w.counts(t, map[string]uint64{"packet_translate": 1, "drop_no_route": 1}, func() {
				w.run(t, in("eth0"), p).dropped(t)
			})
			if n := w.countFlows(t); n != 0 {
				t.Errorf("%d entries of flows", n)
			}
		})
	}
}
