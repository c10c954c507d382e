// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package privileges

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// state is what a thread may do and may come to do.
type state struct {
	effective, permitted, inheritable, bounding, ambient set
	noNewPrivs                                           bool
}

// Drop makes the process give up every capability that the agent does not need,
// in all sets and all threads, and the means to ever get one back. It returns nil
// when that is so. Otherwise it does not return, but executes the program again
// with the same arguments: capabilities belong to threads, and of all threads only
// the one that executes lives on. What the process has not got is no error.
//
// It is to be called before anything is opened that must not be lost.
func Drop() error {
	// Not unlocked before the state is known to be that of all threads.
	runtime.LockOSThread()
	s, err := read()
	if err != nil {
		return err
	}
	if s.reduced() {
		runtime.UnlockOSThread()
		return nil
	}
	if err := s.reduce(); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return again()
}

// reduced tells whether there is nothing left to give up. A bounding set that may
// not be changed, for want of CAP_SETPCAP, gives nothing to a process that cannot
// get new privileges.
func (s state) reduced() bool {
	rest := s.effective | s.permitted | s.inheritable | s.ambient
	if s.permitted.has(unix.CAP_SETPCAP) {
		rest |= s.bounding
	}
	return rest&^kept() == 0 && s.noNewPrivs
}

// reduce makes the calling thread one that executes a program with no more than
// what is kept.
func (s state) reduce() error {
	for number := range 64 {
		if s.bounding.has(number) && !kept().has(number) && s.permitted.has(unix.CAP_SETPCAP) {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(number), 0, 0, 0); err != nil {
				return fmt.Errorf("capability %d: %w", number, err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient capabilities: %w", err)
	}
	keep := s.permitted & kept()
	var inheritable set
	if os.Geteuid() != 0 { // root gets what is in the bounding set, others what is ambient
		inheritable = keep
	}
	if err := write(keep, inheritable); err != nil {
		return err
	}
	for number := range 64 {
		if !inheritable.has(number) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(number), 0, 0); err != nil {
			return fmt.Errorf("ambient capability %d: %w", number, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

// again executes the program again. It returns only when that fails.
func again() error {
	// By its own name, since the name is what tools show of the process.
	path, err := os.Executable()
	if err == nil {
		err = unix.Exec(path, os.Args, os.Environ())
	}
	if errors.Is(err, os.ErrNotExist) { // it has been removed meanwhile
		err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
	}
	return fmt.Errorf("execute %s again without the capabilities it does not need: %w", path, err)
}

// read returns the state of the calling thread.
func read() (state, error) {
	var s state
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // the low and the high half
	if err := unix.Capget(&header, &data[0]); err != nil {
		return s, fmt.Errorf("read capabilities: %w", err)
	}
	s.effective = join(data[0].Effective, data[1].Effective)
	s.permitted = join(data[0].Permitted, data[1].Permitted)
	s.inheritable = join(data[0].Inheritable, data[1].Inheritable)
	for number := range 64 {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(number), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // the kernel has no more
		}
		if err != nil {
			return s, fmt.Errorf("read bounding capabilities: %w", err)
		}
		s.bounding |= set(in) << number
		if in, err = unix.PrctlRetInt(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_IS_SET, uintptr(number), 0, 0); err != nil {
			return s, fmt.Errorf("read ambient capabilities: %w", err)
		}
		s.ambient |= set(in) << number
	}
	in, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil {
		return s, fmt.Errorf("read no_new_privs: %w", err)
	}
	s.noNewPrivs = in == 1
	return s, nil
}

func join(low, high uint32) set { return set(high)<<32 | set(low) }

// write sets the calling thread's capabilities.
func write(permitted, inheritable set) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(permitted), Permitted: uint32(permitted), Inheritable: uint32(inheritable)},
		{Effective: uint32(permitted >> 32), Permitted: uint32(permitted >> 32), Inheritable: uint32(inheritable >> 32)},
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return nil
}
