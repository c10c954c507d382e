// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/docs"
	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// functions try what the rows of the same name in docs/kernels.md say. They fail
// the test only where the outcome says neither yes nor no.
var functions = map[string]func(*ground, *testing.T) bool{
	"connections fail with the error that says why (`bpf_set_retval`)":                      (*ground).choosesErrors,
	"UDP sockets whose backend has gone are found":                                          (*ground).findsSockets,
	"the packet tells whether its checksum is complete (`bpf_cast_to_kern_ctx`)":            (*ground).readsChecksumState,
	"the program that finds UDP sockets ends them (`bpf_sock_destroy`)":                     (*ground).endsSockets,
	"programs are on devices by tcx links, before all clsact filters":                       (*ground).attachesByTCX,
	"SNAT takes the preferred source of the route to the backend":                           (*ground).findsPreferredSource,
	"checksums of IPv6 packets that a network card has summed up stay right (`BPF_F_IPV6`)": (*ground).knowsIPv6Checksums,
}

// TestFunctionsAreThereFromTheVersionNamedOn keeps docs/kernels.md true.
func TestFunctionsAreThereFromTheVersionNamedOn(t *testing.T) {
	rows := readFunctions(t, docs.Kernels)
	code, err := features.LinuxVersionCode()
	if err != nil {
		t.Fatal(err)
	}
	running := version{int(code >> 16), int(code >> 8 & 0xff), int(code & 0xff)}
	t.Logf("Linux %v", running)
	g := newGround(t)
	for _, name := range slices.Sorted(maps.Keys(functions)) {
		t.Run(name, func(t *testing.T) {
			since, ok := rows[name]
			if !ok {
				t.Fatal("docs/kernels.md has no row for it")
			}
			works, want := functions[name](g, t), running.has(since)
			if works != want {
				t.Errorf("on Linux %v: works %t, but docs/kernels.md says since %v", running, works, since)
			}
		})
		delete(rows, name)
	}
	for name := range rows {
		t.Errorf("docs/kernels.md: no test tries %q", name)
	}
}

// version is that of a kernel. The last number is 0 for a release.
type version [3]int

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// has tells whether a kernel has what came with one of some versions: the first is
// a release, the others are stable kernels that got it later.
func (v version) has(since []version) bool {
	for _, stable := range since[1:] {
		if v[0] == stable[0] && v[1] == stable[1] {
			return v[2] >= stable[2]
		}
	}
	return slices.Compare(v[:], since[0][:]) >= 0
}

func TestStableKernelsHaveWhatTheyGotLater(t *testing.T) {
	since := []version{{6, 16, 0}, {6, 12, 40}}
	for v, want := range map[version]bool{
		{6, 16, 0}: true, {6, 18, 1}: true, {7, 0, 0}: true, {6, 12, 40}: true, {6, 12, 117}: true,
		{6, 15, 9}: false, {6, 12, 39}: false, {6, 1, 192}: false, {5, 18, 0}: false,
	} {
		if got := v.has(since); got != want {
			t.Errorf("%v: %t, want %t", v, got, want)
		}
	}
}

// readFunctions returns the versions of the rows of the first table of a document.
func readFunctions(t *testing.T, document string) map[string][]version {
	t.Helper()
	_, table, _ := strings.Cut(document, "|---|---|---|\n")
	rows := map[string][]version{}
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(line, "|\n"), " | ")
		if !strings.HasPrefix(line, "|") {
			break
		}
		if len(cells) != 3 {
			t.Fatalf("docs/kernels.md: want three cells: %s", line)
		}
		name := strings.TrimSpace(cells[0])
		for text := range strings.SplitSeq(cells[1], ", ") {
			var v version
			if n, err := fmt.Sscanf(text, "%d.%d.%d", &v[0], &v[1], &v[2]); n < 2 {
				t.Fatalf("docs/kernels.md: version %q: %v", text, err)
			}
			rows[name] = append(rows[name], v)
		}
	}
	if len(rows) == 0 {
		t.Fatal("docs/kernels.md has no table")
	}
	return rows
}

// ground is a node with a pod, a cgroup that the test is in, and the datapath as
// the agent loads it, with its hooks on the cgroup.
type ground struct {
	node     *sandbox.Node
	pod      *sandbox.Namespace
	root     string
	datapath *datapath.Datapath
	walked   []datapath.UDPSocket // what a walk has found, once it was asked for
}

var (
	podAddr = netip.MustParseAddr("10.244.0.2")
	vip     = netip.MustParseAddrPort("10.96.0.10:53")
	backend = netip.MustParseAddrPort("10.244.0.9:53") // nobody has it
	noVIP   = &unix.SockaddrInet4{Addr: [4]byte{10, 96, 0, 11}, Port: 80}
)

func newGround(t *testing.T) *ground {
	t.Helper()
	g := &ground{node: testutil.Node(t), root: testutil.BPFRoot(t)}
	var err error
	g.pod, err = g.node.AddPod("pod", podAddr)
	must(t, err)
	cgroup, err := attach.OpenCgroup(testutil.Cgroup(t).Path())
	must(t, err)
	g.datapath, err = datapath.Open(datapath.Config{
		Root: g.root, CgroupID: cgroup.ID,
		Sizes: datapath.Sizes{Frontends: 64, Services: 64, Slots: 256, Members: 64, SourceRanges: 64, Affinity: 64, Peers: 64, Flows: 4096},
	})
	must(t, err)
	t.Cleanup(func() { must(t, g.datapath.Close()) })
	for _, h := range attach.Hooks() {
		must(t, attach.Attach(cgroup, h, g.datapath.Program(h.Program), datapath.LinkPath(g.root, h.Name)))
	}
	must(t, g.datapath.SetServiceCIDR(netip.PrefixFrom(vip.Addr(), 16).Masked()))
	return g
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// connect returns a socket of the pod, and what a connect of it came to.
func (g *ground) connect(t *testing.T, kind int, to unix.Sockaddr) (fd int, connectErr error) {
	t.Helper()
	must(t, g.pod.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(fd) })
	return fd, unix.Connect(fd, to)
}

func (g *ground) choosesErrors(t *testing.T) bool {
	_, err := g.connect(t, unix.SOCK_STREAM, noVIP)
	if !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.EPERM) {
		t.Fatalf("connect to an address that no Service has: %v", err)
	}
	return errors.Is(err, unix.EHOSTUNREACH)
}

// walk connects a UDP socket to the VIP, takes its backend away and returns what a
// walk of the pod's sockets says.
func (g *ground) walk(t *testing.T) []datapath.UDPSocket {
	t.Helper()
	if g.walked != nil {
		return g.walked
	}
	if err := g.datapath.NoIterators; err != nil {
		t.Log(err)
		return nil
	}
	member := lb.Member{Service: 1, Backend: lb.Backend{Addr: backend.Addr(), Port: backend.Port()}, Use: lb.UseServing}
	must(t, g.datapath.SetMember(member))
	must(t, g.datapath.SetSlots(16, []lb.Backend{member.Backend}))
	must(t, g.datapath.SetRange(1, lb.SideClusterIP, lb.Range{Base: 16, Count: 1, Generation: 1}))
	must(t, g.datapath.SetFrontend(lb.FrontendKey{VIP: vip.Addr(), Port: vip.Port(), Protocol: lb.UDP},
		lb.Frontend{Service: 1, Kind: lb.KindClusterIP}))
	fd, err := g.connect(t, unix.SOCK_DGRAM, &unix.SockaddrInet4{Addr: vip.Addr().As4(), Port: int(vip.Port())})
	must(t, err)
	must(t, g.datapath.DeleteMember(member))
	must(t, g.pod.Do(func() (err error) {
		g.walked, err = g.datapath.WalkUDP()
		return err
	}))
	ended, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	must(t, err)
	if len(g.walked) == 1 && g.walked[0].Ended != (ended == int(unix.ECONNABORTED)) {
		t.Errorf("the walk says ended %t, the socket has error %d", g.walked[0].Ended, ended)
	}
	return g.walked
}

func (g *ground) findsSockets(t *testing.T) bool {
	found := g.walk(t)
	return len(found) == 1 && found[0].Reason == datapath.BackendGone && found[0].Remote == backend
}

func (g *ground) endsSockets(t *testing.T) bool {
	found := g.walk(t)
	return len(found) == 1 && found[0].Ended
}

func (g *ground) readsChecksumState(t *testing.T) bool {
	types, err := btf.LoadKernelSpec()
	must(t, err)
	// What the loader asks for a weak symbol, too.
	var f *btf.Func
	err = types.TypeByName("bpf_cast_to_kern_ctx", &f)
	if err != nil && !errors.Is(err, btf.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

// attachesByTCX puts programs on the node's end of the pod's link, which must work in
// one way or the other. To have the agent's own verified would take a minute where
// the processor is emulated.
func (g *ground) attachesByTCX(t *testing.T) bool {
	program := load(t, asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()})
	dir := datapath.DevicesPath(g.root)
	var pinned bool
	must(t, g.node.Namespace().Do(func() error {
		link, err := net.InterfaceByName("veth0")
		if err != nil {
			return err
		}
		tc, err := attach.NewTC(dir, attach.Programs{Ingress: program, Egress: program})
		if err != nil {
			return err
		}
		defer tc.Close()
		attached, err := tc.Apply([]attach.Device{{Index: link.Index, Name: link.Name, Hooked: true, L2: true}})
		if err == nil && attached != 1 {
			err = fmt.Errorf("programs are on %d devices, want 1", attached)
		}
		_, statErr := os.Stat(filepath.Join(dir, fmt.Sprintf("%d-ingress", link.Index)))
		if pinned = statErr == nil; !pinned && !errors.Is(statErr, fs.ErrNotExist) {
			err = errors.Join(err, statErr)
		}
		_, removeErr := attach.RemoveTC(dir)
		return errors.Join(err, removeErr)
	}))
	return pinned
}

// findsPreferredSource asks for a route with BPF_FIB_LOOKUP_SRC.
func (g *ground) findsPreferredSource(t *testing.T) bool {
	const size, source = 64, 1 << 4 // of struct bpf_fib_lookup
	program := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R7, 0)}
	for offset := int16(-size); offset < 0; offset += 8 {
		program = append(program, asm.StoreMem(asm.RFP, offset, asm.R7, asm.DWord))
	}
	return knowsFlag(t, append(program,
		asm.Mov.Imm(asm.R7, unix.AF_INET),
		asm.StoreMem(asm.RFP, -size, asm.R7, asm.Byte),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -size),
		asm.Mov.Imm(asm.R3, size),
		asm.Mov.Imm(asm.R4, source),
		asm.FnFibLookup.Call(),
		asm.Return(),
	))
}

// knowsIPv6Checksums asks for a checksum at an odd offset, where none can be.
func (g *ground) knowsIPv6Checksums(t *testing.T) bool {
	const pseudoHeader, ipv6 = 1 << 4, 1 << 7
	return knowsFlag(t, asm.Instructions{
		asm.Mov.Imm(asm.R2, 1),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 1),
		asm.Mov.Imm(asm.R5, pseudoHeader|ipv6),
		asm.FnL4CsumReplace.Call(),
		asm.Return(),
	})
}

// knowsFlag tells whether the helper that a tc program calls knows the flags it is
// given: to others it says EINVAL before it looks at anything else.
func knowsFlag(t *testing.T, instructions asm.Instructions) bool {
	t.Helper()
	result, err := load(t, instructions).Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	must(t, err)
	t.Logf("the helper returns %d", int32(result))
	return int32(result) != -int32(unix.EINVAL)
}

// load returns a tc program.
func load(t *testing.T, instructions asm.Instructions) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, Instructions: instructions, License: "Dual BSD/GPL",
	})
	must(t, err)
	t.Cleanup(func() { must(t, program.Close()) })
	return program
}
