// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// converted is all that is kept of an API object.
type converted struct {
	kind string // one of the kind constants
	name lb.Name
	// event is what to say when the object is new or has changed, nil when that
	// is nobody's business; of a ServiceCIDR it is what to say if there were no
	// other.
	event    Event
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
	c := converted{kind: kindSlice, name: slice.Name, event: sliceGone(slice), warnings: warnings}
	if counts {
		c.event = SliceSet{slice, trigger(s)}
	}
	return c
}

func sliceGone(s lb.Slice) SliceGone { return SliceGone{s.Name, s.Service, s.Family} }

// trigger returns when something happened that changed s, zero when s does not
// say.
func trigger(s *discoveryv1.EndpointSlice) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s.Annotations[corev1.EndpointsLastChangeTriggerTime])
	if err != nil {
		return time.Time{}
	}
	return t
}

// convertNode converts our Node. About any other there is nothing to say.
func convertNode(n *corev1.Node, o Options) converted {
	c := converted{kind: kindNode, name: lb.Name{Name: n.Name}}
	if n.Name == o.NodeName {
		node, warnings := ConvertNode(n)
		c.event, c.warnings = NodeSet{node}, warnings
	}
	return c
}

func convertServiceCIDR(s *networkingv1.ServiceCIDR) converted {
	prefixes, warnings := ConvertServiceCIDR(s)
	return converted{
		kind: kindServiceCIDR, name: lb.Name{Name: s.Name}, event: ServiceCIDRsReplaced{prefixes}, warnings: warnings,
	}
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
