// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packet

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
)

// Protocols behind an IP header.
const (
	HopByHop           = 0
	ICMP               = 1
	TCP                = 6
	UDP                = 17
	Routing            = 43
	FragmentHeader     = 44
	ICMPv6             = 58
	DestinationOptions = 60
	SCTP               = 132
)

// Flags of a TCP segment.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// MAC is a hardware address.
type MAC [6]byte

// Packet is one packet. It is comparable, so strings stand for bytes. What a
// protocol does not have stays zero.
type Packet struct {
	// The Ethernet header. Both zero: the packet begins with its IP header.
	SrcMAC, DstMAC MAC
	// VLAN is the tag between the Ethernet header and the packet, or 0.
	VLAN uint16

	Src, Dst     netip.Addr // of one family
	Proto        uint8      // what is behind the IP header and its extensions
	TTL          uint8
	TrafficClass uint8
	FlowLabel    uint32
	// ID is what fragments of one packet have in common. Over IPv6 it is in the
	// fragment header, which a packet has when it is a fragment or when
	// Fragmentable says so.
	ID            uint32
	Fragmentable  bool // IPv6: has a fragment header though it is whole
	DontFragment  bool // IPv4
	MoreFragments bool
	Offset        uint16 // of a fragment in its packet, in bytes
	Options       string // IPv4: a multiple of four bytes
	Extensions    string // IPv6: see Extension

	// Fragments have none of the following: all that is behind the IP header is
	// their Payload.

	SrcPort, DstPort uint16
	Seq, Ack         uint32 // TCP
	Flags            uint8  // TCP
	Window           uint16 // TCP
	TCPOptions       string // a multiple of four bytes
	NoChecksum       bool   // UDP over IPv4
	Tag              uint32 // SCTP's verification tag; its chunks are Payload
	Type, Code       uint8  // ICMP
	Rest             uint32 // ICMP: of the header; an echo's identifier and number, a route's MTU

	Payload string
	// Trailer is behind the packet, as in frames that were filled up.
	Trailer string
}

// Is6 tells whether it is an IPv6 packet.
func (p Packet) Is6() bool { return p.Src.Is6() }

// IsFragment tells whether the packet is a part of one.
func (p Packet) IsFragment() bool { return p.Offset != 0 || p.MoreFragments }

// HasEthernet tells whether the packet begins with an Ethernet header.
func (p Packet) HasEthernet() bool { return p.SrcMAC != MAC{} || p.DstMAC != MAC{} }

// Extension returns an IPv6 extension header of size bytes, a multiple of eight,
// for Packet.Extensions, where several stand in a row. Its contents are padding;
// of a routing header it is one with no segments left.
func Extension(proto uint8, size int) string {
	b := make([]byte, size)
	b[1] = byte(size/8 - 1)
	if proto != Routing {
		b[2], b[3] = 1, byte(size-4) // PadN
	}
	return string([]byte{proto}) + string(b)
}

// Marshal returns the packet's bytes.
func (p Packet) Marshal() []byte {
	return append(p.appendIP(p.ethernet()), p.Trailer...)
}

// MarshalPartial returns the packet's bytes as they are before a device has summed up
// what it is to: from the offset from on, for the checksum that is at bytes further
// on. Instead of that there is the sum of the pseudo-header. The packet is of TCP or
// UDP and no fragment.
func (p Packet) MarshalPartial() (b []byte, from, at int) {
	b = p.Marshal()
	from = len(b) - len(p.Trailer) - len(p.transport())
	at = map[uint8]int{TCP: 16, UDP: 6}[p.Proto]
	binary.BigEndian.PutUint16(b[from+at:], ^checksum(p.pseudoHeader(len(b)-len(p.Trailer)-from)))
	return b, from, at
}

// Complete does what the device does with the result of MarshalPartial.
func Complete(b []byte, from, at int) {
	sum := checksum(b[from:])
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[from+at:], sum)
}

// Quote returns the first size bytes of the packet without its Ethernet header, as
// an ICMP error has them; all with a size below 0.
func (p Packet) Quote(size int) string {
	b := p.appendIP(nil)
	if size >= 0 && size < len(b) {
		b = b[:size]
	}
	return string(b)
}

const (
	etherIPv4 = 0x0800
	etherVLAN = 0x8100
	etherIPv6 = 0x86dd
)

func (p Packet) ethernet() []byte {
	if !p.HasEthernet() {
		return nil
	}
	b := append(p.DstMAC[:], p.SrcMAC[:]...)
	if p.VLAN != 0 {
		b = binary.BigEndian.AppendUint16(b, etherVLAN)
		b = binary.BigEndian.AppendUint16(b, p.VLAN)
	}
	if p.Is6() {
		return binary.BigEndian.AppendUint16(b, etherIPv6)
	}
	return binary.BigEndian.AppendUint16(b, etherIPv4)
}

func (p Packet) appendIP(b []byte) []byte {
	if p.Is6() {
		return p.appendIPv6(b)
	}
	const header = 20
	transport := p.transport()
	flags := p.Offset / 8
	if p.DontFragment {
		flags |= 0x4000
	}
	if p.MoreFragments {
		flags |= 0x2000
	}
	start := len(b)
	b = append(b, 0x40|byte((header+len(p.Options))/4), p.TrafficClass)
	b = binary.BigEndian.AppendUint16(b, uint16(header+len(p.Options)+len(transport)))
	b = binary.BigEndian.AppendUint16(b, uint16(p.ID))
	b = binary.BigEndian.AppendUint16(b, flags)
	b = append(b, p.TTL, p.Proto, 0, 0)
	b = append(b, p.Src.AsSlice()...)
	b = append(b, p.Dst.AsSlice()...)
	b = append(b, p.Options...)
	binary.BigEndian.PutUint16(b[start+10:], checksum(b[start:]))
	return append(b, transport...)
}

func (p Packet) appendIPv6(b []byte) []byte {
	next, extensions := p.extensions()
	transport := p.transport()
	b = binary.BigEndian.AppendUint32(b, 6<<28|uint32(p.TrafficClass)<<20|p.FlowLabel)
	b = binary.BigEndian.AppendUint16(b, uint16(len(extensions)+len(transport)))
	b = append(b, next, p.TTL)
	b = append(b, p.Src.AsSlice()...)
	b = append(b, p.Dst.AsSlice()...)
	b = append(b, extensions...)
	return append(b, transport...)
}

// extensions returns the extension headers with what each is followed by, and what
// the first one is.
func (p Packet) extensions() (first uint8, headers []byte) {
	last := &first // where the protocol of the next one goes
	for rest := p.Extensions; rest != ""; {
		*last = rest[0]
		size := 8 * (1 + int(rest[2]))
		headers = append(headers, rest[1:1+size]...)
		last = &headers[len(headers)-size]
		rest = rest[1+size:]
	}
	if !p.IsFragment() && !p.Fragmentable {
		*last = p.Proto
		return first, headers
	}
	*last = FragmentHeader
	offset := p.Offset
	if p.MoreFragments {
		offset |= 1
	}
	headers = append(headers, p.Proto, 0)
	headers = binary.BigEndian.AppendUint16(headers, offset)
	return first, binary.BigEndian.AppendUint32(headers, p.ID)
}

// transport returns all that is behind the IP header, with its checksum.
func (p Packet) transport() []byte {
	if p.IsFragment() {
		return []byte(p.Payload)
	}
	var b []byte
	field := 0 // where the checksum is
	switch p.Proto {
	case TCP:
		b, field = p.tcp(), 16
	case UDP:
		b, field = p.ports(), 6
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(p.Payload)))
		b = append(b, 0, 0)
	case SCTP:
		b = binary.BigEndian.AppendUint32(p.ports(), p.Tag)
		b = append(b, 0, 0, 0, 0)
		b = append(b, p.Payload...)
		binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
		return b
	case p.icmp():
		field = 2
		b = binary.BigEndian.AppendUint32([]byte{p.Type, p.Code, 0, 0}, p.Rest)
	}
	b = append(b, p.Payload...)
	if field == 0 || p.NoChecksum {
		return b
	}
	sum := checksum(p.pseudoHeader(len(b)), b)
	if sum == 0 && p.Proto == UDP {
		sum = 0xffff // 0 would say that there is none
	}
	binary.BigEndian.PutUint16(b[field:], sum)
	return b
}

// icmp returns the protocol that is ICMP in the packet's family.
func (p Packet) icmp() uint8 {
	if p.Is6() {
		return ICMPv6
	}
	return ICMP
}

func (p Packet) ports() []byte {
	b := binary.BigEndian.AppendUint16(nil, p.SrcPort)
	return binary.BigEndian.AppendUint16(b, p.DstPort)
}

func (p Packet) tcp() []byte {
	b := binary.BigEndian.AppendUint32(p.ports(), p.Seq)
	b = binary.BigEndian.AppendUint32(b, p.Ack)
	b = append(b, byte((20+len(p.TCPOptions))/4)<<4, p.Flags)
	b = binary.BigEndian.AppendUint16(b, p.Window)
	b = append(b, 0, 0, 0, 0)
	return append(b, p.TCPOptions...)
}

// pseudoHeader returns what a checksum covers beside the bytes that are sent. ICMP
// over IPv4 has none.
func (p Packet) pseudoHeader(length int) []byte {
	if p.Proto == ICMP {
		return nil
	}
	b := append(p.Src.AsSlice(), p.Dst.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	return binary.BigEndian.AppendUint32(b, uint32(p.Proto))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum returns the Internet checksum of the parts, all but the last of even
// length, one behind the other (RFC 1071).
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
