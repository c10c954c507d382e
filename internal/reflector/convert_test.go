// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

var webName = lb.Name{Namespace: "shop", Name: "web"}

// service returns a valid Service, 10.0.0.1 port 80/TCP, with changes.
func service(changes ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"},
		Spec: corev1.ServiceSpec{
			Type:       corev1.ServiceTypeClusterIP,
			ClusterIP:  "10.0.0.1",
			ClusterIPs: []string{"10.0.0.1"},
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports:      []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: 80}},
		},
	}
	for _, change := range changes {
		change(s)
	}
	return s
}

func serviceLabel(key, value string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Labels = map[string]string{key: value} }
}

func serviceIPs(families []corev1.IPFamily, ips ...string) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.ClusterIP, s.Spec.ClusterIPs, s.Spec.IPFamilies = ips[0], ips, families
	}
}

func servicePortList(ports ...corev1.ServicePort) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Spec.Ports = ports }
}

func TestWhichServicesAreOurs(t *testing.T) {
	spec := func(change func(*corev1.ServiceSpec)) func(*corev1.Service) {
		return func(s *corev1.Service) { change(&s.Spec) }
	}
	tests := []struct {
		name    string
		change  func(*corev1.Service)
		options Options
		want    bool
		foreign bool
	}{
		{name: "a plain Service is ours", change: func(*corev1.Service) {}, want: true},
		{
			name:   "ExternalName is ignored even with a clusterIP",
			change: spec(func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeExternalName }),
		},
		{
			name:   "a headless Service is ignored",
			change: spec(func(s *corev1.ServiceSpec) { s.ClusterIP, s.ClusterIPs = "None", []string{"None"} }),
		},
		{
			name:   "a Service without an address is ignored",
			change: spec(func(s *corev1.ServiceSpec) { s.ClusterIP, s.ClusterIPs = "", nil }),
		},
		{
			name:   "types NodePort and LoadBalancer are served at their ClusterIP",
			change: spec(func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeLoadBalancer }),
			want:   true,
		},
		{
			name:    "another proxy's Service is foreign",
			change:  serviceLabel(labelServiceProxyName, "other"),
			want:    true,
			foreign: true,
		},
		{
			name:    "an empty proxy name is a name too",
			change:  serviceLabel(labelServiceProxyName, ""),
			want:    true,
			foreign: true,
		},
		{
			name: "what is wrong with another proxy's Service is not ours to say",
			change: func(s *corev1.Service) {
				serviceLabel(labelServiceProxyName, "other")(s)
				serviceIPs(nil, "10.0.0.1", "nonsense")(s)
				servicePortList(corev1.ServicePort{Port: -1})(s)
			},
			want:    true,
			foreign: true,
		},
		{
			name: "another proxy's Service without an address is ignored",
			change: func(s *corev1.Service) {
				serviceLabel(labelServiceProxyName, "other")(s)
				serviceIPs(nil, "None")(s)
			},
		},
		{
			name:    "a Service with our proxy name is ours",
			change:  serviceLabel(labelServiceProxyName, "fairlead"),
			options: Options{ServiceProxyName: "fairlead"},
			want:    true,
		},
		{
			name:    "with a proxy name of our own, another's is still foreign",
			change:  serviceLabel(labelServiceProxyName, "other"),
			options: Options{ServiceProxyName: "fairlead"},
			want:    true,
			foreign: true,
		},
		{
			name:    "with a proxy name of our own, Services without the label stay ours",
			change:  func(*corev1.Service) {},
			options: Options{ServiceProxyName: "fairlead"},
			want:    true,
		},
		{
			name:   "the headless label on a Service means nothing",
			change: serviceLabel(corev1.IsHeadlessService, ""),
			want:   true,
		},
		{
			name:   "a Service without ports keeps its ClusterIP",
			change: servicePortList(),
			want:   true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, ours, warnings := ConvertService(service(tt.change), tt.options)
			if ours != tt.want {
				t.Errorf("ours = %v, want %v (%+v)", ours, tt.want, svc)
			}
			if svc.Foreign != tt.foreign {
				t.Errorf("foreign = %v, want %v", svc.Foreign, tt.foreign)
			}
			if svc.Name != webName {
				t.Errorf("name = %v, want %v: it is needed to say that the Service is gone", svc.Name, webName)
			}
			if len(warnings) > 0 {
				t.Errorf("warnings about a Service that is fine: %v", warnings)
			}
		})
	}
}

func TestClusterIPs(t *testing.T) {
	v4, v6 := corev1.IPv4Protocol, corev1.IPv6Protocol
	tests := []struct {
		name   string
		change func(*corev1.Service)
		want   []string
		warns  []string
	}{
		{
			name:   "dual stack has both",
			change: serviceIPs([]corev1.IPFamily{v6, v4}, "fd00::1", "10.0.0.1"),
			want:   []string{"fd00::1", "10.0.0.1"},
		},
		{
			name:   "without clusterIPs the clusterIP counts",
			change: func(s *corev1.Service) { s.Spec.ClusterIPs, s.Spec.IPFamilies = nil, nil },
			want:   []string{"10.0.0.1"},
		},
		{
			name:   "without ipFamilies the address tells its family",
			change: serviceIPs(nil, "10.0.0.1", "fd00::1"),
			want:   []string{"10.0.0.1", "fd00::1"},
		},
		{
			name:   "with one family given the second address tells its own",
			change: serviceIPs([]corev1.IPFamily{v4}, "10.0.0.1", "fd00::1"),
			want:   []string{"10.0.0.1", "fd00::1"},
		},
		{
			name:   "leading zeros are decimal",
			change: serviceIPs([]corev1.IPFamily{v4}, "010.000.000.001"),
			want:   []string{"10.0.0.1"},
		},
		{
			name:   "a mapped IPv4 address is IPv4",
			change: serviceIPs([]corev1.IPFamily{v4}, "::ffff:10.0.0.1"),
			want:   []string{"10.0.0.1"},
		},
		{
			name:   "an invalid address is left out and the other lives",
			change: serviceIPs([]corev1.IPFamily{v4, v6}, "10.0.0.256", "fd00::1"),
			want:   []string{"fd00::1"},
			warns:  []string{`ClusterIP "10.0.0.256" left out: not an IP address`},
		},
		{
			name:   "no valid address leaves nothing to serve",
			change: serviceIPs([]corev1.IPFamily{v4}, "nonsense"),
			warns:  []string{`ClusterIP "nonsense" left out: not an IP address`},
		},
		{
			name:   "an address that is not of the family given for it is left out",
			change: serviceIPs([]corev1.IPFamily{v4, v4}, "10.0.0.1", "fd00::1"),
			want:   []string{"10.0.0.1"},
			warns:  []string{`ClusterIP "fd00::1" left out: the family given for it is "IPv4"`},
		},
		{
			name:   "a second address of a family is left out",
			change: serviceIPs(nil, "10.0.0.1", "10.0.0.2"),
			want:   []string{"10.0.0.1"},
			warns:  []string{`ClusterIP "10.0.0.2" left out: a second address of family IPv4`},
		},
		{
			name:   "loopback is never taken over",
			change: serviceIPs(nil, "127.0.0.1"),
			warns:  []string{`ClusterIP "127.0.0.1" left out: loopback address`},
		},
		{
			name:   "the unspecified address is never taken over",
			change: serviceIPs(nil, "::"),
			warns:  []string{`ClusterIP "::" left out: unspecified address`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, ours, warnings := ConvertService(service(tt.change), Options{})
			var got []string
			for _, ip := range svc.ClusterIPs {
				got = append(got, ip.String())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("ClusterIPs (-want +got):\n%s", diff)
			}
			if ours != (len(tt.want) > 0) {
				t.Errorf("ours = %v with ClusterIPs %v", ours, got)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestServicePorts(t *testing.T) {
	tcp, udp, sctp := corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP
	tests := []struct {
		name  string
		ports []corev1.ServicePort
		want  []lb.Port
		warns []string
	}{
		{
			name:  "one number on three protocols is three ports",
			ports: []corev1.ServicePort{{Name: "a", Protocol: tcp, Port: 53}, {Name: "b", Protocol: udp, Port: 53}, {Name: "c", Protocol: sctp, Port: 53}},
			want:  []lb.Port{{Name: "a", Protocol: lb.TCP, Number: 53}, {Name: "b", Protocol: lb.UDP, Number: 53}, {Name: "c", Protocol: lb.SCTP, Number: 53}},
		},
		{
			name:  "one name on two protocols is two ports",
			ports: []corev1.ServicePort{{Name: "dns", Protocol: tcp, Port: 53}, {Name: "dns", Protocol: udp, Port: 53}},
			want:  []lb.Port{{Name: "dns", Protocol: lb.TCP, Number: 53}, {Name: "dns", Protocol: lb.UDP, Number: 53}},
		},
		{
			name:  "no protocol is TCP",
			ports: []corev1.ServicePort{{Port: 80}},
			want:  []lb.Port{{Protocol: lb.TCP, Number: 80}},
		},
		{
			name:  "port 0 is left out and the rest lives",
			ports: []corev1.ServicePort{{Name: "zero", Protocol: tcp}, {Name: "ok", Protocol: tcp, Port: 80}},
			want:  []lb.Port{{Name: "ok", Protocol: lb.TCP, Number: 80}},
			warns: []string{`port "zero" left out: number 0 is not between 1 and 65535`},
		},
		{
			name:  "a number out of range is not truncated to 16 bits",
			ports: []corev1.ServicePort{{Name: "big", Protocol: tcp, Port: 65536 + 80}, {Name: "neg", Protocol: tcp, Port: -1}},
			want:  []lb.Port{},
			warns: []string{
				`port "big" left out: number 65616 is not between 1 and 65535`,
				`port "neg" left out: number -1 is not between 1 and 65535`,
			},
		},
		{
			name:  "an unknown protocol is left out",
			ports: []corev1.ServicePort{{Name: "odd", Protocol: "ICMP", Port: 1}, {Name: "ok", Protocol: tcp, Port: 80}},
			want:  []lb.Port{{Name: "ok", Protocol: lb.TCP, Number: 80}},
			warns: []string{`port "odd" left out: unknown protocol "ICMP"`},
		},
		{
			name:  "of two ports with one number the first is kept",
			ports: []corev1.ServicePort{{Name: "a", Protocol: tcp, Port: 80}, {Name: "b", Protocol: tcp, Port: 80}},
			want:  []lb.Port{{Name: "a", Protocol: lb.TCP, Number: 80}},
			warns: []string{`port "b" left out: port "a" already has number 80/TCP`},
		},
		{
			name:  "of two ports with one name and protocol the first is kept",
			ports: []corev1.ServicePort{{Name: "a", Protocol: tcp, Port: 80}, {Name: "a", Protocol: tcp, Port: 81}},
			want:  []lb.Port{{Name: "a", Protocol: lb.TCP, Number: 80}},
			warns: []string{`port "a" left out: 80/TCP already has this name`},
		},
		{
			name:  "a name that no slice can have is left out",
			ports: []corev1.ServicePort{{Name: "two\nlines", Protocol: tcp, Port: 80}},
			want:  []lb.Port{},
			warns: []string{`port "two\nlines" left out: its name is not a DNS label`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, ours, warnings := ConvertService(service(servicePortList(tt.ports...)), Options{})
			if !ours {
				t.Error("ours = false: a bad port must not take its Service along")
			}
			if diff := cmp.Diff(tt.want, svc.Ports); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestAForeignServiceIsItsAddresses(t *testing.T) {
	svc, _, _ := ConvertService(loadBalancer(serviceLabel(labelServiceProxyName, "other")), Options{})
	want := lb.Service{Name: webName, Foreign: true, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	if diff := cmp.Diff(want, svc, compareAddr, comparePrefix); diff != "" {
		t.Errorf("Service (-want +got):\n%s", diff)
	}
}

// loadBalancer returns a Service that uses every field, with changes.
func loadBalancer(changes ...func(*corev1.Service)) *corev1.Service {
	s := service()
	s.Spec.Type = corev1.ServiceTypeLoadBalancer
	s.Spec.Ports[0].NodePort = 30080
	s.Spec.ExternalIPs = []string{"198.51.100.1"}
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	s.Spec.HealthCheckNodePort = 31000
	s.Spec.LoadBalancerSourceRanges = []string{"192.0.2.0/24"}
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "203.0.113.1"}}
	for _, change := range changes {
		change(s)
	}
	return s
}

func TestNodePorts(t *testing.T) {
	tests := []struct {
		name   string
		kind   corev1.ServiceType
		change func([]corev1.ServicePort)
		want   []uint16
		warns  []string
	}{
		{name: "type NodePort has them", kind: corev1.ServiceTypeNodePort, want: []uint16{30080, 30081}},
		{name: "type LoadBalancer has them", kind: corev1.ServiceTypeLoadBalancer, want: []uint16{30080, 30081}},
		{
			name:   "a load balancer may do without them",
			kind:   corev1.ServiceTypeLoadBalancer,
			change: func(p []corev1.ServicePort) { p[0].NodePort, p[1].NodePort = 0, 0 },
			want:   []uint16{0, 0},
		},
		{
			name: "type ClusterIP has none",
			kind: corev1.ServiceTypeClusterIP,
			want: []uint16{0, 0},
			warns: []string{
				`nodePort 30080 of port "a" left out: only the types NodePort and LoadBalancer have one`,
				`nodePort 30081 of port "b" left out: only the types NodePort and LoadBalancer have one`,
			},
		},
		{
			name:   "a number out of range is left out and the port lives",
			kind:   corev1.ServiceTypeNodePort,
			change: func(p []corev1.ServicePort) { p[0].NodePort, p[1].NodePort = 65536+30080, -1 },
			want:   []uint16{0, 0},
			warns: []string{
				`nodePort 95616 of port "a" left out: not between 1 and 65535`,
				`nodePort -1 of port "b" left out: not between 1 and 65535`,
			},
		},
		{
			name:   "of two equal ones the first is kept",
			kind:   corev1.ServiceTypeNodePort,
			change: func(p []corev1.ServicePort) { p[1].NodePort = 30080 },
			want:   []uint16{30080, 0},
			warns:  []string{`nodePort 30080 of port "b" left out: port "a" already has it`},
		},
		{
			name:   "protocols have NodePorts of their own",
			kind:   corev1.ServiceTypeNodePort,
			change: func(p []corev1.ServicePort) { p[1].NodePort, p[1].Protocol = 30080, corev1.ProtocolUDP },
			want:   []uint16{30080, 30080},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ports := []corev1.ServicePort{{Name: "a", Port: 80, NodePort: 30080}, {Name: "b", Port: 81, NodePort: 30081}}
			if tt.change != nil {
				tt.change(ports)
			}
			svc, _, warnings := ConvertService(service(servicePortList(ports...), func(s *corev1.Service) { s.Spec.Type = tt.kind }), Options{})
			var got []uint16
			for _, p := range svc.Ports {
				got = append(got, p.NodePort)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("NodePorts (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestLoadBalancerIPs(t *testing.T) {
	mode := func(m corev1.LoadBalancerIPMode) *corev1.LoadBalancerIPMode { return &m }
	tests := []struct {
		name    string
		ingress []corev1.LoadBalancerIngress
		want    []string
		warns   []string
	}{
		{name: "without ipMode an address counts", ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.1"}}, want: []string{"203.0.113.1"}},
		{
			name:    "ipMode VIP counts",
			ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.1", IPMode: mode("VIP")}},
			want:    []string{"203.0.113.1"},
		},
		{
			name:    "ipMode Proxy does not count",
			ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.1", IPMode: mode("Proxy")}, {IP: "203.0.113.2"}},
			want:    []string{"203.0.113.2"},
		},
		{
			name:    "an unknown ipMode does not count",
			ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.1", IPMode: mode("vip")}, {IP: "203.0.113.2"}},
			want:    []string{"203.0.113.2"},
			warns:   []string{`load-balancer IPs left out: "203.0.113.1" (unknown ipMode "vip")`},
		},
		{
			name:    "host names are ignored",
			ingress: []corev1.LoadBalancerIngress{{Hostname: "lb.example.com"}, {Hostname: "192.0.2.1", IPMode: mode("VIP")}},
		},
		{
			name:    "both families, each address once, as Kubernetes reads it",
			ingress: []corev1.LoadBalancerIngress{{IP: "2001:db8::1"}, {IP: "203.000.113.010"}, {IP: "::ffff:203.0.113.10"}},
			want:    []string{"2001:db8::1", "203.0.113.10"},
		},
		{
			name: "reserved addresses are left out with one warning",
			ingress: []corev1.LoadBalancerIngress{
				{IP: "0.0.0.0"}, {IP: "::1"}, {IP: "x"}, {IP: "239.1.1.1"}, {IP: "255.255.255.255"}, {IP: "203.0.113.1"},
			},
			want: []string{"203.0.113.1"},
			warns: []string{`load-balancer IPs left out: "0.0.0.0" (unspecified address), "::1" (loopback address), ` +
				`"x" (not an IP address) and 2 more`},
		},
		{
			name:    "a link-local address counts, as upstream",
			ingress: []corev1.LoadBalancerIngress{{IP: "169.254.20.10"}},
			want:    []string{"169.254.20.10"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, ours, warnings := ConvertService(service(func(s *corev1.Service) {
				s.Spec.Type, s.Status.LoadBalancer.Ingress = corev1.ServiceTypeLoadBalancer, tt.ingress
			}), Options{})
			if !ours {
				t.Error("ours = false: a bad address must not take its Service along")
			}
			if diff := cmp.Diff(tt.want, addressTexts(svc.LoadBalancerIPs)); diff != "" {
				t.Errorf("load-balancer IPs (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func addressTexts(in []netip.Addr) []string {
	var out []string
	for _, a := range in {
		out = append(out, a.String())
	}
	return out
}

func TestExternalIPs(t *testing.T) {
	tests := []struct {
		name    string
		ips     []string
		options Options
		want    []string
		warns   []string
	}{
		{name: "all types have them, of both families", ips: []string{"198.51.100.1", "2001:db8::1"}, want: []string{"198.51.100.1", "2001:db8::1"}},
		{name: "the feature gate takes them away", ips: []string{"198.51.100.1", "x"}, options: Options{NoExternalIPs: true}},
		{name: "blanks are nothing to warn about", ips: []string{"", " ", "198.51.100.1"}, want: []string{"198.51.100.1"}},
		{
			name: "an address counts once, as Kubernetes reads it",
			ips:  []string{"198.051.100.001", "198.51.100.1", "::ffff:198.51.100.1"},
			want: []string{"198.51.100.1"},
		},
		{
			name: "what the API refuses is left out with one warning",
			ips:  []string{"127.0.0.1", " 198.51.100.1", "169.254.169.254", "fe80::1", "198.51.100.1"},
			want: []string{"198.51.100.1"},
			warns: []string{`external IPs left out: "127.0.0.1" (loopback address), " 198.51.100.1" (not an IP address), ` +
				`"169.254.169.254" (link-local address) and 1 more`},
		},
		{
			name:  "the broadcast address is nobody's",
			ips:   []string{"255.255.255.255"},
			warns: []string{`external IPs left out: "255.255.255.255" (broadcast address)`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, ours, warnings := ConvertService(service(func(s *corev1.Service) { s.Spec.ExternalIPs = tt.ips }), tt.options)
			if !ours {
				t.Error("ours = false: a bad address must not take its Service along")
			}
			if diff := cmp.Diff(tt.want, addressTexts(svc.ExternalIPs)); diff != "" {
				t.Errorf("external IPs (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestSourceRanges(t *testing.T) {
	many := make([]string, 1000)
	for i := range many {
		many[i] = fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)
	}
	tests := []struct {
		name   string
		ranges []string
		want   []string
		warns  []string
	}{
		{name: "both families", ranges: []string{"192.0.2.0/24", "2001:db8::/32"}, want: []string{"192.0.2.0/24", "2001:db8::/32"}},
		{name: "trimmed, masked, each once", ranges: []string{" 192.0.2.77/24\t", "192.0.2.0/24", ""}, want: []string{"192.0.2.0/24"}},
		{name: "a zero prefix is kept", ranges: []string{"0.0.0.0/0", "10.0.0.0/8"}, want: []string{"0.0.0.0/0", "10.0.0.0/8"}},
		{
			name:   "read as Kubernetes reads them",
			ranges: []string{"010.000.000.000/8", "::ffff:192.0.2.0/120", "::ffff:1.2.3.4/64"},
			want:   []string{"10.0.0.0/8", "192.0.2.0/24", "::/64"},
		},
		{
			name:   "invalid ones are left out with one warning",
			ranges: []string{"192.0.2.1", "10.0.0.0/8", "10.0.0.0/33", "two\nlines"},
			want:   []string{"10.0.0.0/8"},
			warns:  []string{`loadBalancerSourceRanges that are no CIDRs left out: "192.0.2.1", "10.0.0.0/33", "two\nlines"`},
		},
		{
			name:   "no valid one leaves the Service open, which is said",
			ranges: []string{"nonsense"},
			warns:  []string{`loadBalancerSourceRanges that are no CIDRs left out: "nonsense"; none is left, so every source may connect`},
		},
		{name: "a thousand are fine", ranges: many, want: many},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, _, warnings := ConvertService(service(func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = tt.ranges }), Options{})
			var got []string
			for _, p := range svc.Sources {
				got = append(got, p.String())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("sources (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestTrafficPolicies(t *testing.T) {
	local := corev1.ServiceExternalTrafficPolicyLocal
	internal := func(p corev1.ServiceInternalTrafficPolicy) func(*corev1.ServiceSpec) {
		return func(s *corev1.ServiceSpec) { s.InternalTrafficPolicy = &p }
	}
	external := func(kind corev1.ServiceType, policy corev1.ServiceExternalTrafficPolicy, ips ...string) func(*corev1.ServiceSpec) {
		return func(s *corev1.ServiceSpec) { s.Type, s.ExternalTrafficPolicy, s.ExternalIPs = kind, policy, ips }
	}
	tests := []struct {
		name               string
		change             func(*corev1.ServiceSpec)
		options            Options
		internal, external bool
		warns              []string
	}{
		{name: "nothing said is Cluster", change: func(*corev1.ServiceSpec) {}},
		{name: "internalTrafficPolicy Local", change: internal("Local"), internal: true},
		{name: "internalTrafficPolicy Cluster", change: internal("Cluster")},
		{
			name:   "an unknown internalTrafficPolicy is Cluster",
			change: internal("local"),
			warns:  []string{`internalTrafficPolicy "local" is unknown: taken for Cluster`},
		},
		{name: "externalTrafficPolicy Local counts for type NodePort", change: external(corev1.ServiceTypeNodePort, local), external: true},
		{
			name: "externalTrafficPolicy Local counts for type LoadBalancer",
			change: func(s *corev1.ServiceSpec) {
				external(corev1.ServiceTypeLoadBalancer, local)(s)
				s.HealthCheckNodePort = 31000
			},
			external: true,
		},
		{
			name:     "externalTrafficPolicy Local on a ClusterIP Service with externalIPs counts",
			change:   external(corev1.ServiceTypeClusterIP, local, "198.51.100.1"),
			external: true,
		},
		{
			name:     "it counts even when the feature gate takes the externalIPs away",
			change:   external(corev1.ServiceTypeClusterIP, local, "198.51.100.1"),
			options:  Options{NoExternalIPs: true},
			external: true,
		},
		{
			name:   "externalTrafficPolicy Local on a ClusterIP Service nobody outside can dial means nothing",
			change: external(corev1.ServiceTypeClusterIP, local),
		},
		{
			name:   "externalTrafficPolicy Global of old is Cluster",
			change: external(corev1.ServiceTypeNodePort, "Global"),
			warns:  []string{`externalTrafficPolicy "Global" is unknown: taken for Cluster`},
		},
		{
			name:   "an unknown type is ClusterIP",
			change: external("Magic", local, "198.51.100.1"),
			warns:  []string{`type "Magic" is unknown: taken for ClusterIP`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, ours, warnings := ConvertService(service(func(s *corev1.Service) { tt.change(&s.Spec) }), tt.options)
			if !ours || svc.InternalLocal != tt.internal || svc.ExternalLocal != tt.external {
				t.Errorf("ours, internal, external = %v, %v, %v, want true, %v, %v",
					ours, svc.InternalLocal, svc.ExternalLocal, tt.internal, tt.external)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestSessionAffinity(t *testing.T) {
	timeout := func(seconds int32) *corev1.SessionAffinityConfig {
		return &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
	tests := []struct {
		name     string
		affinity corev1.ServiceAffinity
		config   *corev1.SessionAffinityConfig
		want     uint32
		warns    []string
	}{
		{name: "None, whatever the timeout", affinity: corev1.ServiceAffinityNone, config: timeout(60)},
		{name: "nothing said is None"},
		{name: "ClientIP with its timeout", affinity: corev1.ServiceAffinityClientIP, config: timeout(60), want: 60},
		{name: "the longest timeout", affinity: corev1.ServiceAffinityClientIP, config: timeout(86400), want: 86400},
		{name: "ClientIP without a configuration has the default", affinity: corev1.ServiceAffinityClientIP, want: 10800},
		{
			name:     "ClientIP without a timeout has the default",
			affinity: corev1.ServiceAffinityClientIP,
			config:   &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{}},
			want:     10800,
		},
		{
			name:     "timeout 0 is the default",
			affinity: corev1.ServiceAffinityClientIP, config: timeout(0), want: 10800,
			warns: []string{"session affinity timeout of 0 s is not above 0: taken for 10800 s"},
		},
		{
			name:     "a negative timeout is the default",
			affinity: corev1.ServiceAffinityClientIP, config: timeout(-1), want: 10800,
			warns: []string{"session affinity timeout of -1 s is not above 0: taken for 10800 s"},
		},
		{
			name:     "a huge timeout is the longest the API allows",
			affinity: corev1.ServiceAffinityClientIP, config: timeout(2147483647), want: 86400,
			warns: []string{"session affinity timeout of 2147483647 s is too long: taken for 86400 s"},
		},
		{
			name:     "an unknown affinity is None",
			affinity: "Cookie", config: timeout(60),
			warns: []string{`sessionAffinity "Cookie" is unknown: taken for None`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, _, warnings := ConvertService(service(func(s *corev1.Service) {
				s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = tt.affinity, tt.config
			}), Options{})
			if svc.Affinity != tt.want {
				t.Errorf("affinity = %d, want %d", svc.Affinity, tt.want)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestHealthCheckNodePort(t *testing.T) {
	tests := []struct {
		name   string
		change func(*corev1.ServiceSpec)
		want   uint16
		warns  []string
	}{
		{name: "type LoadBalancer under externalTrafficPolicy Local", change: func(*corev1.ServiceSpec) {}, want: 31000},
		{name: "none under Cluster", change: func(s *corev1.ServiceSpec) { s.ExternalTrafficPolicy = "Cluster" }},
		{name: "none for type NodePort", change: func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeNodePort }},
		{
			name:   "a missing one is said",
			change: func(s *corev1.ServiceSpec) { s.HealthCheckNodePort = 0 },
			warns:  []string{"healthCheckNodePort is missing: load balancers cannot ask which nodes have endpoints"},
		},
		{
			name:   "a number out of range is left out",
			change: func(s *corev1.ServiceSpec) { s.HealthCheckNodePort = 65536 + 80 },
			warns:  []string{"healthCheckNodePort 65616 left out: not between 1 and 65535"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			svc, _, warnings := ConvertService(loadBalancer(func(s *corev1.Service) { tt.change(&s.Spec) }), Options{})
			if svc.HealthCheckNodePort != tt.want {
				t.Errorf("health check port = %d, want %d", svc.HealthCheckNodePort, tt.want)
			}
			checkWarnings(t, warnings, "Service shop/web", tt.warns)
		})
	}
}

func TestServiceKeepsItsAge(t *testing.T) {
	born := time.Date(2024, 2, 3, 4, 5, 6, 0, time.UTC)
	svc, _, _ := ConvertService(service(func(s *corev1.Service) {
		s.CreationTimestamp = metav1.NewTime(born)
	}), Options{})
	if !svc.Created.Equal(born) {
		t.Errorf("created = %v, want %v", svc.Created, born)
	}
}

// slice returns a valid EndpointSlice of shop/web, one endpoint 10.1.0.1 port
// 8080/TCP, with changes.
func slice(changes ...func(*discoveryv1.EndpointSlice)) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop",
			Name:      "web-1",
			Labels:    map[string]string{discoveryv1.LabelServiceName: "web"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new(""), Protocol: new(corev1.ProtocolTCP), Port: new(int32(8080))}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"10.1.0.1"}}},
	}
	for _, change := range changes {
		change(s)
	}
	return s
}

func TestWhichSlicesCount(t *testing.T) {
	label := func(key, value string) func(*discoveryv1.EndpointSlice) {
		return func(s *discoveryv1.EndpointSlice) { s.Labels[key] = value }
	}
	addressType := func(a discoveryv1.AddressType) func(*discoveryv1.EndpointSlice) {
		return func(s *discoveryv1.EndpointSlice) { s.AddressType, s.Endpoints = a, nil }
	}
	tests := []struct {
		name   string
		change func(*discoveryv1.EndpointSlice)
		want   bool
		warns  []string
	}{
		{name: "a slice of a Service counts", change: func(*discoveryv1.EndpointSlice) {}, want: true},
		{name: "a slice of no Service is ignored", change: func(s *discoveryv1.EndpointSlice) { s.Labels = nil }},
		{name: "a slice of a Service without name is ignored", change: label(discoveryv1.LabelServiceName, "")},
		{name: "a slice of a headless Service is ignored", change: label(corev1.IsHeadlessService, "")},
		{name: "a proxy name on a slice means nothing", change: label(labelServiceProxyName, "other"), want: true},
		{name: "IPv6 counts", change: addressType(discoveryv1.AddressTypeIPv6), want: true},
		{name: "host names are ignored", change: addressType(discoveryv1.AddressTypeFQDN)},
		{
			name:   "an unknown address type is ignored with a warning",
			change: addressType("IPv5"),
			warns:  []string{`slice left out: unknown addressType "IPv5"`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, counts, warnings := ConvertSlice(slice(tt.change))
			if counts != tt.want {
				t.Errorf("counts = %v, want %v (%+v)", counts, tt.want, got)
			}
			if want := (lb.Name{Namespace: "shop", Name: "web-1"}); got.Name != want {
				t.Errorf("name = %v, want %v: it is needed to say that the slice is gone", got.Name, want)
			}
			checkWarnings(t, warnings, "EndpointSlice shop/web-1", tt.warns)
		})
	}
}

func TestSlicePorts(t *testing.T) {
	tests := []struct {
		name  string
		ports []discoveryv1.EndpointPort
		want  []lb.SlicePort
		warns []string
	}{
		{
			name: "names and protocols are kept apart",
			ports: []discoveryv1.EndpointPort{
				{Name: new("dns"), Protocol: new(corev1.ProtocolTCP), Port: new(int32(53))},
				{Name: new("dns"), Protocol: new(corev1.ProtocolUDP), Port: new(int32(5353))},
			},
			want: []lb.SlicePort{{Name: "dns", Protocol: lb.TCP, Number: 53}, {Name: "dns", Protocol: lb.UDP, Number: 5353}},
		},
		{
			name:  "no protocol is TCP",
			ports: []discoveryv1.EndpointPort{{Name: new("a"), Port: new(int32(80))}},
			want:  []lb.SlicePort{{Name: "a", Protocol: lb.TCP, Number: 80}},
		},
		{
			name: "a port without name or number says nothing",
			ports: []discoveryv1.EndpointPort{
				{Port: new(int32(80))}, {Name: new("a")}, {Name: new("b"), Port: new(int32(0))}, {},
			},
			want: []lb.SlicePort{},
		},
		{
			name: "what cannot be a port is left out and the rest lives",
			ports: []discoveryv1.EndpointPort{
				{Name: new("big"), Port: new(int32(70000))},
				{Name: new("odd"), Protocol: new(corev1.Protocol("ICMP")), Port: new(int32(1))},
				{Name: new("ok"), Port: new(int32(80))},
			},
			want: []lb.SlicePort{{Name: "ok", Protocol: lb.TCP, Number: 80}},
			warns: []string{
				`port "big" left out: number 70000 is not between 1 and 65535`,
				`port "odd" left out: unknown protocol "ICMP"`,
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, counts, warnings := ConvertSlice(slice(func(s *discoveryv1.EndpointSlice) { s.Ports = tt.ports }))
			if !counts {
				t.Error("counts = false: a bad port must not take its slice along")
			}
			if diff := cmp.Diff(tt.want, got.Ports); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "EndpointSlice shop/web-1", tt.warns)
		})
	}
}

func TestConditionDefaults(t *testing.T) {
	yes, no := new(true), new(false)
	tests := []struct {
		name       string
		conditions discoveryv1.EndpointConditions
		want       lb.Endpoint
	}{
		{name: "nothing said is ready and serving", want: lb.Endpoint{Ready: true, Serving: true}},
		{
			name:       "ready false alone keeps serving",
			conditions: discoveryv1.EndpointConditions{Ready: no},
			want:       lb.Endpoint{Serving: true},
		},
		{
			name:       "serving and terminating",
			conditions: discoveryv1.EndpointConditions{Ready: no, Serving: yes, Terminating: yes},
			want:       lb.Endpoint{Serving: true, Terminating: true},
		},
		{
			name:       "not serving any more",
			conditions: discoveryv1.EndpointConditions{Ready: no, Serving: no, Terminating: yes},
			want:       lb.Endpoint{Terminating: true},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, _ := ConvertSlice(slice(func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Conditions = tt.conditions }))
			tt.want.Addr = netip.MustParseAddr("10.1.0.1")
			if diff := cmp.Diff([]lb.Endpoint{tt.want}, got.Endpoints, compareAddr); diff != "" {
				t.Errorf("endpoints (-want +got):\n%s", diff)
			}
		})
	}
}

func TestEndpointAddresses(t *testing.T) {
	tests := []struct {
		name      string
		family    discoveryv1.AddressType
		addresses [][]string // of each endpoint
		want      []string
		warns     []string
	}{
		{
			name:      "only the first address counts",
			family:    discoveryv1.AddressTypeIPv4,
			addresses: [][]string{{"10.1.0.1", "10.1.0.2"}},
			want:      []string{"10.1.0.1"},
		},
		{
			name:      "addresses are read as Kubernetes reads them",
			family:    discoveryv1.AddressTypeIPv4,
			addresses: [][]string{{"010.001.000.009"}, {"::ffff:10.1.0.2"}},
			want:      []string{"10.1.0.9", "10.1.0.2"},
		},
		{
			name:      "what nobody can be reached at is left out with one warning",
			family:    discoveryv1.AddressTypeIPv4,
			addresses: [][]string{{"127.0.0.1"}, {"10.1.0.1"}, {"169.254.1.1"}, {"0.0.0.0"}, {"224.0.0.1"}, {"x"}, {}},
			want:      []string{"10.1.0.1"},
			warns: []string{`endpoints left out: "127.0.0.1" (loopback address), "169.254.1.1" (link-local address), ` +
				`"0.0.0.0" (unspecified address) and 3 more`},
		},
		{
			name:      "the same for IPv6",
			family:    discoveryv1.AddressTypeIPv6,
			addresses: [][]string{{"::1"}, {"fe80::1"}, {"fd00::1"}, {"ff02::1"}},
			want:      []string{"fd00::1"},
			warns: []string{`endpoints left out: "::1" (loopback address), "fe80::1" (link-local address), ` +
				`"ff02::1" (multicast address)`},
		},
		{
			name:      "loopback hides behind no mapping",
			family:    discoveryv1.AddressTypeIPv4,
			addresses: [][]string{{"::ffff:127.0.0.1"}},
			warns:     []string{`endpoints left out: "::ffff:127.0.0.1" (loopback address)`},
		},
		{
			name:      "an address of the other family is left out",
			family:    discoveryv1.AddressTypeIPv6,
			addresses: [][]string{{"fd00::1"}, {"10.1.0.1"}, {"::ffff:10.1.0.2"}},
			want:      []string{"fd00::1"},
			warns:     []string{`endpoints left out: "10.1.0.1" (not IPv6), "::ffff:10.1.0.2" (not IPv6)`},
		},
		{
			name:      "an address with a zone is none",
			family:    discoveryv1.AddressTypeIPv6,
			addresses: [][]string{{"fd00::1%eth0"}},
			warns:     []string{`endpoints left out: "fd00::1%eth0" (not an IP address)`},
		},
		{
			name:      "an endpoint without address is left out",
			family:    discoveryv1.AddressTypeIPv4,
			addresses: [][]string{nil, {"10.1.0.1"}},
			want:      []string{"10.1.0.1"},
			warns:     []string{"endpoints left out: an endpoint without address"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			object := slice(func(s *discoveryv1.EndpointSlice) { s.AddressType, s.Endpoints = tt.family, nil })
			for _, a := range tt.addresses {
				object.Endpoints = append(object.Endpoints, discoveryv1.Endpoint{Addresses: a})
			}
			converted, counts, warnings := ConvertSlice(object)
			if !counts {
				t.Error("counts = false: a bad endpoint must not take its slice along")
			}
			var got []string
			for _, e := range converted.Endpoints {
				got = append(got, e.Addr.String())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("addresses (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "EndpointSlice shop/web-1", tt.warns)
			if n := len(tt.addresses) - len(tt.want); len(converted.Invalid) != n {
				t.Errorf("%d invalid endpoints, want %d: %v", len(converted.Invalid), n, converted.Invalid)
			}
			for _, e := range converted.Invalid {
				if e.Reason == "" {
					t.Errorf("invalid endpoint %q without a reason", e.Address)
				}
			}
		})
	}
}

func TestNodesAndHintsOfEndpoints(t *testing.T) {
	zones := func(names ...string) (out []discoveryv1.ForZone) {
		for _, n := range names {
			out = append(out, discoveryv1.ForZone{Name: n})
		}
		return out
	}
	tests := []struct {
		name     string
		endpoint discoveryv1.Endpoint
		want     lb.Endpoint
	}{
		{name: "nothing said"},
		{name: "the node is taken as it is spelled", endpoint: discoveryv1.Endpoint{NodeName: new("N1 ")}, want: lb.Endpoint{Node: "N1 "}},
		{
			name: "hints for nodes and zones",
			endpoint: discoveryv1.Endpoint{Hints: &discoveryv1.EndpointHints{
				ForNodes: []discoveryv1.ForNode{{Name: "n1"}, {Name: "n2"}}, ForZones: zones("z1", "z2"),
			}},
			want: lb.Endpoint{NodeHints: []string{"n1", "n2"}, ZoneHints: []string{"z1", "z2"}},
		},
		{
			name:     "hints that name nothing are none",
			endpoint: discoveryv1.Endpoint{Hints: &discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{}, ForZones: zones()}},
		},
		{
			name:     "a zone without a name is a hint, as upstream",
			endpoint: discoveryv1.Endpoint{Hints: &discoveryv1.EndpointHints{ForZones: zones("")}},
			want:     lb.Endpoint{ZoneHints: []string{""}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, warnings := ConvertSlice(slice(func(s *discoveryv1.EndpointSlice) {
				tt.endpoint.Addresses = []string{"10.1.0.1"}
				s.Endpoints = []discoveryv1.Endpoint{tt.endpoint}
			}))
			tt.want.Addr, tt.want.Ready, tt.want.Serving = netip.MustParseAddr("10.1.0.1"), true, true
			if diff := cmp.Diff([]lb.Endpoint{tt.want}, got.Endpoints, compareAddr); diff != "" {
				t.Errorf("endpoints (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "", nil)
		})
	}
}

var (
	compareAddr   = cmpopts.EquateComparable(netip.Addr{})
	comparePrefix = cmpopts.EquateComparable(netip.Prefix{})
)

// checkWarnings compares the texts of warnings, all about one object.
func checkWarnings(t *testing.T, got []Warning, object string, want []string) {
	t.Helper()
	var texts []string
	for _, w := range got {
		if w.Object != object {
			t.Errorf("warning about %q, want %q", w.Object, object)
		}
		texts = append(texts, w.Text)
	}
	if diff := cmp.Diff(want, texts, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}
