// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// machine says where figures come from.
type machine struct {
	Kernel    string
	CPU       string
	CPUs      int
	Go        string
	Libraries map[string]string // version by module
}

// thisMachine leaves empty what the machine does not tell.
func thisMachine() machine {
	m := machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), Libraries: map[string]string{}}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(cpuinfo)) {
		if name, found := strings.CutPrefix(line, "model name"); found {
			m.CPU = strings.Trim(name, "\t :\n")
			break
		}
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == "github.com/cilium/ebpf" {
				m.Libraries[dep.Path] = dep.Version
			}
		}
	}
	return m
}

// String returns the machine and the versions in one line.
func (m machine) String() string {
	s := fmt.Sprintf("Linux %s, %d CPUs (%s), %s", m.Kernel, m.CPUs, m.CPU, m.Go)
	for path, version := range m.Libraries {
		s += ", " + path + " " + version
	}
	return s
}
