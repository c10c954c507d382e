// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Where namespaces are bound that no process may be in, beside /proc.
var boundNamespaces = []string{"/run/netns/*", "/var/run/netns/*", "/run/docker/netns/*"}

// namespaces finds the network namespaces of the node: a path for each inode.
// Those of processes come from /proc, which must be the node's (hostPID).
func namespaces() map[uint32]string {
	out := map[uint32]string{}
	for _, pattern := range append([]string{"/proc/[0-9]*/ns/net"}, boundNamespaces...) {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			continue // only a bad pattern fails
		}
		for _, path := range paths {
			var st unix.Stat_t
			// Processes come and go while we look.
			if unix.Stat(path, &st) == nil {
				if _, known := out[uint32(st.Ino)]; !known {
					out[uint32(st.Ino)] = path
				}
			}
		}
	}
	return out
}

// errGone says that a namespace ended before it could be entered, and its
// sockets with it.
var errGone = errors.New("network namespace is gone")

// within runs f on a thread that is in the network namespace with this inode.
// The error is errGone when path leads there no more.
func within(path string, inode uint32, f func() error) error {
	file, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return errGone
		}
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	if uint32(st.Ino) != inode {
		return errGone // the process ID has been used again
	}
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with this goroutine instead of coming
		// back to others in a strange namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", path, err)
			return
		}
		done <- f()
	}()
	return <-done
}
