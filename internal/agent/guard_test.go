// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// refresher counts how often it was asked to look again.
type refresher struct{ ticket uint64 }

// Refresh implements reflector.Refresher.
func (r *refresher) Refresh() uint64 {
	r.ticket++
	return r.ticket
}

// someServices returns n Services that have an endpoint each.
func someServices(n int) (services []lb.Service, slices []lb.Slice) {
	for i := range n {
		name := lb.Name{Namespace: "ns", Name: fmt.Sprintf("s%d", i)}
		services = append(services, lb.Service{
			Name: name, ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 1, byte(i)})},
			Ports: []lb.Port{{Protocol: lb.TCP, Number: 80}},
		})
		slices = append(slices, lb.Slice{
			Name: name, Service: name.Name, Family: lb.IPv4,
			Ports:     []lb.SlicePort{{Protocol: lb.TCP, Number: 80}},
			Endpoints: []lb.Endpoint{{Addr: netip.AddrFrom4([4]byte{10, 244, 1, byte(i)}), Ready: true}},
		})
	}
	return services, slices
}

// serving returns an agent whose kernel has a backend for each of the services, and
// the source it may ask.
func serving(services []lb.Service) (*agent, *refresher) {
	a, source := idle(), &refresher{}
	a.guard.source = source
	tables := lb.NewTables()
	for i, svc := range services {
		id := lb.ServiceID(i + 1)
		tables.Names[id] = lb.ServicePort{Service: svc.Name, Protocol: lb.TCP, Family: lb.IPv4}
		tables.Services[id] = lb.ServiceRow{Sides: [lb.Sides]lb.Range{{Base: uint32(i), Count: 1}}}
		tables.Slots[uint32(i)] = lb.Backend{Addr: netip.AddrFrom4([4]byte{10, 244, 1, byte(i)}), Port: 80}
	}
	a.reconciler = reconciler.New(nil, reconciler.Limits{Services: 1000, Slots: 1000})
	a.reconciler.Adopt(tables)
	return a, source
}

func TestGuard(t *testing.T) {
	services, slices := someServices(60)
	lists := func(services []lb.Service, slices []lb.Slice, ticket uint64) []reflector.Event {
		return []reflector.Event{
			reflector.ServicesReplaced{Services: services, Ticket: ticket},
			reflector.SlicesReplaced{Slices: slices, Ticket: ticket},
		}
	}
	none := lists(nil, nil, 0)
	gone := func(n int) (out []reflector.Event) {
		for _, s := range slices[:n] {
			out = append(out, reflector.SliceGone{Name: s.Name})
		}
		return out
	}
	for _, tt := range []struct {
		name    string
		batches [][]reflector.Event
		want    []bool // whether it is held after each batch
	}{
		{"a list that has all is done", [][]reflector.Event{lists(services, slices, 0)}, []bool{false}},
		{"a list that has none is held", [][]reflector.Event{none}, []bool{true}},
		{"Services without EndpointSlices lead nowhere, too", [][]reflector.Event{lists(services, nil, 0)}, []bool{true}},
		{"twenty of them may go", [][]reflector.Event{lists(services, slices[20:], 0)}, []bool{false}},
		{"half of them may go", [][]reflector.Event{lists(services, slices[30:], 0)}, []bool{false}},
		{"more than half of them may not", [][]reflector.Event{lists(services, slices[31:], 0)}, []bool{true}},
		{
			"what a watch takes away is done, all of it",
			[][]reflector.Event{lists(services, slices, 0), gone(60)}, []bool{false, false},
		},
		{
			"the answer is done, whatever it is",
			[][]reflector.Event{none, lists(nil, nil, 1)}, []bool{true, false},
		},
		{
			"an answer that has all is done",
			[][]reflector.Event{none, lists(services, slices, 1)}, []bool{true, false},
		},
		{
			"half an answer is none, nor are changes",
			[][]reflector.Event{none, lists(services, nil, 1)[:1], gone(1), lists(nil, slices, 1)[1:]},
			[]bool{true, true, true, false},
		},
		{
			"a list that was on its way is no answer",
			[][]reflector.Event{none, none, lists(services, slices, 1)}, []bool{true, true, false},
		},
		{
			"what follows the answer is looked at",
			[][]reflector.Event{none, lists(services, slices, 1), none}, []bool{true, false, true},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, _ := serving(services)
			for i, batch := range tt.batches {
				for _, ev := range batch {
					a.take(ev)
				}
				if got := a.held(); got != tt.want[i] {
					t.Fatalf("batch %d: held %v, want %v", i, got, tt.want[i])
				}
			}
		})
	}

	t.Run("a source that cannot be asked is believed", func(t *testing.T) {
		a, _ := serving(services)
		a.guard.source = nil
		a.take(none[0])
		if a.held() {
			t.Error("held for ever")
		}
	})
	t.Run("the node is healthy while a list is held", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, source := serving(services)
			a.applied = true
			a.health.Applied()
			a.take(none[0])
			if !a.held() || source.ticket != 1 {
				t.Fatalf("not held, or asked %d times", source.ticket)
			}
			time.Sleep(10 * stuckAfter)
			if !a.health.Healthy() {
				t.Error("unhealthy")
			}
		})
	})
}

// failing is a source that cannot start for some times.
type failing struct {
	times int
	ran   chan struct{}
}

// Run implements reflector.Source.
func (f *failing) Run(ctx context.Context, _ chan<- reflector.Event) error {
	if f.times--; f.times >= 0 {
		return errors.New("refused")
	}
	close(f.ran)
	<-ctx.Done()
	return nil
}

func TestASourceThatCannotStart(t *testing.T) {
	t.Run("ends an agent that has nothing to keep", func(t *testing.T) {
		if err := idle().follow(t.Context(), &failing{times: 1}, false); err == nil {
			t.Error("no error")
		}
	})
	t.Run("is tried again while the kernel serves", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			source := &failing{times: 3, ran: make(chan struct{})}
			done := make(chan error)
			go func() { done <- idle().follow(ctx, source, true) }()
			<-source.ran
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	})
}
