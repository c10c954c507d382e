// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// small are sizes that a test can fill.
var small = Sizes{Frontends: 64, Services: 64, Slots: 256, Members: 64, SourceRanges: 64, Affinity: 64, Peers: 64, Flows: 4096}

// openDatapath loads a datapath that is closed when the test ends. It has no
// programs of the packet path: maps are what most tests are about, and verifying
// those programs takes seconds on an emulated processor.
func openDatapath(t testing.TB, root string, sizes Sizes) *Datapath {
	t.Helper()
	return openConfig(t, Config{Root: root, Sizes: sizes})
}

// openConfig is openDatapath with every setting.
func openConfig(t testing.TB, config Config) *Datapath {
	t.Helper()
	d, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if d.lock != nil {
			closeDatapath(t, d)
		}
	})
	return d
}

func closeDatapath(t testing.TB, d *Datapath) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	d.lock = nil
}

// frontendKey returns the key that "10.96.0.1:80" and the like mean.
func frontendKey(s string, p lb.Protocol) lb.FrontendKey {
	ap := netip.MustParseAddrPort(s)
	return lb.FrontendKey{VIP: ap.Addr(), Port: ap.Port(), Protocol: p}
}

// sample is a row or more of every kind.
func sample() lb.Tables {
	dns := lb.Name{Namespace: "kube-system", Name: "kube-dns"}
	t := lb.NewTables()
	t.Frontends[frontendKey("10.96.0.10:53", lb.UDP)] = lb.Frontend{Service: 1, Kind: lb.KindClusterIP}
	t.Frontends[frontendKey("10.96.0.10:53", lb.TCP)] = lb.Frontend{Service: 2, Kind: lb.KindClusterIP}
	t.Frontends[lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.10")}] = lb.Frontend{Kind: lb.KindClusterIP}
	t.Frontends[frontendKey("[fd00:96::a]:53", lb.UDP)] = lb.Frontend{Service: 3, Kind: lb.KindClusterIP}
	t.Frontends[frontendKey("0.0.0.0:30053", lb.TCP)] = lb.Frontend{Service: 2, Kind: lb.KindNodePort}
	t.Frontends[frontendKey("[::]:30053", lb.UDP)] = lb.Frontend{Service: 3, Kind: lb.KindNodePort}
	t.Frontends[frontendKey("198.51.100.1:53", lb.TCP)] = lb.Frontend{Service: 2, Kind: lb.KindLoadBalancer}
	t.Frontends[frontendKey("198.51.100.2:53", lb.UDP)] = lb.Frontend{Service: 1, Kind: lb.KindExternalIP}
	t.Frontends[lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.20")}] = lb.Frontend{Kind: lb.KindForeign}
	t.Names[1] = lb.ServicePort{Service: dns, Port: "dns", Protocol: lb.UDP, Family: lb.IPv4}
	t.Names[2] = lb.ServicePort{Service: dns, Port: "dns-tcp", Protocol: lb.TCP, Family: lb.IPv4}
	t.Names[3] = lb.ServicePort{Service: dns, Port: "dns", Protocol: lb.UDP, Family: lb.IPv6}
	dnsBlock := lb.Range{Base: 10, Count: 2, Generation: 5}
	t.Services[1] = lb.ServiceRow{ // inside and outside share a block
		Sides:    [lb.Sides]lb.Range{{Base: 12, Count: 1, Generation: 2}, dnsBlock, dnsBlock},
		Affinity: 10800,
	}
	t.Services[2] = lb.ServiceRow{ // one side is empty because of a traffic policy
		Sides:      [lb.Sides]lb.Range{{Base: 0, Count: 1, Generation: 1}, {Base: 0, Count: 1, Generation: 1}, lb.Range{}.NextEmpty(true)},
		Restricted: true, NodeAllowed: true, OutsideLocal: true,
	}
	t.Services[3] = lb.ServiceRow{Sides: [lb.Sides]lb.Range{{Generation: 9}, {}, {}}, Restricted: true} // without backends
	t.Services[40] = lb.ServiceRow{Sides: [lb.Sides]lb.Range{{}, {}, {Generation: 3}}}                  // had a name once
	t.Slots[0] = backend("10.244.0.2:5353")
	t.Slots[10] = backend("10.244.0.2:5353")
	t.Slots[11] = backend("10.244.0.3:5353")
	t.Slots[12] = backend("10.244.0.4:5353")
	for _, b := range []lb.Backend{t.Slots[10], t.Slots[11], t.Slots[12]} {
		t.Members[lb.Member{Service: 1, Backend: b}] = struct{}{}
	}
	t.Members[lb.Member{Service: 1, Backend: t.Slots[12], Use: lb.UseOn(lb.SideClusterIP)}] = struct{}{}
	t.Members[lb.Member{Service: 1, Backend: t.Slots[10], Use: lb.UseOn(lb.SideInside)}] = struct{}{}
	t.Members[lb.Member{Service: 1, Backend: t.Slots[10], Use: lb.UseOn(lb.SideOutside)}] = struct{}{}
	t.Members[lb.Member{Service: 3, Backend: backend("[fd00:244::2]:5353")}] = struct{}{}
	t.Sources[lb.Source{Service: 2, Prefix: netip.MustParsePrefix("192.0.2.0/24")}] = struct{}{}
	t.Sources[lb.Source{Service: 2, Prefix: netip.MustParsePrefix("0.0.0.0/0")}] = struct{}{}
	t.Sources[lb.Source{Service: 3, Prefix: netip.MustParsePrefix("2001:db8::/32")}] = struct{}{}
	t.NodeAddresses[netip.MustParseAddr("203.0.113.1")] = lb.NodeAddressOpen
	t.NodeAddresses[netip.MustParseAddr("127.0.0.1")] = lb.NodeAddressLoopback
	t.NodeAddresses[netip.MustParseAddr("2001:db8::1")] = lb.NodeAddressOpen
	t.ServiceCIDRs[netip.MustParsePrefix("10.96.0.0/12")] = struct{}{}
	t.ServiceCIDRs[netip.MustParsePrefix("fd00:96::/112")] = struct{}{}
	t.Problems[lb.Name{Namespace: "default", Name: "web"}] = "10.96.0.10:53/UDP belongs to Service kube-system/kube-dns"
	return t
}

// write puts every row of rows into the kernel.
func write(t testing.TB, tables *Tables, rows lb.Tables) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, b := range rows.Slots {
		must(tables.SetSlots(i, []lb.Backend{b}))
	}
	for m := range rows.Members {
		must(tables.SetMember(m))
	}
	for id, name := range rows.Names {
		must(tables.SetName(id, name))
	}
	for id, row := range rows.Services {
		for side, r := range row.Sides {
			must(tables.SetRange(id, lb.Side(side), r))
		}
		must(tables.SetOptions(id, row))
	}
	for s := range rows.Sources {
		must(tables.SetSource(s))
	}
	for a, kind := range rows.NodeAddresses {
		must(tables.SetNodeAddress(a, kind))
	}
	for k, f := range rows.Frontends {
		must(tables.SetFrontend(k, f))
	}
	for p := range rows.ServiceCIDRs {
		must(tables.SetServiceCIDR(p))
	}
	for name, p := range rows.Problems {
		must(tables.SetProblem(name, p))
	}
}

func wantLoaded(t testing.TB, tables *Tables, want lb.Tables) {
	t.Helper()
	got, err := tables.Load()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("the kernel holds other rows than were written (-want +got):\n%s", diff)
	}
}

func TestMapsOutliveTheProcessThatMadeThem(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	write(t, d.Tables, sample())
	started := AgentState{Started: time.Unix(1, 2), CgroupID: 3, NetnsCookie: 4, PID: os.Getpid(), Version: "v0.1"}
	if err := d.SetAgentState(started); err != nil {
		t.Fatal(err)
	}
	closeDatapath(t, d)

	again := openDatapath(t, root, small)
	wantLoaded(t, again.Tables, sample())
	if got, err := again.AgentState(); err != nil || got != started {
		t.Errorf("agent state is %+v, %v; want %+v", got, err, started)
	}
	if len(again.Resized) > 0 {
		t.Errorf("maps of the size they had are reported as resized: %v", again.Resized)
	}
	for table, n := range again.Writes() {
		if n != 0 {
			t.Errorf("opening counts %d writes to %s", n, table)
		}
	}
}

// withoutCapabilities runs f on a thread that has none and sees files as uid.
func withoutCapabilities(t *testing.T, uid int, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		err := errors.Join(unix.Setfsuid(uid), unix.Capset(&header, &none[0]))
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestBesideTheAgent is about others who look at a root while an agent runs.
func TestBesideTheAgent(t *testing.T) {
	root := testutil.BPFRoot(t)
	if _, err := OpenView(root); !errors.Is(err, ErrNoDatapath) {
		t.Errorf("a view of nothing: %v, want ErrNoDatapath", err)
	}
	d := openDatapath(t, root, small)
	write(t, d.Tables, sample())

	t.Run("a view reads what is pinned", func(t *testing.T) {
		view, err := OpenView(root)
		if err != nil {
			t.Fatal(err)
		}
		defer view.Close()
		wantLoaded(t, view.Tables, sample())
		fatal(t, d.SetRange(1, lb.SideInside, lb.Range{Base: 11, Count: 1, Generation: 6}))
		tables, err := view.Load()
		if err != nil {
			t.Fatal(err)
		}
		if got := tables.Backends(tables.Services[1].Sides[lb.SideInside]); !slices.Equal(got, []lb.Backend{backend("10.244.0.3:5353")}) {
			t.Errorf("the view does not follow the writer: %v", got)
		}
		fatal(t, d.AddFlow(tcpFlow()))
		fatal(t, d.SetDevices([]Device{{Index: 2}}))
		fatal(t, d.SetClusterCIDRs([]netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}))
		flows, err1 := view.Flows()
		devices, err2 := view.Devices()
		cidrs, err3 := view.ClusterCIDRs()
		if err := errors.Join(err1, err2, err3); err != nil || len(flows) != 1 || len(devices) != 1 || len(cidrs) != 1 {
			t.Errorf("the view has flows %v, devices %v, cluster CIDRs %v, error %v; want one of each", flows, devices, cidrs, err)
		}
		if _, err := view.DeleteFlow(tcpFlow(), func(Flow) bool { return true }); err == nil {
			t.Error("a view can end flows")
		}
		if err := view.DeleteFrontend(frontendKey("10.96.0.10:53", lb.UDP)); err == nil {
			t.Error("a view can write")
		}
	})

	t.Run("a second agent is refused in one line", func(t *testing.T) {
		fatal(t, d.SetAgentState(AgentState{PID: 4711}))
		_, err := Open(Config{Root: root, Sizes: small})
		if err == nil {
			t.Fatal("it gets the same root")
		}
		for _, part := range []string{root, "a running fairlead agent (pid 4711)", "--bpf-root"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("error %q does not say %q", err, part)
			}
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("error has more than one line: %q", err)
		}
	})

	t.Run("cleanup is refused", func(t *testing.T) {
		if locked, err := Locked(root); err != nil || !locked {
			t.Errorf("Locked is %v, %v while an agent runs", locked, err)
		}
		if _, err := Lock(root); err == nil || !strings.Contains(err.Error(), "stop it first") {
			t.Errorf("Lock under a running agent: %v", err)
		}
	})

	closeDatapath(t, d)
	if locked, err := Locked(root); err != nil || locked {
		t.Errorf("Locked is %v, %v when no agent runs", locked, err)
	}

	t.Run("missing privileges are named", func(t *testing.T) {
		withoutCapabilities(t, 0, func() {
			_, err := Open(Config{Root: root, Sizes: small})
			if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "run as root, or with CAP_BPF") {
				t.Errorf("error %v does not say which privilege is missing", err)
			}
		})
		const nobody = 65534
		withoutCapabilities(t, nobody, func() {
			_, err := OpenView(root)
			if err == nil || !strings.Contains(err.Error(), "run as root") {
				t.Errorf("error %v does not say which privilege is missing to look", err)
			}
		})
	})
}

func TestPinnedSizesStay(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	write(t, d.Tables, sample())
	closeDatapath(t, d)

	larger := small
	larger.Frontends, larger.Affinity, larger.SourceRanges, larger.Peers = 128, 128, 128, 1024
	larger.Flows = 8192
	again := openDatapath(t, root, larger)
	slices.Sort(again.Resized)
	if want := []string{bpfMapAffinity, bpfMapFlows, bpfMapFrontends, bpfMapPeers, bpfMapSourceRanges}; !slices.Equal(again.Resized, want) {
		t.Errorf("resized are %v, want %v", again.Resized, want)
	}
	if n := again.maps[bpfMapFrontends].MaxEntries(); n != small.Frontends {
		t.Errorf("frontends has room for %d rows, want the %d it was made with", n, small.Frontends)
	}
	wantLoaded(t, again.Tables, sample())

	closeDatapath(t, again)
	fatal(t, os.RemoveAll(root))
	fresh := openDatapath(t, root, larger)
	if len(fresh.Resized) > 0 || fresh.maps[bpfMapFrontends].MaxEntries() != larger.Frontends {
		t.Errorf("made anew, frontends has room for %d rows, want %d; resized: %v",
			fresh.maps[bpfMapFrontends].MaxEntries(), larger.Frontends, fresh.Resized)
	}
}

func TestRootMustBeOnBPFFS(t *testing.T) {
	testutil.RequireRoot(t)
	root := filepath.Join(t.TempDir(), "fairlead")
	_, err := Open(Config{Root: root})
	if !errors.Is(err, ErrNotBPFFS) || !strings.Contains(err.Error(), root) {
		t.Errorf("error %v does not say that %s is not on a BPF file system", err, root)
	}
	if _, err := os.Stat(root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s was made there all the same: %v", root, err)
	}
	if _, err := Open(Config{Root: filepath.Join(root, "missing", "fairlead")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a root without a parent: %v", err)
	}
}

func TestStrangerAtAPin(t *testing.T) {
	root := testutil.BPFRoot(t)
	pin := MapPath(root, bpfMapFrontends)
	if err := os.MkdirAll(filepath.Dir(pin), 0o700); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(pin); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Root: root, Sizes: small}); err == nil ||
		!strings.Contains(err.Error(), bpfMapFrontends) || !strings.Contains(err.Error(), "fairlead cleanup") {
		t.Errorf("error %v does not say whose pin it is and what to do", err)
	}
	// The failed attempt let go of the root.
	if locked, err := Locked(root); err != nil || locked {
		t.Errorf("Locked is %v, %v after a failed Open", locked, err)
	}
}

// TestSlotsAreNumberedIn24Bits guards the range word: a larger base would run
// into the count.
func TestSlotsAreNumberedIn24Bits(t *testing.T) {
	root := testutil.BPFRoot(t)
	sizes := small
	sizes.Slots = lb.MaxSlots + 1
	d, err := Open(Config{Root: root, Sizes: sizes})
	if err == nil {
		closeDatapath(t, d)
		t.Fatalf("%d slots are offered, a range can name %d", sizes.Slots, lb.MaxSlots)
	}
	if !strings.Contains(err.Error(), "16777217 slots are too many") {
		t.Errorf("error %v does not say which size is wrong", err)
	}
}

// partsOf returns the programs by kind, and open maps for them.
func partsOf(t *testing.T) (parts, map[string]*ebpf.Map) {
	t.Helper()
	root := testutil.BPFRoot(t)
	fatal(t, os.Mkdir(root, 0o700))
	_, err := makeDirs(root)
	fatal(t, err)
	spec, _, err := buildSpec(Config{Root: root, Sizes: small})
	fatal(t, err)
	opened, err := openMaps(root, spec)
	fatal(t, err)
	t.Cleanup(func() { closeMaps(opened) })
	return split(spec), opened
}

// TestHooksThatMayNotReadTheKernel has them ask for what the library makes of
// bpf_probe_read_kernel where lockdown=confidentiality refuses it: a helper that
// no kernel gives them.
func TestHooksThatMayNotReadTheKernel(t *testing.T) {
	parts, opened := partsOf(t)
	hooks := parts.hooks
	for _, prog := range hooks.Programs {
		for i, ins := range prog.Instructions {
			if ins.IsBuiltinCall() && ins.Constant == int64(asm.FnProbeReadKernel) {
				prog.Instructions[i].Constant = int64(asm.FnProbeRead)
			}
		}
	}
	programs, noTypes, err := loadHooks(func(types *btf.Spec) (map[string]*ebpf.Program, error) {
		return loadPrograms(hooks, opened, types)
	})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer closePrograms(programs)
	if len(programs) != len(hooks.Programs) {
		t.Errorf("%d programs are loaded, want %d", len(programs), len(hooks.Programs))
	}
	if !errors.Is(noTypes, unix.EINVAL) {
		t.Fatalf("reading is refused with %v, want EINVAL", noTypes)
	}
	for _, part := range []string{"bpf_probe_read#4", "lockdown=confidentiality"} {
		if !strings.Contains(noTypes.Error(), part) {
			t.Errorf("%q does not say %q", noTypes, part)
		}
	}
	if strings.Contains(noTypes.Error(), "\n") {
		t.Errorf("the reason has more than one line: %q", noTypes)
	}
}

// TestHooksAreLoadedWithoutKernelTypes is about what a failure leads to.
func TestHooksAreLoadedWithoutKernelTypes(t *testing.T) {
	parts, opened := partsOf(t)
	refused := fmt.Errorf("program sock_connect4: load program: %w", unix.EINVAL)
	for _, tc := range []struct {
		name        string
		first       error
		alsoWithout bool // loading without types fails as well
		want        error
	}{
		{name: "when the kernel has none", first: btf.ErrNotFound},
		{name: "when programs are refused", first: refused},
		{name: "when a privilege is missing", first: unix.EPERM},
		{name: "and the first error is told when that fails too", first: refused, alsoWithout: true, want: refused},
		{name: "but not when a stranger is at a pin", first: ebpf.ErrMapIncompatible, want: ebpf.ErrMapIncompatible},
		{name: "but not after a failure that passes", first: unix.ENOMEM, want: unix.ENOMEM},
	} {
		t.Run(tc.name, func(t *testing.T) {
			programs, noTypes, err := loadHooks(func(types *btf.Spec) (map[string]*ebpf.Program, error) {
				switch {
				case types == nil:
					return nil, tc.first
				case tc.alsoWithout:
					return nil, errors.New("the second failure")
				}
				return loadPrograms(parts.hooks, opened, types)
			})
			defer closePrograms(programs)
			if tc.want != nil {
				if !errors.Is(err, tc.want) || programs != nil {
					t.Errorf("got %v, %v; want no programs and %v", programs, err, tc.want)
				}
				return
			}
			if err != nil || len(programs) != len(parts.hooks.Programs) {
				t.Errorf("got %v, %v; want %d programs", programs, err, len(parts.hooks.Programs))
			}
			if !errors.Is(noTypes, tc.first) {
				t.Errorf("types are missing for %v, want %v", noTypes, tc.first)
			}
		})
	}
}

func TestPacketPathIsLoadedOnRequest(t *testing.T) {
	root := testutil.BPFRoot(t)
	d, err := Open(Config{Root: root, Sizes: small})
	fatal(t, err)
	if d.Program("tc_ingress") != nil || d.NoPacketPath != nil {
		t.Errorf("not asked for it is %v, %v; want none and no reason", d.Program("tc_ingress"), d.NoPacketPath)
	}
	closeDatapath(t, d)
	d = openConfig(t, Config{Root: root, Sizes: small, PacketPath: true})
	for _, name := range []string{"tc_ingress", "tc_egress", "tc_ingress_l3", "tc_egress_l3"} {
		if d.Program(name) == nil {
			t.Errorf("%s is not loaded: %v", name, d.NoPacketPath)
		}
	}
}

// TestPacketPathThatTheKernelRefuses takes a helper from its programs' sight that
// no kernel gives them.
func TestPacketPathThatTheKernelRefuses(t *testing.T) {
	parts, opened := partsOf(t)
	for _, prog := range parts.packets.Programs {
		for i, ins := range prog.Instructions {
			if ins.IsBuiltinCall() && ins.Constant == int64(asm.FnFibLookup) {
				prog.Instructions[i].Constant = int64(asm.FnSetRetval)
			}
		}
	}
	programs, err := loadPrograms(parts.packets, opened, nil)
	if err == nil || len(programs) > 0 {
		t.Fatalf("%d programs are loaded", len(programs))
	}
	reason := explainPacketPath(err)
	if !strings.Contains(reason.Error(), "bpf_set_retval") || strings.Contains(reason.Error(), "\n") {
		t.Errorf("the reason is not one line that names the helper: %q", reason)
	}
}

func TestOptions(t *testing.T) {
	spec, err := loadBpf()
	fatal(t, err)
	get := func(name string) (n uint32) {
		t.Helper()
		v := spec.Variables[name]
		if v.Size() == 2 {
			var short uint16
			fatal(t, v.Get(&short))
			return uint32(short)
		}
		fatal(t, v.Get(&n))
		return n
	}
	want := func(first, last, rate, burst uint32) {
		t.Helper()
		for name, n := range map[string]uint32{
			bpfVarSnatPortFirst: first, bpfVarSnatPortLast: last, bpfVarReplyRate: rate, bpfVarReplyBurst: burst,
		} {
			if got := get(name); got != n {
				t.Errorf("%s is %d, want %d", name, got, n)
			}
		}
	}
	fatal(t, setOptions(spec, Config{}))
	want(61000, 65535, 1000, 250)
	fatal(t, setOptions(spec, Config{SNATPorts: PortRange{40000, 40000}, ReplyRate: 7, ReplyBurst: 8}))
	want(40000, 40000, 7, 8)
	for _, bad := range []PortRange{{0, 80}, {81, 80}, {80, 0}} {
		if err := setOptions(spec, Config{SNATPorts: bad}); err == nil || !strings.Contains(err.Error(), "SNAT ports") {
			t.Errorf("ports %v: %v", bad, err)
		}
	}
}

// maxInstructions leaves room below the verifier's million: other kernels and
// later additions need more.
const maxInstructions = 300_000

func TestVerifierHasAnEasyTime(t *testing.T) {
	d := openConfig(t, Config{Root: testutil.BPFRoot(t), Sizes: small, PacketPath: true})
	if d.NoIterators != nil {
		t.Errorf("iterators do not load: %v", d.NoIterators)
	}
	if d.NoPacketPath != nil {
		t.Errorf("tc programs do not load: %v", d.NoPacketPath)
		if ve := (*ebpf.VerifierError)(nil); errors.As(d.NoPacketPath, &ve) {
			t.Log(strings.Join(ve.Log[max(0, len(ve.Log)-60):], "\n"))
		}
	}
	if d.NoClientAddress != nil {
		t.Errorf("hooks do not see the address of a pod: %v", d.NoClientAddress)
	}
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	for name := range spec.Programs {
		prog := d.programs[name]
		if prog == nil {
			prog = d.iterators[name]
		}
		if prog == nil {
			t.Errorf("%s is not loaded", name)
			continue
		}
		info, err := prog.Info()
		if err != nil {
			t.Fatal(err)
		}
		n, ok := info.VerifiedInstructions()
		if !ok {
			t.Fatal("kernel does not tell how many instructions the verifier looked at (Linux 5.16)")
		}
		t.Logf("%-20s %6d instructions verified", name, n)
		if n > maxInstructions {
			t.Errorf("%s: the verifier looked at %d instructions, more than %d", name, n, maxInstructions)
		}
	}
}
