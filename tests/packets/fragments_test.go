// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// testFragments sends packets in pieces.
func testFragments(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			for _, backend := range []addrs{pod, remotePod} {
				way := wayTo(t, backend)
				toPort := uint16(backendPort)
				if proto == lb.SCTP {
					if backend == remotePod {
						continue // the source port would change, see below
					}
					toPort = port // the first piece does not show how long the checksum's packet is
				}
				t.Run(f.String()+" "+proto.String()+" "+way.name, func(t *testing.T) {
					s := &service{
						proto: proto, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
						backends: everywhere(at(backend[f], toPort)),
					}
					w.add(t, f, s)
					w.wildcard(t, clusterIP[f], lb.KindClusterIP)
					fl := w.begin(t, f, way, s, at(clusterIP[f], port))
					w.inPieces(t, fl)
				})
			}
		}
		testLostFragments(t, w, f)
	}
}

// large returns a packet that is cut into pieces, with an identification of its own.
func large(p packet.Packet, id uint32) packet.Packet {
	p.DontFragment, p.ID = false, id
	return p
}

// inPieces sends a packet of a flow in each direction in three pieces.
func (w *world) inPieces(t *testing.T, fl *flow) {
	const size = 24
	payload := "a payload for three pieces: 24 + 24 + the rest"
	for _, tc := range []struct {
		at       place
		action   uint32
		in, want packet.Packet
	}{
		{fl.way.request, fl.way.action(), fl.request(payload), fl.requested(fl.request(payload))},
		{fl.way.answer, fl.way.answerAction(), fl.answer(payload), fl.answered(fl.answer(payload))},
	} {
		want := large(tc.want, 4711).Split(size)
		var got []packet.Packet
		for i, part := range large(tc.in, 4711).Split(size) {
			r := w.run(t, tc.at, part)
			r.wants(t, tc.action, want[i])
			got = append(got, r.packet(t))
		}
		for i := range got {
			got[i].SrcMAC, got[i].DstMAC = got[0].SrcMAC, got[0].DstMAC
		}
		if _, err := packet.Join(got); err != nil {
			t.Errorf("the pieces of %v: %v", tc.want, err)
		}
		// Once the first one was there, the others may come in any order, also again.
		parts := large(tc.in, 4711).Split(size)
		for _, i := range []int{2, 1, 2} {
			w.run(t, tc.at, parts[i]).wants(t, tc.action, want[i])
		}
	}
	// The same number means another packet from somebody else.
	other := large(fl.request(payload), 4711).Split(size)[2]
	other.Src = otherClient[fl.f]
	w.counts(t, map[string]uint64{"drop_fragment": 1}, func() { w.run(t, fl.way.request, other).dropped(t) })
}

// testLostFragments sends pieces that come too early or belong to nobody.
func testLostFragments(t *testing.T, w *world, f family) {
	s := &service{
		proto: lb.UDP,
		frontends: []frontend{
			{lb.KindClusterIP, clusterIP[f], port}, {lb.KindLoadBalancer, balancer[f], port},
			{lb.KindExternalIP, external[f], port},
		},
		backends: everywhere(at(pod[f], backendPort)),
	}
	w.add(t, f, s)
	w.wildcard(t, clusterIP[f], lb.KindClusterIP)
	piece := func(to addrs, id uint32) []packet.Packet {
		return large(later(lb.UDP, at(client[f], clientPort), at(to[f], port), "a payload for two pieces"), id).Split(16)
	}
	t.Run(f.String()+" a later fragment before the first, to a ClusterIP", func(t *testing.T) {
		w.forget(t)
		w.counts(t, map[string]uint64{"drop_fragment": 1}, func() {
			w.run(t, in("eth0"), piece(clusterIP, 1000)[1]).dropped(t)
		})
	})
	// At these addresses others may serve the ports that no Service has.
	for name, to := range map[string]addrs{"load-balancer IP": balancer, "external IP": external} {
		t.Run(f.String()+" a later fragment before the first, to a "+name, func(t *testing.T) {
			w.forget(t)
			w.run(t, in("eth0"), piece(to, 1000)[1]).untouched(t)
		})
	}
	t.Run(f.String()+" fragments for others", func(t *testing.T) {
		w.forget(t)
		for _, part := range append(piece(otherCluster, 1001), piece(thirdNode, 1002)...) {
			if part.Dst != otherCluster[f] { // that is in a service CIDR
				w.run(t, in("eth0"), part).untouched(t)
			}
		}
	})
	t.Run(f.String()+" a fragmented segment without a flow", func(t *testing.T) {
		w.forget(t)
		parts := large(later(lb.TCP, at(client[f], clientPort), at(balancer[f], port), "a segment for two pieces"), 1003).Split(24)
		w.run(t, in("eth0"), parts[0]).untouched(t)
	})
	t.Run(f.String()+" a first fragment without all of the TCP header", func(t *testing.T) {
		w.forget(t)
		parts := large(opening(lb.TCP, at(client[f], clientPort), at(balancer[f], port)), 1004).Split(8)
		w.run(t, in("eth0"), parts[0]).untouched(t)
	})
	t.Run(f.String()+" SCTP in pieces to another port", func(t *testing.T) {
		s := &service{
			proto: lb.SCTP, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
			backends: everywhere(at(pod[f], backendPort)),
		}
		w.add(t, f, s)
		fl := w.begin(t, f, ways[0], s, at(clusterIP[f], port))
		parts := large(fl.request("a payload for two pieces"), 1005).Split(24)
		w.counts(t, map[string]uint64{"drop_malformed": 1, "flow_request": 1}, func() {
			w.run(t, in("eth0"), parts[0]).dropped(t)
		})
	})
}
