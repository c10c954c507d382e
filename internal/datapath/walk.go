// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"unsafe"

	"github.com/cilium/ebpf/link"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Origin is what one UDP socket remembers, without the addresses.
type Origin struct {
	Netns uint32 // inode of the socket's network namespace
	// Stale says that the socket's storage names a backend that is in members no
	// more. Whether the socket is still connected to it, WalkUDP finds out.
	Stale    bool
	Services []lb.ServiceID // whose backends it remembers
}

// Reason says why WalkUDP reports a socket.
type Reason uint8

// The reasons.
const (
	BackendGone Reason = Reason(bpfUdpReasonUDP_BACKEND_GONE) // it is connected to a backend that has left
	BackendCame Reason = Reason(bpfUdpReasonUDP_BACKEND_CAME) // it is connected to a VIP that leads somewhere now
)

// UDPSocket is a connected UDP socket that must connect anew.
type UDPSocket struct {
	Cookie  uint64
	IPv6    bool // an AF_INET6 socket, whatever its addresses are
	Local   netip.AddrPort
	Remote  netip.AddrPort
	Ifindex uint32 // the device it is bound to, or 0
	// Ended says that the walk has ended the socket; where the kernel has no
	// bpf_sock_destroy (before Linux 6.5) it is left to the caller.
	Ended  bool
	Reason Reason
}

// WalkOrigins returns one Origin for each UDP socket that remembers anything, in
// all network namespaces.
func (d *Datapath) WalkOrigins() ([]Origin, error) {
	records, err := walk[bpfOriginRecord](d, bpfProgIterOrigins, bpfMapOrigins)
	if err != nil {
		return nil, fmt.Errorf("walk the storage of UDP sockets: %w", err)
	}
	out := make([]Origin, 0, len(records))
	for _, r := range records {
		o := Origin{Netns: r.Netns, Stale: r.Stale != 0}
		for _, id := range r.Services {
			if id != uint32(lb.NoService) {
				o.Services = append(o.Services, lb.ServiceID(id))
			}
		}
		out = append(out, o)
	}
	return out, nil
}

// WalkUDP finds, in the network namespace of the calling thread, the sockets that
// are connected to a backend that has gone, or to a VIP that SetAnswered named,
// and ends them where the kernel can.
func (d *Datapath) WalkUDP() ([]UDPSocket, error) {
	records, err := walk[bpfUdpRecord](d, bpfProgIterUdp, "")
	if err != nil {
		return nil, fmt.Errorf("walk UDP sockets: %w", err)
	}
	out := make([]UDPSocket, 0, len(records))
	for _, r := range records {
		out = append(out, UDPSocket{
			Cookie:  r.Cookie,
			IPv6:    r.Family == 10,
			Local:   netip.AddrPortFrom(decodeAddr(r.Local), networkPort(r.LocalPort)),
			Remote:  netip.AddrPortFrom(decodeAddr(r.Remote), networkPort(r.RemotePort)),
			Ifindex: r.Ifindex,
			Ended:   r.Destroyed != 0,
			Reason:  Reason(r.Reason),
		})
	}
	return out, nil
}

// iterator attaches an iterator, over a map unless that has no name. It goes on when
// its program is replaced.
func (d *Datapath) iterator(program, over string) (*link.Iter, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	prog := d.iterators[program]
	if prog == nil {
		return nil, errors.New("iterators are not available on this kernel")
	}
	return link.AttachIter(link.IterOptions{Program: prog, Map: d.maps[over]})
}

// walk runs an iterator and decodes the records it writes.
func walk[R any](d *Datapath, program, over string) ([]R, error) {
	it, err := d.iterator(program, over)
	if err != nil {
		return nil, err
	}
	defer it.Close()
	file, err := it.Open()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(file)
	if err != nil {
		return nil, err
	}
	var r R
	records := make([]R, len(data)/int(unsafe.Sizeof(r)))
	if err := binary.Read(bytes.NewReader(data), binary.NativeEndian, records); err != nil {
		return nil, err
	}
	return records, nil
}

// OverflowServices returns the services of sockets whose memory did not fit into
// their storage; such sockets may be in any namespace. Normally there are none.
func (d *Datapath) OverflowServices() ([]lb.ServiceID, error) {
	var ctl bpfControl
	if err := d.table(bpfMapControl).Lookup(uint32(0), &ctl); err != nil {
		return nil, fmt.Errorf("read control: %w", err)
	}
	if ctl.Overflowed == 0 {
		return nil, nil
	}
	var out []lb.ServiceID
	err := each(d.table(bpfMapOriginsOverflow), func(_ *bpfOverflowKey, e *bpfOriginEntry) {
		out = append(out, lb.ServiceID(e.ServiceId))
	})
	return out, err
}

// SetAnswered names the UDP frontends whose directly connected sockets the next
// walks shall end; none clears the list.
func (d *Datapath) SetAnswered(keys []lb.FrontendKey) error {
	m := d.table(bpfMapAnswered)
	var old []bpfFrontendKey
	if err := each(m, func(k *bpfFrontendKey, _ *uint8) { old = append(old, *k) }); err != nil {
		return err
	}
	for _, k := range old {
		if err := m.Delete(&k); err != nil {
			return fmt.Errorf("delete answered: %w", err)
		}
	}
	value := present
	for _, key := range keys {
		k := encodeFrontendKey(key)
		if err := m.Put(&k, &value); err != nil {
			return fmt.Errorf("update answered %v: %w", key, err)
		}
	}
	return nil
}
