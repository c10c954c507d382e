// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func TestManifestDefaults(t *testing.T) {
	m := parseManifest("shop.yaml", []byte(shopManifest), Options{})
	want := []Event{
		ServiceSet{lb.Service{
			Name:       webName,
			ClusterIPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
			Ports:      []lb.Port{{Protocol: lb.TCP, Number: 80}},
		}},
		SliceSet{Slice: lb.Slice{
			Name:      lb.Name{Namespace: "shop", Name: "web-1"},
			Service:   "web",
			Family:    lb.IPv4,
			Ports:     []lb.SlicePort{{Protocol: lb.TCP, Number: 8080}},
			Endpoints: []lb.Endpoint{{Addr: netip.MustParseAddr("10.1.0.1"), Ready: true, Serving: true}},
		}},
	}
	var got []Event
	for _, o := range m.objects {
		got = append(got, o.event)
	}
	if diff := cmp.Diff(want, got, compareAddr); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
	if m.broken || len(m.warnings) > 0 {
		t.Errorf("broken = %v, warnings %v about a file that is fine", m.broken, m.warnings)
	}
	if diff := cmp.Diff([]string{"document 1: apps/v1 Deployment"}, m.passedOver); diff != "" {
		t.Errorf("passed over (-want +got):\n%s", diff)
	}
}

func TestServiceDefaults(t *testing.T) {
	s := corev1.Service{Spec: corev1.ServiceSpec{
		ClusterIPs:      []string{"fd00::1", "10.0.0.1"},
		SessionAffinity: corev1.ServiceAffinityClientIP,
		Ports:           []corev1.ServicePort{{Port: 53, Protocol: corev1.ProtocolUDP}, {Port: 80}},
	}}
	defaultService(&s)
	want := corev1.ServiceSpec{
		Type:                  corev1.ServiceTypeClusterIP,
		ClusterIP:             "fd00::1",
		ClusterIPs:            []string{"fd00::1", "10.0.0.1"},
		IPFamilies:            []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol},
		InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyCluster),
		ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyCluster,
		SessionAffinity:       corev1.ServiceAffinityClientIP,
		SessionAffinityConfig: &corev1.SessionAffinityConfig{
			ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(int32(10800))},
		},
		Ports: []corev1.ServicePort{{Port: 53, Protocol: corev1.ProtocolUDP}, {Port: 80, Protocol: corev1.ProtocolTCP}},
	}
	if diff := cmp.Diff(want, s.Spec); diff != "" {
		t.Errorf("spec (-want +got):\n%s", diff)
	}
	if s.Namespace != "default" {
		t.Errorf("namespace = %q, want default", s.Namespace)
	}
}

func TestLoadBalancerDefaults(t *testing.T) {
	s := corev1.Service{
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer},
		Status: corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{
			{IP: "192.0.2.1"}, {Hostname: "lb.example.com"},
		}}},
	}
	defaultService(&s)
	want := []corev1.LoadBalancerIngress{
		{IP: "192.0.2.1", IPMode: new(corev1.LoadBalancerIPModeVIP)}, {Hostname: "lb.example.com"},
	}
	if diff := cmp.Diff(want, s.Status.LoadBalancer.Ingress); diff != "" {
		t.Errorf("ingress (-want +got):\n%s", diff)
	}
	if allocate := s.Spec.AllocateLoadBalancerNodePorts; allocate == nil || !*allocate {
		t.Errorf("allocateLoadBalancerNodePorts = %v, want true", allocate)
	}
}

func TestManifestsMayHoldEveryField(t *testing.T) {
	text := `apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIPs: [10.0.0.1, "fd00::1"]
  externalIPs: [198.51.100.1]
  externalTrafficPolicy: Local
  internalTrafficPolicy: Local
  healthCheckNodePort: 31000
  sessionAffinity: ClientIP
  loadBalancerSourceRanges: [192.0.2.0/24]
  ports: [{port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.1}, {ip: 203.0.113.2, ipMode: Proxy}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.1.0.1], nodeName: n1, hints: {forNodes: [{name: n1}], forZones: [{name: z1}, {name: z2}]}}]
`
	m := parseManifest("shop.yaml", []byte(text), Options{})
	want := []Event{
		ServiceSet{lb.Service{
			Name:                webName,
			ClusterIPs:          []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
			LoadBalancerIPs:     []netip.Addr{netip.MustParseAddr("203.0.113.1")},
			ExternalIPs:         []netip.Addr{netip.MustParseAddr("198.51.100.1")},
			Ports:               []lb.Port{{Protocol: lb.TCP, Number: 80, NodePort: 30080}},
			InternalLocal:       true,
			ExternalLocal:       true,
			Affinity:            10800,
			Sources:             []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
			HealthCheckNodePort: 31000,
		}},
		SliceSet{Slice: lb.Slice{
			Name:    lb.Name{Namespace: "shop", Name: "web-1"},
			Service: "web",
			Family:  lb.IPv4,
			Ports:   []lb.SlicePort{{Protocol: lb.TCP, Number: 8080}},
			Endpoints: []lb.Endpoint{{
				Addr: netip.MustParseAddr("10.1.0.1"), Ready: true, Serving: true,
				Node: "n1", NodeHints: []string{"n1"}, ZoneHints: []string{"z1", "z2"},
			}},
		}},
	}
	var got []Event
	for _, o := range m.objects {
		got = append(got, o.event)
	}
	if diff := cmp.Diff(want, got, compareAddr, comparePrefix); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
	_, warnings := merge([]manifest{m})
	if diff := cmp.Diff([]Warning(nil), warnings, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

func TestManifests(t *testing.T) {
	item := `{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"},"spec":{"clusterIP":"10.0.0.1"}}`
	tests := []struct {
		name   string
		file   string // m.yaml when empty
		text   string
		want   []string // objects
		warns  []Warning
		broken bool
	}{
		{name: "an empty file says nothing", text: ""},
		{name: "comments and directives are no documents", text: "%YAML 1.1\n---\n# nothing\n---\n"},
		{
			name: "Windows line ends",
			text: "apiVersion: v1\r\nkind: Service\r\nmetadata: {name: a}\r\nspec: {clusterIP: 10.0.0.1}\r\n---\r\nkind: Pod\r\napiVersion: v1\r\n",
			want: []string{"Service default/a"},
		},
		{name: "JSON in a YAML file", text: item + "\n", want: []string{"Service default/a"}},
		{
			name: "several JSON documents, indented with tabs",
			file: "m.json", text: "{\n\t\"apiVersion\": \"v1\", \"kind\": \"Pod\"}\n" + item,
			want: []string{"Service default/a"},
		},
		{
			name: "a JSON file that ends too soon",
			file: "m.json", text: item + `{"apiVersion":`,
			want:   []string{"Service default/a"},
			warns:  []Warning{{"m.json", "document 2: left out: unexpected EOF"}},
			broken: true,
		},
		{
			name: "a List, as kubectl get -o yaml writes it",
			text: "apiVersion: v1\nkind: List\nitems:\n- " + item + "\n- {apiVersion: v1, kind: Pod}\n",
			want: []string{"Service default/a"},
		},
		{
			name: "a bad item of a List costs only itself",
			text: "apiVersion: v1\nkind: List\nitems:\n- {kind: Service}\n- " + item + "\n",
			want: []string{"Service default/a"},
			warns: []Warning{
				{"m.yaml", "document 1, item 1: left out: apiVersion or kind is missing"},
			},
			broken: true,
		},
		{
			name: "a document that is no object",
			text: "just words\n---\n" + item,
			want: []string{"Service default/a"},
			warns: []Warning{{"m.yaml",
				"document 1: left out: json: cannot unmarshal string into Go value of type v1.TypeMeta"}},
			broken: true,
		},
		{
			name: "a field of the wrong type names its object",
			text: "apiVersion: v1\nkind: Service\nmetadata: {name: b, namespace: shop}\nspec: {ports: [{port: http}]}\n",
			warns: []Warning{{"m.yaml",
				"document 1 (Service shop/b): left out: json: cannot unmarshal string into Go struct field ServicePort.spec.ports.port of type int32"}},
			broken: true,
		},
		{
			name:  "a misspelled field is passed over",
			text:  "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.0.0.1, clusterip: 10.0.0.2}\n",
			want:  []string{"Service default/a"},
			warns: []Warning{{"m.yaml", `document 1 (Service default/a): unknown field "spec.clusterip": ignored`}},
		},
		{
			name:   "a missing name",
			text:   "apiVersion: v1\nkind: Service\nspec: {clusterIP: 10.0.0.1}\n",
			warns:  []Warning{{"m.yaml", "document 1 (Service default/): left out: metadata.name is missing"}},
			broken: true,
		},
		{
			name: "a Service that nobody gave an address",
			text: "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n",
			want: []string{"Service default/a"},
			warns: []Warning{{"Service default/a",
				"left out: it has no clusterIP, and without an API server nobody allocates one (set spec.clusterIP)"}},
		},
		{
			name: "headless and ExternalName are nothing to warn about",
			text: "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None}\n---\n" +
				"apiVersion: v1\nkind: Service\nmetadata: {name: b}\nspec: {type: ExternalName, externalName: example.com}\n",
			want: []string{"Service default/a", "Service default/b"},
		},
		{
			name: "our own Node and every ServiceCIDR",
			text: nodeManifest,
			want: []string{"Node n1", "ServiceCIDR kubernetes", "ServiceCIDR more"},
		},
		{
			name: "a misspelled field of a Node is passed over",
			text: "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: z}}\n" +
				"status: {adresses: [], addresses: [{type: InternalIP, address: 192.0.2.1}]}\n",
			want:  []string{"Node n1"},
			warns: []Warning{{"m.yaml", `document 1 (Node n1): unknown field "status.adresses": ignored`}},
		},
		{
			name: "a ServiceCIDR that is none costs only itself",
			text: "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nspec: {cidrs: [10.0.0.0/8]}\n---\n" + item,
			want: []string{"Service default/a"},
			warns: []Warning{
				{"m.yaml", "document 1 (ServiceCIDR ): left out: metadata.name is missing"},
			},
			broken: true,
		},
		{
			name: "an invalid address costs only itself",
			text: "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIPs: [10.0.0.1, nonsense]}\n",
			want: []string{"Service default/a"},
			warns: []Warning{{"Service default/a",
				`ClusterIP "nonsense" left out: not an IP address`}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.file == "" {
				tt.file = "m.yaml"
			}
			m := parseManifest(tt.file, []byte(tt.text), Options{NodeName: "n1"})
			var got []string
			for _, o := range m.objects {
				got = append(got, title(o.kind, o.name))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
			_, warnings := merge([]manifest{m})
			if diff := cmp.Diff(tt.warns, warnings, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("warnings (-want +got):\n%s", diff)
			}
			if m.broken != tt.broken {
				t.Errorf("broken = %v, want %v", m.broken, tt.broken)
			}
		})
	}
}
