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

// Where namespaces can be found: at the processes of the node, whose /proc it
// must be (hostPID), and bound to files, where no process has to be in them. In
// a container these files are in the mount namespace of PID 1.
var everywhere = []string{
	"/proc/[0-9]*/ns/net",
	"/proc/1/root/run/netns/*", "/proc/1/root/run/docker/netns/*",
	"/run/netns/*", "/run/docker/netns/*",
}

// threads are looked at only for a namespace that is nowhere else: there are
// many of them, and most are where their process is.
var threads = []string{"/proc/[0-9]*/task/*/ns/net"}

// namespaces finds network namespaces: the paths that lead to each inode.
// Processes come and go, so one path may be dead when it is used.
func namespaces(patterns []string) map[uint32][]string {
	out := map[uint32][]string{}
	device, ok := namespaceDevice()
	if !ok {
		return out
	}
	for _, pattern := range patterns {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			continue // only a bad pattern fails
		}
		for _, path := range paths {
			var st unix.Stat_t
			if unix.Stat(path, &st) == nil && st.Dev == device {
				out[uint32(st.Ino)] = append(out[uint32(st.Ino)], path)
			}
		}
	}
	return out
}

// namespaceDevice returns the device of all namespaces. A file that a namespace
// is to be bound to, or was until a moment ago, is on another one, and its inode
// means something else.
func namespaceDevice() (device uint64, ok bool) {
	var st unix.Stat_t
	err := unix.Stat("/proc/self/ns/net", &st)
	return st.Dev, err == nil
}

// errGone says that a namespace ended before it could be entered, and its
// sockets with it.
var errGone = errors.New("network namespace is gone")

// open opens a path that leads to the network namespace with this inode. The
// error is errGone when none does any more.
func open(paths []string, inode uint32) (*os.File, error) {
	for _, path := range paths {
		file, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open network namespace: %w", err)
		}
		var st unix.Stat_t
		err = unix.Fstat(int(file.Fd()), &st)
		if device, ok := namespaceDevice(); err == nil && ok && st.Dev == device && uint32(st.Ino) == inode {
			return file, nil
		}
		_ = file.Close() // a process ID or a name that has been used again
	}
	return nil, errGone
}

// within runs f on a thread of its own in the network namespace, which it closes
// when f has returned.
func within(namespace *os.File, f func() error) error {
	defer namespace.Close()
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with this goroutine instead of coming
		// back to others in a strange namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", namespace.Name(), err)
			return
		}
		done <- f()
	}()
	return <-done
}
