// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// backlog holds the connections of many blocks: while a client connects and
// does not wait, the server does not run.
const backlog = 4096

// serve is the server's process. It sends back each byte that comes on a TCP
// connection, of which it serves one at a time, and each datagram, but for those
// to the sink. It writes a byte to out when it listens and ends when in does.
func serve(in io.Reader, out io.Writer) error {
	addrs := podAddrs()
	// Every thread sits in a raw call most of the time and keeps its place.
	runtime.GOMAXPROCS(len(addrs) + 3)
	listener, err := listenTCP()
	if err != nil {
		return err
	}
	failed := make(chan error)
	start := func(f func(fd int) error, fd int) {
		go func() {
			runtime.LockOSThread()
			if err := pin(true); err != nil {
				failed <- err
				return
			}
			failed <- f(fd)
		}()
	}
	start(echoConnections, listener)
	// The answer must come from the address that was asked.
	for _, addr := range addrs {
		fd, err := listenUDP(netip.AddrPortFrom(addr, port))
		if err != nil {
			return err
		}
		start(echoDatagrams, fd)
	}
	if err := openSink(); err != nil {
		return err
	}
	if _, err := out.Write([]byte{1}); err != nil {
		return err
	}
	go func() {
		_, err := io.Copy(io.Discard, in)
		failed <- err
	}()
	return <-failed
}

func listenTCP() (fd int, err error) {
	if fd, err = socket(unix.SOCK_STREAM); err != nil {
		return -1, err
	}
	err = errors.Join(
		os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: netip.IPv4Unspecified().As4()})),
		os.NewSyscallError("listen", unix.Listen(fd, backlog)),
	)
	return fd, err
}

func listenUDP(at netip.AddrPort) (fd int, err error) {
	if fd, err = socket(unix.SOCK_DGRAM); err != nil {
		return -1, err
	}
	return fd, os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}))
}

// openSink makes the socket that takes floods. It has room for next to nothing, so
// what arrives is counted (UdpRcvbufErrors) and forgotten: the cost of reading it
// would be the same for everybody, and the largest part of all.
func openSink() error {
	fd, err := listenUDP(netip.AddrPortFrom(netip.IPv4Unspecified(), sinkPort))
	if err != nil {
		return err
	}
	return os.NewSyscallError("set SO_RCVBUF", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0))
}

func echoConnections(listener int) error {
	var b byte
	for {
		fd, errno := accept(listener)
		if errno != 0 {
			return fmt.Errorf("accept: %w", errno)
		}
		// Clients end connections with a reset.
		for readByte(fd, &b) == 0 && writeByte(fd, &b) == 0 {
		}
		closeSocket(fd)
	}
}

func echoDatagrams(fd int) error {
	var b byte
	var from sockaddr
	var size uint32
	for {
		if errno := recvFrom(fd, &b, &from, &size); errno != 0 {
			return fmt.Errorf("receive datagram: %w", errno)
		}
		if errno := sendTo(fd, &b, &from); errno != 0 {
			return fmt.Errorf("send datagram: %w", errno)
		}
	}
}
