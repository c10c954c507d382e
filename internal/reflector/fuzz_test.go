// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	netutils "k8s.io/utils/net"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func FuzzConvertService(f *testing.F) {
	f.Add("ClusterIP", "10.0.0.1", "IPv4", "http", "TCP", int32(80), "metrics", "TCP", int32(81))
	f.Add("", "::ffff:010.0.0.1,fd00::1", "IPv4,IPv6", "", "", int32(53), "", "UDP", int32(53))
	f.Add("ExternalName", "fd00::1%x,,None", "IPv6", "a", "QUIC", int32(65536), "b\n", "SCTP", int32(-1))
	f.Add("NodePort", "127.0.0.1,10.0.0.1,10.0.0.2", "", "a", "TCP", int32(1), "a", "TCP", int32(65535))
	f.Fuzz(func(t *testing.T, kind, ips, families, name1, protocol1 string, number1 int32,
		name2, protocol2 string, number2 int32,
	) {
		s := service(serviceIPs(nil, strings.Split(ips, ",")...), servicePortList(
			corev1.ServicePort{Name: name1, Protocol: corev1.Protocol(protocol1), Port: number1},
			corev1.ServicePort{Name: name2, Protocol: corev1.Protocol(protocol2), Port: number2}))
		s.Spec.Type = corev1.ServiceType(kind)
		for family := range strings.SplitSeq(families, ",") {
			s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPFamily(family))
		}
		svc, ours, warnings := ConvertService(s, Options{})
		checkWellFormed(t, warnings)
		if ours {
			checkService(t, svc)
		}
	})
}

// FuzzServiceFields is about what a Service may have beside ClusterIPs.
func FuzzServiceFields(f *testing.F) {
	f.Add("LoadBalancer", "203.0.113.1,::1", "VIP", "198.51.100.1, ", " 10.0.0.1/8,::ffff:1.2.3.4/64,x", "Local", "Local", "ClientIP", int32(0), int32(31000), int32(30080))
	f.Add("NodePort", "010.0.0.1,lb", "proxy", "169.254.1.1,255.255.255.255", "0.0.0.0/0,::/0,1/33", "local", "Global", "Cookie", int32(-1), int32(-1), int32(65536))
	f.Add("ClusterIP", "", "", "", "", "", "", "", int32(86401), int32(65536), int32(1))
	f.Fuzz(func(t *testing.T, kind, ips, mode, externals, ranges, internal, external, sticky string, timeout, health, nodePort int32) {
		s := service()
		s.Spec.Type = corev1.ServiceType(kind)
		s.Spec.Ports[0].NodePort = nodePort
		for ip := range strings.SplitSeq(ips, ",") {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress,
				corev1.LoadBalancerIngress{IP: ip}, corev1.LoadBalancerIngress{IP: ip, IPMode: new(corev1.LoadBalancerIPMode(mode))})
		}
		s.Spec.ExternalIPs = strings.Split(externals, ",")
		s.Spec.LoadBalancerSourceRanges = strings.Split(ranges, ",")
		s.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicy(internal))
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicy(external)
		s.Spec.SessionAffinity = corev1.ServiceAffinity(sticky)
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &timeout}}
		s.Spec.HealthCheckNodePort = health
		svc, ours, warnings := ConvertService(s, Options{})
		checkWellFormed(t, warnings)
		if ours {
			checkService(t, svc)
		}
	})
}

// FuzzParsePrefix holds ranges to mean what they mean to Kubernetes.
func FuzzParsePrefix(f *testing.F) {
	for _, text := range []string{"010.0.0.1/8", "::ffff:10.0.0.0/104", "::ffff:10.0.0.0/90", "::ffff:0:0/96", "fd00::1/0", "1/8", "10.0.0.0/33"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, ok := parsePrefix(text)
		_, want, err := netutils.ParseCIDRSloppy(text)
		if ok != (err == nil) {
			t.Fatalf("%q: ok = %v, upstream says %v", text, ok, err)
		}
		if ok && got.String() != want.String() {
			t.Errorf("%q = %v, want %v", text, got, want)
		}
	})
}

// FuzzConvertNode is about our Node and ServiceCIDRs.
func FuzzConvertNode(f *testing.F) {
	f.Add("z1", "InternalIP", "192.0.2.1,fd00::1,10.0.0.1", "10.0.0.1/8,fd00::/112")
	f.Add("", "ExternalIP", "127.0.0.1,::ffff:192.0.2.1,x", "0.0.0.0/0,::/0,::ffff:0.0.0.0/96,1")
	f.Fuzz(func(t *testing.T, zone, kind, addresses, ranges string) {
		n := node(nodeLabel("topology.kubernetes.io/zone", zone))
		for a := range strings.SplitSeq(addresses, ",") {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeAddressType(kind), Address: a})
		}
		got, warnings := ConvertNode(n)
		checkWellFormed(t, warnings)
		checkNode(t, got)
		prefixes, warnings := ConvertServiceCIDR(cidr("a", strings.Split(ranges, ",")...))
		checkWellFormed(t, warnings)
		checkRanges(t, prefixes)
	})
}

func FuzzConvertSlice(f *testing.F) {
	f.Add("web", "IPv4", "10.1.0.1,010.1.0.2,::ffff:10.1.0.3", "http", "TCP", int32(80), uint8(0))
	f.Add("web", "IPv6", "fd00::1,fe80::1%eth0,,::,::1,::ffff:127.0.0.1", "", "", int32(-1), uint8(1))
	f.Add("", "FQDN", "example.com", "a\n", "QUIC", int32(65536), uint8(2))
	f.Add("web", "IPv4", "127.0.0.1,224.0.0.1,169.254.0.1,0.0.0.0", "a", "SCTP", int32(0), uint8(4))
	f.Fuzz(func(t *testing.T, owner, addressType, addresses, name, protocol string, number int32, unset uint8) {
		port := discoveryv1.EndpointPort{Name: &name, Protocol: new(corev1.Protocol(protocol)), Port: &number}
		// What the API allows to be left out.
		if unset&1 != 0 {
			port.Name = nil
		}
		if unset&2 != 0 {
			port.Protocol = nil
		}
		if unset&4 != 0 {
			port.Port = nil
		}
		s := slice(func(s *discoveryv1.EndpointSlice) {
			s.Labels[discoveryv1.LabelServiceName] = owner
			s.AddressType = discoveryv1.AddressType(addressType)
			s.Ports = append(s.Ports, port)
			s.Endpoints = []discoveryv1.Endpoint{{}}
		})
		for a := range strings.SplitSeq(addresses, ",") {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
		}
		slice, counts, warnings := ConvertSlice(s)
		checkWellFormed(t, warnings)
		if counts {
			checkSlice(t, slice)
		}
	})
}

// FuzzManifest holds what files say to the same invariants.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(shopManifest), false)
	f.Add([]byte(nodeManifest), false)
	f.Add([]byte("%YAML 1.1\n--- # comment\r\nkind: List\napiVersion: v1\nitems: [null, {}, 1]\n---\n--- [\n...\n"), false)
	f.Add([]byte(`{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"}} {`), true)
	f.Fuzz(func(t *testing.T, data []byte, isJSON bool) {
		path := "file.yaml"
		if isJSON {
			path = "file.json"
		}
		m := parseManifest(path, data, Options{NodeName: "n1"})
		checkWellFormed(t, m.warnings)
		for _, o := range m.objects {
			namespaced := o.kind == kindService || o.kind == kindSlice
			if o.name.Name == "" || namespaced != (o.name.Namespace != "") {
				t.Errorf("an object without a full name: %+v", o)
			}
			switch e := o.event.(type) {
			case ServiceSet:
				checkService(t, e.Service)
			case SliceSet:
				checkSlice(t, e.Slice)
			case NodeSet:
				checkNode(t, e.Node)
			case ServiceCIDRsReplaced:
				checkRanges(t, e.Prefixes)
			}
		}
	})
}

func checkService(t *testing.T, s lb.Service) {
	t.Helper()
	families := map[lb.Family]bool{}
	for _, ip := range s.ClusterIPs {
		if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" || ip.IsLoopback() || ip.IsUnspecified() {
			t.Errorf("ClusterIP %v", ip)
		}
		if families[lb.FamilyOf(ip)] {
			t.Errorf("two ClusterIPs of one family: %v", s.ClusterIPs)
		}
		families[lb.FamilyOf(ip)] = true
	}
	if len(s.ClusterIPs) == 0 {
		t.Error("ours without a ClusterIP")
	}
	for _, ip := range slices.Concat(s.LoadBalancerIPs, s.ExternalIPs) {
		if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" || reserved(ip) != "" {
			t.Errorf("load-balancer or external IP %v", ip)
		}
	}
	for _, p := range s.Sources {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
			t.Errorf("source range %v", p)
		}
	}
	if s.Affinity > maxAffinity {
		t.Errorf("affinity %d", s.Affinity)
	}
	if s.HealthCheckNodePort != 0 && !s.ExternalLocal {
		t.Errorf("health check port %d under Cluster", s.HealthCheckNodePort)
	}
	checkServicePorts(t, s.Ports)
}

func checkServicePorts(t *testing.T, ports []lb.Port) {
	t.Helper()
	taken := map[lb.Port]bool{}
	take := func(p lb.Port) {
		if taken[p] {
			t.Errorf("two ports clash: %+v", ports)
		}
		taken[p] = true
	}
	for _, p := range ports {
		checkPort(t, p)
		take(lb.Port{Protocol: p.Protocol, Number: p.Number})
		take(lb.Port{Protocol: p.Protocol, Name: "/" + p.Name})
		if p.NodePort != 0 {
			take(lb.Port{Protocol: p.Protocol, NodePort: p.NodePort})
		}
	}
}

func checkNode(t *testing.T, n lb.Node) {
	t.Helper()
	families := map[lb.Family]bool{}
	for _, a := range n.Addresses {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" || reserved(a) != "" || families[lb.FamilyOf(a)] {
			t.Errorf("node address %v of %v", a, n.Addresses)
		}
		families[lb.FamilyOf(a)] = true
	}
}

func checkRanges(t *testing.T, prefixes []netip.Prefix) {
	t.Helper()
	for _, p := range prefixes {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || p.Bits() == 0 {
			t.Errorf("ServiceCIDR range %v", p)
		}
	}
}

func checkSlice(t *testing.T, s lb.Slice) {
	t.Helper()
	if s.Service == "" {
		t.Error("counts without a Service")
	}
	for _, p := range s.Ports {
		checkPort(t, lb.Port{Name: p.Name, Protocol: p.Protocol, Number: p.Number})
	}
	for _, e := range s.Endpoints {
		if !e.Addr.IsValid() || e.Addr.Is4In6() || e.Addr.Zone() != "" || unusable(e.Addr) != "" {
			t.Errorf("endpoint address %v", e.Addr)
		}
		if is4 := s.Family == lb.IPv4; e.Addr.Is4() != is4 || s.Family != lb.IPv4 && s.Family != lb.IPv6 {
			t.Errorf("endpoint address %v in a slice of family %d", e.Addr, s.Family)
		}
		if _, err := netip.ParseAddr(e.Addr.String()); err != nil {
			t.Errorf("endpoint address %v: %v", e.Addr, err)
		}
	}
}

func checkPort(t *testing.T, p lb.Port) {
	t.Helper()
	if p.Number == 0 || p.Protocol == lb.Any || len(p.Name) > 63 {
		t.Errorf("port %+v", p)
	}
}

// checkWellFormed holds warnings to being one line each.
func checkWellFormed(t *testing.T, warnings []Warning) {
	t.Helper()
	for _, w := range warnings {
		for _, r := range w.Text {
			if r == '\n' || r == '\r' {
				t.Errorf("warning of more than one line: %q", w.Text)
			}
		}
	}
}
