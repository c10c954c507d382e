// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
)

// Link says what packets begin with.
type Link int

// The links.
const (
	Ethernet Link = iota
	NoLink        // the IP header
)

// Parse returns the packet that b is. Every length and every checksum must be
// right, also in the packet that an ICMP error quotes, as far as it is quoted;
// the transport checksum of fragments is that of the whole: see Join.
func Parse(b []byte, link Link) (Packet, error) {
	var p Packet
	version := 0
	if link == Ethernet {
		var err error
		if b, version, err = p.parseEthernet(b); err != nil {
			return Packet{}, err
		}
	} else if len(b) > 0 {
		version = int(b[0] >> 4)
	}
	var err error
	switch version {
	case 4:
		err = p.parseIPv4(b, false)
	case 6:
		err = p.parseIPv6(b, false)
	default:
		err = errors.New("not an IP packet")
	}
	if err != nil {
		return Packet{}, err
	}
	return p, nil
}

func (p *Packet) parseEthernet(b []byte) (rest []byte, version int, err error) {
	if len(b) < 14 {
		return nil, 0, errors.New("an Ethernet header is cut short")
	}
	p.DstMAC, p.SrcMAC = MAC(b[:6]), MAC(b[6:12])
	kind := binary.BigEndian.Uint16(b[12:])
	b = b[14:]
	if kind == etherVLAN && len(b) >= 4 {
		p.VLAN = binary.BigEndian.Uint16(b)
		kind, b = binary.BigEndian.Uint16(b[2:]), b[4:]
	}
	switch kind {
	case etherIPv4:
		return b, 4, nil
	case etherIPv6:
		return b, 6, nil
	}
	return nil, 0, fmt.Errorf("frame of type %#04x", kind)
}

// parseIPv4 reads a packet; quoted says that it may be cut short behind its
// headers.
func (p *Packet) parseIPv4(b []byte, quoted bool) error {
	if len(b) < 20 {
		return errors.New("an IPv4 header is cut short")
	}
	header, length := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
	if b[0]>>4 != 4 || header < 20 || length < header || len(b) < header {
		return fmt.Errorf("an IPv4 header of %d bytes in a packet of %d, of which %d are there", header, length, len(b))
	}
	if checksum(b[:header]) != 0 {
		return fmt.Errorf("IPv4 header checksum %#04x is wrong", binary.BigEndian.Uint16(b[10:]))
	}
	flags := binary.BigEndian.Uint16(b[6:])
	p.TrafficClass, p.ID = b[1], uint32(binary.BigEndian.Uint16(b[4:]))
	if flags&0x8000 != 0 {
		return errors.New("the reserved flag of an IPv4 header is set")
	}
	p.DontFragment, p.MoreFragments = flags&0x4000 != 0, flags&0x2000 != 0
	p.Offset = flags & 0x1fff * 8
	p.TTL, p.Proto = b[8], b[9]
	p.Src, p.Dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	p.Options = string(b[20:header])
	return p.parseRest(b, header, length, quoted)
}

func (p *Packet) parseIPv6(b []byte, quoted bool) error {
	if len(b) < 40 || b[0]>>4 != 6 {
		return errors.New("an IPv6 header is cut short, or has another version")
	}
	first := binary.BigEndian.Uint32(b)
	p.TrafficClass, p.FlowLabel = byte(first>>20), first&0xfffff
	length := 40 + int(binary.BigEndian.Uint16(b[4:]))
	p.Proto, p.TTL = b[6], b[7]
	p.Src, p.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	offset := 40
	for {
		size, err := p.parseExtension(b[offset:min(length, len(b))])
		if err != nil {
			return err
		}
		if size == 0 {
			break
		}
		offset += size
	}
	return p.parseRest(b, offset, length, quoted)
}

// parseExtension reads one extension header, of the kind that p.Proto says. size
// is 0 when none is there.
func (p *Packet) parseExtension(b []byte) (size int, err error) {
	switch p.Proto {
	case HopByHop, Routing, DestinationOptions, FragmentHeader:
	default:
		return 0, nil
	}
	if p.IsFragment() {
		return 0, nil // what follows is the payload's
	}
	if len(b) < 8 {
		return 0, errors.New("an extension header is cut short")
	}
	if p.Proto == FragmentHeader {
		p.Fragmentable = true
		field := binary.BigEndian.Uint16(b[2:])
		p.Offset, p.MoreFragments = field&^7, field&1 != 0
		p.Proto, p.ID = b[0], binary.BigEndian.Uint32(b[4:])
		if b[1] != 0 || field&6 != 0 {
			return 0, errors.New("reserved bits of a fragment header are set")
		}
		return 8, nil
	}
	size = 8 * (1 + int(b[1]))
	if len(b) < size {
		return 0, errors.New("an extension header is cut short")
	}
	if p.Fragmentable {
		return 0, errors.New("an extension header behind the fragment header")
	}
	// The kind of what follows is kept where it belongs, in the next one.
	p.Extensions += string([]byte{p.Proto, 0}) + string(b[1:size])
	p.Proto = b[0]
	return size, nil
}

// parseRest reads what is behind the IP headers: from start to length.
func (p *Packet) parseRest(b []byte, start, length int, quoted bool) error {
	if p.IsFragment() {
		p.Fragmentable = false // follows from it
	}
	if len(b) < length {
		if !quoted {
			return fmt.Errorf("a packet of %d bytes, of which %d are there", length, len(b))
		}
		p.parsePart(b[start:])
		return nil
	}
	p.Trailer = string(b[length:])
	if length < start {
		return fmt.Errorf("headers of %d bytes in a packet of %d", start, length)
	}
	return p.parseTransport(b[start:length])
}

// parsePart reads the beginning of what is behind the IP header of a quoted packet.
func (p *Packet) parsePart(b []byte) {
	if hasPorts(p.Proto) && !p.IsFragment() && len(b) >= 4 {
		p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		b = b[4:]
	}
	p.Payload = string(b)
}

func hasPorts(proto uint8) bool { return proto == TCP || proto == UDP || proto == SCTP }

func (p *Packet) parseTransport(b []byte) error {
	if p.IsFragment() {
		p.Payload = string(b)
		return nil
	}
	switch p.Proto {
	case TCP:
		return p.parseTCP(b)
	case UDP:
		return p.parseUDP(b)
	case SCTP:
		return p.parseSCTP(b)
	case p.icmp():
		return p.parseICMP(b)
	}
	p.Payload = string(b)
	return nil
}

// verify sums up what Marshal has summed up.
func (p *Packet) verify(name string, b []byte) error {
	if checksum(p.pseudoHeader(len(b)), b) != 0 {
		return fmt.Errorf("%s checksum is wrong", name)
	}
	return nil
}

func (p *Packet) parseTCP(b []byte) error {
	if len(b) < 20 || int(b[12]>>4)*4 < 20 || int(b[12]>>4)*4 > len(b) {
		return errors.New("a TCP header is cut short")
	}
	header := int(b[12]>>4) * 4
	p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	p.Seq, p.Ack = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	p.Flags, p.Window = b[13], binary.BigEndian.Uint16(b[14:])
	p.TCPOptions, p.Payload = string(b[20:header]), string(b[header:])
	if b[12]&0xf != 0 || b[18] != 0 || b[19] != 0 {
		return errors.New("a TCP header with reserved bits or an urgent pointer")
	}
	return p.verify("TCP", b)
}

func (p *Packet) parseUDP(b []byte) error {
	if len(b) < 8 || int(binary.BigEndian.Uint16(b[4:])) != len(b) {
		return errors.New("a UDP datagram of another length than its packet")
	}
	p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	p.Payload = string(b[8:])
	if binary.BigEndian.Uint16(b[6:]) == 0 {
		p.NoChecksum = true
		if p.Is6() {
			return errors.New("a UDP datagram over IPv6 without a checksum")
		}
		return nil
	}
	return p.verify("UDP", b)
}

func (p *Packet) parseSCTP(b []byte) error {
	if len(b) < 12 {
		return errors.New("an SCTP header is cut short")
	}
	p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	p.Tag, p.Payload = binary.BigEndian.Uint32(b[4:]), string(b[12:])
	whole := append([]byte{}, b...)
	copy(whole[8:12], "\x00\x00\x00\x00")
	if crc32.Checksum(whole, castagnoli) != binary.LittleEndian.Uint32(b[8:]) {
		return errors.New("SCTP checksum is wrong")
	}
	return nil
}

func (p *Packet) parseICMP(b []byte) error {
	if len(b) < 8 {
		return errors.New("an ICMP header is cut short")
	}
	p.Type, p.Code, p.Rest = b[0], b[1], binary.BigEndian.Uint32(b[4:])
	p.Payload = string(b[8:])
	if err := p.verify("ICMP", b); err != nil {
		return err
	}
	if !p.IsError() {
		return nil
	}
	if _, err := p.Quoted(); err != nil {
		return fmt.Errorf("in the packet that an ICMP error quotes: %w", err)
	}
	return nil
}

// IsError tells whether the packet is an ICMP error, which quotes a packet.
func (p Packet) IsError() bool {
	if p.IsFragment() || p.Proto != p.icmp() {
		return false
	}
	if p.Is6() {
		return p.Type < 128
	}
	return p.Type == 3 || p.Type == 11 || p.Type == 12
}

// Quoted returns the packet that an ICMP error quotes, as far as it is there: of
// one that is cut short, the ports are read and the Payload is what follows them.
func (p Packet) Quoted() (Packet, error) {
	var inner Packet
	if p.Is6() {
		return inner, inner.parseIPv6([]byte(p.Payload), true)
	}
	return inner, inner.parseIPv4([]byte(p.Payload), true)
}
