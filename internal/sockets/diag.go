// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// sockDestroy is the message type SOCK_DESTROY of linux/sock_diag.h (Linux 4.5,
// CONFIG_INET_DIAG_DESTROY).
const sockDestroy = 21

// diagRequest is struct inet_diag_req_v2 of linux/inet_diag.h for one socket.
// The cookie makes sure that no other socket with the same addresses is hit.
type diagRequest struct{ datapath.UDPSocket }

// Len returns the size of the message in bytes.
func (r diagRequest) Len() int { return 56 }

// Serialize returns the message, addresses and ports in network order.
func (r diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0] = unix.AF_INET
	if r.IPv6 {
		b[0] = unix.AF_INET6
	}
	b[1] = unix.IPPROTO_UDP
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // any state
	binary.BigEndian.PutUint16(b[8:], r.Local.Port())
	binary.BigEndian.PutUint16(b[10:], r.Remote.Port())
	r.putAddr(b[12:28], r.Local.Addr())
	r.putAddr(b[28:44], r.Remote.Addr())
	binary.NativeEndian.PutUint32(b[44:], r.Ifindex)
	binary.NativeEndian.PutUint32(b[48:], uint32(r.Cookie))
	binary.NativeEndian.PutUint32(b[52:], uint32(r.Cookie>>32))
	return b
}

// putAddr writes an address as the socket's family has it: an IPv4 address of an
// AF_INET6 socket is ::ffff:a.b.c.d, the unspecified one stays all zero.
func (r diagRequest) putAddr(b []byte, a netip.Addr) {
	if !r.IPv6 {
		v4 := a.As4()
		copy(b, v4[:])
		return
	}
	v6 := a.As16()
	copy(b, v6[:])
}

// destroy ends one socket of the calling thread's network namespace through
// sock_diag. The error wraps ENOENT when it is not there any more.
func destroy(s datapath.UDPSocket) error {
	req := nl.NewNetlinkRequest(sockDestroy, unix.NLM_F_ACK)
	req.AddData(diagRequest{s})
	_, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("end UDP socket %v → %v: %w (the kernel needs CONFIG_INET_DIAG_DESTROY, or bpf_sock_destroy of Linux 6.5)",
			s.Local, s.Remote, err)
	default:
		return fmt.Errorf("end UDP socket %v → %v: %w", s.Local, s.Remote, err)
	}
}
