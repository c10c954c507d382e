// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// This file is the only place that knows byte order and padding. Rows go in as
// lb has them (host order, 4-byte IPv4) and come out the same.

// encodeAddr turns an address into the kernel's 16 bytes, IPv4 as ::ffff:a.b.c.d.
func encodeAddr(a netip.Addr) bpfAddr { return bpfAddr{B: a.As16()} }

// decodeAddr is encodeAddr backwards.
func decodeAddr(a bpfAddr) netip.Addr { return netip.AddrFrom16(a.B).Unmap() }

// networkPort swaps a port between host order and the network order that the
// kernel's __be16 fields keep; it is its own inverse.
func networkPort(p uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], p)
	return binary.NativeEndian.Uint16(b[:])
}

func encodeFrontendKey(k lb.FrontendKey) bpfFrontendKey {
	return bpfFrontendKey{Vip: encodeAddr(k.VIP), Port: networkPort(k.Port), Proto: uint8(k.Protocol)}
}

func decodeFrontendKey(k bpfFrontendKey) lb.FrontendKey {
	return lb.FrontendKey{VIP: decodeAddr(k.Vip), Port: networkPort(k.Port), Protocol: lb.Protocol(k.Proto)}
}

func encodeFrontend(f lb.Frontend) bpfFrontend {
	return bpfFrontend{ServiceId: uint32(f.Service), Kind: bpfFrontendKind(f.Kind)}
}

func decodeFrontend(f bpfFrontend) lb.Frontend {
	return lb.Frontend{Service: lb.ServiceID(f.ServiceId), Kind: lb.FrontendKind(f.Kind)}
}

// The parts of a range word: see struct service in bpf/types.h.
const (
	rangeBaseBits  = 24
	rangeCountBits = 16
)

func encodeRange(r lb.Range) uint64 {
	return uint64(r.Generation)<<(rangeBaseBits+rangeCountBits) | uint64(r.Count)<<rangeBaseBits | uint64(r.Base)
}

func decodeRange(word uint64) lb.Range {
	return lb.Range{
		Base:       uint32(word & (1<<rangeBaseBits - 1)),
		Count:      uint16(word >> rangeBaseBits),
		Generation: uint32(word >> (rangeBaseBits + rangeCountBits)),
	}
}

func encodeSlot(b lb.Backend) bpfSlot {
	return bpfSlot{Backend: encodeAddr(b.Addr), Port: networkPort(b.Port)}
}

func decodeSlot(s bpfSlot) lb.Backend {
	return lb.Backend{Addr: decodeAddr(s.Backend), Port: networkPort(s.Port)}
}

func encodeMember(m lb.Member) bpfMemberKey {
	return bpfMemberKey{
		ServiceId: uint32(m.Service),
		Backend:   encodeAddr(m.Backend.Addr),
		Port:      networkPort(m.Backend.Port),
	}
}

func decodeMember(k bpfMemberKey) lb.Member {
	return lb.Member{
		Service: lb.ServiceID(k.ServiceId),
		Backend: lb.Backend{Addr: decodeAddr(k.Backend), Port: networkPort(k.Port)},
	}
}

// encodeString fills a zero-terminated field. It fails when s does not fit;
// names of API objects always do, those in files may not.
func encodeString(field []byte, s string) error {
	if len(s) >= len(field) {
		return fmt.Errorf("%.20q… has %d characters, the kernel's tables hold %d", s, len(s), len(field)-1)
	}
	copy(field, s)
	return nil
}

func decodeString(field []byte) string {
	s, _, _ := bytes.Cut(field, []byte{0})
	return string(s)
}

func encodeServiceName(s lb.ServicePort) (bpfServiceName, error) {
	n := bpfServiceName{Proto: uint8(s.Protocol), Family: uint8(s.Family)}
	for _, f := range []struct {
		field []byte
		value string
	}{{n.Namespace[:], s.Service.Namespace}, {n.Name[:], s.Service.Name}, {n.Port[:], s.Port}} {
		if err := encodeString(f.field, f.value); err != nil {
			return n, err
		}
	}
	return n, nil
}

func decodeServiceName(n *bpfServiceName) lb.ServicePort {
	return lb.ServicePort{
		Service:  lb.Name{Namespace: decodeString(n.Namespace[:]), Name: decodeString(n.Name[:])},
		Port:     decodeString(n.Port[:]),
		Protocol: lb.Protocol(n.Proto),
		Family:   lb.Family(n.Family),
	}
}

func encodeObjectName(name lb.Name) (bpfObjectName, error) {
	var n bpfObjectName
	if err := encodeString(n.Namespace[:], name.Namespace); err != nil {
		return n, err
	}
	return n, encodeString(n.Name[:], name.Name)
}

func decodeObjectName(n *bpfObjectName) lb.Name {
	return lb.Name{Namespace: decodeString(n.Namespace[:]), Name: decodeString(n.Name[:])}
}

// encodeProblem cuts the text where the field ends.
func encodeProblem(p lb.Problem) bpfProblem {
	var row bpfProblem
	copy(row.Text[:len(row.Text)-1], p)
	return row
}
