// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// L3Link connects two namespaces by a pair of links without an Ethernet header.
type L3Link struct {
	ends    [2]*os.File
	relayed sync.WaitGroup
}

// ConnectL3 makes tun devices with the given names in two namespaces; what one
// of them sends the other one receives. The links are down and have no address.
// The caller must close the result, which removes them.
func ConnectL3(a *Namespace, linkA string, b *Namespace, linkB string) (*L3Link, error) {
	first, err := a.openTun(linkA)
	if err != nil {
		return nil, err
	}
	second, err := b.openTun(linkB)
	if err != nil {
		return nil, errors.Join(err, first.Close())
	}
	l := &L3Link{ends: [2]*os.File{first, second}}
	l.relayed.Go(func() { relay(first, second) })
	l.relayed.Go(func() { relay(second, first) })
	return l, nil
}

// Close removes both links and waits until nothing is relayed any more.
func (l *L3Link) Close() error {
	err := errors.Join(l.ends[0].Close(), l.ends[1].Close())
	l.relayed.Wait()
	return err
}

// openTun makes a tun device, which lasts until the file is closed. Each read of
// the file gives a packet and each write takes one.
func (ns *Namespace) openTun(link string) (*os.File, error) {
	var fd int
	err := ns.Do(func() (err error) {
		fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make tun device %s in %s: %w", link, ns.name, err)
	}
	request, err := unix.NewIfreq(link)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err == nil {
		err = unix.SetNonblock(fd, true) // or Close would wait for a read
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("make tun device %s in %s: %w", link, ns.name, err)
	}
	return os.NewFile(uintptr(fd), link), nil
}

// relay copies packets until from is closed or its namespace is gone. A packet that
// the other end does not take, being down, is lost like one on a wire.
func relay(from io.Reader, to io.Writer) {
	packet := make([]byte, 64<<10)
	for {
		n, err := from.Read(packet)
		if err != nil {
			return
		}
		_, _ = to.Write(packet[:n])
	}
}
