// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packet

import (
	"encoding/binary"
	"fmt"
	"net"
	"strings"
)

// String returns the packet in one line, with the one that an ICMP error quotes.
func (p Packet) String() string {
	var b strings.Builder
	if p.HasEthernet() {
		fmt.Fprintf(&b, "%s > %s ", net.HardwareAddr(p.SrcMAC[:]), net.HardwareAddr(p.DstMAC[:]))
	}
	if p.VLAN != 0 {
		fmt.Fprintf(&b, "vlan %d ", p.VLAN)
	}
	p.writeIP(&b)
	p.writeTransport(&b)
	switch inner, err := p.Quoted(); {
	case p.IsError() && err == nil:
		fmt.Fprintf(&b, " [%s]", inner)
	case len(p.Payload) > 40:
		fmt.Fprintf(&b, " %q... (%d bytes)", p.Payload[:40], len(p.Payload))
	case p.Payload != "":
		fmt.Fprintf(&b, " %q", p.Payload)
	}
	if p.Trailer != "" {
		fmt.Fprintf(&b, " trailer %d bytes", len(p.Trailer))
	}
	return b.String()
}

func (p Packet) writeIP(b *strings.Builder) {
	fmt.Fprintf(b, "%s > %s ttl %d", p.Src, p.Dst, p.TTL)
	if p.TrafficClass != 0 {
		fmt.Fprintf(b, " class %#x", p.TrafficClass)
	}
	if p.FlowLabel != 0 {
		fmt.Fprintf(b, " label %#x", p.FlowLabel)
	}
	if p.ID != 0 {
		fmt.Fprintf(b, " id %d", p.ID)
	}
	if p.DontFragment {
		b.WriteString(" DF")
	}
	if p.Fragmentable {
		b.WriteString(" fragmentable")
	}
	if p.IsFragment() {
		fmt.Fprintf(b, " fragment at %d", p.Offset)
		if p.MoreFragments {
			b.WriteString("+")
		}
	}
	if p.Options != "" {
		fmt.Fprintf(b, " options %x", p.Options)
	}
	if p.Extensions != "" {
		fmt.Fprintf(b, " extensions %x", p.Extensions)
	}
}

func (p Packet) writeTransport(b *strings.Builder) {
	name := map[uint8]string{TCP: "TCP", UDP: "UDP", SCTP: "SCTP", p.icmp(): "ICMP"}[p.Proto]
	if name == "" {
		name = fmt.Sprintf("protocol %d", p.Proto)
	}
	fmt.Fprintf(b, " %s", name)
	switch {
	case p.IsFragment():
		if hasPorts(p.Proto) && p.Offset == 0 && len(p.Payload) >= 4 {
			ports := []byte(p.Payload)
			fmt.Fprintf(b, " (%d > %d)", binary.BigEndian.Uint16(ports), binary.BigEndian.Uint16(ports[2:]))
		}
		return
	case hasPorts(p.Proto):
		fmt.Fprintf(b, " %d > %d", p.SrcPort, p.DstPort)
	}
	switch p.Proto {
	case TCP:
		fmt.Fprintf(b, " %s seq %d ack %d win %d", flagNames(p.Flags), p.Seq, p.Ack, p.Window)
		if p.TCPOptions != "" {
			fmt.Fprintf(b, " options %x", p.TCPOptions)
		}
	case UDP:
		if p.NoChecksum {
			b.WriteString(" no checksum")
		}
	case SCTP:
		fmt.Fprintf(b, " tag %#x", p.Tag)
	case p.icmp():
		fmt.Fprintf(b, " type %d code %d rest %#x", p.Type, p.Code, p.Rest)
	}
}

func flagNames(flags uint8) string {
	var names []string
	for i, name := range []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"} {
		if flags&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if names == nil {
		return "-"
	}
	return strings.Join(names, "|")
}
