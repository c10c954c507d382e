// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	netutils "k8s.io/utils/net"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// labelServiceProxyName hands a Service to a proxy other than the default one.
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// Options say which Services are ours.
type Options struct {
	// ServiceProxyName is the value of the label
	// service.kubernetes.io/service-proxy-name on Services meant for us. When it
	// is empty, every Service with that label is another proxy's, whatever the
	// label says. Services without the label are ours in either case.
	ServiceProxyName string
}

// ConvertService reduces a Service to what matters here. ours is false for one
// that we do not serve: of type ExternalName, without a usable ClusterIP, or
// meant for another proxy; then only svc.Name has a meaning. Whatever is
// invalid is left out of svc and named in warnings.
func ConvertService(s *corev1.Service, o Options) (svc lb.Service, ours bool, warnings []Warning) {
	svc.Name = lb.Name{Namespace: s.Namespace, Name: s.Name}
	if !serves(s, o) {
		return svc, false, nil
	}
	c := complaints{kind: kindService, name: svc.Name}
	svc.Created = s.CreationTimestamp.Time
	svc.ClusterIPs = clusterIPs(&s.Spec, &c)
	svc.Ports = servicePorts(s.Spec.Ports, &c)
	return svc, len(svc.ClusterIPs) > 0, c.warnings
}

// serves tells whether s has ClusterIPs that are ours to serve. The type comes
// first: an ExternalName Service may still carry the ClusterIP it had before.
func serves(s *corev1.Service, o Options) bool {
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return false
	}
	if s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone {
		return false
	}
	proxy, other := s.Labels[labelServiceProxyName]
	return !other || (o.ServiceProxyName != "" && proxy == o.ServiceProxyName)
}

// clusterIPs returns the valid ClusterIPs in their order, one of each family at
// most. clusterIPs[i] belongs to ipFamilies[i]; where that list is shorter (an
// object older than dual stack) the address tells its family.
func clusterIPs(spec *corev1.ServiceSpec, c *complaints) []netip.Addr {
	texts := spec.ClusterIPs
	if len(texts) == 0 {
		texts = []string{spec.ClusterIP}
	}
	out := make([]netip.Addr, 0, len(texts))
	for i, text := range texts {
		addr, ok := parseAddr(text)
		if !ok {
			c.add("ClusterIP %q left out: not an IP address", text)
			continue
		}
		family := lb.FamilyOf(addr)
		switch {
		// Taking these over would cut the node and its pods off from themselves.
		case addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast():
			c.add("ClusterIP %q left out: %s", text, unusable(addr))
		case i < len(spec.IPFamilies) && string(spec.IPFamilies[i]) != family.String():
			c.add("ClusterIP %q left out: the family given for it is %q", text, spec.IPFamilies[i])
		case slices.ContainsFunc(out, func(a netip.Addr) bool { return lb.FamilyOf(a) == family }):
			c.add("ClusterIP %q left out: a second address of family %s", text, family)
		default:
			out = append(out, addr)
		}
	}
	return out
}

// servicePorts returns the valid ports in their order. No two of them share
// protocol and number, or name and protocol.
func servicePorts(ports []corev1.ServicePort, c *complaints) []lb.Port {
	out := make([]lb.Port, 0, len(ports))
	for i := range ports {
		p := &ports[i]
		port, problem := parsePort(p.Name, string(p.Protocol), p.Port)
		if problem != "" {
			c.add("port %q left out: %s", p.Name, problem)
			continue
		}
		if problem := clash(out, port); problem != "" {
			c.add("port %q left out: %s", p.Name, problem)
			continue
		}
		out = append(out, port)
	}
	return out
}

// clash says which of the taken ports stands in the way of p, "" when none does.
func clash(taken []lb.Port, p lb.Port) string {
	for _, t := range taken {
		switch {
		case t.Protocol != p.Protocol:
		case t.Number == p.Number:
			return fmt.Sprintf("port %q already has number %d/%s", t.Name, p.Number, p.Protocol)
		case t.Name == p.Name:
			return fmt.Sprintf("%d/%s already has this name", t.Number, t.Protocol)
		}
	}
	return ""
}

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
	c := complaints{kind: kindSlice, name: slice.Name}
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
	slice.Endpoints = endpoints(s.Endpoints, slice.Family, &c)
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
		out = append(out, lb.SlicePort(port))
	}
	return out
}

// endpoints returns the endpoints whose first address is a usable one of the
// family. The API calls all addresses of an endpoint interchangeable; the first
// is the one that counts.
func endpoints(in []discoveryv1.Endpoint, family lb.Family, c *complaints) []lb.Endpoint {
	out := make([]lb.Endpoint, 0, len(in))
	var bad []string
	for i := range in {
		e := &in[i]
		if len(e.Addresses) == 0 {
			bad = append(bad, "an endpoint without address")
			continue
		}
		addr, problem := endpointAddr(e.Addresses[0], family)
		if problem != "" {
			bad = append(bad, fmt.Sprintf("%q (%s)", e.Addresses[0], problem))
			continue
		}
		out = append(out, lb.Endpoint{
			Addr:        addr,
			Ready:       isTrue(e.Conditions.Ready, true),
			Serving:     isTrue(e.Conditions.Serving, true),
			Terminating: isTrue(e.Conditions.Terminating, false),
		})
	}
	if len(bad) > 0 {
		c.add("endpoints left out: %s", firstFew(bad))
	}
	return out
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

// parsePort checks one port of either kind of object. problem says what is
// wrong and is empty when nothing is.
func parsePort(name, protocol string, number int32) (port lb.Port, problem string) {
	p, ok := lb.ParseProtocol(protocol)
	switch {
	case !ok:
		return port, fmt.Sprintf("unknown protocol %q", protocol)
	case number < 1 || number > 65535:
		return port, fmt.Sprintf("number %d is not between 1 and 65535", number)
	case name != "" && len(validation.IsDNS1123Label(name)) > 0:
		return port, "its name is not a DNS label"
	}
	return lb.Port{Name: name, Protocol: p, Number: uint16(number)}, ""
}

// parseAddr reads an address as Kubernetes does: leading zeros are decimal
// (netip refuses them) and ::ffff:a.b.c.d is IPv4.
func parseAddr(text string) (addr netip.Addr, ok bool) {
	addr, ok = netip.AddrFromSlice(netutils.ParseIPSloppy(text))
	return addr.Unmap(), ok
}

// unusable says why no endpoint can have this address; it is empty when one can.
func unusable(a netip.Addr) string {
	switch {
	case a.IsUnspecified():
		return "unspecified address"
	case a.IsLoopback():
		return "loopback address"
	case a.IsLinkLocalUnicast():
		return "link-local address"
	case a.IsMulticast():
		return "multicast address"
	default:
		return ""
	}
}

func isTrue(condition *bool, unset bool) bool {
	if condition == nil {
		return unset
	}
	return *condition
}

// firstFew joins the first items of a list that may be long.
func firstFew(items []string) string {
	const few = 3
	if len(items) <= few {
		return strings.Join(items, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(items[:few], ", "), len(items)-few)
}

// Kinds of API objects.
const (
	kindService = "Service"
	kindSlice   = "EndpointSlice"
)

// complaints collects the warnings about one object.
type complaints struct {
	kind     string
	name     lb.Name
	warnings []Warning
}

func (c *complaints) add(format string, args ...any) {
	c.warnings = append(c.warnings, Warning{
		Object: c.kind + " " + c.name.String(),
		Text:   fmt.Sprintf(format, args...),
	})
}
