// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"bytes"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// What programs return, as in linux/pkt_cls.h.
const (
	actNext     = ^uint32(0) // TC_ACT_UNSPEC, TCX_NEXT
	actDrop     = 2
	actRedirect = 7
)

func actionName(action uint32) string {
	switch action {
	case actNext:
		return "next"
	case actDrop:
		return "drop"
	case actRedirect:
		return "redirect"
	}
	return "action " + string('0'+rune(action))
}

// skBuff is struct __sk_buff: what a program run for a test may be told.
type skBuff struct {
	_              [9]uint32
	IngressIfindex uint32 // where a packet on its way out came in; 0 from a process
	Ifindex        uint32
	_              [37]uint32
}

var _ [192 - 48*4]struct{} // the size of struct __sk_buff

// place is where a packet is met.
type place struct {
	device string
	out    bool
	from   string // on its way out: where it came in, "" for a process of the node
}

// in is the place of packets that arrive by a device.
func in(device string) place { return place{device: device} }

// out is the place of packets that leave by a device and came in by another one.
func out(device, from string) place { return place{device: device, out: true, from: from} }

// local is the place of packets that processes of the node send by a device.
func local(device string) place { return place{device: device, out: true} }

// program returns the name of the program that meets packets there.
func (w *world) program(p place) string {
	name := "tc_ingress"
	if p.out {
		name = "tc_egress"
	}
	if w.link(p) == packet.NoLink {
		name += "_l3"
	}
	return name
}

// link returns what packets at a place begin with.
func (w *world) link(p place) packet.Link {
	if w.devices[p.device].mac == (packet.MAC{}) {
		return packet.NoLink
	}
	return packet.Ethernet
}

// frame returns the packet with the Ethernet header it has at the place, unless it
// has one.
func (w *world) frame(at place, p packet.Packet) packet.Packet {
	if w.link(at) == packet.NoLink || p.HasEthernet() {
		return p
	}
	neighbour := map[string]packet.MAC{
		"eth0": routerMAC, "eth1": thirdNodeMAC, "pod0": podMAC, "pod1": podBMAC, "port0": bridgedMAC, "port1": bridgedBMAC,
	}[at.device]
	p.SrcMAC, p.DstMAC = neighbour, w.devices[w.devices[at.device].l3].mac
	if at.out {
		p.SrcMAC, p.DstMAC = p.DstMAC, p.SrcMAC
	}
	return p
}

// result is what a program has made of a packet.
type result struct {
	in     packet.Packet // with its Ethernet header
	sent   []byte
	action uint32
	data   []byte
	link   packet.Link
}

// run sends a packet through the program at a place.
func (w *world) run(t testing.TB, at place, p packet.Packet) result {
	t.Helper()
	p = w.frame(at, p)
	r := w.runBytes(t, at, p.Marshal())
	r.in = p
	return r
}

// runBytes is run for bytes that need not be a packet.
func (w *world) runBytes(t testing.TB, at place, sent []byte) result {
	t.Helper()
	r := result{sent: sent, link: w.link(at)}
	must(t, w.node.Do(func() (err error) {
		r.action, r.data, err = w.test(at, sent)
		return err
	}))
	return r
}

// test runs the program at a place on the calling thread, which must be in the
// node's namespace.
func (w *world) test(at place, sent []byte) (action uint32, data []byte, err error) {
	ctx := skBuff{Ifindex: w.devices[at.device].index}
	if at.from != "" {
		ctx.IngressIfindex = w.devices[at.from].index
	}
	options := ebpf.RunOptions{
		Data: sent, DataOut: make([]byte, len(sent)+256), // the kernel's own room
		Context: ctx,
	}
	action, err = w.datapath.Program(w.program(at)).Run(&options)
	return action, options.DataOut, err
}

// packet returns what came out. The test fails when a checksum in it is wrong.
func (r result) packet(t testing.TB) packet.Packet {
	t.Helper()
	p, err := r.parse()
	if err != nil {
		t.Fatalf("in   %v\nout  %x: %v", r.in, r.data, err)
	}
	return p
}

func (r result) parse() (packet.Packet, error) {
	link := r.link
	if link == packet.NoLink && r.action == actRedirect && len(r.data) == len(r.sent)+14 {
		link = packet.Ethernet // it goes to a device with Ethernet headers
	}
	return packet.Parse(r.data, link)
}

// wants fails the test unless the program has done what is wanted.
func (r result) wants(t testing.TB, action uint32, want packet.Packet) {
	t.Helper()
	got := r.packet(t)
	if !want.HasEthernet() {
		got.SrcMAC, got.DstMAC = want.SrcMAC, want.DstMAC
	}
	if r.action != action || got != want {
		t.Fatalf("in   %v\ngot  %s %v\nwant %s %v", r.in, actionName(r.action), got, actionName(action), want)
	}
}

// passes fails the test unless the packet goes on as want. Its Ethernet header is
// compared when want has one.
func (r result) passes(t testing.TB, want packet.Packet) {
	t.Helper()
	r.wants(t, actNext, want)
}

// redirected fails the test unless the packet goes around the stack as want.
func (r result) redirected(t testing.TB, want packet.Packet) {
	t.Helper()
	r.wants(t, actRedirect, want)
}

// dropped fails the test unless the packet is dropped.
func (r result) dropped(t testing.TB) {
	t.Helper()
	if r.action != actDrop {
		t.Fatalf("in   %v\ngot  %s %v\nwant drop", r.in, actionName(r.action), r.packet(t))
	}
}

// untouched fails the test unless the packet goes on byte for byte.
func (r result) untouched(t testing.TB) {
	t.Helper()
	if r.action != actNext || !bytes.Equal(r.data, r.sent) {
		got, err := packet.Parse(r.data, r.link)
		t.Fatalf("in   %v (%x)\ngot  %s %v (%x, %v)\nwant it untouched", r.in, r.sent, actionName(r.action), got, r.data, err)
	}
}

// counts fails the test unless these counters, and no others, have grown by this
// much while f ran.
func (w *world) counts(t testing.TB, want map[string]uint64, f func()) {
	t.Helper()
	before := w.counters(t)
	f()
	got := w.counters(t)
	for name, n := range before {
		if got[name] -= n; got[name] == 0 {
			delete(got, name)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
}

func (w *world) counters(t testing.TB) map[string]uint64 {
	t.Helper()
	counters, err := w.datapath.Counters()
	must(t, err)
	out := map[string]uint64{}
	for _, c := range counters {
		out[c.Name] = c.Value
	}
	return out
}
