// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// hostile is a world with Services and flows of all kinds, and packets that belong to
// them, for packets that hardly do.
type hostile struct {
	*world
	places    []place
	packets   []sample
	known     map[netip.Addr]bool // that something of ours is behind, or may be
	fragments *ebpf.Map
	// kept are the flows' entries, which every packet finds.
	kept  map[flowKey]flowValue
	dirty bool // the last packet may have changed something
}

// An entry of the flows, whose meaning does not matter here.
type (
	flowKey   [40]byte
	flowValue [72]byte
)

// sample is a packet that comes to the right place.
type sample struct {
	at    int // in places
	frame []byte
}

const hostileFlows = 1024

func newHostile(t testing.TB) *hostile {
	t.Helper()
	// Looking through the flows takes as long as there are places.
	small := func(c *datapath.Config) { c.Sizes.Flows = hostileFlows }
	h := &hostile{world: newWorld(t, small), known: map[netip.Addr]bool{}, kept: map[flowKey]flowValue{}, dirty: true}
	for _, name := range []string{"eth0", "pod0", "port0", "tun0"} {
		h.places = append(h.places, in(name), local(name), out(name, "eth1"))
	}
	var err error
	h.fragments, err = ebpf.LoadPinnedMap(datapath.MapPath(h.root, "fragments"), nil)
	must(t, err)
	t.Cleanup(func() { must(t, h.fragments.Close()) })
	for _, a := range []addrs{
		client, otherClient, nodeAddr, nodeAddr1, tunnelAddr, bridgeAddr, remotePod, farPod, pod, podB, bridged, bridgedB,
		tunnelClient, tunnelPod, clusterIP, balancer, external,
	} {
		h.known[a[ipv4]], h.known[a[ipv6]] = true, true
	}
	for _, f := range families {
		h.wildcard(t, clusterIP[f], lb.KindClusterIP)
		for _, proto := range protocols {
			h.addServices(t, f, proto)
		}
	}
	return h
}

// addServices adds a Service for each way a packet may take, and one for each verdict.
func (h *hostile) addServices(t testing.TB, f family, proto lb.Protocol) {
	t.Helper()
	for i, way := range []way{
		wayTo(t, pod), wayTo(t, remotePod), wayTo(t, tunnelPod), wayFrom(t, tunnelClient), wayFrom(t, nodeAddr),
	} {
		frontPort := uint16(1000 + i)
		s := &service{
			proto: proto, frontends: []frontend{{lb.KindClusterIP, clusterIP[f], frontPort}},
			backends: everywhere(at(way.backend[f], backendPort+uint16(i))),
		}
		h.add(t, f, s)
		// begin forgets what was there.
		fl := h.begin(t, f, way, s, at(clusterIP[f], frontPort))
		h.keep(t)
		h.sample(way.request, opening(proto, fl.from, fl.vip))
		h.sample(way.request, fl.request("request"))
		h.sample(way.answer, fl.answer("answer"))
		size := 8 + f.headers()
		request, answer := between(fl.request("request"), fl.seen, fl.backend), between(fl.answer("answer"), fl.vip, fl.from)
		for _, kind := range icmpKinds[f] {
			h.sample(way.answer, icmpError(f, kind, fl.backend.Addr(), fl.seen.Addr(), request, size))
			h.sample(way.request, icmpError(f, kind, fl.from.Addr(), fl.vip.Addr(), answer, size))
		}
		for _, name := range slices.Sorted(maps.Keys(unusual(f))) {
			h.sample(way.request, unusual(f)[name](fl.request("request")))
			h.sample(way.answer, unusual(f)[name](fl.answer("answer")))
		}
		for _, part := range large(fl.request(strings.Repeat("request", 10)), uint32(i)).Split(40) {
			h.sample(way.request, part)
		}
	}
	empty := &service{proto: proto, frontends: []frontend{{lb.KindLoadBalancer, balancer[f], port}, {lb.KindNodePort, nodeAddr[f], nodePort}}}
	h.add(t, f, empty)
	for _, to := range []netip.AddrPort{
		at(balancer[f], port), at(nodeAddr[f], nodePort), at(clusterIP[f], 1), at(nobody[f], port), at(external[f], port),
	} {
		p := opening(proto, at(client[f], clientPort), to)
		h.sample(in("eth0"), p)
		p.Payload = strings.Repeat("x", 1400)
		h.sample(in("eth0"), p)
	}
}

// keep takes up the entries of the flow that has just begun.
func (h *hostile) keep(t testing.TB) {
	t.Helper()
	entries, err := h.entries()
	must(t, err)
	maps.Copy(h.kept, entries)
}

// entries returns the entries of all flows.
func (h *hostile) entries() (map[flowKey]flowValue, error) {
	var cursor ebpf.MapBatchCursor
	keys, values := make([]flowKey, hostileFlows), make([]flowValue, hostileFlows)
	n, err := h.flows.BatchLookup(&cursor, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("read flows: %w", err)
	}
	out := map[flowKey]flowValue{}
	for i := range n {
		out[keys[i]] = values[i]
	}
	return out, nil
}

func (h *hostile) sample(at place, p packet.Packet) {
	index := slices.IndexFunc(h.places, func(p place) bool {
		return p.device == at.device && p.out == at.out && (p.from == "") == (at.from == "")
	})
	if index < 0 {
		return
	}
	h.packets = append(h.packets, sample{index, h.frame(at, p).Marshal()})
}

// reset makes the flows those that were kept, so that what one packet does to them is
// no matter of the next one. So a failure can be repeated with its packet alone.
func (h *hostile) reset() error {
	if !h.dirty {
		return nil
	}
	entries, err := h.entries()
	if err != nil {
		return err
	}
	for key := range entries {
		if _, ok := h.kept[key]; !ok {
			if err := h.flows.Delete(key); err != nil {
				return err
			}
		}
	}
	for key, value := range h.kept {
		if entries[key] != value {
			if err := h.flows.Put(key, value); err != nil {
				return err
			}
		}
	}
	piece := make([]byte, h.fragments.KeySize())
	for h.fragments.NextKey(nil, piece) == nil {
		if err := h.fragments.Delete(piece); err != nil {
			return err
		}
	}
	h.dirty = false
	return nil
}

// attack sends bytes to a place and tells what is wrong with what comes out. It is to
// be called on a thread in the node's namespace.
func (h *hostile) attack(at place, sent []byte) error {
	if err := h.reset(); err != nil {
		return err
	}
	action, got, err := h.test(at, sent)
	if errors.Is(err, unix.EINVAL) && len(sent) < 14+40 {
		return nil // a test run wants whole IP headers
	}
	if err != nil {
		return fmt.Errorf("the program does not run: %w", err)
	}
	same := bytes.Equal(sent, got)
	h.dirty = action != actNext || !same
	switch action {
	case actNext, actRedirect:
	case actDrop:
		if !h.isKnown(at, sent) {
			return errors.New("dropped, and nothing in it is ours")
		}
		return nil
	default:
		return fmt.Errorf("the program returns %d", action)
	}
	if same {
		return nil
	}
	if !h.isKnown(at, sent) {
		return fmt.Errorf("%s, and nothing in it is ours: %x", actionName(action), got)
	}
	return h.compare(at, action, sent, got)
}

// isKnown tells whether the packet goes to an address that something of ours may be
// behind. Bytes that are not a packet do not.
func (h *hostile) isKnown(at place, b []byte) bool {
	version := byte(0)
	if h.link(at) == packet.NoLink && len(b) > 0 {
		version = b[0] >> 4
	} else if len(b) > 14 {
		version = map[string]byte{"\x08\x00": 4, "\x86\xdd": 6}[string(b[12:14])]
		b = b[14:]
	}
	var dst netip.Addr
	switch {
	case version == 4 && len(b) >= 20:
		dst = netip.AddrFrom4([4]byte(b[16:20]))
	case version == 6 && len(b) >= 40:
		dst = netip.AddrFrom16([16]byte(b[24:40]))
		if dst.Is4In6() {
			return true // the tables cannot tell it from IPv4
		}
	}
	return h.known[dst] || serviceCIDR[ipv4].Contains(dst) || serviceCIDR[ipv6].Contains(dst)
}

// compare tells what is wrong with a translated packet, or with our own reply to one.
// Of what was not right before nothing can be said.
func (h *hostile) compare(at place, action uint32, sent, got []byte) error {
	before, err := packet.Parse(sent, h.link(at))
	if err != nil {
		return nil
	}
	r := result{sent: sent, data: got, link: h.link(at), action: action}
	after, err := r.parse()
	if err != nil {
		return fmt.Errorf("in   %v\ngot  %x: %w", before, got, err)
	}
	reply := after.TTL == 64 && after.Dst == before.Src &&
		(after.Proto == packet.TCP && after.Flags&packet.RST != 0 || after.IsError())
	if action == actRedirect && reply {
		return nil
	}
	want := after
	want.SrcMAC, want.DstMAC, want.TTL = before.SrcMAC, before.DstMAC, before.TTL
	want.Src, want.Dst, want.SrcPort, want.DstPort = before.Src, before.Dst, before.SrcPort, before.DstPort
	if before.IsError() || before.IsFragment() && before.Offset == 0 {
		// What it quotes, or its ports and its checksum, have changed.
		if len(want.Payload) != len(before.Payload) {
			return fmt.Errorf("in   %v\ngot  %v\nwant the same length", before, after)
		}
		want.Payload = before.Payload
	}
	if want != before || after.TTL != before.TTL && (action != actRedirect || after.TTL != before.TTL-1) {
		return fmt.Errorf("in   %v\ngot  %v\nwant nothing but its ends changed", before, after)
	}
	return nil
}

// attackEverywhere sends bytes to all places, each with the flows as they were.
func (h *hostile) attackEverywhere(t testing.TB, sent []byte) {
	t.Helper()
	for _, at := range h.places {
		must(t, h.node.Do(func() error {
			if err := h.attack(at, sent); err != nil {
				return fmt.Errorf("%s at %s: %x: %w", h.program(at), at.device, sent, err)
			}
			return nil
		}))
	}
}

// FuzzPackets sends any bytes to all programs. Whatever they are, the programs run;
// what is nobody's comes out byte for byte; and what was right before is right after
// it was translated.
func FuzzPackets(f *testing.F) {
	h := newHostile(f)
	for _, s := range h.packets {
		f.Add(s.frame)
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		if len(sent) < 14 || len(sent) > 3000 {
			t.Skip("a test run takes neither")
		}
		h.attackEverywhere(t, sent)
	})
}

// wayFrom returns a way of a client's.
func wayFrom(t testing.TB, client addrs) way {
	t.Helper()
	for _, way := range ways {
		if way.client == client {
			return way
		}
	}
	t.Fatalf("no way from %v", client)
	return way{}
}

// TestCutShort sends the packets of FuzzPackets cut at every length, and with every
// byte of the headers changed.
func TestCutShort(t *testing.T) {
	h := newHostile(t)
	for _, s := range h.packets {
		must(t, h.node.Do(func() error {
			for size := 14; size < min(len(s.frame), 100); size++ {
				if err := h.attack(h.places[s.at], s.frame[:size]); err != nil {
					return fmt.Errorf("%d bytes of %x: %w", size, s.frame, err)
				}
			}
			changed := slices.Clone(s.frame)
			for i := range min(len(changed), 100) {
				changed[i] ^= 0xff
				if err := h.attack(h.places[s.at], changed); err != nil {
					return fmt.Errorf("byte %d of %x is %#x: %w", i, s.frame, changed[i], err)
				}
				changed[i] ^= 0xff
			}
			return nil
		}))
	}
}
