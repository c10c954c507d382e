// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// ours is Fairlead: the reflector's conversion, the store, and what it has said
// so far, change by change.
type ours struct {
	store *lb.Store
	told  lb.Delta
}

// Ours returns Fairlead's side, which knows the node and no object.
func Ours() Side {
	o := &ours{
		store: lb.NewStore(lb.Config{NodeName: nodeName}),
		told: lb.Delta{
			Services:  map[lb.ServicePort]*lb.Backends{},
			Frontends: map[lb.FrontendKey]lb.Owner{},
			Health:    map[lb.ServiceFamily]lb.Health{},
		},
	}
	o.apply(Step{Node: baseNode()})
	return o
}

// apply does what the reflector and the agent do with an object.
func (o *ours) apply(s Step) {
	switch {
	case s.Service != nil:
		if svc, counts, _ := reflector.ConvertService(s.Service, reflector.Options{}); counts {
			o.store.SetService(svc)
		} else {
			o.store.DeleteService(svc.Name)
		}
	case s.Slice != nil:
		if slice, counts, _ := reflector.ConvertSlice(s.Slice); counts {
			o.store.SetSlice(slice)
		} else {
			o.store.DeleteSlice(slice.Name)
		}
	case s.DeleteService != nil:
		o.store.DeleteService(name(*s.DeleteService))
	case s.DeleteSlice != nil:
		o.store.DeleteSlice(name(*s.DeleteSlice))
	case s.Node != nil:
		node, _ := reflector.ConvertNode(s.Node)
		o.store.SetNode(node)
	}
}

func name(n types.NamespacedName) lb.Name { return lb.Name{Namespace: n.Namespace, Name: n.Name} }

// answer puts together what the store has said so far.
func (o *ours) answer() Answer {
	d := o.store.Changes()
	fold(o.told.Services, d.Services, func(b *lb.Backends) bool { return b == nil })
	fold(o.told.Frontends, d.Frontends, func(owner lb.Owner) bool { return !owner.Exists() })
	fold(o.told.Health, d.Health, func(h lb.Health) bool { return h == lb.Health{} })

	a := Answer{
		Frontends: make(map[lb.FrontendKey]lb.Owner, len(o.told.Frontends)),
		Ports:     make(map[lb.ServicePort]Port, len(o.told.Services)),
		Health:    maps.Clone(o.told.Health),
	}
	kinds := map[lb.ServicePort]kinds{}
	for key, owner := range o.told.Frontends {
		if owner.Kind == lb.KindForeign {
			continue // kube-proxy knows nothing of another proxy's Service
		}
		a.Frontends[key] = owner
		kinds[owner.Service] |= 1 << owner.Kind
	}
	for sp, backends := range o.told.Services {
		a.Ports[sp] = port(backends, kinds[sp])
	}
	return a
}

// fold makes told say what news says.
func fold[K comparable, V any](told, news map[K]V, gone func(V) bool) {
	for key, value := range news {
		if gone(value) {
			delete(told, key)
		} else {
			told[key] = value
		}
	}
}

// kinds is the set of the kinds of frontends a service port has.
type kinds uint8

func (k kinds) has(kind lb.FrontendKind) bool { return k&(1<<kind) != 0 }

// port keeps of the backends what somebody can reach.
func port(b *lb.Backends, has kinds) Port {
	p := Port{Serving: b.Serving, Affinity: b.Affinity}
	for _, kind := range []lb.FrontendKind{lb.KindClusterIP, lb.KindNodePort, lb.KindLoadBalancer, lb.KindExternalIP} {
		if has.has(kind) {
			for _, side := range []lb.Side{kind.Inside(), kind.Outside()} {
				p.Sets[side] = reached(b.Sides[side])
			}
		}
	}
	if has.has(lb.KindLoadBalancer) && b.Restricted {
		p.Sources, p.NodeAllowed = outermost(b.Sources), b.NodeAllowed
	}
	return p
}

// reached says what a client gets out of a set.
func reached(s lb.Set) Set {
	switch {
	case len(s.Backends) > 0:
		return Set{Backends: slices.Clone(s.Backends)}
	case s.Elsewhere:
		return Set{Verdict: VerdictDrop}
	default:
		return Set{Verdict: VerdictRefuse}
	}
}
