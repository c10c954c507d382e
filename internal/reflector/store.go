// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// store takes the place of a cache behind client-go's Reflector: it passes on
// what the Reflector would have it keep, so that the API's objects are held
// nowhere. One goroutine uses it.
type store struct {
	// ctx ends the sends; the Reflector's calls bring none.
	ctx     context.Context
	events  chan<- Event
	options Options
	digest  digest
	// said holds the warnings that were sent and are still true.
	said map[lb.Name][]Warning
	// ticket is that of the last Refresh that the lists follow.
	ticket uint64
	// listed is called when a complete list has arrived.
	listed func()
	// heard is called with every event before it is sent.
	heard func(Event)
}

var (
	_ cache.ReflectorStore    = (*store)(nil)
	_ cache.TransformingStore = (*store)(nil)
)

// convert accepts an API object or what Transformer made of one.
func (s *store) convert(obj any) (converted, error) {
	switch o := obj.(type) {
	case converted:
		return o, nil
	case *corev1.Service:
		return convertService(o, s.options), nil
	case *discoveryv1.EndpointSlice:
		return convertSlice(o), nil
	case *corev1.Node:
		return convertNode(o, s.options), nil
	case *networkingv1.ServiceCIDR:
		return convertServiceCIDR(o), nil
	default:
		return converted{}, fmt.Errorf("convert %T: not a kind that is watched", obj)
	}
}

// tell sends e unless it is nil.
func (s *store) tell(e Event) {
	if e != nil {
		s.heard(e)
		send(s.ctx, s.events, e)
	}
}

// Transformer lets the Reflector convert each object as it arrives while it
// gathers a complete list, so that even then it never holds all of them.
func (s *store) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return s.convert(obj) }
}

// Add passes on a new object.
func (s *store) Add(obj any) error { return s.Update(obj) }

// Update passes on an object that is new or has changed.
func (s *store) Update(obj any) error {
	c, err := s.convert(obj)
	if err != nil {
		return err
	}
	s.tell(s.digest.set(c))
	send(s.ctx, s.events, unsaid(s.said[c.name], c.warnings)...)
	if len(c.warnings) > 0 {
		s.said[c.name] = c.warnings
	} else {
		delete(s.said, c.name)
	}
	return nil
}

// Delete passes on that an object is gone.
func (s *store) Delete(obj any) error {
	c, err := s.convert(obj)
	if err != nil {
		return err
	}
	s.tell(s.digest.gone(c))
	delete(s.said, c.name)
	return nil
}

// Replace passes on a complete list. The order of objs has no meaning: it comes
// from a map when the list was streamed.
func (s *store) Replace(objs []any, _ string) error {
	all := make([]converted, 0, len(objs))
	said := map[lb.Name][]Warning{}
	var news []Warning
	for _, obj := range objs {
		c, err := s.convert(obj)
		if err != nil {
			return err
		}
		all = append(all, c)
		if len(c.warnings) > 0 {
			news = append(news, unsaid(s.said[c.name], c.warnings)...)
			said[c.name] = c.warnings
		}
	}
	s.listed()
	s.tell(answering(s.digest.replaced(all), s.ticket))
	send(s.ctx, s.events, news...)
	s.said = said
	return nil
}

// answering returns e with the ticket of the Refresh it answers.
func answering(e Event, ticket uint64) Event {
	switch e := e.(type) {
	case ServicesReplaced:
		e.Ticket = ticket
		return e
	case SlicesReplaced:
		e.Ticket = ticket
		return e
	default:
		return e
	}
}

// Resync does nothing: whoever receives the events knows what they said.
func (s *store) Resync() error { return nil }
