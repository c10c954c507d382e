// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// converted is all that is kept of an API object.
type converted struct {
	kind     string // kindService or kindSlice
	name     lb.Name
	event    Event // what to say when the object is new or has changed
	warnings []Warning
}

// identity tells objects apart.
type identity struct {
	kind string
	name lb.Name
}

func (c converted) identity() identity { return identity{c.kind, c.name} }

func convertService(s *corev1.Service, o Options) converted {
	svc, ours, warnings := ConvertService(s, o)
	c := converted{kind: kindService, name: svc.Name, event: ServiceGone{svc.Name}, warnings: warnings}
	if ours {
		c.event = ServiceSet{svc}
	}
	return c
}

func convertSlice(s *discoveryv1.EndpointSlice) converted {
	slice, counts, warnings := ConvertSlice(s)
	c := converted{kind: kindSlice, name: slice.Name, event: SliceGone{slice.Name}, warnings: warnings}
	if counts {
		c.event = SliceSet{slice}
	}
	return c
}

// services returns the complete list of the Services among objects.
func services(objects []converted) ServicesReplaced {
	list := make([]lb.Service, 0, len(objects))
	for _, o := range objects {
		if e, ok := o.event.(ServiceSet); ok {
			list = append(list, e.Service)
		}
	}
	return ServicesReplaced{list}
}

// endpointSlices returns the complete list of the slices among objects.
func endpointSlices(objects []converted) SlicesReplaced {
	list := make([]lb.Slice, 0, len(objects))
	for _, o := range objects {
		if e, ok := o.event.(SliceSet); ok {
			list = append(list, e.Slice)
		}
	}
	return SlicesReplaced{list}
}

// send sends what there is to say; it stops early and returns false when ctx
// ends.
func send[E Event](ctx context.Context, to chan<- Event, what ...E) bool {
	for _, e := range what {
		select {
		case to <- e:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// unsaid returns the warnings in now that are not in before, each once.
func unsaid(before, now []Warning) []Warning {
	if len(now) == 0 {
		return nil
	}
	said := make(map[Warning]bool, len(before)+len(now))
	for _, w := range before {
		said[w] = true
	}
	var news []Warning
	for _, w := range now {
		if !said[w] {
			news = append(news, w)
		}
		said[w] = true
	}
	return news
}
