// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Flow is what a client has with one frontend on the packet path.
type Flow struct {
	Protocol lb.Protocol
	Client   netip.AddrPort
	VIP      netip.AddrPort // what the client dialled
	Backend  netip.AddrPort
	// Source is whom the backend sees as the client: Client, or with SNAT an
	// address and port of the node.
	Source  netip.AddrPort
	Service lb.ServiceID
	// Device is the index of the device that requests came in on last. It means
	// nothing when Node is set.
	Device   uint32
	Node     bool // the client is a process on the node
	Redirect bool // packets go around the node's stack
	SNAT     bool
	Outside  bool // the client counts as an outside one
	State    FlowState
	Idle     time.Duration // since the last packet of either, in whole seconds
	// A flow has an entry for requests and one for answers, of which the kernel
	// may have evicted one. Here they tell which one the Flow was read from, or
	// that it was both.
	Requests, Answers bool
}

// FlowState is what has been seen of a flow.
type FlowState uint8

// The bits of a FlowState.
const (
	FlowAnswered      = FlowState(bpfFlowStateFLOW_ANSWERED)       // the backend has answered
	FlowEstablished   = FlowState(bpfFlowStateFLOW_ESTABLISHED)    // and the client after that
	FlowClientClosed  = FlowState(bpfFlowStateFLOW_CLIENT_CLOSED)  // FIN, or SCTP's SHUTDOWN
	FlowBackendClosed = FlowState(bpfFlowStateFLOW_BACKEND_CLOSED) // the same from the backend
	FlowReset         = FlowState(bpfFlowStateFLOW_RESET)          // RST, or SCTP's ABORT

	// FlowClosed holds the bits of a flow that both have closed.
	FlowClosed = FlowClientClosed | FlowBackendClosed
)

// Has tells whether all bits of o are set.
func (s FlowState) Has(o FlowState) bool { return s&o == o }

// tuple tells a flow from all others.
type tuple struct {
	protocol                     lb.Protocol
	client, vip, backend, source netip.AddrPort
}

func (f *Flow) tuple() tuple { return tuple{f.Protocol, f.Client, f.VIP, f.Backend, f.Source} }

// Flows returns all flows in no order. Programs go on writing meanwhile; it tells
// what was there at some time during the call.
func (t *Tables) Flows() ([]Flow, error) {
	var out []Flow
	places := map[tuple]int{}
	for scan := t.ScanFlows(); ; {
		entries, err := scan.Next()
		if err != nil || len(entries) == 0 {
			return out, err
		}
		for _, f := range entries {
			at, half := places[f.tuple()]
			if !half {
				places[f.tuple()] = len(out)
				out = append(out, f)
				continue
			}
			whole := &out[at]
			whole.Requests, whole.Answers = whole.Requests || f.Requests, whole.Answers || f.Answers
			whole.State |= f.State
			whole.Idle = min(whole.Idle, f.Idle)
		}
	}
}

// FlowScan goes through the entries of all flows, in slices.
type FlowScan struct {
	flows  *ebpf.Map
	cursor ebpf.MapBatchCursor
	keys   []bpfFlowKey
	values []bpfFlow
	slice  []Flow
	ended  bool
}

// ScanFlows begins a scan. Time may pass between its slices: what is there all the
// time is found once.
func (t *Tables) ScanFlows() *FlowScan {
	return &FlowScan{
		flows: t.table(bpfMapFlows),
		keys:  make([]bpfFlowKey, batch), values: make([]bpfFlow, batch), slice: make([]Flow, 0, batch),
	}
}

// Next returns the next entries, a thousand at most, and none when all have been
// returned. They are valid until the next call.
func (s *FlowScan) Next() ([]Flow, error) {
	now, err := programClock()
	if err != nil {
		return nil, err
	}
	s.slice = s.slice[:0]
	for len(s.slice) == 0 && !s.ended {
		n, err := s.flows.BatchLookup(&s.cursor, s.keys, s.values, nil)
		if s.ended = errors.Is(err, ebpf.ErrKeyNotExist); err != nil && !s.ended {
			return nil, fmt.Errorf("read map %s: %w", s.flows, err)
		}
		for i := range n {
			s.slice = append(s.slice, decodeFlow(&s.keys[i], &s.values[i], now))
		}
	}
	return s.slice, nil
}

// programClock reads the clock of entries, that of bpf_ktime_get_ns, in seconds.
func programClock() (uint32, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, fmt.Errorf("read the clock of programs: %w", err)
	}
	return uint32(now.Sec), nil
}

// AddFlow writes the entries that f names. Programs make flows by themselves and
// know more of them; this is for those that want flows without packets, to test or
// measure what is done with them.
func (t *Tables) AddFlow(f Flow) error {
	now, err := programClock()
	if err != nil {
		return err
	}
	requests, answers := encodeFlowKeys(&f)
	var errs []error
	if f.Answers {
		value := encodeFlow(&f, requests, now)
		value.Flags |= uint32(bpfFlowFlagFLOW_ANSWER)
		errs = append(errs, t.table(bpfMapFlows).Put(&answers, &value))
	}
	if f.Requests {
		value := encodeFlow(&f, answers, now)
		errs = append(errs, t.table(bpfMapFlows).Put(&requests, &value))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("add a flow of %v: %w", f.Client, err)
	}
	return nil
}

// Deletion says what has become of a flow that was to be deleted.
type Deletion uint8

// The outcomes of DeleteFlow.
const (
	FlowKept    Deletion = iota // it is not over
	FlowDeleted                 // no entry is left
	FlowAbsent                  // there was none
)

// DeleteFlow deletes both entries of a flow, or the one there is, if over is true of
// each as it is now. A packet may come at any time and the kernel knows no deleting
// under a condition: an entry of which over turns out to be false when it has been
// deleted is put back at once, with its partner.
func (t *Tables) DeleteFlow(f Flow, over func(Flow) bool) (Deletion, error) {
	entries, kept, err := t.flowEntries(f, over)
	if err != nil || kept {
		return FlowKept, err
	}
	var gone []*flowEntry
	for _, e := range entries {
		there, err := e.read(t.table(bpfMapFlows).LookupAndDelete) // Linux 5.14
		if err != nil {
			return FlowKept, err
		}
		if !there {
			continue
		}
		gone = append(gone, e)
		if e.flow.tuple() != f.tuple() || !over(e.flow) {
			return FlowKept, t.putBack(gone)
		}
	}
	if len(gone) == 0 {
		return FlowAbsent, nil
	}
	return FlowDeleted, nil
}

// flowEntries returns the entries of a flow, in the order in which they are to go,
// or that one is to be kept since over is false of it.
func (t *Tables) flowEntries(f Flow, over func(Flow) bool) (entries []*flowEntry, kept bool, err error) {
	requests, answers := encodeFlowKeys(&f)
	// The answers' entry is the first: a request that comes in between makes it
	// anew. An answer cannot do that for the requests' entry when its own is gone.
	for _, k := range []bpfFlowKey{answers, requests} {
		e := &flowEntry{key: k}
		there, err := e.read(t.table(bpfMapFlows).Lookup)
		if err != nil {
			return nil, false, err
		}
		if !there || e.flow.tuple() != f.tuple() {
			continue // evicted, or another flow's
		}
		if !over(e.flow) {
			return nil, true, nil
		}
		entries = append(entries, e)
	}
	return entries, false, nil
}

// flowEntry is an entry of the flows map.
type flowEntry struct {
	key   bpfFlowKey
	value bpfFlow
	flow  Flow // what they mean
}

// read fills in the entry by a method of the map; it tells whether there is one.
func (e *flowEntry) read(lookup func(key, value any) error) (there bool, err error) {
	err = lookup(&e.key, &e.value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("delete a flow: %w", err)
	}
	now, err := programClock()
	if err != nil {
		return false, err
	}
	e.flow = decodeFlow(&e.key, &e.value, now)
	return true, nil
}

// putBack undoes the deletion of entries, unless there are newer ones by then.
func (t *Tables) putBack(entries []*flowEntry) error {
	for _, e := range entries {
		err := t.table(bpfMapFlows).Update(&e.key, &e.value, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("put back a flow: %w", err)
		}
	}
	return nil
}
