// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packet

import (
	"cmp"
	"errors"
	"slices"
)

// Split returns the packet in fragments with size bytes each, a multiple of eight,
// behind the IP header; the packet alone when it fits.
func (p Packet) Split(size int) []Packet {
	whole := p.transport()
	if len(whole) <= size {
		return []Packet{p}
	}
	part := p.part()
	var parts []Packet
	for offset := 0; offset < len(whole); offset += size {
		end := min(offset+size, len(whole))
		part.Offset, part.MoreFragments = uint16(offset), end < len(whole)
		part.Payload = string(whole[offset:end])
		parts = append(parts, part)
	}
	return parts
}

// part returns the packet without all that is behind the IP header.
func (p Packet) part() Packet {
	p.Fragmentable, p.DontFragment = false, false
	p.SrcPort, p.DstPort, p.Seq, p.Ack, p.Flags, p.Window, p.TCPOptions = 0, 0, 0, 0, 0, 0, ""
	p.NoChecksum, p.Tag, p.Type, p.Code, p.Rest, p.Payload = false, 0, 0, 0, 0, ""
	return p
}

// Join puts fragments together. All must be there, with the same headers but for
// where they belong, and the whole must be right as Parse wants it.
func Join(parts []Packet) (Packet, error) {
	if len(parts) == 1 && !parts[0].IsFragment() {
		return parts[0], nil
	}
	parts = slices.Clone(parts)
	slices.SortFunc(parts, func(a, b Packet) int { return cmp.Compare(a.Offset, b.Offset) })
	var whole []byte
	for i, part := range parts {
		if int(part.Offset) != len(whole) || part.MoreFragments != (i < len(parts)-1) {
			return Packet{}, errors.New("not all fragments are there")
		}
		whole = append(whole, part.Payload...)
		part.Offset, part.MoreFragments, part.Payload = 0, false, ""
		parts[i] = part
		if part != parts[0] {
			return Packet{}, errors.New("fragments with different headers")
		}
	}
	if len(parts) == 0 {
		return Packet{}, errors.New("no fragments")
	}
	p := parts[0]
	if err := p.parseTransport(whole); err != nil {
		return Packet{}, err
	}
	return p, nil
}
