// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package guest proves that a test machine is what the other tests believe it
// to be, inside the machines of tests/vm only; and there and elsewhere that a kernel
// is what docs/kernels.md says of it.
package guest

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// series returns the kernel the machine was asked to be, like "6.1", and skips
// the test outside a machine.
func series(t *testing.T) string {
	s := os.Getenv("FAIRLEAD_VM_KERNEL")
	if s == "" {
		t.Skip("runs in the virtual machines of tests/vm only")
	}
	return s
}

func TestKernelIsTheOneAskedFor(t *testing.T) {
	want := series(t)
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(name.Release[:])
	t.Logf("Linux %s", release)
	if !strings.HasPrefix(release, want+".") {
		t.Errorf("kernel release is %s, want %s.*", release, want)
	}
}

func TestKernelHasTypeInformation(t *testing.T) {
	series(t)
	if _, err := btf.LoadKernelSpec(); err != nil {
		t.Error(err)
	}
}

// TestProgramCanBePinnedAndAttached needs the file systems at their usual
// places: bpffs at /sys/fs/bpf and cgroup2 at /sys/fs/cgroup.
func TestProgramCanBePinnedAndAttached(t *testing.T) {
	series(t)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.CGroupSockAddr,
		AttachType:   ebpf.AttachCGroupInet4Connect,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()

	cgroup := filepath.Join("/sys/fs/cgroup", t.Name())
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(cgroup)
	hook, err := link.AttachCgroup(link.CgroupOptions{
		Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: program,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer hook.Close()
	if err := hook.Pin(filepath.Join("/sys/fs/bpf", t.Name())); err != nil {
		t.Fatal(err)
	}
	if err := hook.Unpin(); err != nil {
		t.Error(err)
	}
}

func TestNetworkDevicesAreLoopbackAndAWire(t *testing.T) {
	series(t)
	devices, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range devices {
		if d.Flags&net.FlagUp != 0 && d.Flags&net.FlagLoopback == 0 {
			t.Errorf("device %s is up", d.Name)
		}
		names = append(names, d.Name+" "+d.HardwareAddr.String())
	}
	if want := []string{"lo ", "eth0 02:00:00:00:00:01", "eth1 02:00:00:00:00:02"}; !slices.Equal(names, want) {
		t.Errorf("devices are %q, want %q", names, want)
	}
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			continue
		}
		l.Close()
	}
}
