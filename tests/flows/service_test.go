// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// backendPort is where backends listen, for TCP and UDP.
const backendPort = 9000

// Ports of every Service, at all its addresses but the nodes'.
const (
	tcpPort = 80
	udpPort = 53
)

// service is a Service of both families with a ClusterIP, a load-balancer IP, an
// external IP and NodePorts, all of which follow from its number.
type service struct {
	name   string
	number int
	// spec is more of the Service's spec, in YAML's flow style: "key: value, ...".
	spec      string
	endpoints []endpoint
}

// endpoint is a backend on a node.
type endpoint struct {
	*host
	node *node
}

// addServices makes the Services every world has, told apart by where their
// backends are as node a sees it.
func (w *world) addServices() {
	a1, a2, b1 := endpoint{w.a1, w.a}, endpoint{w.a2, w.a}, endpoint{w.b1, w.b}
	hostA, hostB := endpoint{&w.a.host, w.a}, endpoint{&w.b.host, w.b}
	only := fmt.Sprintf("loadBalancerSourceRanges: [%s/32, '%s/128']", clientAddrs[ipv4], clientAddrs[ipv6])
	w.services = map[string]service{}
	for i, s := range []service{
		{name: "local", endpoints: []endpoint{a1}},
		{name: "remote", endpoints: []endpoint{b1}},
		{name: "host", endpoints: []endpoint{hostA}},
		{name: "remote-host", endpoints: []endpoint{hostB}},
		{name: "policy-local", spec: "externalTrafficPolicy: Local", endpoints: []endpoint{a1, b1}},
		{name: "elsewhere", spec: "externalTrafficPolicy: Local", endpoints: []endpoint{b1}},
		{name: "empty"},
		{name: "sticky", spec: "sessionAffinity: ClientIP", endpoints: []endpoint{a1, a2, b1}},
		{name: "restricted", spec: only, endpoints: []endpoint{a1}},
	} {
		s.number = 1 + i
		w.services[s.name] = s
	}
}

func (s service) clusterIP() addrs {
	return both(fmt.Sprintf("10.96.0.%d", s.number), fmt.Sprintf("fd00:96::%d", s.number))
}

func (s service) loadBalancerIP() addrs {
	return both(fmt.Sprintf("203.0.113.%d", s.number), fmt.Sprintf("2001:db8:113::%d", s.number))
}

func (s service) externalIP() addrs {
	return both(fmt.Sprintf("203.0.113.%d", 100+s.number), fmt.Sprintf("2001:db8:113::1:%d", s.number))
}

// nodePort returns the NodePort at a node's own address. Its number is the same for
// both protocols.
func (s service) nodePort(f family, n *node) netip.AddrPort {
	return netip.AddrPortFrom(n.addrs[f], s.nodePortNumber())
}

func (s service) nodePortNumber() uint16 { return uint16(30000 + s.number) }

// entry is one of the ways into a Service from outside.
type entry struct {
	name string
	vip  func(s service, f family, network string, n *node) netip.AddrPort
}

// port returns the port of a Service's own addresses.
func port(network string) uint16 {
	if network == "udp" {
		return udpPort
	}
	return tcpPort
}

// entries are all of them; what a router sends to a node.
var entries = []entry{
	{"NodePort", func(s service, f family, _ string, n *node) netip.AddrPort { return s.nodePort(f, n) }},
	{"load-balancer IP", func(s service, f family, network string, _ *node) netip.AddrPort {
		return netip.AddrPortFrom(s.loadBalancerIP()[f], port(network))
	}},
	{"external IP", func(s service, f family, network string, _ *node) netip.AddrPort {
		return netip.AddrPortFrom(s.externalIP()[f], port(network))
	}},
	clusterIPEntry,
}

var clusterIPEntry = entry{"ClusterIP", func(s service, f family, network string, _ *node) netip.AddrPort {
	return netip.AddrPortFrom(s.clusterIP()[f], port(network))
}}

// apply writes the manifests of a Service, in place of those it had before.
func (w *world) apply(t *testing.T, s service) {
	t.Helper()
	cluster, lb, external := s.clusterIP(), s.loadBalancerIP(), s.externalIP()
	spec := s.spec
	if spec != "" {
		spec += ", "
	}
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata: {name: %s, namespace: test}
spec: {%s
  type: LoadBalancer, ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv4, IPv6],
  clusterIP: %s, clusterIPs: [%[3]s, '%s'], externalIPs: [%s, '%s'],
  ports: [
    {name: web, port: %d, targetPort: %[8]d, nodePort: %[9]d},
    {name: dns, port: %[10]d, targetPort: %[8]d, nodePort: %[9]d, protocol: UDP}]}
status: {loadBalancer: {ingress: [{ip: %[11]s}, {ip: '%[12]s'}]}}
`, s.name, spec, cluster[ipv4], cluster[ipv6], external[ipv4], external[ipv6],
		tcpPort, backendPort, s.nodePortNumber(), udpPort, lb[ipv4], lb[ipv6])
	for _, f := range families {
		fmt.Fprintf(&b, `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-%[2]d, namespace: test, labels: {kubernetes.io/service-name: %[1]s}}
addressType: %[3]s
ports: [{name: web, port: %[4]d}, {name: dns, port: %[4]d, protocol: UDP}]
endpoints: [`, s.name, f, f, backendPort)
		for _, e := range s.endpoints {
			fmt.Fprintf(&b, "{addresses: ['%s'], nodeName: %s}, ", e.addrs[f], e.node.name)
		}
		b.WriteString("]\n")
	}
	w.write(t, s.name+".yaml", b.String())
}

// clusterManifests are the nodes and the range of ClusterIPs.
func clusterManifests(w *world) string {
	var b strings.Builder
	b.WriteString(`apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/16, 'fd00:96::/112']}
`)
	for _, n := range []*node{w.a, w.b} {
		fmt.Fprintf(&b, `---
apiVersion: v1
kind: Node
metadata: {name: %s}
status: {addresses: [`, n.name)
		for _, a := range n.addrs {
			fmt.Fprintf(&b, "{type: InternalIP, address: '%s'}, ", a)
		}
		b.WriteString("]}\n")
	}
	return b.String()
}
