// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"runtime/debug"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// warmup is how many times a block's operation is done before the clock counts:
// the client comes from another block, the processor's caches from elsewhere.
const warmup = 8

// workload names what a block does over and over.
type workload string

const (
	// tcpConnect times connect() alone: from the SYN to the established socket.
	tcpConnect workload = "TCP connect"
	// tcpRequest times connect(), one byte to the server, close().
	tcpRequest workload = "TCP connect, byte, close"
	// tcpRoundTrip times a byte there and back on a connection that is open.
	tcpRoundTrip workload = "TCP byte there and back"
	// udpRoundTrip times a byte there and back with sendto() and recvfrom() on
	// a socket that is not connected.
	udpRoundTrip workload = "UDP sendto, recvfrom"
	// tcpPeer times getpeername() on a new connection.
	tcpPeer workload = "TCP getpeername"
	// flood sends datagrams as fast as it can and waits for no answer.
	flood workload = "UDP packets"
)

// order asks the client for one block.
type order struct {
	Workload workload
	Targets  int           // index into the target lists
	Count    int           // operations; none of a flood
	Time     time.Duration // of a flood
}

// result is the client's answer.
type result struct {
	Nanoseconds []int64 // of each operation
	// Took is what the whole block took, until the server had nothing left to do.
	Took time.Duration
	Err  string
}

// client is the process that is measured. It has one thread and allocates
// nothing while the clock runs.
type client struct {
	lists   [][]sockaddr
	next    []int // position in each list; blocks go on where the last one ended
	samples []int64
	epoch   time.Time
	buf     byte
	from    sockaddr
	size    uint32
}

// beClient is the client's process: it reads its target lists and then orders
// until in ends, and writes a result for each.
func beClient(in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1) // what a run allocates fits into memory many times
	if err := pin(false); err != nil {
		return err
	}
	orders, results := gob.NewDecoder(in), gob.NewEncoder(out)
	var l [][]netip.AddrPort
	if err := orders.Decode(&l); err != nil {
		return fmt.Errorf("read target lists: %w", err)
	}
	c := newClient(l)
	for {
		var o order
		if err := orders.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read order: %w", err)
		}
		var r result
		start := c.now()
		if err := c.block(o); err != nil {
			r.Err = err.Error()
		} else {
			r.Took = time.Duration(c.now() - start)
			r.Nanoseconds = c.samples[min(warmup, len(c.samples)):]
		}
		if err := results.Encode(r); err != nil {
			return fmt.Errorf("write result: %w", err)
		}
	}
}

func newClient(l [][]netip.AddrPort) *client {
	c := &client{epoch: time.Now(), next: make([]int, len(l))}
	for _, list := range l {
		targets := make([]sockaddr, len(list))
		for i, addr := range list {
			targets[i] = sockaddrOf(addr)
		}
		c.lists = append(c.lists, targets)
	}
	return c
}

// block does what o asks, warm-up included, and leaves the times in c.samples.
func (c *client) block(o order) error {
	if o.Workload == flood {
		c.samples = c.samples[:0]
		return firstInLine(func() error { return c.flood(o.Targets, int64(o.Time)) })
	}
	n := warmup + o.Count
	if cap(c.samples) < n {
		c.samples = make([]int64, n)
	}
	c.samples = c.samples[:n]
	var err error
	switch o.Workload {
	case tcpConnect:
		err = c.connects(o.Targets, false)
	case tcpRequest:
		err = c.requests(o.Targets)
	case tcpPeer:
		err = c.connects(o.Targets, true)
	case tcpRoundTrip:
		err = c.tcpRoundTrips(c.target(o.Targets), c.samples)
	case udpRoundTrip:
		err = c.udpRoundTrips(c.target(o.Targets))
	}
	if err == nil && o.Workload != udpRoundTrip {
		// The server serves connections in turn: once it answers on a new one
		// none of the old ones is left.
		err = c.tcpRoundTrips(c.target(o.Targets), []int64{0})
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.Workload, err)
	}
	return nil
}

// target returns the next target of a list.
func (c *client) target(list int) *sockaddr {
	targets := c.lists[list]
	i := c.next[list]
	if i++; i == len(targets) {
		i = 0
	}
	c.next[list] = i
	return &targets[i]
}

// now is a time on the monotonic clock. It reads only that one, through the
// vDSO.
func (c *client) now() int64 { return int64(time.Since(c.epoch)) }

// connects times connect() or, on what it has connected, getpeername().
func (c *client) connects(list int, peer bool) error {
	for i := range c.samples {
		to := c.target(list)
		fd, err := tcpSocket()
		if err != nil {
			return err
		}
		start := c.now()
		errno := connect(fd, to)
		end := c.now()
		if errno != 0 {
			return fmt.Errorf("connect to %s: %w", addrOf(to), errno)
		}
		if peer {
			start = c.now()
			errno = getpeername(fd, &c.from, &c.size)
			end = c.now()
			if errno != 0 || c.from != *to {
				return fmt.Errorf("getpeername of a connection to %s says %s (error %d)", addrOf(to), addrOf(&c.from), errno)
			}
		}
		closeSocket(fd)
		c.samples[i] = end - start
	}
	return nil
}

func (c *client) requests(list int) error {
	for i := range c.samples {
		to := c.target(list)
		fd, err := tcpSocket()
		if err != nil {
			return err
		}
		start := c.now()
		errno := connect(fd, to)
		if errno == 0 {
			errno = writeByte(fd, &c.buf)
		}
		closeSocket(fd)
		end := c.now()
		if errno != 0 {
			return fmt.Errorf("request to %s: %w", addrOf(to), errno)
		}
		c.samples[i] = end - start
	}
	return nil
}

func (c *client) tcpRoundTrips(to *sockaddr, samples []int64) error {
	fd, err := tcpSocket()
	if err != nil {
		return err
	}
	defer closeSocket(fd)
	if errno := connect(fd, to); errno != 0 {
		return fmt.Errorf("connect to %s: %w", addrOf(to), errno)
	}
	for i := range samples {
		start := c.now()
		errno := writeByte(fd, &c.buf)
		if errno == 0 {
			errno = readByte(fd, &c.buf)
		}
		end := c.now()
		if errno != 0 {
			return fmt.Errorf("round trip to %s: %w", addrOf(to), errno)
		}
		samples[i] = end - start
	}
	return nil
}

func (c *client) udpRoundTrips(to *sockaddr) error {
	fd, err := socket(unix.SOCK_DGRAM)
	if err != nil {
		return err
	}
	defer closeSocket(fd)
	if err := limitWaiting(fd); err != nil {
		return err
	}
	for i := range c.samples {
		start := c.now()
		errno := sendTo(fd, &c.buf, to)
		if errno == 0 {
			errno = recvFrom(fd, &c.buf, &c.from, &c.size)
		}
		end := c.now()
		if errno != 0 {
			return fmt.Errorf("round trip to %s: %w", addrOf(to), errno)
		}
		if c.from != *to {
			return fmt.Errorf("sent to %s, answered by %s", addrOf(to), addrOf(&c.from))
		}
		c.samples[i] = end - start
	}
	return nil
}

// message is struct mmsghdr.
type message struct {
	header unix.Msghdr
	_      [8]byte // how much was sent
}

// flood sends datagrams to all of a list in turn until time is over. On devices that
// hand a packet on at once, as veth does, each has arrived, or is lost, when it returns.
func (c *client) flood(list int, nanoseconds int64) error {
	fd, err := socket(unix.SOCK_DGRAM)
	if err != nil {
		return err
	}
	defer closeSocket(fd)
	var payload [22]byte
	messages := make([]message, len(c.lists[list]))
	for i := range messages {
		h := &messages[i].header
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&c.lists[list][i])), unix.SizeofSockaddrInet4
		h.Iov, h.Iovlen = &unix.Iovec{Base: &payload[0], Len: uint64(len(payload))}, 1
	}
	for end := c.now() + nanoseconds; c.now() < end; {
		n, errno := sendMessages(fd, messages)
		if errno != 0 || n != len(messages) {
			return fmt.Errorf("%d of %d datagrams were sent: %w", n, len(messages), errno)
		}
	}
	return nil
}
