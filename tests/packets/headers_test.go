// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"strings"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// unusual returns what may stand between an IP header and what it carries, and what
// may be set in it.
func unusual(f family) map[string]func(packet.Packet) packet.Packet {
	if f == ipv4 {
		options := func(o string) func(packet.Packet) packet.Packet {
			return func(p packet.Packet) packet.Packet { p.Options = o; return p }
		}
		return map[string]func(packet.Packet) packet.Packet{
			"no options":          options(""),
			"router alert":        options("\x94\x04\x00\x00"),
			"40 bytes of options": options(strings.Repeat("\x01", 40)),
			"a class of traffic":  func(p packet.Packet) packet.Packet { p.TrafficClass = 0xb9; return p },
			"no DF":               func(p packet.Packet) packet.Packet { p.DontFragment = false; return p },
		}
	}
	extensions := func(e string) func(packet.Packet) packet.Packet {
		return func(p packet.Packet) packet.Packet { p.Extensions = e; return p }
	}
	return map[string]func(packet.Packet) packet.Packet{
		"hop-by-hop options":  extensions(packet.Extension(packet.HopByHop, 8)),
		"destination options": extensions(packet.Extension(packet.DestinationOptions, 64)),
		"a routing header":    extensions(packet.Extension(packet.Routing, 24)),
		"all of them": extensions(packet.Extension(packet.HopByHop, 8) + packet.Extension(packet.DestinationOptions, 8) +
			packet.Extension(packet.Routing, 8)),
		"all of them and a fragment header": func(p packet.Packet) packet.Packet {
			p.Extensions = packet.Extension(packet.HopByHop, 8) + packet.Extension(packet.Routing, 8)
			p.Fragmentable, p.ID = true, 0x10203040
			return p
		},
		"a class of traffic": func(p packet.Packet) packet.Packet { p.TrafficClass = 0xb9; return p },
	}
}

// testHeaders sends packets with more headers than usual through flows.
func testHeaders(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			for _, backend := range []addrs{pod, remotePod} {
				s := &service{
					proto: proto, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
					backends: everywhere(at(backend[f], backendPort)),
				}
				way, vip := wayTo(t, backend), at(clusterIP[f], port)
				for name, change := range unusual(f) {
					t.Run(f.String()+" "+proto.String()+" "+way.name+" with "+name, func(t *testing.T) {
						w.add(t, f, s)
						w.forget(t)
						from := at(client[f], clientPort)
						p := change(opening(proto, from, vip))
						first := w.run(t, way.request, p)
						fl := &flow{way: way, f: f, proto: proto, from: from, vip: vip, backend: s.backends[0][0], first: first}
						fl.seen = way.seen(f, first.packet(t))
						first.wants(t, way.action(), fl.requested(p))
						p = change(fl.request("payload"))
						w.run(t, way.request, p).wants(t, way.action(), fl.requested(p))
						p = change(fl.answer("payload"))
						w.run(t, way.answer, p).wants(t, way.answerAction(), fl.answered(p))
					})
				}
			}
		}
	}
}

// testTrailer sends frames that were filled up: what is behind the packet is not the
// packet's.
func testTrailer(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			for _, backend := range []addrs{pod, remotePod} {
				way := wayTo(t, backend)
				t.Run(f.String()+" "+proto.String()+" "+way.name, func(t *testing.T) {
					s := &service{
						proto: proto, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}},
						backends: everywhere(at(backend[f], backendPort)),
					}
					w.add(t, f, s)
					fl := w.begin(t, f, way, s, at(clusterIP[f], port))
					p := fl.request("x")
					p.Trailer = "filled up"
					w.run(t, way.request, p).wants(t, way.action(), fl.requested(p))
					p = fl.answer("x")
					p.Trailer = "filled up"
					w.run(t, way.answer, p).wants(t, way.answerAction(), fl.answered(p))
				})
			}
		}
	}
}

// testShort sends packets whose header speaks of more bytes than are there: they are
// damaged, and nobody's to repair or to answer.
func testShort(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			for _, backend := range []addrs{pod, remotePod, farPod} {
				way := wayTo(t, backend)
				t.Run(f.String()+" "+proto.String()+" "+way.name, func(t *testing.T) {
					s := clusterService(f, proto, backend)
					w.add(t, f, s)
					fl := w.begin(t, f, way, s, at(clusterIP[f], port))
					for _, missing := range []int{1, 1200} {
						whole := w.frame(way.request, fl.request(strings.Repeat("x", 1300))).Marshal()
						w.runBytes(t, way.request, whole[:len(whole)-missing]).untouched(t)
						whole = w.frame(way.answer, fl.answer(strings.Repeat("x", 1300))).Marshal()
						w.runBytes(t, way.answer, whole[:len(whole)-missing]).untouched(t)
					}
					empty := &service{proto: proto, frontends: []frontend{{lb.KindLoadBalancer, balancer[f], port}}}
					w.add(t, f, empty)
					p := opening(proto, at(client[f], clientPort), at(balancer[f], port))
					p.Payload += strings.Repeat("x", 100)
					whole := w.frame(in("eth0"), p).Marshal()
					w.runBytes(t, in("eth0"), whole[:len(whole)-50]).untouched(t)
				})
			}
		}
	}
}

// testNotOurs sends what nobody is to touch, while everything that could be taken for
// it is there.
func testNotOurs(t *testing.T, w *world) {
	for _, f := range families {
		s := &service{
			proto: lb.TCP,
			frontends: []frontend{
				{lb.KindLoadBalancer, balancer[f], port}, {lb.KindNodePort, nodeAddr[f], nodePort},
			},
			backends: everywhere(at(pod[f], backendPort)),
		}
		w.add(t, f, s)
		from := at(client[f], clientPort)
		vip := at(balancer[f], port)
		for name, p := range map[string]packet.Packet{
			"another address":               opening(lb.TCP, from, at(external[f], port)),
			"another port":                  opening(lb.TCP, from, at(balancer[f], port+1)),
			"another protocol":              opening(lb.UDP, from, vip),
			"a NodePort at another address": opening(lb.TCP, from, at(nodeAddr1[f], nodePort)),
			"a segment without a flow":      later(lb.TCP, from, vip, "data"),
			"a SYN with ACK":                tcp(opening(lb.TCP, from, vip), packet.SYN|packet.ACK),
			"a SYN with FIN":                tcp(opening(lb.TCP, from, vip), packet.SYN|packet.FIN),
			"a SYN with RST":                tcp(opening(lb.TCP, from, vip), packet.SYN|packet.RST),
			"a RST":                         tcp(opening(lb.TCP, from, vip), packet.RST),
			"no flags at all":               tcp(opening(lb.TCP, from, vip), 0),
			"an echo request":               {Src: client[f], Dst: balancer[f], TTL: 64, Proto: f.icmp(), Type: []uint8{8, 128}[f], Payload: "ping"},
			"a protocol without ports":      {Src: client[f], Dst: balancer[f], TTL: 64, Proto: 47, Payload: "something else"},
			"a pod to a pod":                opening(lb.TCP, at(pod[f], port), at(podB[f], port)),
		} {
			t.Run(f.String()+" "+name, func(t *testing.T) {
				w.forget(t)
				for _, at := range []place{in("eth0"), in("pod0"), in("port0"), local("eth0"), out("eth0", "pod0")} {
					w.run(t, at, p).untouched(t)
				}
				if n := w.countFlows(t); n != 0 {
					t.Errorf("%d entries of flows", n)
				}
			})
		}
		for _, proto := range protocols {
			t.Run(f.String()+" the frontend of another host, "+proto.String(), func(t *testing.T) {
				w.forget(t)
				p := w.frame(in("eth0"), opening(lb.TCP, from, vip))
				p.DstMAC = mac(0x77)
				w.run(t, in("eth0"), p).untouched(t)
			})
		}
		t.Run(f.String()+" a frontend as the source", func(t *testing.T) {
			w.forget(t)
			w.run(t, in("eth0"), opening(lb.TCP, vip, from)).untouched(t)
		})
		t.Run(f.String()+" on its way out, from others", func(t *testing.T) {
			w.forget(t)
			w.run(t, out("eth0", "pod0"), opening(lb.TCP, from, vip)).untouched(t)
		})
		for name, change := range unusual(f) {
			t.Run(f.String()+" "+name, func(t *testing.T) {
				w.run(t, in("eth0"), change(opening(lb.TCP, from, at(external[f], port)))).untouched(t)
			})
		}
	}
	t.Run("a VLAN inside the frame", func(t *testing.T) {
		p := w.frame(in("eth0"), opening(lb.TCP, at(client[ipv4], clientPort), at(balancer[ipv4], port)))
		p.VLAN = 100
		w.run(t, in("eth0"), p).untouched(t)
	})
	t.Run("ARP", func(t *testing.T) {
		frame := "\xff\xff\xff\xff\xff\xff\x0a\x58\x00\x00\x00\x11\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01" + strings.Repeat("\x00", 20)
		w.runBytes(t, in("eth0"), []byte(frame)).untouched(t)
	})
}

// tcp returns the segment with other flags.
func tcp(p packet.Packet, flags uint8) packet.Packet {
	p.Flags = flags
	return p
}

// countFlows returns how many entries the flows have.
func (w *world) countFlows(t testing.TB) int {
	t.Helper()
	n := 0
	key, value := make([]byte, w.flows.KeySize()), make([]byte, w.flows.ValueSize())
	for entries := w.flows.Iterate(); entries.Next(key, value); {
		n++
	}
	return n
}
