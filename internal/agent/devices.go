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
	mend     func([]datapath.Device) (mended int, err error) // makes the rows these
	mendRows time.Duration                                   // how often; 0 for never
	mendedAt time.Time
	takeOver func() // takes away what other versions have left on devices

	lists  chan listing
	ready  signal // programs may be attached
	synced signal // the tables say what the source says

	held     map[uint32]datapath.Device // rows that programs may be using
	want     listing
	behind   bool // the kernel does not have what is wanted
	attached int  // devices that have their programs
	begun    bool // it has had it once
	checked  bool // that the node forwards
	failing  string
	told     map[string]bool      // reasons for which devices are left out
	spoken   map[string]time.Time // of which restored programs, and when

	mu      sync.Mutex // of what follows
	node    nodeAddresses
	rewatch context.CancelFunc // has watch begin anew; nil before it has begun
	state   PacketState
}

// nodeAddresses are those by which the Node is known, once they are.
type nodeAddresses struct {
	known bool
	list  []netip.Addr
}

func (n nodeAddresses) equal(o nodeAddresses) bool {
	return n.known == o.known && slices.Equal(n.list, o.list)
}

// listing is what devices there are, as the Node's addresses tell them apart.
type listing struct {
	devices []attach.Device
	node    nodeAddresses
}

// newDevices returns what has yet to run. held are the rows of an earlier agent.
func newDevices(filter attach.DeviceFilter, tables *datapath.Datapath, programs *attach.TC, held []datapath.Device, log *zap.Logger) *devices {
	d := &devices{
		log: log, filter: filter, rows: tables, programs: programs,
		lists: make(chan listing), ready: newSignal(), synced: newSignal(),
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

func (s signal) isGiven() bool {
	select {
	case <-s.given:
		return true
	default:
		return false
	}
}

// setAddresses says by which addresses the Node is known; its devices are looked at
// anew.
func (d *devices) setAddresses(addresses []netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	node := nodeAddresses{known: true, list: slices.Clone(addresses)}
	if d.node.equal(node) {
		return
	}
	d.node = node
	if d.rewatch != nil {
		d.rewatch()
	}
}

// addresses returns what setAddresses was told last.
func (d *devices) addresses() nodeAddresses {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.node
}

// watch sends the devices, at the start and whenever they change, until ctx ends.
func (d *devices) watch(ctx context.Context) {
	failing := false
	for ctx.Err() == nil {
		watching, stop := context.WithCancel(ctx)
		d.mu.Lock()
		d.rewatch = stop
		d.mu.Unlock()
		var node nodeAddresses // of the list that is being made, on this goroutine
		asked := func() []netip.Addr { node = d.addresses(); return node.list }
		err := attach.WatchDevices(watching, d.filter, asked, func(list []attach.Device) {
			if failing {
				d.log.Info("the node's devices are watched again")
			}
			failing = false
			select {
			case d.lists <- listing{list, node}:
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
		ticked := false
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
			ticked = true
		}
		// A list from before the Node's addresses were known has a successor soon.
		if ready == nil && listed && d.want.node.equal(d.addresses()) {
			d.tend(ticked)
		}
		if synced == nil && d.begun && d.takeOver != nil {
			d.takeOver() // ours do their work now
			d.takeOver = nil
		}
	}
}

// tend brings the kernel up to date and, if it is time to or nothing else is to be
// done, puts back what somebody else has removed: a device that cannot be attached
// to must not keep others from that.
func (d *devices) tend(ticked bool) {
	var err error
	if ticked || !d.behind {
		err = d.check()
	}
	if d.behind {
		err = d.apply() // tries again what check has failed in
	}
	d.checkRows()
	d.failed(err)
	d.publish(err)
	if err == nil && !d.begun {
		d.begun = true
		d.log.Info("programs are on devices", logfield.Count(d.attached), logfield.Devices(hooked(d.want.devices)))
		if len(hooked(d.want.devices)) == 0 {
			d.log.Warn(noDevice + "; nobody is served by packets")
		}
	}
	d.checkForwarding()
}

// checkRows puts right, now and then, rows that somebody else has changed.
func (d *devices) checkRows() {
	if d.mendRows == 0 || d.behind || time.Since(d.mendedAt) < d.mendRows {
		return
	}
	d.mendedAt = time.Now()
	rows := slices.Collect(maps.Values(d.held))
	mended, err := d.mend(rows)
	if err != nil {
		d.log.Warn("repair: rows of devices cannot be put right", logfield.Error(err))
	}
	if mended > 0 {
		d.log.Warn(rowsWrong, logfield.Table(devicesTable), logfield.Count(mended))
	}
}

// apply brings the kernel up to date. A program is attached after the row of its
// device is there, and the row goes after the program.
func (d *devices) apply() error {
	d.leaveOut()
	rows := d.rowsOf(d.want)
	maps.Copy(d.held, rows)
	err := d.rows.SetDevices(slices.Collect(maps.Values(d.held)))
	if err == nil {
		d.attached, err = d.programs.Apply(d.want.devices)
	}
	if err == nil {
		d.held = rows
		err = d.rows.SetDevices(slices.Collect(maps.Values(rows)))
	}
	d.behind = err != nil
	return err
}

// checkForwarding says once what keeps the node from forwarding, as soon as it is
// known which families it has.
func (d *devices) checkForwarding() {
	if d.checked || len(d.want.node.list) == 0 {
		return
	}
	d.checked = true
	for _, name := range notForwarding(procSys, d.want.node.list) {
		d.log.Warn("the node does not forward packets, so no client elsewhere reaches a pod by it (set it to 1)", logfield.Sysctl(name))
	}
}

// rowsOf returns what the packet path knows of devices. Which of them are pods' is
// for certain only when the Node's addresses are known; an earlier agent's word
// holds until then.
func (d *devices) rowsOf(list listing) map[uint32]datapath.Device {
	rows := map[uint32]datapath.Device{}
	for _, device := range list.devices {
		r := row(device)
		if held, ok := d.held[r.Index]; ok && !list.node.known {
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
func (d *devices) check() error {
	restored, err := d.programs.Check()
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
	return err
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
	for _, device := range d.want.devices {
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
	s := PacketState{On: true, Devices: len(hooked(d.want.devices)), Attached: d.attached}
	for _, device := range d.want.devices {
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
