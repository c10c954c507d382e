// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// labelServiceProxyName hands a Service to a proxy other than the default one.
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// maxAffinity bounds timeoutSeconds of session affinity, as the API does.
const maxAffinity = 86400

// Options say which node we are and which Services are ours.
type Options struct {
	// NodeName is the name of the Node object of the node we run on.
	NodeName string
	// ServiceProxyName is the value of the label
	// service.kubernetes.io/service-proxy-name on Services meant for us. When it
	// is empty, every Service with that label is another proxy's, whatever the
	// label says. Services without the label are ours in either case.
	ServiceProxyName string
	// NoExternalIPs leaves the externalIPs of all Services out: Kubernetes'
	// feature gate AllowServiceExternalIPs set to false.
	NoExternalIPs bool
}

// ConvertService reduces a Service to what matters here. ours is false for one
// that has no addresses we need to know: of type ExternalName or without a
// usable ClusterIP; then only svc.Name has a meaning. A Service meant for
// another proxy is Foreign. Whatever is invalid is left out of svc or given its
// safest meaning, and named in warnings.
func ConvertService(s *corev1.Service, o Options) (svc lb.Service, ours bool, warnings []Warning) {
	svc.Name = lb.Name{Namespace: s.Namespace, Name: s.Name}
	// The type comes first: an ExternalName Service may still carry the ClusterIP
	// it had before.
	if s.Spec.Type == corev1.ServiceTypeExternalName ||
		s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone {
		return svc, false, nil
	}
	c := complaints{object: title(kindService, svc.Name)}
	svc.Created = s.CreationTimestamp.Time
	svc.ClusterIPs = clusterIPs(&s.Spec, &c)
	ours = len(svc.ClusterIPs) > 0
	if svc.Foreign = foreign(s, o); svc.Foreign {
		return svc, ours, nil // what is wrong with it is for its proxy to say
	}
	if !ours {
		return svc, false, c.warnings
	}
	checkType(s.Spec.Type, &c)
	svc.LoadBalancerIPs = loadBalancerIPs(&s.Status.LoadBalancer, &c)
	if !o.NoExternalIPs {
		svc.ExternalIPs = externalIPs(&s.Spec, &c)
	}
	svc.Ports = servicePorts(&s.Spec, &c)
	svc.InternalLocal = internalLocal(&s.Spec, &c)
	svc.ExternalLocal = externalLocal(&s.Spec, &c)
	svc.Affinity = affinity(&s.Spec, &c)
	svc.Sources = sources(s.Spec.LoadBalancerSourceRanges, &c)
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.ExternalLocal {
		svc.HealthCheckNodePort = healthCheckNodePort(&s.Spec, &c)
	}
	return svc, true, c.warnings
}

// foreign tells whether s is meant for another proxy.
func foreign(s *corev1.Service, o Options) bool {
	proxy, named := s.Labels[labelServiceProxyName]
	return named && (o.ServiceProxyName == "" || proxy != o.ServiceProxyName)
}

func checkType(t corev1.ServiceType, c *complaints) {
	switch t {
	case "", corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer:
	default:
		c.add("type %q is unknown: taken for ClusterIP", t)
	}
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
		case reserved(addr) != "":
			c.add("ClusterIP %q left out: %s", text, reserved(addr))
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

// loadBalancerIPs returns the valid addresses a load balancer was given that
// nodes are to take traffic for. Link-local ones are among them: the API allows
// them here, and only controllers write the status.
func loadBalancerIPs(status *corev1.LoadBalancerStatus, c *complaints) []netip.Addr {
	var texts, bad []string
	for i := range status.Ingress {
		ingress := &status.Ingress[i]
		switch {
		case ingress.IP == "": // a host name
		case ingress.IPMode == nil || *ingress.IPMode == corev1.LoadBalancerIPModeVIP:
			texts = append(texts, ingress.IP)
		case *ingress.IPMode == corev1.LoadBalancerIPModeProxy: // wants to see all traffic itself
		default:
			bad = append(bad, fmt.Sprintf("%q (unknown ipMode %q)", ingress.IP, *ingress.IPMode))
		}
	}
	out, more := addresses(texts, reserved)
	if bad = append(bad, more...); len(bad) > 0 {
		c.add("load-balancer IPs left out: %s", firstFew(bad))
	}
	return out
}

// externalIPs returns the valid ones, without those the API refuses.
func externalIPs(spec *corev1.ServiceSpec, c *complaints) []netip.Addr {
	var texts []string
	for _, text := range spec.ExternalIPs {
		if strings.TrimSpace(text) != "" { // the API lets blanks pass
			texts = append(texts, text)
		}
	}
	out, bad := addresses(texts, unusable)
	if len(bad) > 0 {
		c.add("external IPs left out: %s", firstFew(bad))
	}
	return out
}

// addresses returns the valid addresses among texts, each once, and in bad the
// others with the reason. problem says why an address cannot be taken.
func addresses(texts []string, problem func(netip.Addr) string) (out []netip.Addr, bad []string) {
	for _, text := range texts {
		addr, ok := parseAddr(text)
		if !ok {
			bad = append(bad, fmt.Sprintf("%q (not an IP address)", text))
		} else if why := problem(addr); why != "" {
			bad = append(bad, fmt.Sprintf("%q (%s)", text, why))
		} else {
			out = append(out, addr)
		}
	}
	return distinct(out), bad
}

// servicePorts returns the valid ports in their order. No two of them share
// protocol and number, name and protocol, or protocol and NodePort.
func servicePorts(spec *corev1.ServiceSpec, c *complaints) []lb.Port {
	out := make([]lb.Port, 0, len(spec.Ports))
	for i := range spec.Ports {
		p := &spec.Ports[i]
		port, problem := parsePort(p.Name, string(p.Protocol), p.Port)
		if problem == "" {
			problem = clash(out, port)
		}
		if problem != "" {
			c.add("port %q left out: %s", p.Name, problem)
			continue
		}
		port.NodePort, problem = nodePort(spec.Type, p.NodePort, out, port.Protocol)
		if problem != "" {
			c.add("nodePort %d of port %q left out: %s", p.NodePort, p.Name, problem)
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

// nodePort returns number as a NodePort, 0 when there is none. problem says why
// it cannot be one beside those taken, and is empty when it can.
func nodePort(t corev1.ServiceType, number int32, taken []lb.Port, protocol lb.Protocol) (port uint16, problem string) {
	switch {
	case number == 0:
		return 0, ""
	case t != corev1.ServiceTypeNodePort && t != corev1.ServiceTypeLoadBalancer:
		return 0, "only the types NodePort and LoadBalancer have one"
	case number < 1 || number > 65535:
		return 0, "not between 1 and 65535"
	}
	for _, p := range taken {
		if p.NodePort == uint16(number) && p.Protocol == protocol {
			return 0, fmt.Sprintf("port %q already has it", p.Name)
		}
	}
	return uint16(number), ""
}

func internalLocal(spec *corev1.ServiceSpec, c *complaints) bool {
	if spec.InternalTrafficPolicy == nil {
		return false
	}
	switch policy := *spec.InternalTrafficPolicy; policy {
	case corev1.ServiceInternalTrafficPolicyLocal:
		return true
	case corev1.ServiceInternalTrafficPolicyCluster:
	default:
		c.add("internalTrafficPolicy %q is unknown: taken for Cluster", policy)
	}
	return false
}

// externalLocal tells whether outside clients get the endpoints of their node
// only. A Service nobody outside can dial has no such policy, whatever it says.
func externalLocal(spec *corev1.ServiceSpec, c *complaints) bool {
	switch spec.ExternalTrafficPolicy {
	case corev1.ServiceExternalTrafficPolicyLocal:
	case "", corev1.ServiceExternalTrafficPolicyCluster:
		return false
	default:
		c.add("externalTrafficPolicy %q is unknown: taken for Cluster", spec.ExternalTrafficPolicy)
		return false
	}
	switch spec.Type {
	case corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeNodePort:
		return true
	case corev1.ServiceTypeClusterIP:
		return len(spec.ExternalIPs) > 0
	default:
		return false
	}
}

// affinity returns how long a client keeps its backend, 0 for not at all.
func affinity(spec *corev1.ServiceSpec, c *complaints) uint32 {
	switch spec.SessionAffinity {
	case corev1.ServiceAffinityClientIP:
	case "", corev1.ServiceAffinityNone:
		return 0
	default:
		c.add("sessionAffinity %q is unknown: taken for None", spec.SessionAffinity)
		return 0
	}
	timeout := corev1.DefaultClientIPServiceAffinitySeconds
	if config := spec.SessionAffinityConfig; config != nil && config.ClientIP != nil && config.ClientIP.TimeoutSeconds != nil {
		timeout = *config.ClientIP.TimeoutSeconds
	}
	switch {
	case timeout < 1:
		c.add("session affinity timeout of %d s is not above 0: taken for %d s", timeout, corev1.DefaultClientIPServiceAffinitySeconds)
		return uint32(corev1.DefaultClientIPServiceAffinitySeconds)
	case timeout > maxAffinity:
		c.add("session affinity timeout of %d s is too long: taken for %d s", timeout, maxAffinity)
		return maxAffinity
	}
	return uint32(timeout)
}

// sources returns the valid source ranges, masked, each once.
func sources(texts []string, c *complaints) []netip.Prefix {
	var out []netip.Prefix
	var bad []string
	for _, text := range texts {
		text = strings.TrimSpace(text) // the API lets blanks pass
		if text == "" {
			continue
		}
		prefix, ok := parsePrefix(text)
		if !ok {
			bad = append(bad, fmt.Sprintf("%q", text))
			continue
		}
		out = append(out, prefix)
	}
	switch {
	case len(bad) > 0 && len(out) == 0:
		c.add("loadBalancerSourceRanges that are no CIDRs left out: %s; none is left, so every source may connect", firstFew(bad))
	case len(bad) > 0:
		c.add("loadBalancerSourceRanges that are no CIDRs left out: %s", firstFew(bad))
	}
	return distinct(out)
}

// healthCheckNodePort returns the port of a Service that should have one.
func healthCheckNodePort(spec *corev1.ServiceSpec, c *complaints) uint16 {
	switch port := spec.HealthCheckNodePort; {
	case port == 0:
		c.add("healthCheckNodePort is missing: load balancers cannot ask which nodes have endpoints")
		return 0
	case port < 1 || port > 65535:
		c.add("healthCheckNodePort %d left out: not between 1 and 65535", port)
		return 0
	default:
		return uint16(port)
	}
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
	kindService     = "Service"
	kindSlice       = "EndpointSlice"
	kindNode        = "Node"
	kindServiceCIDR = "ServiceCIDR"
)

// title names an object: "Service ns/name", "Node name".
func title(kind string, n lb.Name) string {
	if n.Namespace == "" {
		return kind + " " + n.Name
	}
	return kind + " " + n.String()
}

// complaints collects the warnings about one object.
type complaints struct {
	object   string
	warnings []Warning
}

func (c *complaints) add(format string, args ...any) {
	c.warnings = append(c.warnings, Warning{Object: c.object, Text: fmt.Sprintf(format, args...)})
}
