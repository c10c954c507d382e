// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

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

// The parts of a service's words: see struct service in bpf/types.h.
const (
	rangeBaseBits  = 24
	rangeCountBits = 16

	optionRestricted   = uint64(bpfServiceOptionOPTION_RESTRICTED)
	optionNodeAllowed  = uint64(bpfServiceOptionOPTION_NODE_ALLOWED)
	optionOutsideLocal = uint64(bpfServiceOptionOPTION_OUTSIDE_LOCAL)
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

// encodeOptions makes the word of everything in row but the ranges.
func encodeOptions(row lb.ServiceRow) uint64 {
	word := uint64(row.Affinity)
	if row.Restricted {
		word |= optionRestricted
	}
	if row.NodeAllowed {
		word |= optionNodeAllowed
	}
	if row.OutsideLocal {
		word |= optionOutsideLocal
	}
	return word
}

func decodeService(s bpfService) lb.ServiceRow {
	row := lb.ServiceRow{
		Affinity:     uint32(s.Options),
		Restricted:   s.Options&optionRestricted != 0,
		NodeAllowed:  s.Options&optionNodeAllowed != 0,
		OutsideLocal: s.Options&optionOutsideLocal != 0,
	}
	for side, word := range s.Range {
		row.Sides[side] = decodeRange(word)
	}
	return row
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
		Use:       uint8(m.Use),
	}
}

func decodeMember(k bpfMemberKey) lb.Member {
	return lb.Member{
		Service: lb.ServiceID(k.ServiceId),
		Backend: lb.Backend{Addr: decodeAddr(k.Backend), Port: networkPort(k.Port)},
		Use:     lb.Use(k.Use),
	}
}

// mappedBits is how many bits come before an IPv4 address in the kernel's.
const mappedBits = 96

// encodePrefix returns the address of a prefix, masked, and how many of its bits
// count. One that is not valid, which only a stranger's key decodes to, has none.
func encodePrefix(p netip.Prefix) (bpfAddr, uint32) {
	if !p.IsValid() {
		return bpfAddr{}, 0
	}
	p = p.Masked()
	if p.Addr().Is4() {
		return encodeAddr(p.Addr()), mappedBits + uint32(p.Bits())
	}
	return encodeAddr(p.Addr()), uint32(p.Bits())
}

// decodePrefix is encodePrefix backwards.
func decodePrefix(a bpfAddr, bits uint32) netip.Prefix {
	addr := netip.AddrFrom16(a.B)
	if addr.Is4In6() && bits >= mappedBits {
		return netip.PrefixFrom(addr.Unmap(), int(bits)-mappedBits)
	}
	return netip.PrefixFrom(addr, int(bits))
}

// sourceBits is how many bits of a source's key come before the address, all of
// which count.
const sourceBits = 32

func encodeSource(s lb.Source) bpfSourceKey {
	addr, bits := encodePrefix(s.Prefix)
	return bpfSourceKey{Prefixlen: sourceBits + bits, ServiceId: uint32(s.Service), Addr: addr}
}

func decodeSource(k bpfSourceKey) lb.Source {
	return lb.Source{Service: lb.ServiceID(k.ServiceId), Prefix: decodePrefix(k.Addr, k.Prefixlen-sourceBits)}
}

func encodeCIDR(p netip.Prefix) bpfCidrKey {
	addr, bits := encodePrefix(p)
	return bpfCidrKey{Prefixlen: bits, Addr: addr}
}

func decodeCIDR(k bpfCidrKey) netip.Prefix { return decodePrefix(k.Addr, k.Prefixlen) }

// decodeAffinity returns the row as of nowSec, on the clock of programs. An entry
// from a second that has just begun may be ahead of it.
func decodeAffinity(k *bpfAffinityKey, v *bpfAffinity, nowSec uint32) AffinityEntry {
	client := v.Client
	if client == (bpfAddr{}) {
		client = k.Client
	}
	e := AffinityEntry{
		Netns:   k.Netns,
		Service: lb.ServiceID(k.ServiceId),
		Backend: lb.Backend{Addr: decodeAddr(v.Backend), Port: networkPort(v.Port)},
		Age:     time.Duration(max(0, int32(nowSec-v.LastSec))) * time.Second,
	}
	if client != (bpfAddr{}) {
		e.Client = decodeAddr(client)
	}
	return e
}

func encodeDevice(d Device) bpfDevice {
	row := bpfDevice{L3Ifindex: d.L3Index, Mac: d.MAC}
	if d.Pod {
		row.Flags |= uint32(bpfDeviceFlagDEVICE_POD)
	}
	if d.Source4.IsValid() {
		row.Source4 = encodeAddr(d.Source4)
	}
	if d.Source6.IsValid() {
		row.Source6 = encodeAddr(d.Source6)
	}
	return row
}

func decodeDevice(index uint32, row *bpfDevice) Device {
	d := Device{
		Index: index, L3Index: row.L3Ifindex, MAC: row.Mac,
		Pod: row.Flags&uint32(bpfDeviceFlagDEVICE_POD) != 0,
	}
	if row.Source4 != (bpfAddr{}) {
		d.Source4 = decodeAddr(row.Source4)
	}
	if row.Source6 != (bpfAddr{}) {
		d.Source6 = decodeAddr(row.Source6)
	}
	return d
}

func decodeEnd(a bpfAddr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(decodeAddr(a), networkPort(port))
}

// encodeFlowKeys returns the keys of a flow's two entries.
func encodeFlowKeys(f *Flow) (requests, answers bpfFlowKey) {
	requests = bpfFlowKey{
		Src: encodeAddr(f.Client.Addr()), Sport: networkPort(f.Client.Port()),
		Dst: encodeAddr(f.VIP.Addr()), Dport: networkPort(f.VIP.Port()),
		Proto: uint8(f.Protocol),
	}
	answers = bpfFlowKey{
		Src: encodeAddr(f.Backend.Addr()), Sport: networkPort(f.Backend.Port()),
		Dst: encodeAddr(f.Source.Addr()), Dport: networkPort(f.Source.Port()),
		Proto: uint8(f.Protocol),
	}
	return requests, answers
}

// flowFlags are the bits behind the fields of a Flow.
func flowFlags(f *Flow) (flags uint32) {
	for _, b := range []struct {
		is   bool
		flag bpfFlowFlag
	}{
		{f.Node, bpfFlowFlagFLOW_NODE}, {f.Redirect, bpfFlowFlagFLOW_REDIRECT},
		{f.SNAT, bpfFlowFlagFLOW_SNAT}, {f.Outside, bpfFlowFlagFLOW_OUTSIDE},
	} {
		if b.is {
			flags |= uint32(b.flag)
		}
	}
	return flags
}

// rangeUnknown is RANGE_UNKNOWN of bpf/types.h: members decides.
const rangeUnknown = ^uint32(0)

// encodeFlow returns the value of the entry whose partner has the given key: what is
// written into a packet is the partner's key the other way round.
func encodeFlow(f *Flow, partner bpfFlowKey, nowSec uint32) bpfFlow {
	return bpfFlow{
		Src: partner.Dst, Sport: partner.Dport, Dst: partner.Src, Dport: partner.Sport,
		ServiceId: uint32(f.Service), Generation: rangeUnknown, Ifindex: f.Device,
		State: uint32(f.State), Flags: flowFlags(f), LastSec: nowSec - uint32(f.Idle/time.Second),
	}
}

// decodeFlow returns the flow of an entry as of nowSec, on the clock of programs. An
// entry from a second that has just begun may be ahead of it.
func decodeFlow(k *bpfFlowKey, v *bpfFlow, nowSec uint32) Flow {
	has := func(flag bpfFlowFlag) bool { return v.Flags&uint32(flag) != 0 }
	f := Flow{
		Protocol: lb.Protocol(k.Proto),
		Service:  lb.ServiceID(v.ServiceId),
		Device:   v.Ifindex,
		State:    FlowState(v.State),
		Idle:     time.Duration(max(0, int32(nowSec-v.LastSec))) * time.Second,
		Node:     has(bpfFlowFlagFLOW_NODE),
		Redirect: has(bpfFlowFlagFLOW_REDIRECT),
		SNAT:     has(bpfFlowFlagFLOW_SNAT),
		Outside:  has(bpfFlowFlagFLOW_OUTSIDE),
		Answers:  has(bpfFlowFlagFLOW_ANSWER),
	}
	f.Requests = !f.Answers
	// What a packet shows, and what is written into it.
	from, to := decodeEnd(k.Src, k.Sport), decodeEnd(k.Dst, k.Dport)
	src, dst := decodeEnd(v.Src, v.Sport), decodeEnd(v.Dst, v.Dport)
	if f.Answers {
		f.Backend, f.Source, f.VIP, f.Client = from, to, src, dst
	} else {
		f.Client, f.VIP, f.Source, f.Backend = from, to, src, dst
	}
	return f
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

func decodeObjectKey(n bpfObjectName) lb.Name { return decodeObjectName(&n) }

// encodeObjectKey returns for a name that does not fit what is in no table.
func encodeObjectKey(name lb.Name) bpfObjectName {
	n, err := encodeObjectName(name)
	if err != nil {
		return bpfObjectName{}
	}
	return n
}

// encodeProblem cuts the text where the field ends.
func encodeProblem(p lb.Problem) bpfProblem {
	var row bpfProblem
	copy(row.Text[:len(row.Text)-1], p)
	return row
}
