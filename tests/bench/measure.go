// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// effort is how much is measured.
type effort struct {
	few, many int // Services in the maps
	rounds    int // each compares all sides
	block     int // operations a side does at a time, twice in a round
	hookRuns  int // operations for the run time of the programs

	nftables     int           // Services of kube-proxy
	packetRounds int           // each compares all ways of the packet path
	flood        int           // packets from outside at a time, twice in a round
	neighbour    time.Duration // what a pod sends at a time, twice in a round
}

// full takes about three minutes, quick about one.
var (
	full = effort{
		few: 10, many: 10_000, rounds: 150, block: 100, hookRuns: 20_000,
		nftables: 1_000, packetRounds: 20, flood: 100_000, neighbour: 100 * time.Millisecond,
	}
	quick = effort{
		few: 10, many: 10_000, rounds: 50, block: 50, hookRuns: 5_000,
		nftables: 10, packetRounds: 5, flood: 50_000, neighbour: 50 * time.Millisecond,
	}
)

// side is one way to the server.
type side struct {
	name    string
	cgroup  *sandbox.Cgroup
	targets int
}

// Columns of the table, also in JSON.
const (
	sideDirect  = "direct"
	sideFew     = "few"
	sideMany    = "many"
	sideSpread  = "spread"
	sideNotOurs = "not ours"
	sideAgain   = "direct again"
)

// sides are the ways to the server. Direct in a cgroup without programs stands
// for a node without Fairlead; not ours is direct in the cgroup that has them.
func (c *cluster) sides() []side {
	return []side{
		{sideDirect, c.plain, toPod},
		{sideFew, c.few.cgroup, toService},
		{sideMany, c.many.cgroup, toService},
		{sideSpread, c.many.cgroup, toAnyOfMany},
		{sideNotOurs, c.many.cgroup, toPod},
		{sideAgain, c.plain, toPod},
	}
}

// goal is how much of the direct time a workload may take through a Service.
type goal struct {
	workload workload
	ratio    float64
	// dials tells that each operation dials anew, so that it can dial another
	// Service each time.
	dials bool
}

var goals = []goal{
	{tcpConnect, 1.01, true},
	{tcpRequest, 1.02, true},
	{tcpRoundTrip, 1.02, false},
	{udpRoundTrip, 1.02, false},
}

// samples are nanoseconds by side, then by round.
type samples map[string][][]int64

// verify makes sure that it is Services that are going to be measured: on a
// connection to each of them getpeername must say its address.
func (c *cluster) verify(e effort) error {
	const block = 500
	for _, s := range []struct {
		side
		services int
	}{
		{side{sideFew, c.few.cgroup, toAnyOfFew}, e.few},
		{side{sideMany, c.many.cgroup, toAnyOfMany}, e.many},
	} {
		for done := 0; done < s.services; done += block {
			if _, err := c.measure(s.side, tcpPeer, min(block, s.services)); err != nil {
				return fmt.Errorf("check the installation with %d Services: %w", s.services, err)
			}
		}
	}
	if _, err := c.measure(side{sideDirect, c.plain, toService}, tcpPeer, 1); err == nil {
		return errors.New("a Service answers outside of the cgroups with programs")
	}
	return nil
}

// compare measures one workload. Sides take turns in blocks of a few
// milliseconds, so that whatever changes on the machine in the meantime changes
// all of them alike.
func (c *cluster) compare(ctx context.Context, g goal, e effort) (samples, error) {
	sides := c.sides()
	if !g.dials {
		sides = slices.DeleteFunc(sides, func(s side) bool { return s.name == sideSpread })
	}
	order := rand.New(rand.NewPCG(1, 2))
	got := samples{}
	for round := range e.rounds {
		for _, i := range thereAndBack(order.Perm(len(sides))) {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			s := sides[i]
			times, err := c.measure(s, g.workload, e.block)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			if len(got[s.name]) == round {
				got[s.name] = append(got[s.name], nil)
			}
			got[s.name][round] = append(got[s.name][round], times...)
		}
	}
	return got, nil
}

// thereAndBack returns list and then list from its end to its start: what grows
// steadily over that time weighs the same on each element.
func thereAndBack(list []int) []int {
	back := slices.Clone(list)
	slices.Reverse(back)
	return append(list, back...)
}

// measure does one block on one side.
func (c *cluster) measure(s side, w workload, count int) ([]int64, error) {
	if err := c.enter(s.cgroup); err != nil {
		return nil, err
	}
	got, err := c.client.do(order{Workload: w, Targets: s.targets, Count: count})
	return got.Nanoseconds, err
}
