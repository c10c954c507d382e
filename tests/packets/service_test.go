// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

const nodeAddressOpen = lb.NodeAddressOpen

// service is what a case writes into the tables.
type service struct {
	proto     lb.Protocol
	frontends []frontend
	backends  [lb.Sides][]netip.AddrPort
	// elsewhere marks sides that are empty because of a traffic policy.
	elsewhere   [lb.Sides]bool
	affinity    uint32
	restricted  bool
	nodeAllowed bool
	sources     []netip.Prefix
	// outsideLocal says that clients outside get backends of this node only.
	outsideLocal bool

	id lb.ServiceID
	// ranges are those in the tables.
	ranges [lb.Sides]lb.Range
}

// frontend is one of a service's. Without an address it is a NodePort.
type frontend struct {
	kind lb.FrontendKind
	addr netip.Addr
	port uint16
}

func (f frontend) key(s *service, of family) lb.FrontendKey {
	key := lb.FrontendKey{VIP: f.addr, Port: f.port, Protocol: s.proto}
	if f.kind == lb.KindNodePort {
		key.VIP = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}[of]
	}
	return key
}

// everywhere returns the same backends for all sides.
func everywhere(backends ...netip.AddrPort) (out [lb.Sides][]netip.AddrPort) {
	for side := range out {
		out[side] = backends
	}
	return out
}

// add writes a service's rows, which are gone when the test ends.
func (w *world) add(t testing.TB, f family, s *service) {
	t.Helper()
	w.services++
	s.id = lb.ServiceID(w.services)
	must(t, w.datapath.SetOptions(s.id, lb.ServiceRow{
		Affinity: s.affinity, Restricted: s.restricted, NodeAllowed: s.nodeAllowed, OutsideLocal: s.outsideLocal,
	}))
	for _, prefix := range s.sources {
		must(t, w.datapath.SetSource(lb.Source{Service: s.id, Prefix: prefix}))
	}
	for side, backends := range s.backends {
		w.setBackends(t, s, lb.Side(side), backends)
	}
	for _, front := range s.frontends {
		must(t, w.datapath.SetFrontend(front.key(s, f), lb.Frontend{Service: s.id, Kind: front.kind}))
	}
	t.Cleanup(func() {
		for _, front := range s.frontends {
			must(t, w.datapath.DeleteFrontend(front.key(s, f)))
		}
		for side := range lb.Side(lb.Sides) {
			w.setBackends(t, s, side, nil)
		}
	})
}

// setBackends replaces the backends of one side. Those that leave go on serving.
func (w *world) setBackends(t testing.TB, s *service, side lb.Side, addrs []netip.AddrPort) {
	t.Helper()
	var backends []lb.Backend
	for _, a := range addrs {
		backends = append(backends, lb.Backend{Addr: a.Addr(), Port: a.Port()})
	}
	next := s.ranges[side].NextEmpty(s.elsewhere[side])
	if len(backends) > 0 {
		must(t, w.datapath.SetSlots(w.slots, backends))
		next = s.ranges[side].Next(w.slots, len(backends))
		w.slots += uint32(len(backends))
	}
	for _, b := range backends {
		must(t, w.datapath.SetMember(lb.Member{Service: s.id, Backend: b, Use: lb.UseOn(side)}))
		if s.proto.Remembers() {
			must(t, w.datapath.SetMember(lb.Member{Service: s.id, Backend: b, Use: lb.UseServing}))
		}
	}
	s.ranges[side] = next
	must(t, w.datapath.SetRange(s.id, side, next))
}

// retire ends the serving of a backend that is in no set any more.
func (w *world) retire(t testing.TB, s *service, addr netip.AddrPort) {
	t.Helper()
	must(t, w.datapath.DeleteMember(lb.Member{Service: s.id, Backend: lb.Backend{Addr: addr.Addr(), Port: addr.Port()}, Use: lb.UseServing}))
}

// wildcard makes all undefined ports of an address refuse until the test ends.
func (w *world) wildcard(t testing.TB, vip netip.Addr, kind lb.FrontendKind) {
	t.Helper()
	key := lb.FrontendKey{VIP: vip}
	must(t, w.datapath.SetFrontend(key, lb.Frontend{Service: lb.NoService, Kind: kind}))
	t.Cleanup(func() { must(t, w.datapath.DeleteFrontend(key)) })
}

var protocols = []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP}

// Ports that cases use.
const (
	clientPort  = 40000
	port        = 80
	backendPort = 8080
	nodePort    = 30080
)

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// sctpChunk returns an SCTP chunk with a value of size bytes.
func sctpChunk(kind byte, size int) string {
	chunk := make([]byte, 4+size)
	chunk[0], chunk[2], chunk[3] = kind, byte((4+size)>>8), byte(4+size)
	return string(chunk)
}

// SCTP's chunks.
const (
	sctpData     = 0
	sctpInit     = 1
	sctpInitAck  = 2
	sctpAbort    = 6
	sctpShutdown = 7
	sctpShutAck  = 8
	sctpComplete = 14
)

// class6 makes the first byte of an IPv6 header odd. Where that is taken for the
// first one of an Ethernet header (see tunnelAddr) it is a group's then, and nobody
// else's.
const class6 = 0x10

// opening returns the first packet of a flow.
func opening(proto lb.Protocol, src, dst netip.AddrPort) packet.Packet {
	p := packet.Packet{
		Src: src.Addr(), Dst: dst.Addr(), Proto: uint8(proto), TTL: 64, SrcPort: src.Port(), DstPort: dst.Port(),
	}
	if p.Is6() {
		p.FlowLabel, p.TrafficClass = 0x1234, class6
	} else {
		p.ID, p.DontFragment = 77, true
	}
	switch proto {
	case lb.TCP:
		p.Seq, p.Flags, p.Window, p.TCPOptions = 1000, packet.SYN, 64240, "\x02\x04\x05\xb4"
	case lb.UDP:
		p.Payload = "what is it"
	case lb.SCTP:
		p.Payload = sctpChunk(sctpInit, 16)
	}
	return p
}

// later returns a packet from the middle of a flow.
func later(proto lb.Protocol, src, dst netip.AddrPort, payload string) packet.Packet {
	p := opening(proto, src, dst)
	switch proto {
	case lb.TCP:
		p.Seq, p.Ack, p.Flags, p.TCPOptions, p.Payload = 1001, 5001, packet.ACK|packet.PSH, "", payload
	case lb.UDP:
		p.Payload = payload
	case lb.SCTP:
		p.Tag = 0xcafe
		p.Payload = sctpChunk(sctpData, 12+(len(payload)+3)&^3)
	}
	return p
}

// src and dst return the packet's ends.
func src(p packet.Packet) netip.AddrPort { return at(p.Src, p.SrcPort) }
func dst(p packet.Packet) netip.AddrPort { return at(p.Dst, p.DstPort) }

// between returns the packet with other ends.
func between(p packet.Packet, src, dst netip.AddrPort) packet.Packet {
	p.Src, p.SrcPort, p.Dst, p.DstPort = src.Addr(), src.Port(), dst.Addr(), dst.Port()
	return p
}

// hop returns the packet one hop further on.
func hop(p packet.Packet) packet.Packet {
	p.TTL--
	return p
}
