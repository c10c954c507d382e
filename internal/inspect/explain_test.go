// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// sides says the same of all sides.
func sides(reason string) map[string]string {
	return map[string]string{"clusterIP": reason, "inside": reason, "outside": reason}
}

var inAll = []string{"clusterIP", "inside", "outside"}

// explained is a Service with everything that can be said of one.
func explained() lb.ExplainedPort {
	elsewhere := "on another node (node-b), and the policy is Local"
	return lb.ExplainedPort{
		Service: "web/shop", PortName: "https", Protocol: "TCP", Family: "IPv4",
		InternalTrafficPolicy: "Cluster", ExternalTrafficPolicy: "Local",
		AffinitySeconds: 10800, SourceRanges: []string{"192.0.2.0/24", "203.0.113.20/32"},
		Hints: "ignored because not every ready endpoint has zone hints",
		Frontends: []lb.ExplainedFrontend{
			{VIP: netip.MustParseAddr("10.96.0.20"), Port: 443, Type: "ClusterIP", Inside: "clusterIP", Outside: "clusterIP"},
			{VIP: netip.MustParseAddr("0.0.0.0"), Port: 30443, Type: "NodePort", Inside: "inside", Outside: "outside",
				At: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.7")}},
			{VIP: netip.MustParseAddr("203.0.113.20"), Port: 443, Type: "LoadBalancer", Inside: "inside", Outside: "outside"},
			{
				VIP: netip.MustParseAddr("198.51.100.20"), Port: 443, Type: "ExternalIP", Inside: "inside", Outside: "outside",
				Lost: "default/older",
			},
		},
		Rules: []lb.ExplainedRule{
			{Side: "clusterIP", Rule: "policy Cluster: all ready endpoints", Verdict: "translate", Backends: 2},
			{Side: "inside", Rule: "policy Cluster: all ready endpoints", Verdict: "translate", Backends: 2},
			{Side: "outside", Rule: "policy Local: the ready endpoints on this node", Verdict: "translate", Backends: 1},
		},
		Endpoints: []lb.ExplainedEndpoint{
			{
				Address: "10.244.0.21", Port: 8443, Slice: "shop-7kq2x", Node: "node-a", Ready: true, Serving: true,
				ForZones: []string{"zone-1"}, In: inAll, Out: map[string]string{},
			},
			{
				Address: "10.244.2.22", Port: 8443, Slice: "shop-7kq2x", Node: "node-b", Ready: true, Serving: true,
				In: []string{"clusterIP", "inside"}, Out: map[string]string{"outside": elsewhere},
			},
			{
				Address: "10.244.2.23", Port: 8443, Slice: "shop-7kq2x", Node: "node-b", Serving: true, Terminating: true,
				ForNodes: []string{"node-b", "node-c"}, ForZones: []string{"zone-2"}, In: []string{},
				Out: map[string]string{
					"clusterIP": "terminating, and others are ready", "inside": "terminating, and others are ready",
					"outside": elsewhere,
				},
			},
			{Address: "10.244.2.24", Port: 8443, Slice: "shop-m4z9c", Node: "node-a", Serving: true, In: []string{}, Out: sides("not ready")},
			{Address: "fd00:244::21", Port: 8443, Slice: "shop-v6", Node: "node-a", In: []string{}, Out: sides("wrong family: the slice is IPv6")},
			{Address: "127.0.0.1", Slice: "shop-by-hand", In: []string{}, Out: sides("invalid: a loopback address")},
		},
		Kernel:   []string{"outside: the kernel has [], wanted is [10.244.0.21:8443]", "source range 192.0.2.0/24 is missing"},
		Affinity: []lb.ExplainedAffinity{{Client: "10.244.0.4", Backend: "10.244.2.22:8443", AgeSeconds: 75}},
	}
}

// plain is a Service with a ClusterIP alone.
func plain() lb.ExplainedPort {
	rule := "no endpoint is ready, or serves while it terminates"
	return lb.ExplainedPort{
		Service: "default/web", Protocol: "TCP", Family: "IPv6",
		InternalTrafficPolicy: "Cluster", ExternalTrafficPolicy: "Cluster", SourceRanges: []string{}, Hints: "none",
		Frontends: []lb.ExplainedFrontend{
			{VIP: netip.MustParseAddr("fd00:96::1"), Port: 80, Type: "ClusterIP", Inside: "clusterIP", Outside: "clusterIP"},
		},
		Rules: []lb.ExplainedRule{
			{Side: "clusterIP", Rule: rule, Verdict: "no_backend"},
			{Side: "inside", Rule: rule, Verdict: "no_backend"},
			{Side: "outside", Rule: rule, Verdict: "no_backend"},
		},
		Endpoints: []lb.ExplainedEndpoint{},
	}
}

func TestPrintExplanationGolden(t *testing.T) {
	agreeing := plain()
	agreeing.Kernel = []string{}
	agreeing.Rules[0] = lb.ExplainedRule{
		Side: "clusterIP", Rule: "policy Local: no usable endpoint on this node, but elsewhere", Verdict: "drop",
	}
	agreeing.Endpoints = []lb.ExplainedEndpoint{{
		Address: "fd00:244::21", Port: 8080, Slice: "web-abcde", Node: "node-b", Ready: true, Serving: true, In: []string{},
		Out: sides("on another node (node-b), and the policy is Local"),
	}}
	single := explained()
	single.Frontends = single.Frontends[2:3]
	single.SourceRanges = []string{}
	single.Kernel, single.Affinity, single.AffinitySeconds = nil, nil, 0
	var many []string
	for _, end := range []string{"0", "64", "128", "192"} {
		for _, net := range []string{"192.0.2.", "198.51.100.", "203.0.113."} {
			many = append(many, net+end+"/26")
		}
	}
	wrapped := explained()
	wrapped.SourceRanges = many
	for _, test := range []struct {
		name string
		e    lb.Explanation
	}{
		{"everything there is to say", lb.Explanation{
			Node: "node-a", Zone: "zone-1", Ports: []lb.ExplainedPort{explained()},
			Problem: "198.51.100.20:443/TCP belongs to Service default/older",
		}},
		{"a load balancer for everybody", lb.Explanation{Node: "node-a", Zone: "zone-1", Ports: []lb.ExplainedPort{single}}},
		{"many source ranges take several lines", lb.Explanation{Node: "node-a", Zone: "zone-1", Ports: []lb.ExplainedPort{wrapped}}},
		{"a Service without endpoints, the kernel not compared", lb.Explanation{Node: "node-a", Ports: []lb.ExplainedPort{plain()}}},
		{"two ports, no outside clients", lb.Explanation{Node: "node-a", Ports: []lb.ExplainedPort{agreeing, plain()}}},
		{"an address that is nobody's", lb.Explanation{
			Node: "node-a", Zone: "zone-1", Ports: []lb.ExplainedPort{},
			Verdict: "drop: in a ServiceCIDR, but no Service has this address",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out strings.Builder
			if err := PrintExplanation(&out, test.e, "table"); err != nil {
				t.Fatal(err)
			}
			golden(t, "explain-"+strings.NewReplacer(" ", "-", ",", "", "'", "").Replace(test.name), out.String())
		})
	}
}

func TestPrintExplanationForProgramsIsTheExplanation(t *testing.T) {
	want := lb.Explanation{Node: "node-a", Zone: "zone-1", Ports: []lb.ExplainedPort{explained(), plain()}}
	for format, decode := range map[string]func([]byte, any) error{
		"json": json.Unmarshal,
		"yaml": func(data []byte, to any) error { return yaml.UnmarshalStrict(data, to) },
	} {
		var out strings.Builder
		if err := PrintExplanation(&out, want, format); err != nil {
			t.Fatal(err)
		}
		var got lb.Explanation
		if err := decode([]byte(out.String()), &got); err != nil {
			t.Fatalf("%s: %v\n%s", format, err, out.String())
		}
		// Empty maps are left out.
		wanted, _ := json.Marshal(want)
		gotten, _ := json.Marshal(got)
		if diff := cmp.Diff(string(wanted), string(gotten)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", format, diff)
		}
		if got.Ports[1].Kernel != nil {
			t.Errorf("%s: a kernel that was not compared came back as %q", format, got.Ports[1].Kernel)
		}
	}
}
