// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/logfield"
)

const (
	// checkEvery is how often devices are looked at for programs that somebody
	// has removed, and how soon what failed is tried again.
	checkEvery = 500 * time.Millisecond
	// restoredAgain is how long nothing is said of a program that is removed again
	// and again.
	restoredAgain = time.Minute
)

// devices keeps the programs of the packet path on the devices of the node. Its
// goroutine, run, owns what is not shared; another one, watch, sends it the devices.
type devices struct {
	log    *zap.Logger
	filter attach.DeviceFilter
	rows   interface {
		SetDevices([]datapath.Device) error
	}
	programs interface {
		Apply([]attach.Device) (attached int, err error)
		Check() (restored []string, err error)
		Close() error
	}
	count    func(restored int)
	takeOver func() // takes away what other versions have left on devices

	lists  chan []attach.Device
	ready  signal // programs may be attached
	synced signal // the tables say what the source says

	held     map[uint32]datapath.Device // rows that programs may be using
	want     []attach.Device
	behind   bool // the kernel does not have what is wanted
	attached int  // devices that have their programs
	begun    bool // it has had it once
	checked  bool // that the node forwards
	failing  string
	told     map[string]bool      // reasons for which devices are left out
	spoken   map[string]time.Time // of which restored programs, and when

	mu        sync.Mutex // of what follows
	known     bool       // what the Node's addresses are
	addresses []netip.Addr
	rewatch   context.CancelFunc // has watch begin anew; nil before it has begun
	state     PacketState
}

// newDevices returns what has yet to run. held are the rows of an earlier agent.
func newDevices(filter attach.DeviceFilter, tables *datapath.Datapath, programs *attach.TC, held []datapath.Device, log *zap.Logger) *devices {
	d := &devices{
		log: log, filter: filter, rows: tables, programs: programs,
		lists: make(chan []attach.Device), ready: newSignal(), synced: newSignal(),
		held: map[uint32]datapath.Device{}, told: map[string]bool{}, spoken: map[string]time.Time{},
		state: PacketState{On: true},
	}
	for _, row := range held {
		d.held[row.Index] = row
	}
	return d
}

// signal is given once.
type signal struct {
	given chan struct{}
	once  *sync.Once
}

func newSignal() signal { return signal{make(chan struct{}), new(sync.Once)} }

func (s signal) give() { s.once.Do(func() { close(s.given) }) }

// setAddresses says by which addresses the Node is known; its devices are looked at
// anew.
func (d *devices) setAddresses(addresses []netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known && slices.Equal(d.addresses, addresses) {
		return
	}
	d.known, d.addresses = true, slices.Clone(addresses)
	if d.rewatch != nil {
		d.rewatch()
	}
}

// nodeAddresses returns what setAddresses was told last.
func (d *devices) nodeAddresses() []netip.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.addresses
}

// watch sends the devices, at the start and whenever they change, until ctx ends.
func (d *devices) watch(ctx context.Context) {
	failing := false
	for ctx.Err() == nil {
		watching, stop := context.WithCancel(ctx)
		d.mu.Lock()
		d.rewatch = stop
		d.mu.Unlock()
		err := attach.WatchDevices(watching, d.filter, d.nodeAddresses, func(list []attach.Device) {
			if failing {
				d.log.Info("the node's devices are watched again")
			}
			failing = false
			select {
			case d.lists <- list:
			case <-watching.Done():
			}
		})
		again := watching.Err() != nil
		stop()
		if again {
			continue
		}
		if !failing {
			d.log.Warn("the node's devices cannot be watched; trying again", logfield.Error(err))
			failing = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryFirst):
		}
	}
}

// run puts programs on devices until ctx ends, and leaves them there.
func (d *devices) run(ctx context.Context) {
	// It closes descriptors, and we are leaving.
	defer func() { _ = d.programs.Close() }()
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	ready, synced, listed := d.ready.given, d.synced.given, false
	for {
		select {
		case <-ctx.Done():
			return
		case d.want = <-d.lists:
			d.behind, listed = true, true
		case <-ready:
			ready = nil
		case <-synced:
			synced = nil
		case <-tick.C:
		}
		switch {
		case ready != nil || !listed:
		case d.behind:
			d.apply()
		default:
			d.check()
		}
		if synced == nil && d.begun && d.takeOver != nil {
			d.takeOver() // ours do their work now
			d.takeOver = nil
		}
	}
}

// apply brings the kernel up to date. A program is attached after the row of its
// device is there, and the row goes after the program.
func (d *devices) apply() {
	d.leaveOut()
	rows := d.rowsOf(d.want)
	maps.Copy(d.held, rows)
	err := d.rows.SetDevices(slices.Collect(maps.Values(d.held)))
	if err == nil {
		d.attached, err = d.programs.Apply(d.want)
	}
	if err == nil {
		d.held = rows
		err = d.rows.SetDevices(slices.Collect(maps.Values(rows)))
	}
	d.behind = err != nil
	d.failed(err)
	d.publish(err)
	if err == nil && d.begun {
		d.log.Debug("programs are on devices", logfield.Count(d.attached))
	}
	if err == nil && !d.begun {
		d.begun = true
		d.log.Info("programs are on devices", logfield.Count(d.attached), logfield.Devices(hooked(d.want)))
		if len(hooked(d.want)) == 0 {
			d.log.Warn(noDevice + "; nobody is served by packets")
		}
	}
	d.checkForwarding()
}

// checkForwarding says once what keeps the node from forwarding, as soon as it is
// known which families it has.
func (d *devices) checkForwarding() {
	addresses := d.nodeAddresses()
	if d.checked || len(addresses) == 0 {
		return
	}
	d.checked = true
	for _, name := range notForwarding(procSys, addresses) {
		d.log.Warn("the node does not forward packets, so no client elsewhere reaches a pod by it (set it to 1)", logfield.Sysctl(name))
	}
}

// rowsOf returns what the packet path knows of devices. Which of them are pods' is
// for certain only when the Node's addresses are known; an earlier agent's word
// holds until then.
func (d *devices) rowsOf(list []attach.Device) map[uint32]datapath.Device {
	d.mu.Lock()
	known := d.known
	d.mu.Unlock()
	rows := map[uint32]datapath.Device{}
	for _, device := range list {
		r := row(device)
		if held, ok := d.held[r.Index]; ok && !known {
			r = held
		}
		rows[r.Index] = r
	}
	return rows
}

// row returns what the packet path knows of a device.
func row(d attach.Device) datapath.Device {
	r := datapath.Device{
		Index: uint32(d.Index), Pod: d.Pod, L3Index: uint32(d.L3Index), Source4: d.Source4, Source6: d.Source6,
	}
	copy(r.MAC[:], d.MAC)
	return r
}

// hooked returns the names of the devices that programs belong on.
func hooked(list []attach.Device) (names []string) {
	for _, d := range list {
		if d.Hooked {
			names = append(names, d.Name)
		}
	}
	return names
}

// check puts back what somebody else has removed.
func (d *devices) check() {
	restored, err := d.programs.Check()
	d.failed(err)
	d.publish(err)
	d.count(len(restored))
	now := time.Now()
	maps.DeleteFunc(d.spoken, func(_ string, at time.Time) bool { return now.Sub(at) > restoredAgain })
	var news []string
	for _, name := range restored {
		if _, lately := d.spoken[name]; !lately {
			d.spoken[name] = now
			news = append(news, name)
		}
	}
	if len(news) > 0 {
		d.log.Warn("somebody has removed programs from devices; they are back", logfield.Programs(news))
	}
}

// failed logs the first of a series of failures, and the end of it.
func (d *devices) failed(err error) {
	switch {
	case err != nil && err.Error() != d.failing:
		d.failing = err.Error()
		d.log.Error("programs cannot be attached to devices; trying again", logfield.Error(err))
	case err == nil && d.failing != "":
		d.failing = ""
		d.log.Info("programs are attached to devices at last")
	}
}

// leaveOut says once for each reason which devices it keeps from the packet path.
func (d *devices) leaveOut() {
	news := map[string][]string{}
	for _, device := range d.want {
		if reason := device.Unsupported; reason != "" && !d.told[reason] {
			news[reason] = append(news[reason], device.Name)
		}
	}
	for _, reason := range slices.Sorted(maps.Keys(news)) {
		d.told[reason] = true
		d.log.Warn("devices are left out of the packet path", logfield.Devices(news[reason]), logfield.Reason(reason))
	}
}

// PacketState is what an agent says of its packet path.
type PacketState struct {
	On bool `json:"on"`
	// Problem says why it does not work, or not wholly; "" when it does.
	Problem string `json:"problem"`
	// Devices is how many devices programs belong on, and Attached on how many they
	// are.
	Devices  int `json:"devices"`
	Attached int `json:"attached"`
	// Unsupported are devices that are left out, and why.
	Unsupported []string `json:"unsupported"`
}

// publish keeps the state for who asks.
func (d *devices) publish(err error) {
	s := PacketState{On: true, Devices: len(hooked(d.want)), Attached: d.attached}
	for _, device := range d.want {
		if device.Unsupported != "" {
			s.Unsupported = append(s.Unsupported, device.Name+": "+device.Unsupported)
		}
	}
	switch {
	case err != nil:
		s.Problem = err.Error()
	case s.Devices == 0:
		s.Problem = noDevice
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = s
}

const noDevice = "the node has none of --devices"

// State returns the state; it may be called from any goroutine.
func (d *devices) State() PacketState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}
