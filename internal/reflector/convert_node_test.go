// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// node returns a valid Node n1 in zone z1 at 192.0.2.1, with changes.
func node(changes ...func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeHostName, Address: "n1"},
			{Type: corev1.NodeInternalIP, Address: "192.0.2.1"},
		}},
	}
	for _, change := range changes {
		change(n)
	}
	return n
}

func nodeLabel(key, value string) func(*corev1.Node) {
	return func(n *corev1.Node) { n.Labels = map[string]string{key: value} }
}

func cidr(name string, ranges ...string) *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       networkingv1.ServiceCIDRSpec{CIDRs: ranges},
	}
}

func TestNodeAddresses(t *testing.T) {
	const internal, external = corev1.NodeInternalIP, corev1.NodeExternalIP
	const none = "it has no InternalIP or ExternalIP in status.addresses: which address is its own is unknown"
	tests := []struct {
		name      string
		addresses []corev1.NodeAddress
		want      []string
		warns     []string
	}{
		{
			name:      "the first InternalIP of each family",
			addresses: []corev1.NodeAddress{{Type: internal, Address: "fd00::1"}, {Type: internal, Address: "192.0.2.1"}, {Type: internal, Address: "192.0.2.2"}},
			want:      []string{"fd00::1", "192.0.2.1"},
		},
		{
			name:      "an InternalIP beats an ExternalIP before it",
			addresses: []corev1.NodeAddress{{Type: external, Address: "198.51.100.1"}, {Type: internal, Address: "192.0.2.1"}},
			want:      []string{"192.0.2.1"},
		},
		{
			name:      "an ExternalIP fills in for a family without InternalIP",
			addresses: []corev1.NodeAddress{{Type: external, Address: "2001:db8::1"}, {Type: internal, Address: "192.0.2.1"}},
			want:      []string{"192.0.2.1", "2001:db8::1"},
		},
		{
			name:      "host and DNS names are no addresses",
			addresses: []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: "192.0.2.1"}, {Type: corev1.NodeInternalDNS, Address: "n1"}},
			warns:     []string{none},
		},
		{
			name:      "addresses are read as Kubernetes reads them",
			addresses: []corev1.NodeAddress{{Type: internal, Address: "::ffff:192.0.2.1"}, {Type: internal, Address: "192.000.002.002"}},
			want:      []string{"192.0.2.1"},
		},
		{
			name:      "what cannot be its own is left out with one warning",
			addresses: []corev1.NodeAddress{{Type: internal, Address: "127.0.0.1"}, {Type: internal, Address: "x"}, {Type: internal, Address: "192.0.2.1"}},
			want:      []string{"192.0.2.1"},
			warns:     []string{`addresses left out: "127.0.0.1" (loopback address), "x" (not an IP address)`},
		},
		{name: "a node without addresses is said", warns: []string{none}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings := ConvertNode(node(func(n *corev1.Node) { n.Status.Addresses = tt.addresses }))
			if diff := cmp.Diff(tt.want, addressTexts(got.Addresses)); diff != "" {
				t.Errorf("addresses (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "Node n1", tt.warns)
		})
	}
}

func TestNodeZone(t *testing.T) {
	got, warnings := ConvertNode(node())
	if got.Zone != "z1" {
		t.Errorf("zone = %q, want z1", got.Zone)
	}
	checkWarnings(t, warnings, "Node n1", nil)
	got, warnings = ConvertNode(node(func(n *corev1.Node) { n.Labels = nil }))
	if got.Zone != "" {
		t.Errorf("zone = %q, want none", got.Zone)
	}
	checkWarnings(t, warnings, "Node n1", []string{
		"it has no label topology.kubernetes.io/zone: topology hints for zones have no effect here",
	})
}

func TestWhichNodesAreEligible(t *testing.T) {
	tests := []struct {
		name   string
		change func(*corev1.Node)
		want   bool
	}{
		{name: "a plain node is", change: func(*corev1.Node) {}, want: true},
		{name: "a node being deleted is not", change: func(n *corev1.Node) { n.DeletionTimestamp = new(metav1.NewTime(time.Unix(1, 0))) }},
		{
			name: "a node the cluster autoscaler is about to delete is not",
			change: func(n *corev1.Node) {
				n.Spec.Taints = []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule}}
			},
		},
		{
			name:   "other taints mean nothing",
			change: func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/unreachable"}} },
			want:   true,
		},
		{name: "a cordoned node is", change: func(n *corev1.Node) { n.Spec.Unschedulable = true }, want: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, _ := ConvertNode(node(tt.change)); got.Eligible != tt.want {
				t.Errorf("eligible = %v, want %v", got.Eligible, tt.want)
			}
		})
	}
}

func TestServiceCIDRs(t *testing.T) {
	tests := []struct {
		name   string
		object *networkingv1.ServiceCIDR
		want   []string
		warns  []string
	}{
		{name: "both families", object: cidr("a", "10.96.0.0/12", "fd00::/112"), want: []string{"10.96.0.0/12", "fd00::/112"}},
		{name: "masked, read as Kubernetes reads them", object: cidr("a", "010.96.0.1/12"), want: []string{"10.96.0.0/12"}},
		{
			name: "conditions and deletion mean nothing",
			object: func() *networkingv1.ServiceCIDR {
				s := cidr("a", "10.96.0.0/12")
				s.DeletionTimestamp = new(metav1.NewTime(time.Unix(1, 0)))
				s.Status.Conditions = []metav1.Condition{{Type: networkingv1.ServiceCIDRConditionReady, Status: metav1.ConditionFalse}}
				return s
			}(),
			want: []string{"10.96.0.0/12"},
		},
		{
			name:   "what is no range is left out",
			object: cidr("a", "10.96.0.0", "fd00::/112"),
			want:   []string{"fd00::/112"},
			warns:  []string{`range "10.96.0.0" left out: not a CIDR`},
		},
		{
			name:   "a range that would cut the node off from itself is left out",
			object: cidr("a", "0.0.0.0/0", "::/0"),
			warns: []string{
				`range "0.0.0.0/0" left out: it holds loopback or multicast addresses`,
				`range "::/0" left out: it holds loopback or multicast addresses`,
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			prefixes, warnings := ConvertServiceCIDR(tt.object)
			var got []string
			for _, p := range prefixes {
				got = append(got, p.String())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("ranges (-want +got):\n%s", diff)
			}
			checkWarnings(t, warnings, "ServiceCIDR a", tt.warns)
		})
	}
}
