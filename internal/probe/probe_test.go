// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package probe

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// TestMain stands in for the program, which a Child starts once more.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Command {
		os.Exit(Main(os.Args[2:], os.Stdout))
	}
	os.Exit(m.Run())
}

var target = Target{
	Frontend: netip.MustParseAddrPort("10.96.0.1:80"),
	Backends: []netip.AddrPort{
		netip.MustParseAddrPort("10.244.1.2:8080"), netip.MustParseAddrPort("10.244.1.3:8080"),
		netip.MustParseAddrPort("10.244.1.4:80"),
	},
}

var target6 = Target{
	Frontend: netip.MustParseAddrPort("[fd00:96::1]:80"),
	Backends: []netip.AddrPort{netip.MustParseAddrPort("[fd00:244::2]:8080")},
}

// Offsets in struct bpf_sock_addr.
const (
	userIP4  = 4
	userIP6  = 8
	userPort = 24
)

// attach puts a program on the cgroup that leads every connection of a family to an
// address, or refuses it when there is none.
func attach(t testing.TB, cgroup string, on ebpf.AttachType, to netip.AddrPort) {
	t.Helper()
	insns := asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}
	if to.IsValid() {
		insns = nil
		address, at := to.Addr().AsSlice(), int16(userIP6)
		if to.Addr().Is4() {
			at = userIP4
		}
		store := func(offset int16, value uint32) {
			insns = append(insns, asm.LoadImm(asm.R2, int64(value), asm.DWord), asm.StoreMem(asm.R1, offset, asm.R2, asm.Word))
		}
		for i := 0; i < len(address); i += 4 {
			store(at+int16(i), binary.NativeEndian.Uint32(address[i:]))
		}
		store(userPort, uint32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, to.Port()))))
		insns = append(insns, asm.Mov.Imm(asm.R0, 1), asm.Return())
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: on, License: "GPL", Instructions: insns,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = prog.Close() }()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: on, Program: prog})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
}

func TestConnectProvesWhereConnectionsLead(t *testing.T) {
	for _, tt := range []struct {
		name   string
		target Target
		to     netip.AddrPort // where a program leads connections
		refuse bool
		want   string // in the error, "" for none
	}{
		{name: "to a backend", target: target, to: target.Backends[0]},
		{name: "to another one", target: target, to: target.Backends[2]},
		{name: "to a backend, with IPv6", target: target6, to: target6.Backends[0]},
		{name: "nowhere else, at a port of a backend", target: target, want: "10.96.0.1:80 was not translated"},
		{name: "nowhere else", target: target6, want: "not translated: connect: connection refused"},
		{name: "to a stranger", target: target, to: netip.MustParseAddrPort("10.244.9.9:8080"),
			want: "was led to 10.244.9.9:8080, which is not a backend of it"},
		{name: "nowhere at all", target: target, refuse: true, want: "operation not permitted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cgroup := testutil.Cgroup(t)
			hook := ebpf.AttachCGroupInet4Connect
			if tt.target.Frontend.Addr().Is6() {
				hook = ebpf.AttachCGroupInet6Connect
			}
			if tt.to.IsValid() || tt.refuse {
				attach(t, cgroup.Path(), hook, tt.to)
			}
			p, err := New()
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			for who, err := range map[string]error{
				"ourselves": p.Connect(tt.target), "a child": Child(t.Context(), cgroup.Path(), tt.target),
			} {
				switch {
				case tt.want == "" && err != nil:
					t.Errorf("%s: %v", who, err)
				case tt.want != "" && (err == nil || errors.Is(err, ErrCannot) || !strings.Contains(err.Error(), tt.want)):
					t.Errorf("%s: error %v, want one with %q", who, err, tt.want)
				}
			}
			if left, _ := os.Stat(cgroup.Path() + "/" + childCgroup); left != nil {
				t.Error("the child's cgroup is left")
			}
		})
	}
}

func TestWhatCannotBeProbedIsNoFailure(t *testing.T) {
	testutil.RequireRoot(t)
	for name, err := range map[string]error{
		"no such cgroup": Child(t.Context(), t.TempDir()+"/missing", target),
		"no cgroup":      Child(t.Context(), t.TempDir(), target),
		"no backends":    Child(t.Context(), testutil.Cgroup(t).Path(), Target{Frontend: target.Frontend}),
	} {
		if !errors.Is(err, ErrCannot) {
			t.Errorf("%s: error %v, want %v", name, err, ErrCannot)
		}
	}
}

func BenchmarkConnect(b *testing.B) {
	cgroup := testutil.Cgroup(b)
	attach(b, cgroup.Path(), ebpf.AttachCGroupInet4Connect, target.Backends[0])
	p, err := New()
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	for b.Loop() {
		if err := p.Connect(target); err != nil {
			b.Fatal(err)
		}
	}
}
