// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package vm runs the tests that meet the kernel on old kernels: it boots
// Debian's 6.1 and 6.12 in QEMU with the test binaries of some packages in the
// initramfs, and reports what they said as its own subtests.
//
// The machines have no disk and no way out: two network devices of theirs are
// wired to each other, for tests that need ones which leave checksums to the
// kernel. No root is needed to run them. scripts/vm-kernels.sh fetches the kernels. KVM is used where it can run
// them, emulation otherwise. With -v the guests' output is shown as it comes.
package vm
