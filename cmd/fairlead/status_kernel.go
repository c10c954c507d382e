// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// kernelStatus is what this kernel offers of what matters here and may be
// missing. What must be there the agent finds out itself when it starts.
type kernelStatus struct {
	Release string `json:"release"`
	// BTF describes the kernel's types; without it stale UDP sockets cannot be
	// found.
	BTF bool `json:"btf"`
	// SockDestroy is the function bpf_sock_destroy (Linux 6.5); sock_diag stands
	// in for it.
	SockDestroy bool `json:"bpfSockDestroy"`
}

func readKernel() kernelStatus {
	var k kernelStatus
	var name unix.Utsname
	// Fails only for a bad pointer.
	_ = unix.Uname(&name)
	k.Release = unix.ByteSliceToString(name.Release[:])
	if spec, err := btf.LoadKernelSpec(); err == nil {
		var f *btf.Func
		k.BTF, k.SockDestroy = true, spec.TypeByName("bpf_sock_destroy", &f) == nil
	}
	return k
}

func (k kernelStatus) endsSockets() string {
	switch {
	case !k.BTF:
		return "cannot be found (the kernel has no BTF); clients must connect anew by themselves"
	case !k.SockDestroy:
		return "ended with sock_diag (no bpf_sock_destroy in this kernel)"
	default:
		return "ended with bpf_sock_destroy"
	}
}
