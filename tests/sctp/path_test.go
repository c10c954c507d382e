// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sctp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// servicePort is the port of ClusterIPs; no backend has it.
const servicePort = 7777

// service is a Service over SCTP.
type service struct {
	name     string
	vips     addrs
	nodePort uint16
	backend  addrs // none when zero
}

var (
	onPod     = service{"pod", both("10.96.0.1", "fd00:96::1"), 30001, podAddrs}
	onOutside = service{"outside", both("10.96.0.2", "fd00:96::2"), 30002, outsideAddrs}
	onWired   = service{"wired", both("10.96.0.3", "fd00:96::3"), 30003, wiredAddrs}
	empty     = service{"empty", both("10.96.0.4", "fd00:96::4"), 30004, addrs{}}
)

// startPath gives the node the packet path and the Services above, without the rest
// of the agent.
func (w *world) startPath(t *testing.T) {
	t.Helper()
	node, root := w.node.Namespace(), testutil.BPFRoot(t)
	var cookie uint64
	must(t, node.Do(func() (err error) { cookie, err = attach.NetnsCookie(); return err }))
	d, err := datapath.Open(datapath.Config{
		Root: root, HostNetnsCookie: cookie, PacketPath: true,
		Sizes: datapath.Sizes{Frontends: 1024, Services: 64, Slots: 256, Members: 1024, SourceRanges: 64, Peers: 64, Affinity: 1024, Flows: 4096},
	})
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	must(t, d.NoPacketPath)
	w.datapath = d
	w.setServices(t)
	tc, err := attach.NewTC(datapath.DevicesPath(root), attach.Programs{
		Ingress: d.Program("tc_ingress"), Egress: d.Program("tc_egress"),
		IngressL3: d.Program("tc_ingress_l3"), EgressL3: d.Program("tc_egress_l3"),
	})
	must(t, err)
	t.Cleanup(func() { must(t, tc.Close()) })
	must(t, node.Do(func() error { return attachAll(d, tc) }))
}

// attachAll gives all devices of the calling thread's namespace what they need.
func attachAll(d *datapath.Datapath, tc *attach.TC) error {
	filter, err := attach.ParseDevices("auto")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var attachErr error
	err = attach.WatchDevices(ctx, filter, nodeAddresses, func(devices []attach.Device) {
		cancel() // they do not change any more
		attachErr = attachTo(d, tc, devices)
	})
	return errors.Join(err, attachErr)
}

func nodeAddresses() []netip.Addr { return slices.Concat(nodeAddrs[:], nodeWired[:]) }

func attachTo(d *datapath.Datapath, tc *attach.TC, devices []attach.Device) error {
	var rows []datapath.Device
	for _, dev := range devices {
		row := datapath.Device{
			Index: uint32(dev.Index), Pod: dev.Pod, L3Index: uint32(dev.L3Index), Source4: dev.Source4, Source6: dev.Source6,
		}
		copy(row.MAC[:], dev.MAC)
		rows = append(rows, row)
	}
	if err := d.SetDevices(rows); err != nil {
		return err
	}
	attached, err := tc.Apply(devices)
	if err == nil && attached == 0 {
		err = fmt.Errorf("attached to none of %v", devices)
	}
	return err
}

// setServices writes the Services' tables.
func (w *world) setServices(t *testing.T) {
	t.Helper()
	store := lb.NewStore(lb.Config{NodeName: "node", NodePorts: lb.NodePorts{Primary: true}})
	store.SetNode(lb.Node{Addresses: nodeAddrs[:], Eligible: true})
	for _, s := range []service{onPod, onOutside, onWired, empty} {
		name := lb.Name{Namespace: "default", Name: s.name}
		store.SetService(lb.Service{
			Name: name, ClusterIPs: s.vips[:],
			Ports: []lb.Port{{Protocol: lb.SCTP, Number: servicePort, NodePort: s.nodePort}},
		})
		for i, family := range []lb.Family{lb.IPv4, lb.IPv6} {
			if !s.backend[i].IsValid() {
				continue
			}
			store.SetSlice(lb.Slice{
				Name:    lb.Name{Namespace: "default", Name: s.name + families[i]},
				Service: s.name, Family: family,
				Ports:     []lb.SlicePort{{Protocol: lb.SCTP, Number: backendPort}},
				Endpoints: []lb.Endpoint{{Addr: s.backend[i], Ready: true, Serving: true}},
			})
		}
	}
	services, slots := w.datapath.Limits()
	r := reconciler.New(w.datapath, reconciler.Limits{Services: services, Slots: slots}).ApplyAll(store.All())
	for name, err := range r.Failed {
		t.Fatalf("apply Service %v: %v", name, err)
	}
}

// association is who talks to which Service.
type association struct {
	name     string
	from     *sandbox.Namespace
	at       addrs
	to       service
	nodePort bool
	source   addrs // from where the backend sees the client; not said when zero
}

func (a association) dial(family int) netip.AddrPort {
	if a.nodePort {
		return nodeAddrs.port(family, a.to.nodePort)
	}
	return a.to.vips.port(family, servicePort)
}

func (w *world) associations() []association {
	node := w.node.Namespace()
	return []association{
		{name: "outside, NodePort, pod", from: w.outside, at: outsideAddrs, to: onPod, nodePort: true, source: outsideAddrs},
		{name: "outside, NodePort, wired", from: w.outside, at: outsideAddrs, to: onWired, nodePort: true, source: nodeWired},
		{name: "wired, NodePort, pod", from: w.wired, at: wiredAddrs, to: onPod, nodePort: true, source: wiredAddrs},
		{name: "wired, NodePort, outside", from: w.wired, at: wiredAddrs, to: onOutside, nodePort: true, source: nodeAddrs},
		{name: "pod, ClusterIP, pod", from: w.asking, at: askingAddrs, to: onPod, source: askingAddrs},
		{name: "pod, ClusterIP, outside", from: w.asking, at: askingAddrs, to: onOutside, source: askingAddrs},
		{name: "pod, ClusterIP, wired", from: w.asking, at: askingAddrs, to: onWired, source: askingAddrs},
		{name: "pod, NodePort, pod", from: w.asking, at: askingAddrs, to: onPod, nodePort: true},
		{name: "pod, ClusterIP, itself", from: w.pod, at: podAddrs, to: onPod},
		{name: "process on the node, ClusterIP, pod", from: node, at: nodeAddrs, to: onPod},
		{name: "process on the node, ClusterIP, outside", from: node, at: nodeAddrs, to: onOutside},
		{name: "process on the node, ClusterIP, wired", from: node, at: nodeAddrs, to: onWired},
	}
}

// TestAssociations: everything that is said arrives, both ways at once, and no packet
// has a wrong checksum: not those that it is left out of, nor those that it is in.
func TestAssociations(t *testing.T) {
	w := newWorld(t)
	t.Run("without Fairlead", func(t *testing.T) {
		for f, family := range families {
			for at, server := range map[addrs]string{podAddrs: "pod", wiredAddrs: "wired"} {
				if name, err := say(w.outside, outsideAddrs[f], at.port(f, backendPort)); name != server || err != nil {
					t.Errorf("%s: %s answers as %q, %v", family, server, name, err)
				}
			}
		}
	})
	w.startPath(t)
	for _, a := range w.associations() {
		t.Run(a.name, func(t *testing.T) {
			for f, family := range families {
				if err := w.talk(a, f); err != nil {
					t.Errorf("%s: %v; counters: %v", family, err, w.counters(t))
				}
			}
		})
	}
	// What is dropped is sent again, and would not be missed.
	for name, n := range w.counters(t) {
		if strings.HasPrefix(name, "drop_") {
			t.Errorf("counter %s is %d, want 0", name, n)
		}
	}
	t.Run("no endpoint", func(t *testing.T) { w.refused(t) })
}

// talk makes an association and looks at who is at its other end.
func (w *world) talk(a association, family int) error {
	name, err := say(a.from, a.at[family], a.dial(family))
	if err != nil {
		return err
	}
	if name != a.to.name {
		return fmt.Errorf("answered by %q, want %q", name, a.to.name)
	}
	got := w.servers[name+families[family]].lastClient()
	if want := a.source[family]; want.IsValid() && got != want {
		return fmt.Errorf("the backend sees the client %v, want %v", got, want)
	}
	return nil
}

// refused: whoever dials a Service without endpoints hears so by ICMP.
func (w *world) refused(t *testing.T) {
	t.Helper()
	for _, a := range []association{
		{name: "outside, NodePort", from: w.outside, at: outsideAddrs, to: empty, nodePort: true},
		{name: "wired, NodePort", from: w.wired, at: wiredAddrs, to: empty, nodePort: true},
		{name: "pod, ClusterIP", from: w.asking, at: askingAddrs, to: empty},
		{name: "process on the node, ClusterIP", from: w.node.Namespace(), at: nodeAddrs, to: empty},
	} {
		for f, family := range families {
			c, err := dial(a.from, a.at[f], a.dial(f))
			if err == nil {
				must(t, c.Close())
			}
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s, %s: %v, want %v; counters: %v", a.name, family, err, unix.ECONNREFUSED, w.counters(t))
			}
		}
	}
}

// counters returns what programs have counted, without what is zero.
func (w *world) counters(t *testing.T) map[string]uint64 {
	t.Helper()
	list, err := w.datapath.Counters()
	must(t, err)
	counted := map[string]uint64{}
	for _, c := range list {
		if c.Value != 0 {
			counted[c.Name] = c.Value
		}
	}
	return counted
}
