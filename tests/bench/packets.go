// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
)

// way is one way from outside to a pod.
type way struct {
	name string
	lane *lane
	path *installation // whose packet path the node has; nil for none
	list int           // of the client's
}

// More sides, of the packet path alone.
const (
	sideNftables = "nftables"
	sideEmpty    = "empty"
	// sideGoal is no side but the rate that has to be reached: the lower of 1.5
	// times that of nftables and 0.95 of that without a proxy.
	sideGoal = "goal"
)

// ways are those of clients outside of the cluster.
func (c *cluster) ways() []way {
	ways := []way{
		{sideDirect, c.routed, nil, lanePods},
		{sideFew, c.routed, c.few, laneNodePort},
		{sideMany, c.routed, c.many, laneNodePort},
		{sideSpread, c.routed, c.many, laneNodePorts},
		{sideAgain, c.routed, nil, lanePods},
		{sideEmpty, c.routed, c.empty, lanePods},
	}
	if c.nftables != nil {
		ways = append(ways, way{sideNftables, c.nftables, nil, laneNodePort})
	}
	return ways
}

// packetLoad is what is done to measure the packet path.
type packetLoad struct {
	title    workload
	workload workload
	rate     bool // what counts is how many there are in a time
	dials    bool // can go to another Service each time
	// passing tells that it has nothing to do with Services.
	passing bool
}

var packetLoads = []packetLoad{
	{title: "UDP packets to a NodePort", workload: flood, rate: true},
	{title: "TCP connections to a NodePort, closed at once", workload: tcpConnect, rate: true, dials: true},
	{title: "UDP sendto, recvfrom with a NodePort", workload: udpRoundTrip},
	{title: "TCP byte there and back with a NodePort", workload: tcpRoundTrip},
	{title: "UDP datagrams from pod to pod", workload: flood, rate: true, passing: true},
}

// lines are those of a load in the report.
func (l packetLoad) lines() []line {
	if l.passing {
		return []line{
			{sideMany, sideDirect, "packet path on both pods' links, MANY Services, against none", atLeast(0.98)},
			{sideEmpty, sideDirect, "programs that do nothing there, against none", nil},
			{sideMany, sideEmpty, "packet path against programs that do nothing", nil},
			{sideAgain, sideDirect, "none, against itself: noise", nil},
		}
	}
	lines := []line{
		{sideFew, sideDirect, "Fairlead, FEW Services, against no proxy", nil},
		{sideMany, sideDirect, "Fairlead, MANY Services, against no proxy", nil},
		{sideSpread, sideDirect, "Fairlead, each of MANY Services in turn, against no proxy", nil},
		{sideNftables, sideDirect, "kube-proxy, nftables, NFT Services, against no proxy", nil},
		{sideMany, sideNftables, "Fairlead, MANY Services, against kube-proxy", nil},
		{sideMany, sideFew, "Fairlead, MANY Services against FEW", nil},
		{sideAgain, sideDirect, "no proxy, against itself: noise", nil},
	}
	if l.workload == flood {
		lines = append(lines, line{
			sideMany, sideGoal, "Fairlead, MANY Services, against the lower of 1.5 × nftables and 0.95 × no proxy", atLeast(1),
		})
	}
	return lines
}

// benchPackets measures everything about the packet path.
func (c *cluster) benchPackets(ctx context.Context, e effort, say func(string)) (r packetReport, err error) {
	r.Rounds = e.packetRounds
	program := ""
	if program, r.Missing = findKubeProxy(); r.Missing == "" {
		say(fmt.Sprintf("programming %d Services by kube-proxy", e.nftables))
		r.Nftables = e.nftables
		if c.nftables, err = c.newLane(ctx, e.nftables); err != nil {
			return r, err
		}
		if r.Sync, err = c.programNftables(ctx, c.nftables, program, e.nftables); err != nil {
			return r, err
		}
	}
	for _, l := range packetLoads {
		say(string(l.title))
		got, err := c.takeTurns(ctx, e, c.ways(), l)
		if err != nil {
			return r, fmt.Errorf("%s: %w", l.title, err)
		}
		if got[sideNftables] != nil && l.workload == flood {
			got[sideGoal] = goalTimes(got)
		}
		r.Workloads = append(r.Workloads, summarize(l.title, l.rate, l.lines(), got))
	}
	say("BPF programs of the packet path")
	r.Hooks, err = c.packetHooks(e)
	return r, err
}

// goalTimes returns how long a packet may take in each round.
func goalTimes(got samples) (rounds [][]int64) {
	for i := range got[sideDirect] {
		limit := max(p50(got[sideNftables][i])/1.5, p50(got[sideDirect][i])/0.95)
		rounds = append(rounds, []int64{int64(math.Round(limit))})
	}
	return rounds
}

// takeTurns measures one load on all ways that it can go, in blocks as compare does.
func (c *cluster) takeTurns(ctx context.Context, e effort, ways []way, l packetLoad) (samples, error) {
	order := rand.New(rand.NewPCG(1, 2))
	got := samples{}
	for round := range e.packetRounds {
		for _, i := range thereAndBack(order.Perm(len(ways))) {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			w := ways[i]
			if !w.can(l) {
				continue
			}
			times, err := w.measure(l, e)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.name, err)
			}
			if len(got[w.name]) == round {
				got[w.name] = append(got[w.name], nil)
			}
			got[w.name][round] = append(got[w.name][round], times...)
		}
	}
	return got, nil
}

// can tells whether a load can go this way.
func (w way) can(l packetLoad) bool {
	switch {
	case l.passing:
		return w.name == sideDirect || w.name == sideAgain || w.name == sideMany || w.name == sideEmpty
	case w.name == sideEmpty:
		return false
	case w.list == laneNodePorts:
		return l.dials
	default:
		return true
	}
}

// measure does one block and returns nanoseconds: of each operation or, of a rate,
// what one takes on average.
func (w way) measure(l packetLoad, e effort) ([]int64, error) {
	if err := w.lane.use(w.path); err != nil {
		return nil, err
	}
	if l.passing {
		ns, err := w.lane.floodFromNeighbour(e.neighbour)
		return []int64{int64(ns)}, err
	}
	if l.workload == flood {
		ns, err := w.lane.floodFromOutside(w.list, e.flood)
		return []int64{int64(ns)}, err
	}
	got, err := w.lane.client.do(order{Workload: l.workload, Targets: w.list, Count: e.block})
	if err != nil || !l.rate {
		return got.Nanoseconds, err
	}
	return []int64{int64(got.Took) / int64(warmup+e.block)}, nil
}
