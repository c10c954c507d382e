// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"fmt"
	"net/netip"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// ConvertSlice reduces an EndpointSlice to what matters here. counts is false
// for one that leads nowhere: it names no Service, belongs to a headless one,
// or its addresses are not IP addresses; then only slice.Name has a meaning.
// Whatever is invalid is left out of slice and named in warnings; all
// addresses left out share one.
func ConvertSlice(s *discoveryv1.EndpointSlice) (slice lb.Slice, counts bool, warnings []Warning) {
	slice.Name = lb.Name{Namespace: s.Namespace, Name: s.Name}
	slice.Service = s.Labels[discoveryv1.LabelServiceName]
	_, headless := s.Labels[corev1.IsHeadlessService]
	if slice.Service == "" || headless {
		return slice, false, nil
	}
	c := complaints{object: title(kindSlice, slice.Name)}
	switch s.AddressType {
	case discoveryv1.AddressTypeIPv4:
		slice.Family = lb.IPv4
	case discoveryv1.AddressTypeIPv6:
		slice.Family = lb.IPv6
	case discoveryv1.AddressTypeFQDN:
		return slice, false, nil
	default:
		c.add("slice left out: unknown addressType %q", s.AddressType)
		return slice, false, c.warnings
	}
	slice.Ports = slicePorts(s.Ports, &c)
	slice.Endpoints, slice.Invalid = endpoints(s.Endpoints, slice.Family, &c)
	return slice, true, c.warnings
}

// slicePorts returns the valid ports in their order. A port without a name or
// number is a legal way to say nothing.
func slicePorts(ports []discoveryv1.EndpointPort, c *complaints) []lb.SlicePort {
	out := make([]lb.SlicePort, 0, len(ports))
	for i := range ports {
		p := &ports[i]
		if p.Name == nil || p.Port == nil || *p.Port == 0 {
			continue
		}
		protocol := ""
		if p.Protocol != nil {
			protocol = string(*p.Protocol)
		}
		port, problem := parsePort(*p.Name, protocol, *p.Port)
		if problem != "" {
			c.add("port %q left out: %s", *p.Name, problem)
			continue
		}
		out = append(out, lb.SlicePort{Name: port.Name, Protocol: port.Protocol, Number: port.Number})
	}
	return out
}

// endpoints returns the endpoints whose first address is a usable one of the
// family, and the others. The API calls all addresses of an endpoint
// interchangeable; the first is the one that counts.
func endpoints(in []discoveryv1.Endpoint, family lb.Family, c *complaints) (out []lb.Endpoint, bad []lb.InvalidEndpoint) {
	out = make([]lb.Endpoint, 0, len(in))
	var texts []string
	for i := range in {
		e := &in[i]
		if len(e.Addresses) == 0 {
			bad = append(bad, lb.InvalidEndpoint{Reason: "it has no address"})
			texts = append(texts, "an endpoint without address")
			continue
		}
		addr, problem := endpointAddr(e.Addresses[0], family)
		if problem != "" {
			bad = append(bad, lb.InvalidEndpoint{Address: e.Addresses[0], Reason: problem})
			texts = append(texts, fmt.Sprintf("%q (%s)", e.Addresses[0], problem))
			continue
		}
		endpoint := lb.Endpoint{
			Addr:        addr,
			Ready:       isTrue(e.Conditions.Ready, true),
			Serving:     isTrue(e.Conditions.Serving, true),
			Terminating: isTrue(e.Conditions.Terminating, false),
		}
		if e.NodeName != nil {
			endpoint.Node = shared(*e.NodeName)
		}
		if e.Hints != nil {
			endpoint.NodeHints = names(e.Hints.ForNodes, func(n discoveryv1.ForNode) string { return n.Name })
			endpoint.ZoneHints = names(e.Hints.ForZones, func(z discoveryv1.ForZone) string { return z.Name })
		}
		out = append(out, endpoint)
	}
	if len(texts) > 0 {
		c.add("endpoints left out: %s", firstFew(texts))
	}
	return out, bad
}

// endpointAddr reads an endpoint's address. problem says why it cannot be used
// and is empty when it can.
func endpointAddr(text string, family lb.Family) (addr netip.Addr, problem string) {
	addr, ok := parseAddr(text)
	if !ok {
		return addr, "not an IP address"
	}
	if problem := unusable(addr); problem != "" {
		return addr, problem
	}
	if lb.FamilyOf(addr) != family {
		return addr, "not " + family.String()
	}
	return addr, ""
}

// names returns the names in hints, nil when there is no hint. A name may be
// empty: the API takes "" for the name of a zone.
func names[T any](hints []T, name func(T) string) []string {
	if len(hints) == 0 {
		return nil
	}
	out := make([]string, 0, len(hints))
	for _, h := range hints {
		out = append(out, shared(name(h)))
	}
	return out
}

// shared returns s in a copy that others who have the same string use, too. A
// few names of nodes and zones are in all endpoints of a cluster.
func shared(s string) string { return unique.Make(s).Value() }

func isTrue(condition *bool, unset bool) bool {
	if condition == nil {
		return unset
	}
	return *condition
}
