// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// How many bytes an ICMP error may have.
var longest = [2]int{576, 1280}

// ours returns an ICMP error of the node's own about a packet, back to where that
// came from.
func ours(f family, k icmpKind, from netip.Addr, about packet.Packet) packet.Packet {
	p := icmpError(f, k, from, about.Src, about, longest[f]-f.headers()-8)
	p.TTL, p.ID, p.TrafficClass, p.DontFragment = 64, 0, 0, f == ipv4
	p.SrcMAC, p.DstMAC = about.DstMAC, about.SrcMAC
	return p
}

// refusal returns what a client gets who dials a port where nobody is.
func refusal(f family, p packet.Packet) packet.Packet {
	if p.Proto != packet.TCP {
		return ours(f, icmpKinds[f][0], p.Dst, p)
	}
	return packet.Packet{
		SrcMAC: p.DstMAC, DstMAC: p.SrcMAC, Src: p.Dst, Dst: p.Src, TTL: 64, DontFragment: f == ipv4,
		Proto: packet.TCP, SrcPort: p.DstPort, DstPort: p.SrcPort,
		Ack: p.Seq + 1 + uint32(len(p.Payload)), Flags: packet.RST | packet.ACK,
	}
}

// everywhereIn are the places where decisions are made.
var everywhereIn = []struct {
	at     place
	client addrs
}{
	{in("eth0"), client}, {in("pod0"), pod}, {in("port0"), bridged}, {local("eth0"), nodeAddr},
}

func testVerdicts(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			empty := &service{proto: proto, frontends: []frontend{
				{lb.KindClusterIP, clusterIP[f], port}, {lb.KindLoadBalancer, balancer[f], port}, {lb.KindNodePort, nodeAddr[f], nodePort},
			}}
			elsewhere := &service{
				proto: proto, elsewhere: [lb.Sides]bool{true, true, true},
				frontends: []frontend{{lb.KindClusterIP, clusterIP[f], 81}, {lb.KindLoadBalancer, balancer[f], 81}},
			}
			for _, from := range everywhereIn {
				name := fmt.Sprintf("%s %s at %s from %s ", f, proto, w.program(from.at), from.client[f])
				t.Run(name+"no backend", func(t *testing.T) {
					w.add(t, f, empty)
					for _, to := range []netip.AddrPort{at(clusterIP[f], port), at(balancer[f], port), at(nodeAddr[f], nodePort)} {
						w.refuses(t, f, from.at, "no_backend", opening(proto, at(from.client[f], clientPort), to))
					}
				})
				t.Run(name+"no such port", func(t *testing.T) {
					w.wildcard(t, clusterIP[f], lb.KindClusterIP)
					w.refuses(t, f, from.at, "no_port", opening(proto, at(from.client[f], clientPort), at(clusterIP[f], 82)))
				})
				t.Run(name+"another proxy's port", func(t *testing.T) {
					w.wildcard(t, clusterIP[f], lb.KindForeign)
					w.run(t, from.at, opening(proto, at(from.client[f], clientPort), at(clusterIP[f], 82))).untouched(t)
				})
				t.Run(name+"backends elsewhere only", func(t *testing.T) {
					w.add(t, f, elsewhere)
					for _, to := range []netip.AddrPort{at(clusterIP[f], 81), at(balancer[f], 81)} {
						w.drops(t, from.at, "no_local", opening(proto, at(from.client[f], clientPort), to))
					}
				})
				t.Run(name+"nobody's address", func(t *testing.T) {
					w.drops(t, from.at, "no_service", opening(proto, at(from.client[f], clientPort), at(nobody[f], port)))
				})
			}
		}
		testAddressVerdicts(t, w, f)
		testRefusals(t, w, f)
	}
}

// refuses sends a packet that is refused.
func (w *world) refuses(t *testing.T, f family, at place, verdict string, p packet.Packet) {
	t.Helper()
	w.forget(t)
	p = w.frame(at, p)
	w.counts(t, map[string]uint64{"packet_" + verdict: 1, "reply_refused": 1}, func() {
		w.run(t, at, p).redirected(t, refusal(f, p))
	})
	if n := w.countFlows(t); n != 0 {
		t.Errorf("%d entries of flows", n)
	}
}

// drops sends a packet that is dropped.
func (w *world) drops(t *testing.T, at place, verdict string, p packet.Packet) {
	t.Helper()
	w.forget(t)
	w.counts(t, map[string]uint64{"packet_" + verdict: 1}, func() { w.run(t, at, p).dropped(t) })
	if n := w.countFlows(t); n != 0 {
		t.Errorf("%d entries of flows", n)
	}
}

// testAddressVerdicts sends packets of protocols without ports.
func testAddressVerdicts(t *testing.T, w *world, f family) {
	echo := packet.Packet{Src: client[f], TTL: 64, Proto: f.icmp(), Type: []uint8{8, 128}[f], Rest: 0x10001, Payload: "ping"}
	other := packet.Packet{Src: client[f], TTL: 64, Proto: 47, Payload: "something else"}
	for name, p := range map[string]packet.Packet{"an echo request": echo, "another protocol": other} {
		t.Run(f.String()+" "+name, func(t *testing.T) {
			w.wildcard(t, clusterIP[f], lb.KindClusterIP)
			p.Dst = clusterIP[f]
			w.refuses(t, f, in("eth0"), "no_port", p)
			p.Dst = nobody[f]
			w.drops(t, in("eth0"), "no_service", p)
		})
	}
	t.Run(f.String()+" an answer to an echo request", func(t *testing.T) {
		w.wildcard(t, clusterIP[f], lb.KindClusterIP)
		reply := echo
		reply.Type, reply.Dst = []uint8{0, 129}[f], clusterIP[f]
		w.counts(t, map[string]uint64{"packet_no_port": 1}, func() { w.run(t, in("eth0"), reply).dropped(t) })
	})
}

// testRefusals sends packets that are refused in an unusual way, or without a word.
func testRefusals(t *testing.T, w *world, f family) {
	from := at(client[f], clientPort)
	s := &service{proto: lb.TCP, frontends: []frontend{{lb.KindLoadBalancer, balancer[f], port}}}
	u := &service{proto: lb.UDP, frontends: []frontend{{lb.KindLoadBalancer, balancer[f], port}}}
	w.add(t, f, s)
	w.add(t, f, u)
	syn, datagram := opening(lb.TCP, from, at(balancer[f], port)), opening(lb.UDP, from, at(balancer[f], port))
	refused := map[string]packet.Packet{}
	for name, change := range unusual(f) {
		refused["a SYN with "+name] = change(syn)
		refused["a datagram with "+name] = change(datagram)
	}
	for name, size := range map[string]int{"empty": 0, "of one byte": 1, "of odd length": 777, "too long to quote": 1400} {
		p := datagram
		p.Payload = strings.Repeat("x", size)
		refused["a datagram that is "+name] = p
		p = syn
		p.Payload = strings.Repeat("x", size)
		refused["a SYN with data that is "+name] = p
	}
	for name, p := range refused {
		t.Run(f.String()+" "+name, func(t *testing.T) {
			w.refuses(t, f, in("eth0"), "no_backend", p)
			filled := p
			filled.Trailer = "filled up"
			w.counts(t, map[string]uint64{"packet_no_backend": 1, "reply_refused": 1}, func() {
				w.run(t, in("eth0"), filled).redirected(t, refusal(f, w.frame(in("eth0"), p)))
			})
		})
	}
	t.Run(f.String()+" a first fragment", func(t *testing.T) {
		p := large(datagram, 2000).Split(16)[0]
		w.refuses(t, f, in("eth0"), "no_backend", p)
	})
	silent := func(name string, change func(*packet.Packet)) {
		t.Run(f.String()+" no word to "+name, func(t *testing.T) {
			for _, p := range []packet.Packet{syn, datagram} {
				p = w.frame(in("eth0"), p)
				change(&p)
				w.drops(t, in("eth0"), "no_backend", p)
			}
		})
	}
	silent("a frame for everybody", func(p *packet.Packet) { p.DstMAC = packet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} })
	silent("a frame for many", func(p *packet.Packet) { p.DstMAC = packet.MAC{1, 0, 0x5e, 0, 0, 1} })
	silent("a group", func(p *packet.Packet) { p.Src = both("224.0.0.5", "ff02::5")[f] })
	silent("nobody", func(p *packet.Packet) { p.Src = both("0.0.0.0", "::")[f] })
	silent("itself", func(p *packet.Packet) { p.Src = both("127.0.0.1", "::1")[f] })
}

// testSides gives each side a backend of its own.
func testSides(t *testing.T, w *world) {
	must(t, w.datapath.SetClusterCIDRs([]netip.Prefix{netip.MustParsePrefix("198.51.100.16/28"), netip.MustParsePrefix("2001:db8:51::20/124")}))
	t.Cleanup(func() { must(t, w.datapath.SetClusterCIDRs(nil)) })
	for _, f := range families {
		for _, proto := range protocols {
			s := &service{proto: proto, frontends: []frontend{
				{lb.KindClusterIP, clusterIP[f], port}, {lb.KindLoadBalancer, balancer[f], port},
				{lb.KindExternalIP, external[f], port}, {lb.KindNodePort, nodeAddr[f], nodePort},
			}}
			for side := range lb.Side(lb.Sides) {
				s.backends[side] = []netip.AddrPort{at(podB[f], 9000+uint16(side))}
			}
			w.add(t, f, s)
			for _, tc := range []struct {
				name   string
				at     place
				client addrs
				side   lb.Side
			}{
				{"from outside", in("eth0"), client, lb.SideOutside},
				{"from outside by a tunnel", in("eth1"), client, lb.SideOutside},
				{"from a pod of another node", in("eth0"), remotePod, lb.SideOutside},
				{"from the cluster's addresses", in("eth0"), otherClient, lb.SideInside},
				{"from a pod", in("pod0"), pod, lb.SideInside},
				{"from a pod behind a bridge", in("port0"), bridged, lb.SideInside},
				{"from a process of the node", local("eth0"), nodeAddr, lb.SideInside},
			} {
				t.Run(f.String()+" "+proto.String()+" "+tc.name, func(t *testing.T) {
					for _, to := range []netip.AddrPort{at(clusterIP[f], port), at(balancer[f], port), at(external[f], port), at(nodeAddr[f], nodePort)} {
						want := tc.side
						if to.Addr() == clusterIP[f] {
							want = lb.SideClusterIP
						}
						w.forget(t)
						p := opening(proto, at(tc.client[f], clientPort), to)
						if got := w.run(t, tc.at, p).packet(t); dst(got) != s.backends[want][0] {
							t.Errorf("in   %v\ngot  %v\nwant the backend of side %s, %s", p, got, want, s.backends[want][0])
						}
					}
				})
			}
		}
	}
}

// testSources restricts load-balancer IPs to some clients.
func testSources(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			for _, nodeAllowed := range []bool{false, true} {
				s := &service{
					proto: proto, restricted: true, nodeAllowed: nodeAllowed,
					frontends: []frontend{
						{lb.KindClusterIP, clusterIP[f], port}, {lb.KindLoadBalancer, balancer[f], port},
						{lb.KindExternalIP, external[f], port}, {lb.KindNodePort, nodeAddr[f], nodePort},
					},
					backends: everywhere(at(podB[f], backendPort)),
					sources:  []netip.Prefix{netip.PrefixFrom(client[f], f.bits()), netip.PrefixFrom(bridged[f], f.bits())},
				}
				name := fmt.Sprintf("%s %s node allowed %t", f, proto, nodeAllowed)
				t.Run(name, func(t *testing.T) {
					w.add(t, f, s)
					for _, tc := range []struct {
						at      place
						client  addrs
						allowed bool
					}{
						{in("eth0"), client, true},
						{in("eth0"), otherClient, false},
						{in("pod0"), pod, false},
						{in("port0"), bridged, true},
						{local("eth0"), nodeAddr, nodeAllowed},
					} {
						from := at(tc.client[f], clientPort)
						for _, to := range []netip.AddrPort{at(clusterIP[f], port), at(external[f], port), at(nodeAddr[f], nodePort)} {
							w.forget(t)
							if got := w.run(t, tc.at, opening(proto, from, to)).packet(t); dst(got) != s.backends[0][0] {
								t.Errorf("in   %v to %v\ngot  %v\nwant it open to everybody", from, to, got)
							}
						}
						p := opening(proto, from, at(balancer[f], port))
						if !tc.allowed {
							w.drops(t, tc.at, "denied", p)
							continue
						}
						w.forget(t)
						if got := w.run(t, tc.at, p).packet(t); dst(got) != s.backends[0][0] {
							t.Errorf("in   %v\ngot  %v\nwant it allowed", p, got)
						}
					}
					// Before any other verdict.
					w.move(t, s)
					w.drops(t, in("eth0"), "denied", opening(proto, at(otherClient[f], clientPort), at(balancer[f], port)))
				})
			}
		}
	}
}

// testAffinities has clients come back.
func testAffinities(t *testing.T, w *world) {
	for _, f := range families {
		for _, proto := range protocols {
			t.Run(f.String()+" "+proto.String(), func(t *testing.T) {
				var backends []netip.AddrPort
				for n := range uint16(16) {
					backends = append(backends, at(pod[f], 9000+n))
				}
				s := &service{
					proto: proto, affinity: 600, backends: everywhere(backends...),
					frontends: []frontend{{lb.KindClusterIP, clusterIP[f], port}, {lb.KindLoadBalancer, balancer[f], port}},
				}
				w.add(t, f, s)
				t.Cleanup(func() {
					_, err := w.datapath.ForgetAffinities(func(datapath.AffinityEntry) bool { return true })
					must(t, err)
				})
				chosen := map[netip.AddrPort]bool{}
				addr := client[f]
				for range 16 {
					addr = addr.Next()
					var first netip.AddrPort
					for n := range uint16(8) {
						to := []netip.AddrPort{at(clusterIP[f], port), at(balancer[f], port)}[n%2]
						r := w.run(t, in("eth0"), opening(proto, at(addr, clientPort+n), to))
						if n == 0 {
							first = dst(r.packet(t))
						}
						r.passes(t, between(r.in, src(r.in), first))
					}
					chosen[first] = true
				}
				if len(chosen) < 4 {
					t.Errorf("16 clients have %d of 16 backends", len(chosen))
				}
			})
		}
	}
}

// TestRepliesAreLimited has a bucket with five tokens that fills up slowly. Each
// processor has its own, so all packets go through one.
func TestRepliesAreLimited(t *testing.T) {
	w := newWorld(t, func(c *datapath.Config) { c.ReplyRate, c.ReplyBurst = 1, 5 })
	f := ipv4
	s := &service{proto: lb.UDP, frontends: []frontend{{lb.KindLoadBalancer, balancer[f], port}}}
	w.add(t, f, s)
	p := w.frame(in("eth0"), opening(lb.UDP, at(client[f], clientPort), at(balancer[f], port))).Marshal()
	actions := map[uint32]uint64{}
	var limited uint64
	must(t, w.node.Do(func() error {
		var all, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			return err
		}
		defer func() { _ = unix.SchedSetaffinity(0, &all) }()
		for cpu := range runtime.NumCPU() * 64 {
			if all.IsSet(cpu) {
				one.Set(cpu)
				break
			}
		}
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return err
		}
		for range 100 {
			action, _, err := w.test(in("eth0"), p)
			if err != nil {
				return err
			}
			actions[action]++
		}
		return nil
	}))
	limited = w.counters(t)["reply_limited"]
	// A second or two may pass on a slow machine.
	if n := actions[actRedirect]; n < 5 || n > 15 || actions[actDrop] != 100-n || limited != 100-n {
		t.Errorf("100 packets: %d answered, %d dropped, %d counted as limited; want 5 answers", n, actions[actDrop], limited)
	}
}
