// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

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
	f.Add([]byte("%YAML 1.1\n--- # comment\r\nkind: List\napiVersion: v1\nitems: [null, {}, 1]\n---\n--- [\n...\n"), false)
	f.Add([]byte(`{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"}} {`), true)
	f.Fuzz(func(t *testing.T, data []byte, isJSON bool) {
		path := "file.yaml"
		if isJSON {
			path = "file.json"
		}
		m := parseManifest(path, data, Options{})
		checkWellFormed(t, m.warnings)
		for _, o := range m.objects {
			if o.name.Name == "" || o.name.Namespace == "" {
				t.Errorf("an object without a full name: %+v", o)
			}
			switch e := o.event.(type) {
			case ServiceSet:
				checkService(t, e.Service)
			case SliceSet:
				checkSlice(t, e.Slice)
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
	numbers, names := map[lb.Port]bool{}, map[lb.Port]bool{}
	for _, p := range s.Ports {
		checkPort(t, p)
		number, name := lb.Port{Protocol: p.Protocol, Number: p.Number}, lb.Port{Protocol: p.Protocol, Name: p.Name}
		if numbers[number] || names[name] {
			t.Errorf("two ports clash: %+v", s.Ports)
		}
		numbers[number], names[name] = true, true
	}
}

func checkSlice(t *testing.T, s lb.Slice) {
	t.Helper()
	if s.Service == "" {
		t.Error("counts without a Service")
	}
	for _, p := range s.Ports {
		checkPort(t, lb.Port(p))
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
