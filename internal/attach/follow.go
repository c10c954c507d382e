// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// restart is the pause before a socket that failed is replaced.
	restart = 50 * time.Millisecond
	// relistInterval is how long a change can stay unseen of which the kernel
	// told nobody.
	relistInterval = 30 * time.Second
	// listAttempts bounds how often a list is asked for again because
	// something changed while the kernel wrote it.
	listAttempts = 10
	// listShare is how many times as long as a list takes no other one is begun:
	// where lists are long and changes many, this bounds what both cost.
	listShare = 9
)

// follower calls list, and report after it, at the start and after each change
// that the kernel tells of on the sockets of subscribe.
type follower struct {
	what      string // that is followed, for errors
	subscribe func() (*nl.NetlinkSocket, error)
	settle    time.Duration // how long changes are gathered after the first of a burst
	relist    time.Duration // how long to wait for a change
	list      func() error
	report    func()
}

// run follows until ctx ends and then returns nil. An error is one of subscribe or
// of list.
func (f *follower) run(ctx context.Context) error {
	for ctx.Err() == nil {
		// Subscribe first, then list: what changes in between is in the list, in
		// the socket or in both.
		socket, err := f.subscribe()
		if err != nil {
			return fmt.Errorf("subscribe to %s: %w", f.what, err)
		}
		if err := f.follow(ctx, socket); err != nil {
			return err
		}
		pause(ctx, restart)
	}
	return nil
}

// follow lists at once, and again after every change, until the socket fails or
// ctx ends, and closes the socket. Only a failed list is an error.
func (f *follower) follow(ctx context.Context, socket *nl.NetlinkSocket) error {
	defer socket.Close()
	defer context.AfterFunc(ctx, socket.Close)()
	for {
		begin := time.Now()
		if err := f.list(); err != nil {
			return err
		}
		rest := min(listShare*time.Since(begin), f.relist)
		f.report()
		// An overrun (ENOBUFS) ends the socket too, although it could be read
		// on: until its queue is empty the kernel drops messages without
		// another error, so a list taken before that could miss a change.
		if err := f.wait(socket, rest); err != nil {
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// wait returns nil when something has changed and settled, or when it is time
// to list anyway, and an error when the socket is of no more use. It does not
// return before rest is over, but for an error.
func (f *follower) wait(socket *nl.NetlinkSocket, rest time.Duration) error {
	begin := time.Now()
	changed, err := receive(socket, f.relist)
	if err != nil || !changed {
		return err
	}
	left := max(f.settle, rest-time.Since(begin))
	for end := time.Now().Add(left); left > 0; left = time.Until(end) {
		if _, err := receive(socket, left); err != nil {
			return err
		}
	}
	return nil
}

// receive tells whether a message arrived before the timeout. What it says does
// not matter: the list has it.
func receive(socket *nl.NetlinkSocket, timeout time.Duration) (bool, error) {
	// Zero would be no timeout.
	limit := unix.NsecToTimeval(max(timeout, time.Millisecond).Nanoseconds())
	if err := socket.SetReceiveTimeout(&limit); err != nil {
		return false, err
	}
	_, _, err := socket.Receive()
	if errors.Is(err, unix.EAGAIN) {
		return false, nil
	}
	return err == nil, err
}

// whole calls list until it has not been interrupted by a change, several times
// at most.
func whole(list func() error) error {
	err := list()
	for attempt := 1; errors.Is(err, netlink.ErrDumpInterrupted) && attempt < listAttempts; attempt++ {
		err = list()
	}
	return err
}

// pause waits, but not beyond the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
