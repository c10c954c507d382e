// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

func TestDeviceFilters(t *testing.T) {
	for _, tt := range []struct {
		text  string
		auto  bool
		names []string
		not   []string
	}{
		{text: "auto", auto: true, not: []string{"eth0"}},
		{text: " auto ", auto: true},
		{text: "eth0", names: []string{"eth0"}, not: []string{"eth01", "veth0", "eth1"}},
		{text: "eth*,cali*", names: []string{"eth0", "eth", "cali1a2b"}, not: []string{"veth0", "lo"}},
		{text: " eth0 , ens?f[01] ", names: []string{"eth0", "ens1f0"}, not: []string{"ens1f2", "ens12f0"}},
		{text: "autobahn0", names: []string{"autobahn0"}},
		{text: "eth0.10", names: []string{"eth0.10"}, not: []string{"eth0x10"}},
	} {
		t.Run(tt.text, func(t *testing.T) {
			f, err := ParseDevices(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			if f.auto() != tt.auto {
				t.Errorf("auto is %t, want %t", f.auto(), tt.auto)
			}
			for _, name := range tt.names {
				if !f.names(attrs(name)) {
					t.Errorf("%s is not named", name)
				}
			}
			for _, name := range tt.not {
				if f.names(attrs(name)) {
					t.Errorf("%s is named", name)
				}
			}
			if again, err := ParseDevices(f.String()); err != nil || again.String() != f.String() {
				t.Errorf("%q is read back as %q, %v", f, again, err)
			}
		})
	}
	for _, text := range []string{"", ",", "eth0,", "auto,eth0", "eth0,auto", "lo", "eth0,lo", "eth[0", "a/b", "eth 0", `eth\0`} {
		if f, err := ParseDevices(text); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("devices %q: ", text)) {
			t.Errorf("%q is read as %q with error %v", text, f, err)
		}
	}
	other := attrs("enp3s0")
	other.AltNames = []string{"uplink"}
	if f, _ := ParseDevices("uplink"); !f.names(other) {
		t.Error("a device is not found by its other name")
	}
}

// deviceRecorder keeps what a watch of devices has reported.
type deviceRecorder struct {
	mu      sync.Mutex
	reports [][]Device
}

func (r *deviceRecorder) report(devices []Device) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reports = append(r.reports, devices)
}

// count returns how many lists have been reported.
func (r *deviceRecorder) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.reports)
}

// latest returns the devices of the last list by their names.
func (r *deviceRecorder) latest() map[string]Device {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.reports) == 0 {
		return nil
	}
	out := map[string]Device{}
	for _, d := range r.reports[len(r.reports)-1] {
		out[d.Name] = d
	}
	return out
}

// want waits until the last list satisfies ok.
func (r *deviceRecorder) want(t *testing.T, what string, ok func(map[string]Device) bool) {
	t.Helper()
	testutil.Eventually(t, testutil.Patience(), what, func() error {
		if got := r.latest(); got == nil || !ok(got) {
			return fmt.Errorf("devices are %+v", got)
		}
		return nil
	})
}

// watchDevices starts WatchDevices in the namespace.
func watchDevices(t *testing.T, ns *sandbox.Namespace, devices string, nodeAddresses ...netip.Addr) *deviceRecorder {
	t.Helper()
	filter, err := ParseDevices(devices)
	if err != nil {
		t.Fatal(err)
	}
	r := &deviceRecorder{}
	start(t, ns, func(ctx context.Context) error {
		return WatchDevices(ctx, filter, func() []netip.Addr { return nodeAddresses }, r.report)
	})
	return r
}

// deviceNode is a node as kind makes it, itself a container with a veth for an
// uplink, with one device of each kind that every kernel can make.
func deviceNode(t *testing.T) (node *sandbox.Node, outside *sandbox.Namespace) {
	t.Helper()
	node = testutil.Node(t)
	pod, err := node.AddPod("pod", podAddr) // veth0, a port of cni0
	if err != nil {
		t.Fatal(err)
	}
	outside, err = node.AddPod("outside") // veth1
	if err != nil {
		t.Fatal(err)
	}
	err = node.Namespace().Configure(strings.NewReplacer("POD", pod.Name(), "OUTSIDE", outside.Name()).Replace(`
		link add eth0 type veth peer name up0 netns OUTSIDE
		link set eth0 up
		addr add 172.18.0.2/16 dev eth0
		addr add 2001:db8::2/64 dev eth0 nodad
		route add default via 172.18.0.1
		link add storage0 type veth peer name up1 netns OUTSIDE
		link set storage0 up
		addr add 10.9.0.2/24 dev storage0
		route add 10.10.0.0/16 via 10.9.0.1 table 100
		link add cali1 type veth peer name cali1 netns POD
		link add both1 type veth peer name both2
		link add vxlan0 type vxlan id 5 dstport 4789
		addr add 10.244.7.0/32 dev vxlan0
		tuntap add tap0 mode tap
		tuntap add tun0 mode tun
		link add ifb0 type ifb
		link add empty0 type bridge
		link add overlay0 type bridge
		link add vxlan1 type vxlan id 6 dstport 4790
		link set vxlan1 master overlay0
		link add inpod1 type veth peer name over1 netns POD
		link set inpod1 master overlay0
		link set veth1 nomaster
	`))
	if err != nil {
		t.Fatal(err)
	}
	return node, outside
}

func TestDevicesOfANode(t *testing.T) {
	node, _ := deviceNode(t)
	type device struct {
		Kind     string
		Hooked   bool
		L2       bool
		Pod      bool
		L3       string
		Source4  string
		Source6  string
		WithMAC  bool
		NotUsual string
	}
	const four, six = "172.18.0.2", "2001:db8::2" // the node's
	want := map[string]device{
		"eth0":     {Kind: "veth", Hooked: true, L2: true, L3: "eth0", Source4: four, Source6: six, WithMAC: true},
		"storage0": {Kind: "veth", Hooked: true, L2: true, L3: "storage0", Source4: "10.9.0.2", Source6: six, WithMAC: true},
		"cni0":     {Kind: "bridge", L2: true, Pod: true, L3: "cni0", Source4: "10.244.0.1", Source6: "fd00:244::1", WithMAC: true},
		"veth0":    {Kind: "veth", Hooked: true, L2: true, Pod: true, L3: "cni0", Source4: "10.244.0.1", Source6: "fd00:244::1", WithMAC: true},
		"veth1":    {Kind: "veth", Hooked: true, L2: true, Pod: true, L3: "veth1", Source4: four, Source6: six, WithMAC: true},
		"cali1":    {Kind: "veth", Hooked: true, L2: true, Pod: true, L3: "cali1", Source4: four, Source6: six, WithMAC: true},
		"both1":    {Kind: "veth", Hooked: true, L2: true, L3: "both1", Source4: four, Source6: six, WithMAC: true},
		"both2":    {Kind: "veth", Hooked: true, L2: true, L3: "both2", Source4: four, Source6: six, WithMAC: true},
		"vxlan0":   {Kind: "vxlan", Hooked: true, L2: true, L3: "vxlan0", Source4: "10.244.7.0", Source6: six, WithMAC: true},
		"tap0":     {Kind: "tap", Hooked: true, L2: true, Pod: true, L3: "tap0", Source4: four, Source6: six, WithMAC: true},
		"tun0":     {Kind: "tun", Hooked: true, L3: "tun0", Source4: four, Source6: six},
		"empty0":   {Kind: "bridge", L2: true, L3: "empty0", Source4: four, Source6: six, WithMAC: true},
		"overlay0": {Kind: "bridge", L2: true, L3: "overlay0", Source4: four, Source6: six, WithMAC: true},
		"vxlan1":   {Kind: "vxlan", Hooked: true, L2: true, L3: "overlay0", Source4: four, Source6: six, WithMAC: true},
		"inpod1":   {Kind: "veth", Hooked: true, L2: true, Pod: true, L3: "overlay0", Source4: four, Source6: six, WithMAC: true},
	}
	r := watchDevices(t, node.Namespace(), "auto", netip.MustParseAddr("172.18.0.2"), netip.MustParseAddr("2001:db8::2"))
	r.want(t, "the start", func(got map[string]Device) bool { return len(got) == len(want) })
	names := map[int]string{}
	for name, d := range r.latest() {
		names[d.Index] = name
	}
	got := map[string]device{}
	for name, d := range r.latest() {
		got[name] = device{
			Kind: d.Kind, Hooked: d.Hooked, L2: d.L2, Pod: d.Pod, L3: names[d.L3Index], Source4: d.Source4.String(),
			Source6: d.Source6.String(), WithMAC: len(d.MAC) == 6, NotUsual: d.Unsupported,
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
	if d := r.latest(); !slices.Equal(d["veth0"].MAC, d["cni0"].MAC) {
		t.Errorf("the MAC of veth0 is %s, want that of its bridge, %s", d["veth0"].MAC, d["cni0"].MAC)
	}
	if d := r.latest(); !d["eth0"].Up || d["cali1"].Up {
		t.Error("eth0 should be up, cali1 down")
	}
}

func TestAListOfDevicesHasProgramsOnThese(t *testing.T) {
	node, _ := deviceNode(t)
	r := watchDevices(t, node.Namespace(), "eth*,cni0,ifb?,lo*")
	r.want(t, "the start", func(got map[string]Device) bool { return len(got) > 0 })
	var hooked []string
	for name, d := range r.latest() {
		if d.Hooked {
			hooked = append(hooked, name)
		}
	}
	slices.Sort(hooked)
	if want := []string{"cni0", "eth0", "ifb0"}; !slices.Equal(hooked, want) {
		t.Errorf("programs belong on %q, want %q", hooked, want)
	}
	// Whether an answer comes back here depends on devices without programs too.
	if d, ok := r.latest()["veth0"]; !ok || !d.Pod {
		t.Errorf("the pod's link is %+v", d)
	}
}

// TestDevicesAreReportedWithinASecond follows one change after the other.
func TestDevicesAreReportedWithinASecond(t *testing.T) {
	node, _ := deviceNode(t)
	ns := node.Namespace()
	r := watchDevices(t, ns, "auto", netip.MustParseAddr("172.18.0.2"))
	pod := func(name string, want bool) func(map[string]Device) bool {
		return func(got map[string]Device) bool { d, ok := got[name]; return ok && d.Pod == want }
	}
	source := func(name, want string) func(map[string]Device) bool {
		return func(got map[string]Device) bool { return got[name].Source4 == netip.MustParseAddr(want) }
	}
	missing := func(name string) func(map[string]Device) bool {
		return func(got map[string]Device) bool { _, ok := got[name]; return !ok }
	}
	r.want(t, "the start", pod("veth0", true))
	for _, step := range []struct {
		what     string
		commands string
		want     func(map[string]Device) bool
	}{
		{"a new device", "tuntap add tap1 mode tap", pod("tap1", true)},
		{"another name", "link set tap1 name vm1", pod("vm1", true)},
		{"a device that is gone", "link del vm1", missing("vm1")},
		{"a device is brought up", "link set cali1 up", func(got map[string]Device) bool { return got["cali1"].Up }},
		{"an address", "addr add 10.1.1.1/32 dev cali1", source("cali1", "10.1.1.1")},
		{"no address", "addr del 10.1.1.1/32 dev cali1", source("cali1", "172.18.0.2")},
		{"a route through a pod", "route add 10.77.0.0/16 via 10.244.0.2 dev cni0", pod("veth0", false)},
		{"... and its bridge", "", pod("cni0", false)},
		{"no such route", "route del 10.77.0.0/16 via 10.244.0.2 dev cni0", pod("veth0", true)},
		{"such a route in another table", "route add 10.77.0.0/16 via 10.244.0.2 dev cni0 table 77", pod("veth0", false)},
		{"no such route there", "route del 10.77.0.0/16 via 10.244.0.2 dev cni0 table 77", pod("veth0", true)},
		{"an IPv6 route through a pod", "route add 2001:db8:7::/48 via fd00:244::2 dev cni0", pod("cni0", false)},
		{"no such IPv6 route", "route del 2001:db8:7::/48 via fd00:244::2 dev cni0", pod("cni0", true)},
		{"one hop of several", "route add 10.77.0.0/16 nexthop via 172.18.0.9 dev eth0 nexthop via 10.244.0.2 dev cni0", pod("veth0", false)},
		{"no hop", "route del 10.77.0.0/16", pod("veth0", true)},
		{"a tunnel at the pods' bridge", "link set vxlan0 master cni0", pod("cni0", false)},
		{"... whose other ports are still pods'", "", pod("veth0", true)},
		{"no tunnel there", "link set vxlan0 nomaster", pod("cni0", true)},
		{"the Node's address on the pods' bridge", "addr add 172.18.0.2/32 dev cni0", pod("veth0", false)},
		{"no such address", "addr del 172.18.0.2/32 dev cni0", pod("veth0", true)},
		{"the bridge's last port goes", "link set veth0 nomaster", pod("cni0", false)},
	} {
		if err := ns.Configure(step.commands); err != nil {
			t.Fatal(err)
		}
		r.want(t, step.what, step.want)
	}
}

func TestDevicesAreReportedOnlyWhenTheyChange(t *testing.T) {
	node, _ := deviceNode(t)
	ns := node.Namespace()
	r := watchDevices(t, ns, "auto")
	r.want(t, "the start", func(got map[string]Device) bool { return len(got) > 0 })
	before := r.count()
	// Nothing that matters, and at last something that does.
	err := ns.Configure(`
		link set cali1 txqueuelen 500
		route add 10.66.0.0/16 via 172.18.0.7
		addr add 172.18.0.44/32 dev eth0
		link add ifb7 type ifb
		link set ifb0 up
	`)
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Configure("tuntap add last0 mode tap"); err != nil {
		t.Fatal(err)
	}
	r.want(t, "a new device", func(got map[string]Device) bool { _, ok := got["last0"]; return ok })
	// A new link can be seen before it has got all that it begins with.
	if got := r.count() - before; got > 2 {
		t.Errorf("%d lists were reported for one new device", got)
	}
}

// TestDevicesAfterAnOverrun makes more changes than the socket holds while the
// first list is being worked on.
func TestDevicesAfterAnOverrun(t *testing.T) {
	node, _ := deviceNode(t)
	ns := node.Namespace()
	r := &deviceRecorder{}
	var mu sync.Mutex
	made := 0
	subscribe := func() (*nl.NetlinkSocket, error) {
		mu.Lock()
		defer mu.Unlock()
		made++
		socket, err := subscribeDevices()
		if err == nil && made == 1 {
			err = socket.SetReceiveBufferSize(1, false)
		}
		return socket, err
	}
	overrun := sync.OnceFunc(func() {
		var commands strings.Builder
		for i := range 50 {
			fmt.Fprintf(&commands, "tuntap add more%d mode tap\n", i)
		}
		if err := ns.Configure(commands.String()); err != nil {
			t.Error(err)
		}
	})
	start(t, ns, func(ctx context.Context) error {
		w := deviceWatch{
			nodeAddresses: func() []netip.Addr { return nil }, subscribe: subscribe, relist: time.Hour,
			changed: func(devices []Device) {
				r.report(devices)
				overrun()
			},
		}
		return w.run(ctx)
	})
	testutil.Eventually(t, testutil.Patience(), "what the socket had no room for", func() error {
		if _, ok := r.latest()["more49"]; !ok {
			return fmt.Errorf("%d devices", len(r.latest()))
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	if made < 2 {
		t.Error("the socket was not replaced")
	}
}

// TestNodeAddressesThatChangeLater has no message from the kernel to go by.
func TestNodeAddressesThatChangeLater(t *testing.T) {
	node, _ := deviceNode(t)
	var mu sync.Mutex
	var own []netip.Addr
	r := &deviceRecorder{}
	start(t, node.Namespace(), func(ctx context.Context) error {
		w := deviceWatch{
			nodeAddresses: func() []netip.Addr { mu.Lock(); defer mu.Unlock(); return own },
			subscribe:     subscribeDevices, relist: 10 * time.Millisecond, changed: r.report,
		}
		return w.run(ctx)
	})
	r.want(t, "a pod's bridge", func(got map[string]Device) bool { return got["cni0"].Pod })
	mu.Lock()
	own = []netip.Addr{sandbox.GatewayIPv4.Addr()}
	mu.Unlock()
	r.want(t, "a bridge with the Node's address", func(got map[string]Device) bool { return !got["cni0"].Pod })
}
