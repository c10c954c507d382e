// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/proxy/apis"
)

// externalAddresses may be load-balancer and external IPs of any Service, which
// do not conflict because no two Services use the same port number. They come in
// the spellings that kube-proxy accepts, and some are none.
var externalAddresses = []string{
	"192.0.2.1", "192.0.2.2", "192.000.002.001", "::ffff:192.0.2.2",
	"2001:db8::1", "2001:db8::2", "2001:DB8:0::2",
	"", " ", "192.0.2.1 ", "192.0.2.300", "cart.example.com",
}

var sourceRanges = []string{
	"10.0.0.0/8", "192.0.2.0/24", "172.18.0.0/16", "2001:db8::/32", "fd00:18::/64",
	"10.1.2.3/16", " 10.0.0.0/8", "2001:db8::/32\t", "010.000.0.0/8", "172.18.0.2/32",
	"0.0.0.0/0", "::/0", "192.0.2.1/0", "2001:db8::1/0", "::ffff:10.0.0.0/104",
	"", " ", "10.0.0.0", "10.0.0.0/33", "everybody",
}

// service returns a new version of a Service: a new one altogether, or the one
// there is with something changed.
func (g *generator) service(i int) *corev1.Service {
	s := &corev1.Service{}
	s.Namespace, s.Name = serviceNames[i].Namespace, serviceNames[i].Name
	if old := g.services[serviceNames[i]]; old != nil && !g.oneIn(3) {
		s = old.DeepCopy()
		g.changeService(s, i)
		return s
	}
	g.identity(s)
	g.clusterIPs(s, i)
	g.ports(s, i)
	g.policies(s)
	g.external(s, i)
	return s
}

// changeService changes one aspect of a Service.
func (g *generator) changeService(s *corev1.Service, i int) {
	switch g.pick(5) {
	case 0:
		g.policies(s)
	case 1:
		g.external(s, i)
	case 2:
		g.ports(s, i)
	case 3:
		g.identity(s)
		g.ports(s, i) // which may have NodePorts depends on the type
	default:
		g.clusterIPs(s, i)
	}
}

// identity chooses the type and the labels.
func (g *generator) identity(s *corev1.Service) {
	s.Spec.Type = oneOf(g,
		corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer,
		corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort,
		corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeLoadBalancer,
		corev1.ServiceTypeExternalName)
	s.Labels = nil
	if g.oneIn(8) {
		s.Labels = oneOf(g,
			map[string]string{corev1.IsHeadlessService: ""},
			map[string]string{apis.LabelServiceProxyName: "other"},
			map[string]string{apis.LabelServiceProxyName: ""})
	}
}

// clusterIPs chooses the families and their addresses, two of each for every
// Service.
func (g *generator) clusterIPs(s *corev1.Service, i int) {
	last := 2*i + 1 + g.pick(2)
	v4, v6 := fmt.Sprintf("10.96.0.%d", last), fmt.Sprintf("fd00:96::%d", last)
	if g.oneIn(16) {
		v4, v6 = fmt.Sprintf("010.96.000.%03d", last), fmt.Sprintf("FD00:96:0:0::%d", last)
	}
	const f4, f6 = corev1.IPv4Protocol, corev1.IPv6Protocol
	set := func(families []corev1.IPFamily, ips ...string) {
		s.Spec.IPFamilies, s.Spec.ClusterIPs, s.Spec.ClusterIP = families, ips, ips[0]
	}
	families := map[corev1.IPFamily]string{f4: v4, f6: v6}
	// Slices have the families of the habit; the first one comes in either place.
	first, second := corev1.IPFamily(g.habit.families[0]), f4
	if first == f4 {
		second = f6
	}
	switch g.pick(16) {
	case 0, 1, 2, 3, 4:
		set([]corev1.IPFamily{first}, families[first])
	case 5, 6, 7:
		set([]corev1.IPFamily{first, second}, families[first], families[second])
	case 8, 9:
		set([]corev1.IPFamily{second, first}, families[second], families[first])
	case 10:
		set([]corev1.IPFamily{second}, families[second])
	case 11:
		set([]corev1.IPFamily{first, second}, families[first]) // the other one is not allocated yet
	case 12, 13:
		set(nil, families[first]) // older than dual stack
	case 14:
		set([]corev1.IPFamily{first}, corev1.ClusterIPNone)
	default:
		s.Spec.IPFamilies, s.Spec.ClusterIPs, s.Spec.ClusterIP = nil, nil, ""
	}
}

// ports chooses one or two ports. Numbers and NodePorts are the Service's own;
// two ports may share a number or a name when their protocols differ.
func (g *generator) ports(s *corev1.Service, i int) {
	nodePorts := s.Spec.Type == corev1.ServiceTypeNodePort || s.Spec.Type == corev1.ServiceTypeLoadBalancer
	s.Spec.AllocateLoadBalancerNodePorts = nil
	if nodePorts && g.oneIn(8) {
		nodePorts = false
		s.Spec.AllocateLoadBalancerNodePorts = new(false)
	}
	s.Spec.Ports = nil
	number := g.pick(3)
	for n := range 1 + g.pick(2) {
		key := g.port(n)
		port := corev1.ServicePort{Name: key.name, Protocol: key.protocol}
		if n > 0 && (port.Protocol == s.Spec.Ports[0].Protocol || g.oneIn(2)) {
			number++
			if port.Name == s.Spec.Ports[0].Name {
				port.Name = "more"
			}
		}
		port.Port = int32(80 + 10*i + number%3)
		if nodePorts {
			port.NodePort = 29950 + port.Port
		}
		s.Spec.Ports = append(s.Spec.Ports, port)
	}
}

// policies chooses the traffic policies, the affinity and what has no say here.
func (g *generator) policies(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = oneOf(g, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal,
		corev1.ServiceExternalTrafficPolicyLocal, "", "Nearby")
	s.Spec.InternalTrafficPolicy = oneOf(g, nil, new(corev1.ServiceInternalTrafficPolicyCluster),
		new(corev1.ServiceInternalTrafficPolicyLocal), new(corev1.ServiceInternalTrafficPolicyLocal),
		new(corev1.ServiceInternalTrafficPolicy("Nearby")))
	s.Spec.SessionAffinity = oneOf(g, corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP, "")
	s.Spec.SessionAffinityConfig = nil
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP || g.oneIn(16) {
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{
			ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(oneOf(g, int32(10800), 10, 1, 86400))},
		}
	}
	s.Spec.TrafficDistribution = oneOf(g, nil, new(corev1.ServiceTrafficDistributionPreferClose))
	s.Spec.PublishNotReadyAddresses = g.oneIn(4)
}

// external chooses what makes a Service reachable from outside, NodePorts apart.
func (g *generator) external(s *corev1.Service, i int) {
	s.Spec.ExternalIPs = g.some(3, externalAddresses)
	s.Spec.LoadBalancerSourceRanges = g.some(3, sourceRanges)
	s.Spec.HealthCheckNodePort = oneOf(g, 0, int32(31000+i), int32(31000+i), int32(32000+i))
	s.Status.LoadBalancer.Ingress = nil
	// A status that belongs to another type is left over from an earlier one.
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer && !g.oneIn(6) {
		return
	}
	for range g.pick(4) {
		ingress := corev1.LoadBalancerIngress{
			IP: oneOf(g, externalAddresses...),
			IPMode: oneOf(g, nil, nil, new(corev1.LoadBalancerIPModeVIP), new(corev1.LoadBalancerIPModeProxy),
				new(corev1.LoadBalancerIPMode("Nearby"))),
		}
		if g.oneIn(8) {
			ingress = corev1.LoadBalancerIngress{Hostname: "lb.example.com"}
		}
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, ingress)
	}
}

// some returns up to n of the values, half of the time none.
func (g *generator) some(n int, values []string) []string {
	var out []string
	for range max(0, g.pick(2*n+1)-n) {
		out = append(out, oneOf(g, values...))
	}
	return out
}
