// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// soon is how long a test waits for what is to happen within a second: the machine
// may be busy with others.
const soon = 10 * time.Second

// withinASecond does something that takes less than that, at least once in a few
// times: a busy machine is late now and then, what waits for a timer is always.
func withinASecond(t *testing.T, what string, f func()) {
	t.Helper()
	var took []time.Duration
	for range 5 {
		start := time.Now()
		f()
		if took = append(took, time.Since(start)); time.Since(start) < time.Second {
			return
		}
	}
	t.Errorf("%s took %v, want less than a second", what, took)
}

var directions = []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress}

// inNode runs f in the node's network namespace.
func (c *cluster) inNode(f func() error) {
	c.t.Helper()
	if err := c.node.Namespace().Do(f); err != nil {
		c.t.Fatal(err)
	}
}

// devicesOf returns the indices of the node's devices by name.
func (c *cluster) devicesOf() map[string]int {
	c.t.Helper()
	indices := map[string]int{}
	c.inNode(func() error {
		list, err := net.Interfaces()
		for _, d := range list {
			indices[d.Name] = d.Index
		}
		return err
	})
	return indices
}

// programsOn returns our links on a device of the node, by direction: those whose
// programs are called as ours are.
func (c *cluster) programsOn(device string) (map[ebpf.AttachType]link.ID, error) {
	ours := map[ebpf.AttachType]link.ID{}
	err := c.node.Namespace().Do(func() error {
		d, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		for _, direction := range directions {
			got, err := link.QueryPrograms(link.QueryOptions{Target: d.Index, Attach: direction})
			if err != nil {
				return err
			}
			for _, p := range got.Programs {
				name, err := programName(p.ID)
				if err != nil {
					return err
				}
				if id, ok := p.LinkID(); ok && strings.HasPrefix(name, "tc_") {
					ours[direction] = id
				}
			}
		}
		return nil
	})
	return ours, err
}

func programName(id ebpf.ProgramID) (string, error) {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "", err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "", err
	}
	return info.Name, nil
}

// hasPrograms waits until a device has a program of ours in each direction and
// returns their links. Zero programs are waited for when some is false.
func (c *cluster) hasPrograms(device string, some bool, within time.Duration) (links map[ebpf.AttachType]link.ID) {
	c.t.Helper()
	want := 0
	if some {
		want = len(directions)
	}
	testutil.Eventually(c.t, within, fmt.Sprintf("%d programs on %s", want, device), func() (err error) {
		if links, err = c.programsOn(device); err != nil {
			return err
		}
		if len(links) != want {
			return fmt.Errorf("%d of ours", len(links))
		}
		return nil
	})
	return links
}

// uplink gives the node a device that leads to nobody.
func (c *cluster) uplink(name string) {
	c.t.Helper()
	other := name + "x"
	if err := c.node.Namespace().Configure(fmt.Sprintf(
		"link add %s type veth peer name %s\nlink set %s up\nlink set %s up\n", name, other, name, other)); err != nil {
		c.t.Fatal(err)
	}
}

// theirs puts a program that lets everything pass on both sides of a device, and
// returns a test of whether it is still there.
func (c *cluster) theirs(device string) (there func() error) {
	c.t.Helper()
	prog, err := passing()
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = prog.Close() })
	var links []link.Link
	c.inNode(func() error {
		d, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		for _, direction := range directions {
			l, err := link.AttachTCX(link.TCXOptions{Interface: d.Index, Program: prog, Attach: direction})
			if err != nil {
				return err
			}
			links = append(links, l)
		}
		return nil
	})
	c.t.Cleanup(func() {
		for _, l := range links {
			_ = l.Close()
		}
	})
	return func() error {
		for _, l := range links {
			info, err := l.Info()
			if err != nil {
				return err
			}
			if info.TCX().Ifindex == 0 {
				return errors.New("another's program is gone")
			}
		}
		return nil
	}
}

func passing() (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "passing", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
}

func TestProgramsFollowTheNodesDevices(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.manifests("web.yaml", service("web", 10, webPort))
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	c.uplink("up0")
	there := c.theirs("up0")
	agent := c.start()
	c.hasPrograms("up0", true, soon)
	c.hasPrograms("veth0", true, soon) // the client's
	c.hasPrograms("cni0", false, soon) // its ports have them

	var pod *sandbox.Namespace
	var name string
	number := 50
	withinASecond(t, "putting programs on a new pod's link", func() {
		before := c.devicesOf()
		pod = c.pod(fmt.Sprint("late", number), number)
		number++
		for device := range c.devicesOf() {
			if before[device] == 0 {
				name = device
			}
		}
		c.hasPrograms(name, true, soon)
	})
	pin := filepath.Join(datapath.DevicesPath(c.bpfRoot), fmt.Sprintf("%d-ingress", c.devicesOf()[name]))
	testutil.Eventually(t, soon, "the program of the new pod is pinned", func() error {
		_, err := os.Stat(pin)
		return err
	})
	if err := c.node.RemovePod(pod); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, soon, "nothing is left of the pod's link", func() error {
		if _, err := os.Stat(pin); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("pin: %w", err)
		}
		return nil
	})

	out, err := c.fairleadInNode("inspect", "devices", "--bpf-root", c.bpfRoot)
	if err != nil || !strings.Contains(out, "up0") || strings.Contains(out, name+" ") {
		t.Errorf("inspect devices: %v\n%s", err, out)
	}
	if err := there(); err != nil {
		t.Error(err)
	}
	saysOnce(t, agent.Logs, "programs are on devices")
	if strings.Contains(agent.Logs(), "does not forward") {
		t.Error("a node that forwards is said not to")
	}
}

// fairleadInNode is fairlead for what looks at the node's devices.
func (c *cluster) fairleadInNode(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := c.node.Namespace().Command(ctx, testutil.BuildBinary(c.t), args...).CombinedOutput()
	return string(out), err
}

func TestProgramsThatSomebodyRemovesAreBackWithinASecond(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.uplink("up0")
	agent := c.start()
	removed := 0
	withinASecond(t, "putting programs back", func() {
		links := c.hasPrograms("up0", true, soon)
		for _, direction := range directions {
			l, err := link.NewFromID(links[direction])
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if err := l.Detach(); err != nil {
				t.Fatal(err)
			}
			removed++
		}
		c.hasPrograms("up0", true, soon)
	})
	says(t, agent.Logs, "somebody has removed programs from devices")
	says(t, agent.Logs, "up0 ingress")
	testutil.Eventually(t, 5*time.Second, "they are counted", func() error {
		if n := metric(t, agent, "fairlead_tc_programs_restored_total"); n != float64(removed) {
			return fmt.Errorf("fairlead_tc_programs_restored_total is %v, want %d", n, removed)
		}
		return nil
	})
}

// flow puts a flow of the service ID 1 into the kernel's table by hand: both its
// entries, as of the last packet being idle ago. The result ends it.
func (c *cluster) flow(client string, idle time.Duration) (end func()) {
	c.t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		c.t.Fatal(err)
	}
	tuple := func(src, dst netip.AddrPort) []byte {
		a, b := src.Addr().As16(), dst.Addr().As16()
		out := append(a[:], b[:]...)
		return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(out, src.Port()), dst.Port())
	}
	key := func(src, dst netip.AddrPort) []byte { return append(tuple(src, dst), unix.IPPROTO_TCP, 0, 0, 0) }
	const established, answers = 1 | 2, 1
	value := func(src, dst netip.AddrPort, flags uint32) []byte {
		out := tuple(src, dst)
		for _, n := range []uint32{1, 1, 1, uint32(now.Sec - int64(idle/time.Second)), established, flags} {
			out = binary.NativeEndian.AppendUint32(out, n)
		}
		return append(out, make([]byte, 12)...)
	}
	from, vip, backend := netip.MustParseAddrPort(client), netip.MustParseAddrPort("10.96.0.10:80"), netip.MustParseAddrPort("10.244.0.11:9000")
	flows := c.pinnedMap("flows")
	if err := errors.Join(
		flows.Put(key(from, vip), value(from, backend, 0)),
		flows.Put(key(backend, from), value(vip, from, answers)),
	); err != nil {
		c.t.Fatal(err)
	}
	return func() {
		c.t.Helper()
		if err := errors.Join(flows.Delete(key(from, vip)), flows.Delete(key(backend, from))); err != nil {
			c.t.Fatal(err)
		}
	}
}

// flowClients returns the clients that inspect shows.
func (c *cluster) flowClients(args ...string) []string {
	c.t.Helper()
	out, err := c.fairlead(append([]string{"inspect", "flows", "-o", "json", "--bpf-root", c.bpfRoot}, args...)...)
	if err != nil {
		c.t.Fatalf("inspect: %v: %s", err, out)
	}
	var rows []struct{ Client struct{ Address string } }
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		c.t.Fatalf("inspect: %v in %s", err, out)
	}
	clients := []string{}
	for _, r := range rows {
		clients = append(clients, r.Client.Address)
	}
	return clients
}

func TestFlowsAndLinksOutliveTheAgentUntilThePathIsOff(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.backend(11)
	c.service("web", 10, 11)
	c.uplink("up0")
	there := c.theirs("up0")
	agent := c.start()
	before := c.hasPrograms("up0", true, soon)
	c.flow("192.0.2.7:1234", 0)
	c.flow("192.0.2.8:1234", 48*time.Hour)
	testutil.Eventually(t, 15*time.Second, "the flow that is over is ended", func() error {
		if got := c.flowClients(); len(got) != 1 || got[0] != "192.0.2.7" {
			return fmt.Errorf("flows of %q", got)
		}
		if n := metric(t, agent, "fairlead_flows", `protocol="TCP"`); n != 1 {
			return fmt.Errorf("fairlead_flows is %v", n)
		}
		return nil
	})
	if got := c.flowClients("--vip=10.96.0.10:80", "--backend=10.244.0.11"); len(got) != 1 {
		t.Errorf("flows of %q to this VIP and backend, want the one", got)
	}
	if got := c.flowClients("--client=192.0.2.9"); len(got) != 0 {
		t.Errorf("flows of %q, want none of that client", got)
	}

	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		if err := agent.Kill(signal); err != nil {
			t.Fatal(err)
		}
		_ = agent.Wait()
		c.samePrograms(before)
		agent = c.start()
		says(t, agent.Logs, "programs are on devices")
		c.samePrograms(before)
		if got := c.flowClients(); len(got) != 1 {
			t.Errorf("after %v and a restart there are flows of %q", signal, got)
		}
	}

	if err := agent.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	off := c.start("--packet-path=off")
	c.hasPrograms("up0", false, soon)
	c.hasPrograms("veth0", false, soon)
	says(t, off.Logs, "the packet path is off; its programs are removed")
	says(t, off.Logs, "the packet path is off; its flows are ended")
	if got := c.flowClients(); len(got) != 0 {
		t.Errorf("with the packet path off there are flows of %q", got)
	}
	if rows := c.pinnedMap("devices").Iterate(); rows.Next(new(uint32), make([]byte, 48)) {
		t.Error("with the packet path off there are devices")
	}
	c.wantPackets(false, "")
	if err := there(); err != nil {
		t.Error(err)
	}
}

// samePrograms wants the links on up0 to be these.
func (c *cluster) samePrograms(want map[ebpf.AttachType]link.ID) {
	c.t.Helper()
	got, err := c.programsOn("up0")
	if err != nil {
		c.t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		c.t.Errorf("links %v, want %v, as they were", got, want)
	}
}

// wantPackets waits until status says of the packet path whether it is on, and
// what is wrong with it.
func (c *cluster) wantPackets(on bool, problem string) {
	c.t.Helper()
	testutil.Eventually(c.t, 10*time.Second, "status of the packet path", func() error {
		// Its exit code is about other things, too.
		out, _ := c.node.Namespace().Command(context.Background(), testutil.BuildBinary(c.t),
			"status", "-o", "json", "--bpf-root", c.bpfRoot, "--cgroup-root", c.cgroup.Path()).Output()
		var got struct {
			PacketPath struct {
				On                bool
				Problem           string
				Devices, Attached int
				Unsupported       []string
			}
		}
		if err := json.Unmarshal(out, &got); err != nil {
			return fmt.Errorf("%w in %s", err, out)
		}
		p := got.PacketPath
		if p.On != on || p.Problem != problem || p.Attached != p.Devices || p.Unsupported == nil ||
			(on && problem == "") != (p.Devices > 0) {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
}

func TestOnlyTheDevicesThatAreListedHavePrograms(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.uplink("up0")
	c.uplink("wan0")
	agent := c.start()
	c.hasPrograms("up0", true, soon)
	c.wantPackets(true, "")
	if err := agent.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	c.wantPackets(true, "") // by what it has left
	agent = c.start("--devices=w*0,none")
	c.hasPrograms("wan0", true, soon)
	for _, device := range []string{"up0", "wan0x", "veth0"} {
		c.hasPrograms(device, false, soon)
	}
	c.uplink("wlan0")
	c.hasPrograms("wlan0", true, soon)
	if err := agent.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	agent = c.start("--devices=none")
	c.hasPrograms("wan0", false, soon)
	saysOnce(t, agent.Logs, "the node has none of --devices")
	c.wantPackets(true, "the node has none of --devices")
}

func TestCleanupTakesProgramsOffDevices(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.uplink("up0")
	there := c.theirs("up0")
	agent := c.start()
	c.hasPrograms("up0", true, soon)
	if err := agent.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	out, err := c.fairleadInNode("cleanup", "--bpf-root", c.bpfRoot, "--cgroup-root", c.cgroup.Path())
	if err != nil || !strings.Contains(out, "detached from devices ") {
		t.Errorf("cleanup: %v\n%s", err, out)
	}
	c.hasPrograms("up0", false, soon)
	c.hasPrograms("veth0", false, soon)
	if _, err := os.Stat(c.bpfRoot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left at %s: %v", c.bpfRoot, err)
	}
	if err := there(); err != nil {
		t.Error(err)
	}
}

func TestDevicesAreTakenOverFromOtherVersions(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.uplink("up0")
	index := c.devicesOf()["up0"]
	dir := filepath.Join(c.bpfRoot, "v77", filepath.Base(datapath.DevicesPath("")))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	prog, err := passing()
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	pin := filepath.Join(dir, fmt.Sprintf("%d-ingress", index))
	var old link.Link
	c.inNode(func() error {
		if old, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXIngress}); err != nil {
			return err
		}
		return old.Pin(pin)
	})
	defer old.Close()
	agent := c.start()
	c.hasPrograms("up0", true, soon)
	ours := filepath.Join(datapath.DevicesPath(c.bpfRoot), filepath.Base(pin))
	testutil.Eventually(t, 10*time.Second, "the other version's pin is ours", func() error {
		if _, err := os.Stat(pin); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("it is still there: %w", err)
		}
		_, err := os.Stat(ours)
		return err
	})
	info, err := old.Info()
	if err != nil {
		t.Fatal(err)
	}
	if got := c.hasPrograms("up0", true, soon)[ebpf.AttachTCXIngress]; got != info.ID || info.TCX().Ifindex != uint32(index) {
		t.Errorf("our program is on link %d, want %d, as it was on device %d", got, info.ID, index)
	}
	says(t, agent.Logs, "programs are on devices")
	testutil.Eventually(t, 10*time.Second, "the other version's directory is gone", func() error {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s: %w", dir, err)
		}
		return nil
	})
}

func TestWhatKeepsThePacketPathFromWorkingIsSaidOnce(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	c.uplink("up0")
	for key, value := range map[string]string{"ipv4/ip_forward": "0", "ipv4/ip_local_port_range": "60000 62000"} {
		c.inNode(func() error { return os.WriteFile("/proc/sys/net/"+key, []byte(value), 0) })
	}
	if err := c.node.Namespace().Configure("link add link up0 name mac0 type macvlan\n"); err != nil {
		t.Fatal(err)
	}
	agent := c.start()
	for _, want := range []string{
		"net.ipv4.ip_forward", "60000-62000: connections of processes on the node", "devices are left out of the packet path",
	} {
		saysOnce(t, agent.Logs, want)
	}
	says(t, agent.Logs, "mac0")
}

func TestServiceIDsRestWhileFlowsHaveThem(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.service("old", 10, 11)
	agent := c.start("--max-services=3") // IDs 1 and 2
	end := c.flow("192.0.2.7:1234", 0)
	c.write("old.yaml", "")
	c.service("new", 11, 11)
	has := func(want int) func() error {
		return func() error {
			if got := c.frontends(); len(got) != want || got["10.96.0.10:80/TCP"] != 0 {
				return fmt.Errorf("frontends %v, want %d of the new Service", got, want)
			}
			return nil
		}
	}
	testutil.Eventually(t, 20*time.Second, "one port of the new Service has an ID", has(1))
	says(t, agent.Logs, "raise --max-services")
	end()
	testutil.Eventually(t, 60*time.Second, "both have", has(2))
}
