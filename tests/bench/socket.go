// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ports of the server and, with the same numbers, of the Services' ClusterIPs.
const (
	port = 8080 // TCP and UDP: what comes is sent back
	// sinkPort is for datagrams that nobody reads. The kernel counts them.
	sinkPort = 8081
)

// ioTimeout bounds every call that waits for the other side.
var ioTimeout = unix.Timeval{Sec: 2}

// sockaddr is an IPv4 address as the kernel takes it.
type sockaddr = unix.RawSockaddrInet4

func sockaddrOf(to netip.AddrPort) sockaddr {
	return sockaddr{Family: unix.AF_INET, Port: to.Port()>>8 | to.Port()<<8, Addr: to.Addr().As4()}
}

func addrOf(sa *sockaddr) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), sa.Port>>8|sa.Port<<8)
}

// The calls below are raw: the Go scheduler does not hear of them, so it cannot
// hand the thread's place to another one in the middle of a measurement. The
// children that use them have one goroutine for each place.

func socket(kind int) (fd int, err error) {
	r, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, uintptr(kind|unix.SOCK_CLOEXEC), 0)
	if errno != 0 {
		return -1, os.NewSyscallError("socket", errno)
	}
	return int(r), nil
}

// tcpSocket returns a TCP socket that is reset when it is closed, so that it
// leaves no port in TIME_WAIT behind.
func tcpSocket() (fd int, err error) {
	if fd, err = socket(unix.SOCK_STREAM); err != nil {
		return -1, err
	}
	err = os.NewSyscallError("set SO_LINGER", unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	if err == nil {
		err = limitWaiting(fd)
	}
	if err != nil {
		closeSocket(fd)
		return -1, err
	}
	return fd, nil
}

// limitWaiting makes connecting and receiving fail after ioTimeout.
func limitWaiting(fd int) error {
	return errors.Join(
		os.NewSyscallError("set SO_SNDTIMEO", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &ioTimeout)),
		os.NewSyscallError("set SO_RCVTIMEO", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &ioTimeout)),
	)
}

func connect(fd int, to *sockaddr) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(to)), unix.SizeofSockaddrInet4)
	return errno
}

func accept(fd int) (int, unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
	return int(r), errno
}

func writeByte(fd int, b *byte) unix.Errno {
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(b)), 1)
	return oneByte(n, errno)
}

func readByte(fd int, b *byte) unix.Errno {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(b)), 1)
	return oneByte(n, errno)
}

func sendTo(fd int, b *byte, to *sockaddr) unix.Errno {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(b)), 1, 0,
		uintptr(unsafe.Pointer(to)), unix.SizeofSockaddrInet4)
	return oneByte(n, errno)
}

// recvFrom puts the sender into from; *size is scratch.
func recvFrom(fd int, b *byte, from *sockaddr, size *uint32) unix.Errno {
	*size = unix.SizeofSockaddrInet4
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(b)), 1, 0,
		uintptr(unsafe.Pointer(from)), uintptr(unsafe.Pointer(size)))
	return oneByte(n, errno)
}

func getpeername(fd int, peer *sockaddr, size *uint32) unix.Errno {
	*size = unix.SizeofSockaddrInet4
	_, _, errno := unix.RawSyscall(unix.SYS_GETPEERNAME, uintptr(fd), uintptr(unsafe.Pointer(peer)), uintptr(unsafe.Pointer(size)))
	return errno
}

// sendMessages returns how many of the messages were sent.
func sendMessages(fd int, messages []message) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), 0, 0, 0)
	return int(n), errno
}

func closeSocket(fd int) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	return errno
}

// oneByte makes the end of a connection an error.
func oneByte(n uintptr, errno unix.Errno) unix.Errno {
	if errno == 0 && n != 1 {
		return unix.ECONNRESET
	}
	return errno
}

// pin keeps the calling thread on one of the CPUs that this process may use, the
// same one in every process. A batch thread never interrupts another that
// runs there: it gets its turn when the other waits.
func pin(batch bool) error {
	var allowed, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return fmt.Errorf("read CPU affinity: %w", err)
	}
	last := -1
	for cpu, left := 0, allowed.Count(); left > 0; cpu++ {
		if allowed.IsSet(cpu) {
			last = cpu
			left--
		}
	}
	one.Set(last)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", last, err)
	}
	if !batch {
		return nil
	}
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		return fmt.Errorf("set scheduling policy: %w", err)
	}
	return nil
}

// alone runs f on the CPU that pin chooses, where nobody else runs in that time. The
// calling goroutine must be locked to its thread.
func alone(f func() error) error {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return fmt.Errorf("read CPU affinity: %w", err)
	}
	if err := pin(false); err != nil {
		return err
	}
	err := firstInLine(f)
	return errors.Join(err, os.NewSyscallError("restore CPU affinity", unix.SchedSetaffinity(0, &allowed)))
}

// firstInLine runs f with a priority above that of all ordinary threads.
func firstInLine(f func() error) error {
	fifo := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}
	if err := unix.SchedSetAttr(0, &fifo, 0); err != nil {
		return fmt.Errorf("set scheduling policy: %w", err)
	}
	err := f()
	normal := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
	return errors.Join(err, os.NewSyscallError("restore scheduling policy", unix.SchedSetAttr(0, &normal, 0)))
}
