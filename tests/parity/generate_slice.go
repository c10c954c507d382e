// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/proxy/apis"
)

// slice returns a new version of a slice of the Service number i, now and then
// one that belongs to another Service of the namespace or to none. The family
// stays as long as the slice does.
func (g *generator) slice(name types.NamespacedName, i int) *discoveryv1.EndpointSlice {
	old := g.slices[name]
	s := &discoveryv1.EndpointSlice{}
	s.Namespace, s.Name = name.Namespace, name.Name
	s.Labels = map[string]string{discoveryv1.LabelServiceName: serviceNames[i].Name}
	if g.oneIn(16) {
		switch g.pick(5) {
		case 0:
			s.Labels[corev1.IsHeadlessService] = ""
		case 1:
			s.Labels[apis.LabelServiceProxyName] = "other" // means nothing on a slice
		case 2:
			s.Labels[discoveryv1.LabelServiceName] = serviceNames[(i+1)%len(serviceNames)].Name
		case 3:
			s.Labels[discoveryv1.LabelServiceName] = ""
		default:
			s.Labels = nil
		}
	}
	s.AddressType = oneOf(g, g.habit.families...)
	if g.oneIn(16) {
		s.AddressType = oneOf(g, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN)
	}
	if old != nil {
		s.AddressType = old.AddressType
	}
	if old != nil && g.oneIn(3) {
		s.Ports = old.Ports
	} else {
		g.slicePorts(s)
	}
	g.endpoints(s, old)
	return s
}

// slicePorts chooses up to three ports. The API has them unique by name;
// kube-proxy knows what to do when they are not.
func (g *generator) slicePorts(s *discoveryv1.EndpointSlice) {
	for range max(1, g.pick(5)-1) {
		key := g.port(g.pick(2))
		port := discoveryv1.EndpointPort{
			Name:     &key.name,
			Protocol: &key.protocol,
			Port:     new(oneOf(g, int32(8080), 8081, 8082)),
		}
		if g.oneIn(16) {
			switch g.pick(4) {
			case 0:
				port.Name = nil
			case 1:
				port.Port = nil
			case 2:
				port.Port = new(int32(0))
			default:
				port.Name = new("admin") // no Service has it
			}
		}
		s.Ports = append(s.Ports, port)
	}
	if g.oneIn(24) {
		s.Ports = nil
	}
}

// endpoints chooses up to five endpoints, or changes those of the version
// before.
func (g *generator) endpoints(s, old *discoveryv1.EndpointSlice) {
	if old != nil && len(old.Endpoints) > 0 && !g.oneIn(3) {
		s.Endpoints = slices.Clone(old.Endpoints)
		i := g.pick(len(s.Endpoints))
		if g.oneIn(4) {
			s.Endpoints = slices.Delete(s.Endpoints, i, i+1)
		} else {
			e := g.endpoint(s.Endpoints[i].Addresses)
			s.Endpoints = slices.Delete(s.Endpoints, i, i+1)
			s.Endpoints = append(s.Endpoints, g.agreed(s, e))
		}
		return
	}
	for range g.pick(6) {
		s.Endpoints = append(s.Endpoints, g.agreed(s, g.endpoint(g.addresses(s))))
	}
}

// agreed returns e, which is to become an endpoint of s, or rather a copy that
// another slice or s itself already has of its address: kube-proxy does not say
// what contradictory copies mean. Now and then they are kept nevertheless.
func (g *generator) agreed(s *discoveryv1.EndpointSlice, e discoveryv1.Endpoint) discoveryv1.Endpoint {
	if g.oneIn(24) {
		return e
	}
	same := func(o discoveryv1.Endpoint) bool { return slices.Equal(o.Addresses, e.Addresses) }
	for i := range slicesPerService {
		name := namespacedName(s)
		name.Name = name.Name[:len(name.Name)-1] + fmt.Sprint(i)
		other := g.slices[name]
		if name.Name == s.Name {
			other = s
		}
		if other == nil {
			continue
		}
		if at := slices.IndexFunc(other.Endpoints, same); at >= 0 {
			return other.Endpoints[at]
		}
	}
	return e
}

// addresses chooses an address, now and then in another spelling or with a second
// one, which does not count. Slices have half of their addresses in common with
// the next one.
func (g *generator) addresses(s *discoveryv1.EndpointSlice) []string {
	slot := int(s.Name[len(s.Name)-1] - '0')
	n := 1 + addressesPerSlice/2*slot + g.pick(addressesPerSlice)
	spelling := g.pick(16)
	var address, second string
	switch s.AddressType {
	case discoveryv1.AddressTypeIPv4:
		address, second = fmt.Sprintf("10.244.0.%d", n), "10.244.0.9"
		switch spelling {
		case 15:
			address = fmt.Sprintf("010.244.000.%03d", n)
		case 14:
			address = fmt.Sprintf("::ffff:10.244.0.%d", n)
		}
	case discoveryv1.AddressTypeIPv6:
		address, second = fmt.Sprintf("fd00:244::%d", n), "fd00:244::9"
		if spelling == 15 {
			address = fmt.Sprintf("FD00:0244:0::%d", n)
		}
	default:
		return []string{fmt.Sprintf("pod-%d.example.com", n)}
	}
	switch spelling {
	case 13:
		return []string{address, second}
	case 12:
		return nil
	}
	return []string{address}
}

func (g *generator) endpoint(addresses []string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: addresses, Conditions: g.conditions()}
	e.NodeName = oneOf(g, nil, new(nodeName), new(nodeName), new(nodeName), new("node-2"), new("node-2"), new("node-2"),
		new("Node-1"), new(" node-1"), new(""))
	e.Hints = g.hints()
	return e
}

// conditions follow the habit of the history most of the time.
func (g *generator) conditions() discoveryv1.EndpointConditions {
	habit := g.habit.conditions
	if g.oneIn(6) {
		habit = 3
	}
	switch habit {
	case 0:
		return discoveryv1.EndpointConditions{}
	case 1: // none is ready
		return discoveryv1.EndpointConditions{
			Ready: new(false), Serving: oneOf(g, nil, new(true), new(false)), Terminating: oneOf(g, new(true), nil),
		}
	case 2: // a rolling update
		return oneOf(g,
			discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
			discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)},
			discoveryv1.EndpointConditions{Ready: new(false), Serving: new(false), Terminating: new(true)})
	default:
		return discoveryv1.EndpointConditions{Ready: g.condition(), Serving: g.condition(), Terminating: g.condition()}
	}
}

func (g *generator) condition() *bool { return oneOf(g, nil, new(true), new(false)) }

// hints follow the habit of the history most of the time.
func (g *generator) hints() *discoveryv1.EndpointHints {
	habit := g.habit.hints
	if g.oneIn(12) {
		habit = g.pick(5)
	}
	switch habit {
	case 0:
		return nil
	case 1:
		return &discoveryv1.EndpointHints{ForZones: g.zoneHints()}
	case 2:
		return &discoveryv1.EndpointHints{ForNodes: g.nodeHints()}
	case 3:
		return &discoveryv1.EndpointHints{ForZones: g.zoneHints(), ForNodes: g.nodeHints()}
	default:
		return &discoveryv1.EndpointHints{}
	}
}

func (g *generator) zoneHints() []discoveryv1.ForZone {
	out := []discoveryv1.ForZone{{Name: oneOf(g, zones...)}}
	if g.oneIn(4) {
		out = append(out, discoveryv1.ForZone{Name: oneOf(g, zones...)})
	}
	return out
}

func (g *generator) nodeHints() []discoveryv1.ForNode {
	out := []discoveryv1.ForNode{{Name: oneOf(g, nodeName, "node-2", nodeName, "Node-1")}}
	if g.oneIn(4) {
		out = append(out, discoveryv1.ForNode{Name: oneOf(g, nodeName, "node-2")})
	}
	return out
}
