// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// ways are the ways of attaching that a test goes through, whichever the kernel
// would choose.
var ways = map[string]func(dir string, others []string) way{
	"tcx":    func(dir string, others []string) way { return &tcx{dir: dir, others: others} },
	"clsact": func(dir string, others []string) way { return &clsact{dir: dir, others: others} },
}

// eachWay runs a test with each way that the kernel has.
func eachWay(t *testing.T, test func(t *testing.T, b *bench)) {
	for name, newWay := range ways {
		t.Run(name, func(t *testing.T) { test(t, newBench(t, name, newWay)) })
	}
}

// bench is a node with one pod, and a directory for pins.
type bench struct {
	t      *testing.T
	node   *sandbox.Node
	ns     *sandbox.Namespace
	pod    *sandbox.Namespace
	dir    string
	others []string // directories of other versions
	name   string
	newWay func(dir string, others []string) way
}

// needTCX skips a test that is about tcx on a kernel that has none.
func needTCX(t *testing.T) {
	if !hasTCX() {
		t.Skip("no tcx on this kernel (Linux 6.6)")
	}
}

// hasTCX asks for the programs on lo.
var hasTCX = sync.OnceValue(func() bool {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	return err == nil
})

func newBench(t *testing.T, name string, newWay func(dir string, others []string) way) *bench {
	if name == "tcx" {
		needTCX(t)
	}
	node := testutil.Node(t)
	pod, err := node.AddPod("pod", podAddr)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, node: node, ns: node.Namespace(), pod: pod, name: name, newWay: newWay}
	b.dir = filepath.Join(testutil.BPFRoot(t), "tc")
	return b
}

var podAddr = netip.MustParseAddr("10.244.0.2")

// hostEnd is the node's end of the pod's link.
const hostEnd = "veth0"

func (b *bench) do(f func() error) {
	b.t.Helper()
	if err := b.ns.Do(f); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) configure(commands string) {
	b.t.Helper()
	if err := b.ns.Configure(commands); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) link(name string) (l netlink.Link) {
	b.t.Helper()
	b.do(func() (err error) {
		l, err = netlink.LinkByName(name)
		return err
	})
	return l
}

// device returns a link as something to attach to.
func (b *bench) device(name string) Device {
	b.t.Helper()
	return Device{Index: b.link(name).Attrs().Index, Name: name, Hooked: true, L2: true}
}

// tc returns a TC that is closed when the test ends.
func (b *bench) tc(p Programs) *TC {
	b.t.Helper()
	tc, err := NewTC(b.dir, p, b.others...)
	if err != nil {
		b.t.Fatal(err)
	}
	tc.way = b.newWay(b.dir, b.others)
	b.t.Cleanup(func() {
		if err := tc.Close(); err != nil {
			b.t.Error(err)
		}
	})
	return tc
}

func (b *bench) apply(tc *TC, want int, devices ...Device) {
	b.t.Helper()
	b.do(func() error {
		attached, err := tc.Apply(devices)
		if attached != want {
			b.t.Errorf("%d devices have programs, want %d", attached, want)
		}
		return err
	})
}

func (b *bench) check(tc *TC, want ...string) {
	b.t.Helper()
	b.do(func() error {
		restored, err := tc.Check()
		if !slices.Equal(restored, want) {
			b.t.Errorf("restored is %q, want %q", restored, want)
		}
		return err
	})
}

// counted is a program that counts the packets of frameSize, as no other traffic
// has, and lets all through.
type counted struct {
	*ebpf.Program
	runs *ebpf.Map
}

const (
	payload   = 1000
	frameSize = 14 + 20 + 8 + payload
)

func newCounted(t *testing.T, name string) counted {
	t.Helper()
	runs, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { runs.Close() })
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.SchedCLS, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R6, asm.R1, 0, asm.Word), // skb->len
			asm.JNE.Imm(asm.R6, frameSize, "next"),
			asm.Mov.Imm(asm.R2, 0),
			asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.LoadMapPtr(asm.R1, runs.FD()),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "next"),
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R0, -1).WithSymbol("next"), // TCX_NEXT, TC_ACT_UNSPEC
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return counted{prog, runs}
}

func (c counted) count(t *testing.T) (n int) {
	t.Helper()
	var value uint64
	if err := c.runs.Lookup(uint32(0), &value); err != nil {
		t.Fatal(err)
	}
	return int(value)
}

// programs returns four different programs.
func programs(t *testing.T, name string) (p Programs, in, out counted) {
	t.Helper()
	in, out = newCounted(t, name+"_in"), newCounted(t, name+"_out")
	return Programs{
		Ingress: in.Program, Egress: out.Program,
		IngressL3: newCounted(t, name+"_in_l3").Program, EgressL3: newCounted(t, name+"_out_l3").Program,
	}, in, out
}

// send sends n packets that counted programs count from the pod to the node.
func (b *bench) send(n int) {
	b.t.Helper()
	conn, err := b.ns.ListenPacket("udp", sandbox.GatewayIPv4.Addr().String()+":0")
	if err != nil {
		b.t.Fatal(err)
	}
	defer conn.Close()
	client, err := b.pod.Dial(b.t.Context(), "udp", conn.LocalAddr().String())
	if err != nil {
		b.t.Fatal(err)
	}
	defer client.Close()
	for range n {
		if _, err := client.Write(make([]byte, payload)); err != nil {
			b.t.Fatal(err)
		}
	}
}

// wantRuns waits until programs together have counted n packets.
func wantRuns(t *testing.T, what string, n int, programs ...counted) {
	t.Helper()
	testutil.Eventually(t, testutil.Patience(), what, func() error {
		total := 0
		for _, p := range programs {
			total += p.count(t)
		}
		if total != n {
			return fmt.Errorf("%d packets were counted, want %d", total, n)
		}
		return nil
	})
}

// on returns the names of the programs on a device in the order they run, tcx
// before clsact.
func (b *bench) on(name string, dir direction) (names []string) {
	b.t.Helper()
	index := b.link(name).Attrs().Index
	b.do(func() error {
		if hasTCX() {
			got, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: attachType(dir)})
			if err != nil {
				return err
			}
			for _, p := range got.Programs {
				names = append(names, b.programName(p.ID))
			}
		}
		filters, err := netlink.FilterList(device(index), parentOf(dir))
		if err != nil {
			return err
		}
		for _, f := range filters {
			names = append(names, b.programName(ebpf.ProgramID(f.(*netlink.BpfFilter).Id)))
		}
		return nil
	})
	return names
}

func (b *bench) programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		b.t.Fatal(err)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		b.t.Fatal(err)
	}
	return info.Name
}

func (b *bench) wantOn(name string, dir direction, want ...string) {
	b.t.Helper()
	if got := b.on(name, dir); !slices.Equal(got, want) {
		b.t.Errorf("%s %s has programs %q, want %q", name, dir, got, want)
	}
}

// qdisc tells whether the device has a clsact qdisc.
func (b *bench) qdisc(name string) (found bool) {
	b.t.Helper()
	index := b.link(name).Attrs().Index
	b.do(func() error {
		qdiscs, err := netlink.QdiscList(device(index))
		found = slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" })
		return err
	})
	return found
}

// neighbour puts a program of somebody else on the device: a filter with the given
// priority.
func (b *bench) neighbour(name string, dir direction, priority uint16, prog *ebpf.Program) {
	b.t.Helper()
	index := b.link(name).Attrs().Index
	b.do(func() error {
		if err := netlink.QdiscAdd(clsactOf(index)); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		return netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: index, Parent: parentOf(dir), Protocol: unix.ETH_P_ALL, Handle: 1, Priority: priority,
			},
			Fd: prog.FD(), Name: "theirs", DirectAction: true,
		})
	})
}

// neighbourLink puts a program of somebody else on the device by a tcx link.
func (b *bench) neighbourLink(name string, dir direction, prog *ebpf.Program) link.Link {
	b.t.Helper()
	needTCX(b.t)
	index := b.link(name).Attrs().Index
	var l link.Link
	b.do(func() (err error) {
		l, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: attachType(dir)})
		return err
	})
	b.t.Cleanup(func() { l.Close() })
	return l
}

func (b *bench) pins() (names []string) {
	b.t.Helper()
	entries, err := os.ReadDir(b.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestProgramsRunOncePerPacket(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p, in, out := programs(t, "ours")
		tc := b.tc(p)
		b.apply(tc, 1, b.device(hostEnd))
		b.wantOn(hostEnd, ingress, "ours_in")
		b.wantOn(hostEnd, egress, "ours_out")
		b.send(100)
		wantRuns(t, "packets from the pod", 100, in)
		wantRuns(t, "nothing went to the pod", 0, out)

		// The same again changes nothing.
		b.apply(tc, 1, b.device(hostEnd))
		b.check(tc)
		b.wantOn(hostEnd, ingress, "ours_in")
		b.wantOn(hostEnd, egress, "ours_out")
	})
}

func TestProgramsFitTheDevice(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		b.configure("tuntap add tun0 mode tun")
		p, _, _ := programs(t, "ours")
		tun, bridge := b.device("tun0"), b.device(sandbox.Bridge)
		tun.L2, bridge.Hooked = false, false
		b.apply(b.tc(p), 2, tun, bridge, b.device(hostEnd))
		b.wantOn("tun0", ingress, "ours_in_l3")
		b.wantOn("tun0", egress, "ours_out_l3")
		b.wantOn(hostEnd, ingress, "ours_in")
		b.wantOn(sandbox.Bridge, ingress)
		b.wantOn(sandbox.Bridge, egress)
	})
}

// TestTakingOverMissesNoPacket has an agent replace another one ten times while a
// pod sends. Each packet must meet one program and no more.
func TestTakingOverMissesNoPacket(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p, in, _ := programs(t, "old")
		all := []counted{in}
		b.apply(b.tc(p), 1, b.device(hostEnd))

		var over atomic.Bool
		sent := make(chan int)
		go func() {
			n := 0
			defer func() { sent <- n }()
			for ; !over.Load(); n += 100 {
				b.send(100)
			}
		}()
		for i := range 10 {
			p, in, _ := programs(t, fmt.Sprintf("new%d", i))
			all = append(all, in)
			next := b.tc(p)
			b.apply(next, 1, b.device(hostEnd))
			b.wantOn(hostEnd, ingress, fmt.Sprintf("new%d_in", i))
			b.wantOn(hostEnd, egress, fmt.Sprintf("new%d_out", i))
			testutil.Eventually(t, testutil.Patience(), "packets with the new program", func() error {
				if n := in.count(t); n < 100 {
					return fmt.Errorf("%d, want 100", n)
				}
				return nil
			})
		}
		over.Store(true)
		wantRuns(t, "every packet once", <-sent, all...)
	})
}

// TestReplacingProgramsMissesNoPacket exchanges the programs of one TC while a pod
// sends.
func TestReplacingProgramsMissesNoPacket(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p, in, _ := programs(t, "v0")
		all := []counted{in}
		tc := b.tc(p)
		tc.Replace(p) // nothing is attached yet
		b.apply(tc, 1, b.device(hostEnd))
		for i := range 4 {
			b.send(100)
			name := fmt.Sprint("v", i+1)
			p, in, _ := programs(t, name)
			all = append(all, in)
			b.do(func() error { tc.Replace(p); return nil })
			b.wantOn(hostEnd, ingress, name+"_in")
			b.wantOn(hostEnd, egress, name+"_out")
		}
		b.send(100)
		wantRuns(t, "every packet once", 500, all...)
		b.check(tc)
		b.wantOn(hostEnd, ingress, "v4_in")
	})
}

// upgrade makes the TCs from now on those of another version, with its own directory.
func (b *bench) upgrade(name string) {
	b.others = append(b.others, b.dir)
	b.dir = filepath.Join(filepath.Dir(b.dir), name)
}

// TestTakingOverFromAnotherVersionMissesNoPacket is TestTakingOverMissesNoPacket
// between directories, to and fro.
func TestTakingOverFromAnotherVersionMissesNoPacket(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p, in, _ := programs(t, "v0")
		all := []counted{in}
		b.apply(b.tc(p), 1, b.device(hostEnd))
		var over atomic.Bool
		sent := make(chan int)
		go func() {
			n := 0
			defer func() { sent <- n }()
			for ; !over.Load(); n += 100 {
				b.send(100)
			}
		}()
		pins := len(b.pins())
		for i := range 6 {
			b.upgrade(fmt.Sprint("tc", i%2))
			name := fmt.Sprint("v", i+1)
			p, in, _ := programs(t, name)
			all = append(all, in)
			b.apply(b.tc(p), 1, b.device(hostEnd))
			b.wantOn(hostEnd, ingress, name+"_in")
			b.wantOn(hostEnd, egress, name+"_out")
			if n := len(b.pins()); n != pins {
				t.Errorf("%d pins in the new directory, want the %d of the old one", n, pins)
			}
			b.do(func() error {
				removed, err := RemoveTC(b.others[len(b.others)-1])
				if removed > 0 {
					t.Errorf("%d programs were left to the old version", removed)
				}
				return err
			})
			testutil.Eventually(t, testutil.Patience(), "packets with the new program", func() error {
				if n := in.count(t); n < 100 {
					return fmt.Errorf("%d, want 100", n)
				}
				return nil
			})
		}
		over.Store(true)
		wantRuns(t, "every packet once", <-sent, all...)
		b.do(func() error {
			_, err := RemoveTC(b.dir)
			return err
		})
		b.wantOn(hostEnd, ingress)
		if b.qdisc(hostEnd) {
			t.Error("nobody has removed the qdisc")
		}
	})
}

func TestProgramsOutliveTheirTC(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p, in, _ := programs(t, "ours")
		tc := b.tc(p)
		b.apply(tc, 1, b.device(hostEnd))
		if err := tc.Close(); err != nil {
			t.Fatal(err)
		}
		b.send(10)
		wantRuns(t, "packets after the end", 10, in)
	})
}

func TestDevicesThatAreNotWantedAnyMore(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		b.configure("link add other type veth peer name other2")
		p, _, _ := programs(t, "old")
		b.apply(b.tc(p), 2, b.device(hostEnd), b.device("other"))
		p, _, _ = programs(t, "new")
		next := b.tc(p)
		b.apply(next, 1, b.device("other")) // another process, with another list
		b.wantOn(hostEnd, ingress)
		b.wantOn(hostEnd, egress)
		b.wantOn("other", ingress, "new_in")
		b.apply(next, 0)
		b.wantOn("other", ingress)
		b.wantOn("other", egress)
		if got := b.pins(); len(got) > 0 {
			t.Errorf("%q is left", got)
		}
		for _, name := range []string{hostEnd, "other"} {
			if b.qdisc(name) {
				t.Errorf("the qdisc of %s is left", name)
			}
		}
	})
}

// TestRemovedProgramsComeBack removes programs as far as each way allows it.
func TestRemovedProgramsComeBack(t *testing.T) {
	byLink := func(b *bench, at place) error {
		h, err := (&tcx{dir: b.dir}).load(at)
		if err != nil {
			return err
		}
		defer h.close()
		return h.link.Detach()
	}
	byFilter := func(b *bench, at place) error {
		w := &clsact{dir: b.dir}
		filters, err := w.filters(at)
		if err != nil {
			return err
		}
		return netlink.FilterDel(w.ours(filters, at))
	}
	remove := map[string]func(*bench, place) error{"tcx": byLink, "clsact": byFilter}
	eachWay(t, func(t *testing.T, b *bench) {
		p, in, _ := programs(t, "ours")
		tc := b.tc(p)
		d := b.device(hostEnd)
		b.apply(tc, 1, d)
		b.check(tc)
		for _, dir := range []direction{ingress, egress} {
			b.do(func() error { return remove[b.name](b, place{d.Index, dir}) })
			b.wantOn(hostEnd, dir)
			b.check(tc, hostEnd+" "+string(dir))
			b.check(tc)
		}
		b.wantOn(hostEnd, ingress, "ours_in")
		b.wantOn(hostEnd, egress, "ours_out")
		b.send(10)
		wantRuns(t, "packets after the repair", 10, in)
	})
}

func TestARemovedQdiscComesBack(t *testing.T) {
	b := newBench(t, "clsact", ways["clsact"])
	p, _, _ := programs(t, "ours")
	tc := b.tc(p)
	d := b.device(hostEnd)
	b.apply(tc, 1, d)
	b.check(tc)
	b.do(func() error { return netlink.QdiscDel(clsactOf(d.Index)) })
	b.check(tc, hostEnd+" egress", hostEnd+" ingress")
	b.wantOn(hostEnd, ingress, "ours_in")
	b.wantOn(hostEnd, egress, "ours_out")
}

func TestRemovedPinsComeBack(t *testing.T) {
	for _, tt := range []struct {
		name   string
		remove func(dir string) error
	}{
		{"one pin", func(dir string) error {
			names, err := filepath.Glob(filepath.Join(dir, "*-ingress"))
			if err != nil || len(names) != 1 {
				return fmt.Errorf("pins are %q, %v", names, err)
			}
			return os.Remove(names[0])
		}},
		{"the whole directory", os.RemoveAll},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, "tcx", ways["tcx"])
			p, in, _ := programs(t, "ours")
			tc := b.tc(p)
			b.apply(tc, 1, b.device(hostEnd))
			before := b.pins()
			if err := tt.remove(b.dir); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				b.check(tc)
				if got := b.pins(); !slices.Equal(got, before) {
					t.Errorf("pins are %q, want %q", got, before)
				}
			}
			b.wantOn(hostEnd, ingress, "ours_in")
			if err := tc.Close(); err != nil {
				t.Fatal(err)
			}
			b.send(10)
			wantRuns(t, "packets after the end", 10, in)
		})
	}
}

func TestDevicesThatGoAway(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		b.configure("link add gone type veth peer name gone2")
		gone := b.device("gone")
		p, _, _ := programs(t, "ours")
		tc := b.tc(p)
		b.apply(tc, 2, gone, b.device(hostEnd))
		b.configure("link del gone")
		b.check(tc)
		b.check(tc)
		// The list is of before, and so it is when a device goes while it is applied.
		b.apply(tc, 1, gone, b.device(hostEnd))
		b.apply(tc, 1, b.device(hostEnd))
		for _, name := range b.pins() {
			if strings.HasPrefix(name, fmt.Sprint(gone.Index)+"-") {
				t.Errorf("%s is left", name)
			}
		}
		b.wantOn(hostEnd, ingress, "ours_in")
	})
}

// TestDevicesThatMoveAway has a device go to another namespace, as some network
// plugins do with hardware, and programs must not go along.
func TestDevicesThatMoveAway(t *testing.T) {
	b := newBench(t, "tcx", ways["tcx"])
	b.configure("link add moved type veth peer name moved2")
	p, _, _ := programs(t, "ours")
	tc := b.tc(p)
	b.apply(tc, 1, b.device("moved"))
	b.configure("link set moved netns " + b.pod.Name())
	b.apply(tc, 0)
	b.ns = b.pod
	b.wantOn("moved", ingress)
	b.wantOn("moved", egress)
	if got := b.pins(); len(got) > 0 {
		t.Errorf("%q is left", got)
	}
}

// TestOthersBeforeAndAfter has programs of others on all sides of ours. They come
// first, last, and after ours; all of them run, and stay when ours go.
func TestOthersBeforeAndAfter(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		p, ours, _ := programs(t, "ours")
		before, after, filter := newCounted(t, "before"), newCounted(t, "after"), newCounted(t, "filter")
		for _, dir := range []direction{ingress, egress} {
			b.neighbourLink(hostEnd, dir, before.Program)
			b.neighbour(hostEnd, dir, 10, filter.Program)
		}
		tc := b.tc(p)
		b.apply(tc, 1, b.device(hostEnd))
		for _, dir := range []direction{ingress, egress} {
			b.neighbourLink(hostEnd, dir, after.Program)
		}
		if b.name == "tcx" {
			b.wantOn(hostEnd, ingress, "ours_in", "before", "after", "filter")
			b.wantOn(hostEnd, egress, "before", "ours_out", "after", "filter")
		} else {
			b.wantOn(hostEnd, ingress, "before", "after", "ours_in", "filter")
			b.wantOn(hostEnd, egress, "before", "after", "filter", "ours_out")
		}
		b.check(tc)
		b.send(10)
		for _, c := range []counted{before, ours, after, filter} {
			wantRuns(t, "packets for everybody", 10, c)
		}

		b.do(func() error {
			removed, err := RemoveTC(b.dir)
			if removed != 2 {
				t.Errorf("%d programs removed, want 2", removed)
			}
			return err
		})
		b.wantOn(hostEnd, ingress, "before", "after", "filter")
		b.wantOn(hostEnd, egress, "before", "after", "filter")
		b.send(10)
		wantRuns(t, "the others' packets afterwards", 60, before, after, filter)
		wantRuns(t, "ours", 10, ours)
	})
}

func TestOthersInTheFirstAndTheLastPlace(t *testing.T) {
	b := newBench(t, "clsact", ways["clsact"])
	theirs := newCounted(t, "theirs")
	b.neighbour(hostEnd, ingress, 1, theirs.Program)
	b.neighbour(hostEnd, egress, 65535, theirs.Program)
	p, ours, _ := programs(t, "ours")
	tc := b.tc(p)
	b.apply(tc, 1, b.device(hostEnd))
	b.wantOn(hostEnd, ingress, "theirs", "ours_in")
	b.wantOn(hostEnd, egress, "ours_out", "theirs")
	b.send(10)
	wantRuns(t, "ours and theirs", 20, ours, theirs)
	b.apply(tc, 0)
	b.wantOn(hostEnd, ingress, "theirs")
	b.wantOn(hostEnd, egress, "theirs")
	if !b.qdisc(hostEnd) {
		t.Error("somebody else's qdisc is gone")
	}
}

// TestSomebodyTakesOurPlace removes our filter and puts another one exactly where
// it was.
func TestSomebodyTakesOurPlace(t *testing.T) {
	b := newBench(t, "clsact", ways["clsact"])
	p, _, _ := programs(t, "ours")
	tc := b.tc(p)
	d := b.device(hostEnd)
	b.apply(tc, 1, d)
	b.check(tc)
	b.do(func() error { return netlink.QdiscDel(clsactOf(d.Index)) })
	b.neighbour(hostEnd, ingress, 1, newCounted(t, "theirs").Program)
	b.check(tc, hostEnd+" egress", hostEnd+" ingress")
	b.wantOn(hostEnd, ingress, "theirs", "ours_in")
	b.apply(tc, 0)
	b.wantOn(hostEnd, ingress, "theirs")
}

func TestAnIngressQdiscKeepsUsOut(t *testing.T) {
	b := newBench(t, "clsact", ways["clsact"])
	d := b.device(hostEnd)
	b.do(func() error {
		return netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: d.Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
		}})
	})
	p, _, _ := programs(t, "ours")
	tc := b.tc(p)
	err := b.ns.Do(func() error {
		_, err := tc.Apply([]Device{d})
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "attach to veth0 egress") || !strings.Contains(err.Error(), "kind ingress") {
		t.Errorf("error is %v, want one that names the device and the qdisc", err)
	}
	b.wantOn(hostEnd, ingress)
	b.do(func() error {
		return netlink.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: d.Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
		}})
	})
	b.check(tc) // puts them on, but nobody had taken them off
	b.wantOn(hostEnd, ingress, "ours_in")
	b.wantOn(hostEnd, egress, "ours_out")
}

// oldKernel attaches like a kernel before 6.6.
type oldKernel struct{ tcx }

func (*oldKernel) attach(place, *ebpf.Program) (hook, error) {
	return nil, fmt.Errorf("attach tcx link: %w", ebpf.ErrNotSupported)
}

func TestKernelsWithoutTCXGetFilters(t *testing.T) {
	b := newBench(t, "old", func(dir string, others []string) way { return &oldKernel{tcx{dir: dir}} })
	b.configure("link add other type veth peer name other2")
	p, _, _ := programs(t, "old")
	b.apply(b.tc(p), 2, b.device(hostEnd), b.device("other"))
	p, _, _ = programs(t, "new")
	tc := b.tc(p)
	b.apply(tc, 1, b.device(hostEnd))
	b.wantOn(hostEnd, ingress, "new_in")
	b.wantOn(hostEnd, egress, "new_out")
	b.wantOn("other", ingress)
	b.check(tc)

	// Without a device to attach to, too.
	b.apply(b.tc(p), 0)
	b.wantOn(hostEnd, ingress)
	b.wantOn(hostEnd, egress)
}

func TestRemoveTC(t *testing.T) {
	eachWay(t, func(t *testing.T, b *bench) {
		b.configure("link add other type veth peer name other2")
		p, _, _ := programs(t, "ours")
		b.apply(b.tc(p), 2, b.device(hostEnd), b.device("other"))
		// Another version's are not touched.
		theirs := *b
		theirs.dir += "-of-another-version"
		p, _, _ = programs(t, "theirs")
		theirs.apply(theirs.tc(p), 1, b.device(hostEnd))

		for _, want := range []int{4, 0} {
			b.do(func() error {
				removed, err := RemoveTC(b.dir)
				if removed != want {
					t.Errorf("%d programs removed, want %d", removed, want)
				}
				return err
			})
			b.wantOn(hostEnd, ingress, "theirs_in")
			b.wantOn(hostEnd, egress, "theirs_out")
			b.wantOn("other", ingress)
			b.wantOn("other", egress)
		}
		if b.qdisc("other") {
			t.Error("the qdisc is left")
		}
		if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the directory is left: %v", err)
		}
	})
}

func TestPinsNameTheirPlace(t *testing.T) {
	for pin, want := range map[string]place{
		"7-ingress": {7, ingress}, "123456-egress": {123456, egress},
		"7-clsact": {}, "ingress": {}, "7": {}, "": {}, "x-egress": {}, "7-ingress-egress": {},
	} {
		got, ok := placeOf(pin)
		if ok != (want != place{}) || ok && !cmp.Equal(got, want, cmp.AllowUnexported(place{})) {
			t.Errorf("%q is %v, %t; want %v", pin, got, ok, want)
		}
		if ok && pinOf(got) != pin {
			t.Errorf("%v has pin %q, want %q", got, pinOf(got), pin)
		}
	}
}
