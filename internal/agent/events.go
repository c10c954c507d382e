// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// synced tells what has arrived as a whole. Nothing is written before all of it
// has: an apply without the Node, say, would take all its NodePorts away.
type synced struct {
	services, slices, node, serviceCIDRs, addresses bool
}

func (s synced) complete() bool { return s == synced{true, true, true, true, true} }

// take enters one event into the store.
func (a *agent) take(ev reflector.Event) {
	switch ev := ev.(type) {
	case reflector.ServicesReplaced:
		a.synced.services = true
		a.guard.services(ev.Ticket)
		a.metrics.ServiceChanges(a.store.ReplaceServices(ev.Services))
	case reflector.ServiceSet:
		a.metrics.ServiceChanges(count(a.store.SetService(ev.Service)))
	case reflector.ServiceGone:
		a.metrics.ServiceChanges(count(a.store.DeleteService(ev.Name)))
	case reflector.SlicesReplaced:
		a.synced.slices = true
		a.guard.slices(ev.Ticket)
		a.metrics.EndpointChanges(a.store.ReplaceSlices(ev.Slices))
		for _, slice := range ev.Slices {
			a.triggered(slice, ev.Triggers[slice.Name])
		}
	case reflector.SliceSet:
		a.metrics.EndpointChanges(count(a.store.SetSlice(ev.Slice)))
		a.triggered(ev.Slice, ev.Trigger)
	case reflector.SliceGone:
		a.metrics.EndpointChanges(count(a.store.DeleteSlice(ev.Name)))
		delete(a.triggers, serviceFamily(ev.Name, ev.Service, ev.Family))
	case reflector.NodeSet:
		a.synced.node = true
		a.nodeSet(ev.Node)
	case reflector.NodeGone:
		a.nodeGone()
		a.synced.node = true
	case reflector.ServiceCIDRsReplaced:
		a.synced.serviceCIDRs = true
		a.store.SetServiceCIDRs(ev.Prefixes)
	case reflector.Warning:
		a.metrics.Warnings.Inc()
		a.log.Warn("object needs attention", logfield.Object(ev.Object), logfield.Reason(ev.Text))
		return
	}
	a.metrics.Queued()
	a.health.Queued()
}

func count(changed bool) int {
	if changed {
		return 1
	}
	return 0
}

// serviceFamily is what a slice belongs to.
func serviceFamily(slice lb.Name, service string, family lb.Family) lb.ServiceFamily {
	return lb.ServiceFamily{Service: lb.Name{Namespace: slice.Namespace, Name: service}, Family: family}
}

// triggered takes note of when something happened that a slice tells of, so that
// how long it takes to reach the kernel can be measured. As with kube-proxy, an
// event that changes nothing but the slice's metadata counts again.
func (a *agent) triggered(slice lb.Slice, at time.Time) {
	if !at.IsZero() {
		key := serviceFamily(slice.Name, slice.Service, slice.Family)
		a.triggers[key] = append(a.triggers[key], at)
	}
}

func (a *agent) nodeSet(node lb.Node) {
	a.setNode(node)
	a.health.SetNodeEligible(node.Eligible)
}

// nodeGone is for a Node that is not there yet, or was deleted. Its zone and
// addresses stay what they were, as with kube-proxy: the machine is still there,
// and load balancers still ask it.
func (a *agent) nodeGone() {
	a.health.SetNodeEligible(a.nodeOptional)
	if !a.synced.node {
		a.setNode(lb.Node{})
	}
	if !a.nodeOptional {
		a.log.Warn("the API server has no Node of this name (check --node-name, if it was not deleted)")
	}
}

func (a *agent) setNode(node lb.Node) {
	node = a.withNodeAddress(node)
	a.store.SetNode(node)
	if a.devices != nil {
		a.devices.setAddresses(node.Addresses)
	}
}

// withNodeAddress returns node with the address that takes the place of its own.
func (a *agent) withNodeAddress(node lb.Node) lb.Node {
	if a.nodeAddress.IsValid() {
		node.Addresses = slices.DeleteFunc(slices.Clone(node.Addresses), func(addr netip.Addr) bool {
			return lb.FamilyOf(addr) == lb.FamilyOf(a.nodeAddress)
		})
		node.Addresses = append(node.Addresses, a.nodeAddress)
	}
	return node
}

func (a *agent) addressesChanged(addresses []netip.Addr) {
	a.synced.addresses = true
	a.store.SetLocalAddresses(addresses)
	a.log.Debug("local addresses", logfield.Count(len(addresses)))
	a.health.Queued()
}
