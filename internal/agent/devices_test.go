// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// fakeKernel stands for the rows and the programs of devices. It notes in done what
// is asked of it.
type fakeKernel struct {
	mu       sync.Mutex // of what tests change meanwhile
	done     []string
	rows     map[uint32]datapath.Device
	applyErr error
	removed  []string
	closed   bool
}

func (k *fakeKernel) SetDevices(devices []datapath.Device) error {
	k.rows = map[uint32]datapath.Device{}
	var indices []uint32
	for _, d := range devices {
		k.rows[d.Index] = d
		indices = append(indices, d.Index)
	}
	slices.Sort(indices)
	k.done = append(k.done, fmt.Sprint("rows ", indices))
	return nil
}

func (k *fakeKernel) Apply(devices []attach.Device) (int, error) {
	k.done = append(k.done, fmt.Sprint("programs ", hooked(devices)))
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.applyErr != nil {
		return 0, k.applyErr
	}
	return len(hooked(devices)), nil
}

func (k *fakeKernel) Check() ([]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.removed, nil
}

func (k *fakeKernel) failWith(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.applyErr = err
}

// remove has Check find each time that these have been removed.
func (k *fakeKernel) remove(programs ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.removed = programs
}

func (k *fakeKernel) Close() error { k.closed = true; return nil }

// fakeDevices returns devices that run without watch, changed before that, and what
// becomes of them.
func fakeDevices(t *testing.T, change func(*devices)) (*devices, *fakeKernel, *observer.ObservedLogs) {
	core, logs := observer.New(zap.InfoLevel)
	kernel := &fakeKernel{}
	d := newDevices(attach.DeviceFilter{}, nil, nil, nil, zap.New(core))
	d.rows, d.programs, d.count = kernel, kernel, func(int) {}
	change(d)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); d.run(ctx) }()
	t.Cleanup(func() {
		stop()
		<-done
		if !kernel.closed {
			t.Error("the programs were not given up")
		}
	})
	return d, kernel, logs
}

func device(index int, name string) attach.Device {
	return attach.Device{Index: index, Name: name, Hooked: true, L2: true, L3Index: index}
}

// list returns the devices as they are told apart without the Node's addresses.
func list(devices ...attach.Device) listing { return listing{devices: devices} }

func messages(logs *observer.ObservedLogs) (out []string) {
	for _, entry := range logs.All() {
		out = append(out, entry.Message)
	}
	return out
}

func TestProgramsComeAfterTheRowsOfTheirDevicesAndGoBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, kernel, _ := fakeDevices(t, func(*devices) {})
		d.lists <- list(device(1, "a"), device(2, "b"))
		time.Sleep(3 * checkEvery)
		synctest.Wait()
		if len(kernel.done) > 0 {
			t.Errorf("%v before the tables hold anything", kernel.done)
		}
		d.ready.give()
		synctest.Wait()
		d.lists <- list(device(2, "b"), device(3, "c"))
		synctest.Wait()
		want := []string{
			"rows [1 2]", "programs [a b]", "rows [1 2]",
			"rows [1 2 3]", "programs [b c]", "rows [2 3]",
		}
		if diff := cmp.Diff(want, kernel.done); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

func TestAFailureIsToldOnceAndSoIsItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, kernel, logs := fakeDevices(t, func(*devices) {})
		d.ready.give()
		kernel.failWith(errors.New("no"))
		d.lists <- list(device(1, "a"))
		time.Sleep(10 * checkEvery)
		synctest.Wait()
		if s := d.State(); s.Problem != "no" || s.Attached != 0 || s.Devices != 1 {
			t.Errorf("state %+v", s)
		}
		kernel.failWith(nil)
		time.Sleep(2 * checkEvery)
		synctest.Wait()
		if s := d.State(); s.Problem != "" || s.Attached != 1 {
			t.Errorf("state %+v", s)
		}
		want := []string{
			"programs cannot be attached to devices; trying again", "programs are attached to devices at last", "programs are on devices",
		}
		if diff := cmp.Diff(want, messages(logs)); diff != "" {
			t.Errorf("log (-want +got):\n%s", diff)
		}
	})
}

// Two who quarrel over a device do not fill the log.
func TestRestoredProgramsAreToldOnceInAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		restored := 0
		d, kernel, logs := fakeDevices(t, func(d *devices) { d.count = func(n int) { restored += n } })
		d.ready.give()
		d.lists <- list(device(1, "a"))
		synctest.Wait()
		logs.TakeAll()
		kernel.remove("a ingress")
		time.Sleep(restoredAgain / 2)
		synctest.Wait()
		if n := logs.Len(); n != 1 {
			t.Errorf("%d lines in half a minute, want one", n)
		}
		if want := int(restoredAgain / 2 / checkEvery); restored < want-1 {
			t.Errorf("%d were counted, want about %d", restored, want)
		}
	})
}

func TestRestoredProgramsOfOneDeviceWhileAnotherFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		restored := 0
		d, kernel, logs := fakeDevices(t, func(d *devices) { d.count = func(n int) { restored += n } })
		d.ready.give()
		kernel.failWith(errors.New("no"))
		d.lists <- list(device(1, "a"), device(2, "b"))
		kernel.remove("b egress")
		time.Sleep(2 * checkEvery)
		synctest.Wait()
		if restored == 0 {
			t.Error("nobody has looked for programs that were removed")
		}
		if s := d.State(); s.Problem != "no" {
			t.Errorf("state %+v, want the failure", s)
		}
		if told := logs.FilterMessageSnippet("they are back").Len(); told != 1 {
			t.Errorf("%d lines tell of it, want one", told)
		}
	})
}

func TestDevicesLeftOutAreToldOnceForEachReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _, logs := fakeDevices(t, func(*devices) {})
		d.ready.give()
		out := func(index int, reason string) attach.Device {
			return attach.Device{Index: index, Name: fmt.Sprint("d", index), Unsupported: reason}
		}
		for _, devices := range [][]attach.Device{
			{device(1, "a"), out(2, "odd"), out(3, "odd")}, {device(1, "a"), out(3, "odd"), out(4, "odd"), out(5, "strange")},
		} {
			d.lists <- list(devices...)
			synctest.Wait()
		}
		told := logs.FilterMessage("devices are left out of the packet path").All()
		if len(told) != 2 || fmt.Sprint(told[0].ContextMap()["devices"]) != "[d2 d3]" || told[1].ContextMap()["reason"] != "strange" {
			t.Errorf("%v", told)
		}
		if want := []string{"d3: odd", "d4: odd", "d5: strange"}; !slices.Equal(d.State().Unsupported, want) {
			t.Errorf("state %+v, want %v", d.State(), want)
		}
	})
}

// Which devices are pods' can be told only when the Node's addresses are known.
func TestRowsOfAnEarlierAgentHoldUntilTheNodeIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, kernel, _ := fakeDevices(t, func(d *devices) {
			d.held = map[uint32]datapath.Device{1: {Index: 1, L3Index: 1}, 9: {Index: 9}}
		})
		d.ready.give()
		mistaken := device(1, "uplink")
		mistaken.Pod = true
		d.lists <- list(mistaken, device(2, "new"))
		synctest.Wait()
		if kernel.rows[1].Pod || kernel.rows[2].Index != 2 || len(kernel.rows) != 2 {
			t.Errorf("rows %v, want that of the uplink as it was", kernel.rows)
		}
		d.setAddresses([]netip.Addr{netip.MustParseAddr("192.0.2.1")})
		d.lists <- list(mistaken) // of a moment before
		synctest.Wait()
		if kernel.rows[1].Pod {
			t.Errorf("rows %v, of a list that did not know the Node's addresses", kernel.rows)
		}
		d.lists <- listing{[]attach.Device{mistaken}, d.addresses()}
		synctest.Wait()
		if !kernel.rows[1].Pod {
			t.Errorf("rows %v, want what is known now", kernel.rows)
		}
	})
}

func TestOtherVersionsAreTakenOverWhenOursServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		took := 0
		d, kernel, _ := fakeDevices(t, func(d *devices) { d.takeOver = func() { took++ } })
		d.ready.give()
		kernel.failWith(errors.New("no"))
		d.lists <- list(device(1, "a"))
		d.synced.give()
		time.Sleep(2 * checkEvery)
		synctest.Wait()
		if took != 0 {
			t.Error("the others were removed before ours were attached")
		}
		kernel.failWith(nil)
		time.Sleep(5 * checkEvery)
		synctest.Wait()
		if took != 1 {
			t.Errorf("the others were removed %d times", took)
		}
	})
}

// settingsIn makes files of a /proc/sys.
func settingsIn(t *testing.T, files map[string]string) string {
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestPortsThatOthersUseAreNamed(t *testing.T) {
	usual := settingsIn(t, map[string]string{"net/ipv4/ip_local_port_range": "32768\t60999\n"})
	for _, tt := range []struct {
		name        string
		root        string
		first, last uint16
		want        int
	}{
		{"our default", usual, 61000, 65535, 0},
		{"the last port of processes", usual, 60999, 61010, 1},
		{"the first NodePort", usual, 20000, 30000, 1},
		{"both", usual, 1024, 65535, 2},
		{"between them and below", usual, 1024, 29999, 0},
		{"a node that does not say", t.TempDir(), 40000, 50000, 0},
	} {
		if got := overlaps(tt.root, datapath.PortRange{First: tt.first, Last: tt.last}); len(got) != tt.want {
			t.Errorf("%s: %q, want %d", tt.name, got, tt.want)
		}
	}
}

func TestSettingsThatKeepTheNodeFromForwardingAreNamed(t *testing.T) {
	off := settingsIn(t, map[string]string{"net/ipv4/ip_forward": "0\n", "net/ipv6/conf/all/forwarding": "0\n"})
	on := settingsIn(t, map[string]string{"net/ipv4/ip_forward": "1\n", "net/ipv6/conf/all/forwarding": "1\n"})
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, tt := range []struct {
		name      string
		root      string
		addresses []netip.Addr
		want      []string
	}{
		{"both families", off, []netip.Addr{v4, v6}, []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"}},
		{"one family", off, []netip.Addr{v4}, []string{"net.ipv4.ip_forward"}},
		{"a node that forwards", on, []netip.Addr{v4, v6}, nil},
		{"a node without IPv6", t.TempDir(), []netip.Addr{v4, v6}, nil},
	} {
		if got := notForwarding(tt.root, tt.addresses); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
