// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// wire is a world whose devices have the programs on them, with a socket on the far
// end of each link.
type wire struct {
	*world
	sockets map[string]int
	marks   uint16 // marks sent
}

// frame is what was caught at the far end of a link.
type frame struct {
	device string
	packet packet.Packet
	gso    uint16 // size of the segments that a device would make of it, or 0
}

func (f frame) String() string {
	s := f.device + ": " + f.packet.String()
	if f.gso != 0 {
		s += fmt.Sprintf(" in segments of %d", f.gso)
	}
	return s
}

func newWire(t *testing.T) *wire {
	t.Helper()
	w := &wire{world: newWorld(t, nil), sockets: map[string]int{}}
	for _, d := range w.devices {
		if d.name == "cni0" {
			continue
		}
		w.attach(t, d)
		must(t, w.far.Do(func() error { return w.listen(d.name) }))
	}
	t.Cleanup(func() {
		for _, fd := range w.sockets {
			_ = unix.Close(fd)
		}
	})
	// The bridge learns who is behind which port.
	for _, name := range []string{"port0", "port1"} {
		w.catch(t, name)
	}
	return w
}

// attach puts the programs on a device.
func (w *wire) attach(t *testing.T, d *device) {
	t.Helper()
	for at, kind := range map[place]ebpf.AttachType{in(d.name): ebpf.AttachTCXIngress, local(d.name): ebpf.AttachTCXEgress} {
		must(t, w.node.Do(func() error {
			l, err := link.AttachTCX(link.TCXOptions{
				Interface: int(d.index), Program: w.datapath.Program(w.program(at)), Attach: kind,
			})
			if err != nil {
				return fmt.Errorf("attach %s to %s: %w", w.program(at), d.name, err)
			}
			t.Cleanup(func() { _ = l.Close() })
			return nil
		}))
	}
}

// vnetHeader is struct virtio_net_hdr: what the sender leaves to the device.
type vnetHeader struct {
	Flags, GSO                             uint8
	Header, Size, ChecksumFrom, ChecksumAt uint16
}

const (
	vnetSize          = 10
	vnetNeedsChecksum = 1
	vnetGSOTCPv4      = 1
	vnetGSOTCPv6      = 4
)

// listen opens a socket on a device of the far namespace, that of the calling thread.
func (w *wire) listen(name string) error {
	protocol := int(uint16(unix.ETH_P_ALL)<<8 | unix.ETH_P_ALL>>8)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	w.sockets[name] = fd
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return err
	}
	// What we send ourselves is of no interest.
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return err
	}
	device, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(protocol), Ifindex: device.Attrs().Index})
}

// send puts a packet on the far end of a device, so that it comes in by it.
func (w *wire) send(t *testing.T, device string, p packet.Packet, header vnetHeader) {
	t.Helper()
	b, err := binary.Append(nil, binary.NativeEndian, header)
	must(t, err)
	p = w.frame(in(device), p)
	_, err = unix.Write(w.sockets[device], append(b, p.Marshal()...))
	must(t, err)
}

// markPort is the source port of datagrams that show that all before has come.
const markPort = 9

// behind is somebody behind each link.
var behind = map[string]netip.Addr{
	"eth0": otherClient[ipv4], "eth1": farPod[ipv4], "pod0": pod[ipv4], "pod1": podB[ipv4],
	"port0": bridged[ipv4], "port1": bridgedB[ipv4], "tun0": tunnelPod[ipv4],
}

// catch returns the packets that have come to the far ends since the last call, when
// those that were sent by a device are through. What the node's stack says by itself,
// looking for neighbours and groups, is left out.
func (w *wire) catch(t *testing.T, from string) []frame {
	t.Helper()
	// A mark follows them to each link, forwarded by the stack like anything else.
	w.marks++
	for name := range w.sockets {
		w.send(t, from, opening(lb.UDP, at(behind[from], markPort), at(behind[name], w.marks)), vnetHeader{})
	}
	var frames []frame
	for name := range w.sockets {
		frames = append(frames, w.drain(t, name)...)
	}
	slices.SortFunc(frames, func(a, b frame) int { return strings.Compare(a.String(), b.String()) })
	return frames
}

// drain returns what came to a link before the mark.
func (w *wire) drain(t *testing.T, name string) (frames []frame) {
	t.Helper()
	buffer := make([]byte, 128<<10)
	for end := time.Now().Add(patience); ; {
		n, err := unix.Read(w.sockets[name], buffer)
		if errors.Is(err, unix.EAGAIN) && time.Now().Before(end) {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(w.sockets[name]), Events: unix.POLLIN}}, 100)
			continue
		}
		if err != nil {
			t.Fatalf("wait for the mark at %s: %v", name, err)
		}
		f, ok := w.caught(t, name, buffer[:n])
		switch {
		case !ok:
		case f.packet.SrcPort != markPort:
			frames = append(frames, f)
		case dst(f.packet) == at(behind[name], w.marks):
			return frames
		}
	}
}

// caught reads what came to the far end of a device, and puts in the checksum that
// was left to the device.
func (w *wire) caught(t *testing.T, name string, b []byte) (frame, bool) {
	t.Helper()
	var header vnetHeader
	_, err := binary.Decode(b, binary.NativeEndian, &header)
	must(t, err)
	b = b[vnetSize:]
	if header.Flags&vnetNeedsChecksum != 0 {
		packet.Complete(b, int(header.ChecksumFrom), int(header.ChecksumAt))
	}
	if w.link(in(name)) == packet.Ethernet && b[12] == 0x08 && b[13] == 0x06 { // ARP
		return frame{}, false
	}
	p, err := packet.Parse(b, w.link(in(name)))
	if err != nil {
		t.Errorf("caught at %s: %x: %v", name, b, err)
		return frame{}, false
	}
	if p.Proto == packet.ICMPv6 && p.Type >= 130 {
		return frame{}, false
	}
	f := frame{device: name, packet: p}
	if header.GSO != 0 {
		f.gso = header.Size
	}
	return f, true
}

// wants fails the test unless what was sent by a device makes exactly these packets
// come out.
func (w *wire) wants(t *testing.T, from string, want ...frame) {
	t.Helper()
	slices.SortFunc(want, func(a, b frame) int { return strings.Compare(a.String(), b.String()) })
	if got := w.catch(t, from); !slices.Equal(got, want) {
		t.Fatalf("caught\n%vwant\n%v", lines(got), lines(want))
	}
}

func lines(frames []frame) string {
	var b strings.Builder
	for _, f := range frames {
		fmt.Fprintln(&b, f)
	}
	return b.String()
}

// leaving returns the packet with the Ethernet header it has on the far end of a
// device.
func (w *wire) leaving(device string, p packet.Packet) frame {
	p.SrcMAC, p.DstMAC = packet.MAC{}, packet.MAC{}
	return frame{device: device, packet: w.frame(local(device), p)}
}

// linkTo returns the device that somebody is behind.
func linkTo(who addrs) string {
	return map[addrs]string{
		client: "eth0", remotePod: "eth0", farPod: "eth1", pod: "pod0", podB: "pod1",
		bridged: "port0", bridgedB: "port1", tunnelClient: "tun0", tunnelPod: "tun0",
	}[who]
}

// TestWire sends packets through the node: those of flows come out at the other end
// with the right neighbour's address, and nothing else comes out.
func TestWire(t *testing.T) {
	w := newWire(t)
	for _, way := range ways {
		if way.isLocal() || linkTo(way.backend) == "" {
			continue
		}
		for _, f := range families {
			for _, proto := range protocols {
				t.Run(way.name+" "+f.String()+" "+proto.String(), func(t *testing.T) {
					s := clusterService(f, proto, way.backend)
					w.add(t, f, s)
					w.through(t, f, way, s)
				})
			}
		}
	}
	for _, f := range families {
		t.Run("replies "+f.String(), func(t *testing.T) { w.replies(t, f) })
		t.Run("checksums that are left to the device "+f.String(), func(t *testing.T) { w.partial(t, f) })
		t.Run("segments that are left to the device "+f.String(), func(t *testing.T) { w.segments(t, f) })
		t.Run("VLANs "+f.String(), func(t *testing.T) { w.tagged(t, f) })
	}
}

// through sends the first packets of a flow.
func (w *wire) through(t *testing.T, f family, way way, s *service) {
	w.forget(t)
	client, backend := linkTo(way.client), linkTo(way.backend)
	from, vip := at(way.client[f], clientPort), at(clusterIP[f], port)
	w.send(t, client, opening(s.proto, from, vip), vnetHeader{})
	got := w.catch(t, client)
	if len(got) != 1 {
		t.Fatalf("caught\n%vwant the first packet", lines(got))
	}
	fl := &flow{way: way, f: f, proto: s.proto, from: from, vip: vip, backend: s.backends[0][0], seen: way.seen(f, got[0].packet)}
	want := w.onward(way.backend, backend, hop(between(opening(s.proto, from, vip), fl.seen, fl.backend)))
	if got[0] != want {
		t.Fatalf("caught %v\nwant   %v", got[0], want)
	}
	for _, payload := range []string{"a payload", "an odd payload!"} {
		answer := fl.answer(payload)
		w.send(t, backend, answer, vnetHeader{})
		w.wants(t, backend, w.onward(way.client, client, hop(between(answer, vip, from))))
		w.send(t, client, fl.request(payload), vnetHeader{})
		w.wants(t, client, w.onward(way.backend, backend, hop(between(fl.request(payload), fl.seen, fl.backend))))
	}
}

// onward returns a packet on its last link to somebody. The router stands for all that
// are behind it.
func (w *wire) onward(who addrs, device string, p packet.Packet) frame {
	f := w.leaving(device, p)
	if who == remotePod {
		f.packet.DstMAC = otherNodeMAC
	}
	return f
}

// replies has the node refuse and send back packets where there is an Ethernet header
// and where there is none.
func (w *wire) replies(t *testing.T, f family) {
	w.forget(t)
	w.wildcard(t, clusterIP[f], lb.KindClusterIP)
	for device, who := range map[string]addrs{"eth0": client, "pod0": pod, "port0": bridged, "tun0": tunnelClient} {
		for _, proto := range protocols {
			p := opening(proto, at(who[f], clientPort), at(clusterIP[f], port))
			w.send(t, device, p, vnetHeader{})
			w.wants(t, device, w.leaving(device, refusal(f, p)))
		}
	}
	s := clusterService(f, lb.UDP, farPod)
	w.add(t, f, s)
	for device, who := range map[string]addrs{"eth0": client, "tun0": tunnelClient} {
		last := opening(lb.UDP, at(who[f], clientPort), at(clusterIP[f], port))
		last.TTL = 1
		w.send(t, device, last, vnetHeader{})
		w.wants(t, device, w.leaving(device, ours(f, timeExceeded[f], w.devices[device].address[f], last)))

		long := later(lb.UDP, at(who[f], clientPort), at(clusterIP[f], port), strings.Repeat("x", narrow))
		w.send(t, device, long, vnetHeader{})
		w.wants(t, device, w.leaving(device, ours(f, tooBig[f], w.devices[device].address[f], long)))
	}
}

// sendPartial sends a packet whose checksum is left to the device.
func (w *wire) sendPartial(t *testing.T, device string, p packet.Packet, header vnetHeader) {
	t.Helper()
	p = w.frame(in(device), p)
	b, from, offset := p.MarshalPartial()
	header.Flags, header.ChecksumFrom, header.ChecksumAt = vnetNeedsChecksum, uint16(from), uint16(offset)
	head, err := binary.Append(nil, binary.NativeEndian, header)
	must(t, err)
	_, err = unix.Write(w.sockets[device], append(head, b...))
	must(t, err)
}

// partial sends packets whose checksum nobody has put in yet.
func (w *wire) partial(t *testing.T, f family) {
	w.wildcard(t, clusterIP[f], lb.KindClusterIP)
	for _, backend := range []addrs{pod, remotePod, tunnelPod} {
		for _, proto := range []lb.Protocol{lb.TCP, lb.UDP} {
			w.forget(t)
			s := clusterService(f, proto, backend)
			w.add(t, f, s)
			way := wayTo(t, backend)
			from, vip, link := at(client[f], clientPort), at(clusterIP[f], port), linkTo(backend)
			w.sendPartial(t, "eth0", opening(proto, from, vip), vnetHeader{})
			got := w.catch(t, "eth0")
			if len(got) != 1 {
				t.Fatalf("caught\n%vwant the first packet", lines(got))
			}
			seen := way.seen(f, got[0].packet)
			if want := w.onward(backend, link, hop(between(opening(proto, from, vip), seen, s.backends[0][0]))); got[0] != want {
				t.Fatalf("caught %v\nwant   %v", got[0], want)
			}
			if link == "tun0" {
				continue // its far end hands over whole packets
			}
			answer := later(proto, s.backends[0][0], seen, "an answer")
			w.sendPartial(t, link, answer, vnetHeader{})
			w.wants(t, link, w.leaving("eth0", hop(between(answer, vip, from))))

			// What the node sends back about them is right, too.
			request := opening(proto, from, vip)
			request.DstPort = port + 1
			w.sendPartial(t, "eth0", request, vnetHeader{})
			w.wants(t, "eth0", w.leaving("eth0", refusal(f, request)))
			if way.around {
				request = later(proto, from, vip, "too far")
				request.TTL = 1
				w.sendPartial(t, "eth0", request, vnetHeader{})
				w.wants(t, "eth0", w.leaving("eth0", ours(f, timeExceeded[f], nodeAddr[f], request)))
			}
		}
	}
}

// segments sends what a device is to make several segments of.
func (w *wire) segments(t *testing.T, f family) {
	gso := []uint8{vnetGSOTCPv4, vnetGSOTCPv6}[f]
	large := func(size uint16) vnetHeader {
		return vnetHeader{GSO: gso, Size: size, Header: uint16(14 + f.headers() + 20)}
	}
	for _, backend := range []addrs{pod, remotePod, farPod} {
		w.forget(t)
		s := clusterService(f, lb.TCP, backend)
		w.add(t, f, s)
		from, vip, link := at(client[f], clientPort), at(clusterIP[f], port), linkTo(backend)
		w.send(t, "eth0", opening(lb.TCP, from, vip), vnetHeader{})
		got := w.catch(t, "eth0")
		if len(got) != 1 {
			t.Fatalf("caught\n%vwant the first packet", lines(got))
		}
		seen := src(got[0].packet)
		request := later(lb.TCP, from, vip, strings.Repeat("x", 4000))
		w.sendPartial(t, "eth0", request, large(1000))
		want := w.onward(backend, link, hop(between(request, seen, s.backends[0][0])))
		want.gso = 1000
		w.wants(t, "eth0", want)

		answer := later(lb.TCP, s.backends[0][0], seen, strings.Repeat("x", 4000))
		w.sendPartial(t, link, answer, large(1000))
		want = w.leaving("eth0", hop(between(answer, vip, from)))
		want.gso = 1000
		w.wants(t, link, want)
		if backend == farPod {
			w.sendPartial(t, "eth0", request, large(narrow))
			reply := ours(f, tooBig[f], nodeAddr[f], request)
			// The device sums up what is left of the quoted packet.
			quoted, from, offset := request.MarshalPartial()
			quoted = quoted[:len(reply.Payload)]
			packet.Complete(quoted, from, offset)
			reply.Payload = string(quoted)
			w.wants(t, "eth0", w.leaving("eth0", reply))
		}
	}
}

// tagged sends frames with a VLAN tag, which are their VLAN device's: the node has none
// for them.
func (w *wire) tagged(t *testing.T, f family) {
	w.forget(t)
	w.wildcard(t, clusterIP[f], lb.KindClusterIP)
	for _, proto := range protocols {
		s := clusterService(f, proto, pod)
		w.add(t, f, s)
		for _, to := range []uint16{port, port + 1} {
			p := w.frame(in("eth0"), opening(proto, at(client[f], clientPort), at(clusterIP[f], to)))
			p.VLAN = 100
			w.send(t, "eth0", p, vnetHeader{})
			w.wants(t, "eth0")
		}
	}
	if n := w.countFlows(t); n != 0 {
		t.Errorf("%d entries of flows", n)
	}
}
