// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// digest turns what happens to the objects of one kind into events; nil stands
// for nothing that matters. One goroutine uses it.
type digest interface {
	// replaced takes a complete list. It passes over objects of other kinds.
	replaced(all []converted) Event
	// set takes an object that is new or has changed.
	set(c converted) Event
	// gone takes the last version of an object that was deleted.
	gone(c converted) Event
}

// serviceDigest tells everything.
type serviceDigest struct{}

func (serviceDigest) replaced(all []converted) Event {
	return ServicesReplaced{Services: setIn(all, func(e ServiceSet) lb.Service { return e.Service })}
}

func (serviceDigest) set(c converted) Event { return c.event }

func (serviceDigest) gone(c converted) Event { return ServiceGone{c.name} }

// sliceDigest tells everything about slices, and the triggers that count: those
// after its start, as kube-proxy has it. In a list, triggers that were told
// before are no news.
type sliceDigest struct {
	since time.Time
	told  map[lb.Name]time.Time // the last trigger told, of slices that exist
}

func newSliceDigest(since time.Time) *sliceDigest {
	return &sliceDigest{since: since, told: map[lb.Name]time.Time{}}
}

func (d *sliceDigest) replaced(all []converted) Event {
	told, news := map[lb.Name]time.Time{}, map[lb.Name]time.Time{}
	for _, c := range all {
		e, ok := c.event.(SliceSet)
		if !ok || !e.Trigger.After(d.since) {
			continue
		}
		told[c.name] = e.Trigger
		if !e.Trigger.Equal(d.told[c.name]) {
			news[c.name] = e.Trigger
		}
	}
	d.told = told
	return SlicesReplaced{Slices: setIn(all, func(e SliceSet) lb.Slice { return e.Slice }), Triggers: news}
}

func (d *sliceDigest) set(c converted) Event {
	e, ok := c.event.(SliceSet)
	if !ok {
		delete(d.told, c.name)
		return c.event
	}
	if e.Trigger.After(d.since) {
		d.told[c.name] = e.Trigger
	} else {
		e.Trigger = time.Time{}
	}
	return e
}

func (d *sliceDigest) gone(c converted) Event {
	delete(d.told, c.name)
	if e, ok := c.event.(SliceSet); ok {
		return sliceGone(e.Slice)
	}
	return c.event
}

// nodeDigest tells what has changed about our Node: a kubelet writes to it every
// few minutes, mostly what we do not read.
type nodeDigest struct{ told Event }

func (d *nodeDigest) replaced(all []converted) Event {
	for _, c := range all {
		if _, ok := c.event.(NodeSet); ok {
			return d.set(c)
		}
	}
	return d.news(NodeGone{})
}

func (d *nodeDigest) set(c converted) Event { return d.news(c.event) }

func (d *nodeDigest) gone(c converted) Event {
	if c.event == nil {
		return nil
	}
	return d.news(NodeGone{})
}

func (d *nodeDigest) news(e Event) Event {
	if e == nil || reflect.DeepEqual(e, d.told) {
		return nil
	}
	d.told = e
	return e
}

// cidrDigest tells the ranges of all ServiceCIDRs together.
type cidrDigest struct {
	ranges map[lb.Name][]netip.Prefix
	told   []netip.Prefix
	synced bool // told something
}

func newCIDRDigest() *cidrDigest { return &cidrDigest{ranges: map[lb.Name][]netip.Prefix{}} }

func (d *cidrDigest) replaced(all []converted) Event {
	clear(d.ranges)
	for _, c := range all {
		if e, ok := c.event.(ServiceCIDRsReplaced); ok {
			d.ranges[c.name] = e.Prefixes
		}
	}
	return d.news()
}

func (d *cidrDigest) set(c converted) Event {
	if e, ok := c.event.(ServiceCIDRsReplaced); ok {
		d.ranges[c.name] = e.Prefixes
	}
	return d.news()
}

func (d *cidrDigest) gone(c converted) Event {
	delete(d.ranges, c.name)
	return d.news()
}

func (d *cidrDigest) news() Event {
	union := slices.Concat(slices.Collect(maps.Values(d.ranges))...)
	slices.SortFunc(union, netip.Prefix.Compare)
	union = slices.Compact(union)
	if d.synced && slices.Equal(union, d.told) {
		return nil
	}
	d.told, d.synced = union, true
	return ServiceCIDRsReplaced{union}
}

// setIn returns, in order, what the events of type E among all are about.
func setIn[E Event, T any](all []converted, object func(E) T) []T {
	out := make([]T, 0, len(all))
	for _, c := range all {
		if e, ok := c.event.(E); ok {
			out = append(out, object(e))
		}
	}
	return out
}
