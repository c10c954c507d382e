// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

// programming is what it takes to bring Services into the kernel, from objects
// that have been read already.
type programming struct {
	Services  int
	Endpoints int // of each

	// Everything at once, as when an agent starts on a fresh node.
	All step
	// The same once more, as a repair does.
	Again step
	// One endpoint of one Service leaves or comes back: medians.
	One step
}

// step is one way from objects to kernel.
type step struct {
	Rows int // written or deleted
	// Build is the time to work out what is wanted, Apply that to write it.
	Build, Apply time.Duration
	// Flip is the part of Apply until clients get the new backends; 0 when
	// nothing flipped or much did.
	Flip time.Duration
	// Grace is the part of Apply spent waiting for programs that may be
	// reading what is to go.
	Grace time.Duration
}

// changes is how many single changes the medians are of.
const changes = 20

// program fills the tables with Services and then takes one endpoint away and
// back, several times.
func program(tables *datapath.Tables, services int) (programming, error) {
	endpoints := podAddrs()
	store := lb.NewStore(lb.Config{})
	store.SetLocalAddresses([]netip.Addr{nodeAddr})
	for i := range services {
		store.SetService(service(i))
		store.SetSlice(slice(i, endpoints))
	}
	p := programming{Services: services, Endpoints: len(endpoints)}
	kernel := &timedTables{Tables: tables}
	limits := reconciler.Limits{}
	limits.Services, limits.Slots = tables.Limits()
	r := reconciler.New(kernel, limits)

	var err error
	if p.All, err = kernel.step(store.All, r.ApplyAll); err != nil {
		return p, err
	}
	p.All.Flip = 0
	if p.Again, err = kernel.step(store.All, r.ApplyAll); err != nil {
		return p, err
	}
	if p.Again.Rows != 0 {
		return p, fmt.Errorf("unchanged Services took %d writes", p.Again.Rows)
	}
	var steps []step
	for i := range changes {
		store.SetSlice(slice(services/2, endpoints[:len(endpoints)-1+i%2]))
		s, err := kernel.step(store.Changes, r.Apply)
		if err != nil {
			return p, err
		}
		steps = append(steps, s)
	}
	p.One = medianStep(steps)
	return p, nil
}

// sinkNodePort is the NodePort of the first Service's sink.
const sinkNodePort = 30_000

// nodePort is the NodePort of a Service, for TCP and, of the first one, for UDP.
func nodePort(service int) uint16 { return uint16(20_000 + service) }

// service is a Service with a port for TCP and, the first one, two for UDP. All have
// NodePorts.
func service(i int) lb.Service {
	s := lb.Service{
		Name:       lb.Name{Namespace: "bench", Name: fmt.Sprintf("service-%05d", i)},
		ClusterIPs: []netip.Addr{vip(i)},
		Ports:      []lb.Port{{Name: "tcp", Protocol: lb.TCP, Number: port, NodePort: nodePort(i)}},
	}
	if i == 0 {
		s.Ports = append(s.Ports,
			lb.Port{Name: "udp", Protocol: lb.UDP, Number: port, NodePort: nodePort(i)},
			lb.Port{Name: "sink", Protocol: lb.UDP, Number: sinkPort, NodePort: sinkNodePort})
	}
	return s
}

func slice(i int, addrs []netip.Addr) lb.Slice {
	of := service(i)
	s := lb.Slice{Name: of.Name, Service: of.Name.Name, Family: lb.IPv4}
	for _, p := range of.Ports {
		s.Ports = append(s.Ports, lb.SlicePort{Name: p.Name, Protocol: p.Protocol, Number: p.Number})
	}
	for _, addr := range addrs {
		s.Endpoints = append(s.Endpoints, lb.Endpoint{Addr: addr, Ready: true, Serving: true})
	}
	return s
}

// vips are the ClusterIPs of the first n Services, in an order that is none but
// always the same: neighbours in the maps are not visited one after another.
func vips(n int) []netip.Addr {
	out := make([]netip.Addr, n)
	for i, service := range shuffled(n) {
		out[i] = vip(service)
	}
	return out
}

// nodePorts are where the first n Services are reached at the node, in that order.
func nodePorts(n int) []netip.AddrPort {
	out := make([]netip.AddrPort, n)
	for i, service := range shuffled(n) {
		out[i] = netip.AddrPortFrom(nodeAddr, nodePort(service))
	}
	return out
}

func shuffled(n int) []int { return rand.New(rand.NewPCG(1, 2)).Perm(n) }

// timedTables notes when something happens to the tables.
type timedTables struct {
	*datapath.Tables
	flipped time.Time
	grace   time.Duration
}

func (t *timedTables) SetRange(id lb.ServiceID, side lb.Side, r lb.Range) error {
	err := t.Tables.SetRange(id, side, r)
	t.flipped = time.Now()
	return err
}

func (t *timedTables) WaitReaders() error {
	start := time.Now()
	err := t.Tables.WaitReaders()
	t.grace += time.Since(start)
	return err
}

// step times build and apply.
func (t *timedTables) step(build func() lb.Delta, apply func(lb.Delta) reconciler.Result) (step, error) {
	t.grace = 0
	start := time.Now()
	delta := build()
	built := time.Now()
	got := apply(delta)
	s := step{
		Rows:  got.Writes + got.Deletes,
		Build: built.Sub(start),
		Apply: time.Since(built),
		Flip:  max(0, t.flipped.Sub(built)),
		Grace: t.grace,
	}
	return s, errors.Join(slices.Collect(maps.Values(got.Failed))...)
}

func medianStep(steps []step) step {
	of := func(get func(step) time.Duration) time.Duration {
		all := make([]float64, len(steps))
		for i, s := range steps {
			all[i] = float64(get(s))
		}
		return time.Duration(quantile(all, 0.5))
	}
	return step{
		Rows:  steps[len(steps)-1].Rows,
		Build: of(func(s step) time.Duration { return s.Build }),
		Apply: of(func(s step) time.Duration { return s.Apply }),
		Flip:  of(func(s step) time.Duration { return s.Flip }),
		Grace: of(func(s step) time.Duration { return s.Grace }),
	}
}
