// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// clusterService returns a service with a ClusterIP and one backend.
func clusterService(f family, proto lb.Protocol, backend addrs) *service {
	return &service{
		proto: proto, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
		backends: everywhere(at(backend[f], backendPort)),
	}
}

// move replaces all backends of a service.
func (w *world) move(t testing.TB, s *service, to ...netip.AddrPort) {
	t.Helper()
	for side := range lb.Side(lb.Sides) {
		w.setBackends(t, s, side, to)
	}
}

// inFamilies runs a test for each family, with no flow there.
func inFamilies(t *testing.T, w *world, name string, test func(t *testing.T, f family)) {
	for _, f := range families {
		t.Run(name+" "+f.String(), func(t *testing.T) {
			w.forget(t)
			test(t, f)
		})
	}
}

func testFlows(t *testing.T, w *world) {
	inFamilies(t, w, "segments out of the window are translated", func(t *testing.T, f family) {
		s := clusterService(f, lb.TCP, remotePod)
		w.add(t, f, s)
		fl := w.begin(t, f, wayTo(t, remotePod), s, at(clusterIP[f], port))
		for _, flags := range []uint8{packet.ACK, packet.SYN, packet.SYN | packet.ACK, packet.PSH, 0, packet.RST, packet.FIN | packet.ACK} {
			p := fl.request("")
			p.Seq, p.Ack, p.Flags = 0xdead0000, 0xbeef0000, flags
			w.run(t, in("eth0"), p).redirected(t, fl.requested(p))
			p = fl.answer("")
			p.Seq, p.Ack, p.Flags = 0xdead0000, 0xbeef0000, flags
			w.run(t, in("eth0"), p).redirected(t, fl.answered(p))
		}
	})
	inFamilies(t, w, "TCP goes on with a backend that has left", func(t *testing.T, f family) {
		s := clusterService(f, lb.TCP, pod)
		w.add(t, f, s)
		fl := w.begin(t, f, ways[0], s, at(clusterIP[f], port))
		w.move(t, s, at(podB[f], backendPort))
		w.translates(t, fl, "data")
		w.move(t, s)
		w.translates(t, fl, "data")
	})
	testEndings(t, w)
	testMoves(t, w)
	testConflicts(t, w)
	testPlaces(t, w)
}

// testEndings ends TCP and SCTP flows and begins them again, when the backend is
// another one: where the second beginning goes shows whether the flow was over.
func testEndings(t *testing.T, w *world) {
	type end struct {
		request, answer []uint8 // TCP's flags
		over            bool
	}
	for name, end := range map[string]end{
		"nothing has ended":               {over: false},
		"the client has closed":           {request: []uint8{packet.FIN | packet.ACK}, over: false},
		"the backend has closed":          {answer: []uint8{packet.FIN | packet.ACK}, over: false},
		"both have closed":                {request: []uint8{packet.FIN | packet.ACK}, answer: []uint8{packet.FIN | packet.ACK}, over: true},
		"the client has reset":            {request: []uint8{packet.RST}, over: true},
		"the backend has reset":           {answer: []uint8{packet.RST | packet.ACK}, over: true},
		"a reset that the other ignores":  {request: []uint8{packet.RST, packet.ACK}, over: false},
		"both have closed and acked that": {request: []uint8{packet.FIN | packet.ACK, packet.ACK}, answer: []uint8{packet.FIN | packet.ACK, packet.ACK}, over: true},
	} {
		inFamilies(t, w, "a SYN when "+name, func(t *testing.T, f family) {
			s := clusterService(f, lb.TCP, pod)
			w.add(t, f, s)
			fl := w.begin(t, f, ways[0], s, at(clusterIP[f], port))
			w.translates(t, fl, "data")
			for _, flags := range end.request {
				w.run(t, in("eth0"), tcp(fl.request(""), flags)).passes(t, fl.requested(tcp(fl.request(""), flags)))
			}
			for _, flags := range end.answer {
				w.run(t, out("eth0", "pod0"), tcp(fl.answer(""), flags)).passes(t, fl.answered(tcp(fl.answer(""), flags)))
			}
			w.wantsBeginning(t, fl, s, end.over)
		})
	}
	for name, end := range map[string]struct {
		request, answer byte // first chunk
		over            bool
	}{
		"nothing has ended":     {sctpData, sctpData, false},
		"the client shuts down": {sctpShutdown, sctpData, false},
		"both have shut down":   {sctpShutdown, sctpShutAck, true},
		"the client has broken": {sctpAbort, sctpAbort, true},
		"all is complete":       {sctpComplete, sctpComplete, true},
	} {
		inFamilies(t, w, "an INIT when "+name, func(t *testing.T, f family) {
			s := clusterService(f, lb.SCTP, pod)
			w.add(t, f, s)
			fl := w.begin(t, f, ways[0], s, at(clusterIP[f], port))
			w.translates(t, fl, "data")
			chunk := func(p packet.Packet, kind byte) packet.Packet {
				p.Payload = sctpChunk(kind, 8)
				return p
			}
			p := chunk(fl.request(""), end.request)
			w.run(t, in("eth0"), p).passes(t, fl.requested(p))
			p = chunk(fl.answer(""), end.answer)
			w.run(t, out("eth0", "pod0"), p).passes(t, fl.answered(p))
			w.wantsBeginning(t, fl, s, end.over)
		})
	}
}

// wantsBeginning moves the service to another pod and begins a flow with the ports of
// fl. It goes to that pod if fl is over, and with fl otherwise.
func (w *world) wantsBeginning(t *testing.T, fl *flow, s *service, over bool) {
	t.Helper()
	w.move(t, s, at(podB[fl.f], backendPort))
	again := opening(s.proto, fl.from, fl.vip)
	if over {
		w.run(t, in("eth0"), again).passes(t, between(again, fl.from, at(podB[fl.f], backendPort)))
		fl.backend = at(podB[fl.f], backendPort)
	} else {
		w.run(t, in("eth0"), again).passes(t, between(again, fl.from, fl.backend))
	}
	p := fl.answer("data")
	w.run(t, out("eth0", "pod1"), p).passes(t, fl.answered(p))
}

// testMoves takes backends away from UDP flows.
func testMoves(t *testing.T, w *world) {
	for _, backend := range []addrs{pod, remotePod} {
		way := wayTo(t, backend)
		inFamilies(t, w, "UDP moves at once, "+way.name, func(t *testing.T, f family) {
			s := clusterService(f, lb.UDP, backend)
			w.add(t, f, s)
			old := s.backends[0][0]
			fl := w.begin(t, f, way, s, at(clusterIP[f], port))

			// It is no longer chosen, but serves.
			w.move(t, s, at(podB[f], backendPort))
			w.translates(t, fl, "still there")

			w.retire(t, s, old)
			p := fl.request("anybody there")
			w.counts(t, map[string]uint64{"flow_moved": 1, "flow_request": 1, "packet_translate": 1}, func() {
				w.run(t, in("eth0"), p).passes(t, between(p, fl.from, at(podB[f], backendPort)))
			})
			// What the old one still says is nobody's.
			w.run(t, way.answer, fl.answer("too late")).untouched(t)
		})
		inFamilies(t, w, "UDP is refused when nobody is left, "+way.name, func(t *testing.T, f family) {
			s := clusterService(f, lb.UDP, backend)
			w.add(t, f, s)
			fl := w.begin(t, f, way, s, at(clusterIP[f], port))
			w.move(t, s)
			w.translates(t, fl, "still there")
			w.retire(t, s, s.backends[0][0])
			p := w.frame(in("eth0"), fl.request("anybody there"))
			w.counts(t, map[string]uint64{"flow_moved": 1, "packet_no_backend": 1, "reply_refused": 1}, func() {
				w.run(t, in("eth0"), p).redirected(t, refusal(f, p))
			})
			if n := w.countFlows(t); n != 0 {
				t.Errorf("%d entries of flows are left", n)
			}
		})
	}
}

// testConflicts begins flows whose packets would look the same at the backend.
func testConflicts(t *testing.T, w *world) {
	for _, proto := range protocols {
		inFamilies(t, w, "two VIPs, one backend, one source port, "+proto.String(), func(t *testing.T, f family) {
			first, second := clusterService(f, proto, pod), clusterService(f, proto, pod)
			second.frontends[0].addr = otherCluster[f]
			w.add(t, f, first)
			w.add(t, f, second)
			fl := w.begin(t, f, ways[0], first, at(clusterIP[f], port))
			var r result
			p := opening(proto, fl.from, at(otherCluster[f], port))
			w.counts(t, map[string]uint64{
				"flow_conflict": 4, "snat_new": 1, "packet_translate": 1, "flow_request": 1,
			}, func() { r = w.run(t, in("eth0"), p) })
			seen := src(r.packet(t))
			if seen.Addr() != client[f] || seen.Port() < snatPorts.First {
				t.Fatalf("in   %v\ngot  %v\nwant another port of the client's", r.in, r.packet(t))
			}
			r.passes(t, between(p, seen, fl.backend))

			// Each answer goes back to what was dialled, and where it did.
			w.translates(t, fl, "the first one")
			answer := later(proto, fl.backend, seen, "the second one")
			w.run(t, in("pod0"), answer).untouched(t)
			w.run(t, fl.way.answer, answer).passes(t, between(answer, at(otherCluster[f], port), fl.from))
		})
		inFamilies(t, w, "two VIPs, two backends, one source port, "+proto.String(), func(t *testing.T, f family) {
			first, second := clusterService(f, proto, pod), clusterService(f, proto, pod)
			second.frontends[0].addr = otherCluster[f]
			second.backends = everywhere(at(pod[f], backendPort), at(podB[f], backendPort))
			w.add(t, f, first)
			w.add(t, f, second)
			others := 0
			for range 50 {
				fl := w.begin(t, f, ways[0], first, at(clusterIP[f], port))
				got := w.run(t, in("eth0"), opening(proto, fl.from, at(otherCluster[f], port))).packet(t)
				switch {
				case src(got) == fl.from && dst(got) == at(podB[f], backendPort):
					others++
				case src(got) == fl.from || src(got).Addr() != client[f]:
					t.Fatalf("got %v, want the other pod or another source port", got)
				}
			}
			// The same one four times over happens once in sixteen.
			if others < 35 {
				t.Errorf("the other pod was taken %d times of 50, want about 47", others)
			}
		})
	}
}

// testPlaces moves clients and answers from one device to another.
func testPlaces(t *testing.T, w *world) {
	inFamilies(t, w, "an answer leaves by the client's uplink", func(t *testing.T, f family) {
		s := clusterService(f, lb.TCP, pod)
		w.add(t, f, s)
		fl := w.begin(t, f, ways[0], s, at(clusterIP[f], port))
		p := fl.answer("data")
		want := fl.answered(p)
		want.SrcMAC, want.DstMAC = fl.first.in.DstMAC, fl.first.in.SrcMAC
		w.counts(t, map[string]uint64{"flow_answer": 1, "flow_redirect": 1}, func() {
			w.run(t, out("eth1", "pod0"), p).redirected(t, want)
		})
	})
	inFamilies(t, w, "a client that is elsewhere now", func(t *testing.T, f family) {
		s := clusterService(f, lb.UDP, remotePod)
		w.add(t, f, s)
		fl := w.begin(t, f, wayTo(t, remotePod), s, at(clusterIP[f], port))
		moved := fl.request("from here")
		want := fl.answered(fl.answer("to there"))
		want.SrcMAC, want.DstMAC = w.devices["eth1"].mac, thirdNodeMAC
		// Requests are noted once a second.
		testutil.Eventually(t, patience, "answers to the new place", func() error {
			w.run(t, in("eth1"), moved).redirected(t, fl.requested(moved))
			if got := w.run(t, in("eth0"), fl.answer("to there")).packet(t); got != want {
				return fmt.Errorf("got  %v\nwant %v", got, want)
			}
			return nil
		})
	})
	inFamilies(t, w, "an entry that was evicted comes back", func(t *testing.T, f family) {
		s := clusterService(f, lb.TCP, remotePod)
		w.add(t, f, s)
		fl := w.begin(t, f, wayTo(t, remotePod), s, at(clusterIP[f], port))
		w.run(t, in("eth0"), fl.answer("data"))
		restored := map[string]uint64{"flow_restored": 1, "flow_redirect": 1}

		w.evict(t, fl.backend.Addr())
		p := fl.request("now it is established")
		restored["flow_request"] = 1
		w.counts(t, restored, func() { w.run(t, in("eth0"), p).redirected(t, fl.requested(p)) })
		w.translates(t, fl, "as before")

		w.evict(t, fl.from.Addr())
		p = tcp(fl.answer("and now half closed"), packet.FIN|packet.ACK)
		delete(restored, "flow_request")
		restored["flow_answer"] = 1
		w.counts(t, restored, func() { w.run(t, in("eth0"), p).redirected(t, fl.answered(p)) })
		w.translates(t, fl, "as before")
	})
}

// evict deletes the flows' entries whose packets have this source.
func (w *world) evict(t testing.TB, source netip.Addr) {
	t.Helper()
	key, value := make([]byte, w.flows.KeySize()), make([]byte, w.flows.ValueSize())
	for entries := w.flows.Iterate(); entries.Next(key, value); {
		if netip.AddrFrom16([16]byte(key[:16])).Unmap() == source {
			must(t, w.flows.Delete(key))
			return
		}
	}
	t.Fatalf("no entry of %s", source)
}

// TestFewSourcePorts has four source ports, of which others may have some.
func TestFewSourcePorts(t *testing.T) {
	w := newWorld(t, func(c *datapath.Config) { c.SNATPorts = datapath.PortRange{First: 61000, Last: 61003} })
	begin := func(t *testing.T, f family, s *service, n uint16) result {
		t.Helper()
		return w.run(t, in("eth0"), opening(s.proto, at(client[f], clientPort+n), at(clusterIP[f], port)))
	}
	for _, proto := range protocols {
		inFamilies(t, w, "exhaustion, "+proto.String(), func(t *testing.T, f family) {
			s := clusterService(f, proto, remotePod)
			w.add(t, f, s)
			ports := map[uint16]bool{}
			for n := range uint16(4) {
				ports[begin(t, f, s, n).packet(t).SrcPort] = true
			}
			if len(ports) != 4 {
				t.Errorf("four flows have the ports %v", ports)
			}
			w.counts(t, map[string]uint64{"packet_translate": 1, "snat_collision": 32, "drop_snat_exhausted": 1}, func() {
				begin(t, f, s, 4).dropped(t)
			})
			// The ports of another backend are free.
			w.move(t, s, at(remotePodB[f], backendPort))
			if got := begin(t, f, s, 5); got.action != actRedirect {
				t.Errorf("a flow to another backend: %s %v", actionName(got.action), got.packet(t))
			}
			// A port is free again after the flow is over.
			w.move(t, s, at(remotePod[f], backendPort))
			if proto == lb.TCP {
				reset := tcp(later(proto, at(client[f], clientPort), at(clusterIP[f], port), ""), packet.RST)
				w.run(t, in("eth0"), reset)
				if got := begin(t, f, s, 6); got.action != actRedirect {
					t.Errorf("a flow after another's end: %s %v", actionName(got.action), got.packet(t))
				}
			}
		})
	}
	for _, proto := range []lb.Protocol{lb.TCP, lb.UDP} {
		inFamilies(t, w, "ports of sockets, "+proto.String(), func(t *testing.T, f family) {
			for n := range uint16(3) {
				addr := at(nodeAddr[f], 61000+n).String()
				if proto == lb.TCP {
					l, err := w.node.Listen("tcp", addr)
					must(t, err)
					defer l.Close()
				} else {
					c, err := w.node.ListenPacket("udp", addr)
					must(t, err)
					defer c.Close()
				}
			}
			s := clusterService(f, proto, remotePod)
			w.add(t, f, s)
			for range 20 {
				w.forget(t)
				if got := begin(t, f, s, 0).packet(t); got.SrcPort != 61003 {
					t.Fatalf("got %v, want source port 61003: sockets have the others", got)
				}
			}
		})
	}
}
