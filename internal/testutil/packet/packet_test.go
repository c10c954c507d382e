// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packet

import (
	"bytes"
	"encoding/hex"
	"hash/crc32"
	"net/netip"
	"strings"
	"testing"
)

var (
	v4 = Packet{Src: netip.MustParseAddr("192.0.2.1"), Dst: netip.MustParseAddr("198.51.100.2"), TTL: 64, ID: 7}
	v6 = Packet{Src: netip.MustParseAddr("2001:db8::1"), Dst: netip.MustParseAddr("2001:db8::2"), TTL: 64, FlowLabel: 0x12345}

	macA, macB = MAC{2, 0, 0, 0, 0, 1}, MAC{2, 0, 0, 0, 0, 2}
)

// change returns p after f.
func change(p Packet, f func(*Packet)) Packet {
	f(&p)
	return p
}

// samples returns packets with everything that can be in one.
func samples() map[string]Packet {
	out := map[string]Packet{}
	for family, base := range map[string]Packet{"v4": v4, "v6": v6} {
		tcp := change(base, func(p *Packet) {
			p.Proto, p.SrcPort, p.DstPort, p.Seq, p.Ack = TCP, 40000, 80, 0x01020304, 0x0a0b0c0d
			p.Flags, p.Window, p.TCPOptions, p.Payload = ACK|PSH, 512, "\x02\x04\x05\xb4", "odd"
		})
		udp := change(base, func(p *Packet) { p.Proto, p.SrcPort, p.DstPort, p.Payload = UDP, 5353, 53, "question" })
		icmp := change(base, func(p *Packet) { p.Proto, p.Type, p.Code, p.Rest = base.icmp(), 3, 1, 1400 })
		for name, p := range map[string]Packet{
			"TCP": tcp,
			"UDP": udp,
			"SCTP": change(base, func(p *Packet) {
				p.Proto, p.SrcPort, p.DstPort, p.Tag, p.Payload = SCTP, 5000, 38412, 99, "\x01\x00\x00\x04"
			}),
			"another protocol":           change(base, func(p *Packet) { p.Proto, p.Payload = 47, "tunnel" }),
			"error that quotes TCP":      change(icmp, func(p *Packet) { p.Payload = tcp.Quote(-1) }),
			"error that quotes a part":   change(icmp, func(p *Packet) { p.Payload = tcp.Quote(48) }),
			"TCP in Ethernet":            change(tcp, func(p *Packet) { p.SrcMAC, p.DstMAC, p.TrafficClass = macA, macB, 0x2c }),
			"TCP in a VLAN":              change(tcp, func(p *Packet) { p.SrcMAC, p.DstMAC, p.VLAN = macA, macB, 100 }),
			"UDP in a frame filled up":   change(udp, func(p *Packet) { p.SrcMAC, p.DstMAC, p.Trailer = macA, macB, "\x00\x00\x00" }),
			"first fragment":             udp.Split(8)[0],
			"last fragment in Ethernet":  change(udp.Split(8)[1], func(p *Packet) { p.SrcMAC = macA }),
			"an error about a fragment":  change(icmp, func(p *Packet) { p.Payload = udp.Split(8)[0].Quote(-1) }),
			"an error about a late part": change(icmp, func(p *Packet) { p.Payload = udp.Split(8)[1].Quote(-1) }),
		} {
			out[name+" "+family] = p
		}
	}
	out["echo v4"] = change(v4, func(p *Packet) { p.Proto, p.Type, p.Rest, p.Payload = ICMP, 8, 0x10002, "ping" })
	out["echo v6"] = change(v6, func(p *Packet) { p.Proto, p.Type, p.Rest, p.Payload = ICMPv6, 128, 0x10002, "ping" })
	out["UDP without a checksum"] = change(v4, func(p *Packet) { p.Proto, p.DstPort, p.NoChecksum = UDP, 53, true })
	out["options"] = change(out["TCP v4"], func(p *Packet) { p.Options, p.DontFragment = "\x94\x04\x00\x00\x01\x01\x01\x01", true })
	out["extensions"] = change(out["TCP v6"], func(p *Packet) {
		p.Extensions = Extension(HopByHop, 8) + Extension(Routing, 24) + Extension(DestinationOptions, 16)
	})
	out["extensions and a fragment header"] = change(out["extensions"], func(p *Packet) { p.Fragmentable, p.ID = true, 1<<20 })
	out["extensions of a fragment"] = out["extensions"].Split(16)[1]
	return out
}

func linkOf(p Packet) Link {
	if p.HasEthernet() {
		return Ethernet
	}
	return NoLink
}

func TestParseReturnsWhatMarshalWrote(t *testing.T) {
	for name, p := range samples() {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(p.Marshal(), linkOf(p))
			if err != nil {
				t.Fatalf("%v\n%v\n%x", err, p, p.Marshal())
			}
			if got != p {
				t.Errorf("got  %+v\nwant %+v", got, p)
			}
		})
	}
}

// Parts of a quoted packet that no checksum covers may change unnoticed by
// checksums, but not by whoever compares the packets.
func TestNoByteChangesUnnoticed(t *testing.T) {
	for name, p := range samples() {
		t.Run(name, func(t *testing.T) {
			whole := p.Marshal()
			for i := range whole {
				for _, bits := range []byte{0x01, 0x80, 0xff} {
					whole[i] ^= bits
					got, err := Parse(whole, linkOf(p))
					if err == nil && got == p {
						t.Errorf("byte %d of %x is %#x and nobody sees", i, whole, whole[i])
					}
					whole[i] ^= bits
				}
			}
		})
	}
}

func TestChecksumsSeeEveryBitOfWhatTheyCover(t *testing.T) {
	for _, name := range []string{"TCP v4", "UDP v4", "SCTP v4", "error that quotes TCP v4", "TCP v6", "UDP v6", "SCTP v6", "echo v6"} {
		t.Run(name, func(t *testing.T) {
			p := samples()[name]
			whole := p.Marshal()
			start := 0 // IPv4 has a checksum of its own
			if p.Is6() {
				start = 40
			}
			for i := start; i < len(whole); i++ {
				for bit := range 8 {
					whole[i] ^= 1 << bit
					if got, err := Parse(whole, NoLink); err == nil {
						t.Errorf("bit %d of byte %d is another one and all checksums are right: %v", bit, i, got)
					}
					whole[i] ^= 1 << bit
				}
			}
		})
	}
}

func TestPartialPacketsAreCompleted(t *testing.T) {
	for _, name := range []string{"TCP v4", "UDP v4", "TCP v6", "UDP v6", "options", "extensions", "TCP in Ethernet v6", "TCP in a VLAN v4"} {
		p := samples()[name]
		b, from, at := p.MarshalPartial()
		if _, err := Parse(b, linkOf(p)); err == nil {
			t.Errorf("%s: the checksum is there already", name)
		}
		Complete(b, from, at)
		if got, err := Parse(b, linkOf(p)); err != nil || got != p {
			t.Errorf("%s: %v\ngot  %v\nwant %v", name, err, got, p)
		}
	}
}

func TestNoPacketThatIsCutShort(t *testing.T) {
	for name, p := range samples() {
		whole := p.Marshal()
		for size := range len(whole) - len(p.Trailer) {
			if got, err := Parse(whole[:size], linkOf(p)); err == nil {
				t.Errorf("%s: %d of %d bytes are %v", name, size, len(whole), got)
			}
		}
	}
}

// Checksums that others have computed.
func TestChecksumsAreThoseOfTheStandards(t *testing.T) {
	// RFC 1071, section 3.
	if got := checksum([]byte{0x00, 0x01, 0xf2, 0x03}, []byte{0xf4, 0xf5, 0xf6, 0xf7}); got != ^uint16(0xddf2) {
		t.Errorf("Internet checksum %#04x, want %#04x", got, ^uint16(0xddf2))
	}
	// RFC 3720, appendix B.4: 32 bytes of zeros, then of ones.
	for b, want := range map[byte]uint32{0: 0x8a9136aa, 0xff: 0x62a8ab43} {
		if got := crc32.Checksum([]byte(strings.Repeat(string([]byte{b}), 32)), castagnoli); got != want {
			t.Errorf("CRC32c of 32 bytes %#x is %#x, want %#x", b, got, want)
		}
	}
}

// Datagrams, SYNs, a RST and a multicast report as Linux 6.18 has sent them.
func TestPacketsOfLinux(t *testing.T) {
	for _, tc := range []struct{ bytes, want string }{
		{
			"4500001f65a6400040115124c0000201c00002029c400035000b1afc616263",
			`192.0.2.1 > 192.0.2.2 ttl 64 id 26022 DF UDP 40000 > 53 "abc"`,
		},
		{
			"4500003cfa0740004006bcb0c0000201c00002029c4200501f2f4b4e00000000a002faf0f3d80000020405b40402080aed34e0ea000000000103030a",
			`192.0.2.1 > 192.0.2.2 ttl 64 id 64007 DF TCP 40002 > 80 SYN seq 523193166 ack 0 win 64240 options 020405b40402080aed34e0ea000000000103030a`,
		},
		{
			"450000280000400040063cce7f0000017f00000100509c420000000011c0ee525014000015290000",
			`127.0.0.1 > 127.0.0.1 ttl 64 DF TCP 80 > 40002 RST|ACK seq 0 ack 297856594 win 0`,
		},
		{
			"600aa6cd000b114020010db800000000000000000000000120010db80000000000000000000000029c400035000b438b616263",
			`2001:db8::1 > 2001:db8::2 ttl 64 label 0xaa6cd UDP 40000 > 53 "abc"`,
		},
		{
			"6005984d0028064020010db800000000000000000000000120010db80000000000000000000000029c420050b2c9fb8500000000" +
				"a002fd206d400000020405a00402080a9cd29a86000000000103030a",
			`2001:db8::1 > 2001:db8::2 ttl 64 label 0x5984d TCP 40002 > 80 SYN seq 2999581573 ack 0 win 64800 options 020405a00402080a9cd29a86000000000103030a`,
		},
		{
			"600000000024000100000000000000000000000000000000ff0200000000000000000000000000163a000502000001008f0064910000000104000000ff0200000000000000000001ffb70a42",
			`:: > ff02::16 ttl 1 extensions 000000050200000100 ICMP type 143 code 0 rest 0x1 "\x04\x00\x00\x00\xff\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\xff\xb7\nB"`,
		},
	} {
		b, err := hex.DecodeString(tc.bytes)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(b, NoLink)
		if err != nil {
			t.Errorf("%s: %v", tc.want, err)
			continue
		}
		if got.String() != tc.want {
			t.Errorf("got  %s\nwant %s", got, tc.want)
		}
		if again := got.Marshal(); !bytes.Equal(again, b) {
			t.Errorf("%s\ngot  %x\nwant %x", tc.want, again, b)
		}
	}
}

func TestSplitPacketsAreJoined(t *testing.T) {
	for name, p := range samples() {
		if p.IsFragment() || p.Fragmentable {
			continue
		}
		for _, size := range []int{8, 16, 1400} {
			parts := p.Split(size)
			for i, part := range parts {
				got, err := Parse(part.Marshal(), linkOf(p))
				if err != nil {
					t.Fatalf("%s: part %d: %v", name, i, err)
				}
				if got != part {
					t.Errorf("%s: part %d\ngot  %v\nwant %v", name, i, got, part)
				}
			}
			parts[0], parts[len(parts)-1] = parts[len(parts)-1], parts[0]
			got, err := Join(parts)
			got.DontFragment = p.DontFragment
			if err != nil || got != p {
				t.Errorf("%s in parts of %d: %v\ngot  %v\nwant %v", name, size, err, got, p)
			}
			if len(parts) == 1 || p.Proto == 47 || p.NoChecksum {
				continue // nothing covers it
			}
			parts[0].Payload = "x" + parts[0].Payload[1:]
			if _, err := Join(parts); err == nil {
				t.Errorf("%s: a changed part is joined with the others", name)
			}
		}
	}
	if _, err := Join(samples()["UDP v4"].Split(8)[:1]); err == nil {
		t.Error("one fragment of two is a packet")
	}
}

func TestStringShowsWhatMatters(t *testing.T) {
	all := samples()
	for name, want := range map[string]string{
		"TCP v4":                      `192.0.2.1 > 198.51.100.2 ttl 64 id 7 TCP 40000 > 80 PSH|ACK seq 16909060 ack 168496141 win 512 options 020405b4 "odd"`,
		"UDP in a frame filled up v6": `02:00:00:00:00:01 > 02:00:00:00:00:02 2001:db8::1 > 2001:db8::2 ttl 64 label 0x12345 UDP 5353 > 53 "question" trailer 3 bytes`,
		"first fragment v4":           `192.0.2.1 > 198.51.100.2 ttl 64 id 7 fragment at 0+ UDP (5353 > 53) "\x14\xe9\x005\x00\x10C\xb8"`,
		"error that quotes a part v6": `2001:db8::1 > 2001:db8::2 ttl 64 label 0x12345 ICMP type 3 code 1 rest 0x578 ` +
			`[2001:db8::1 > 2001:db8::2 ttl 64 label 0x12345 TCP 40000 > 80 - seq 0 ack 0 win 0 "\x01\x02\x03\x04"]`,
	} {
		if got := all[name].String(); got != want {
			t.Errorf("%s\ngot  %s\nwant %s", name, got, want)
		}
	}
}
