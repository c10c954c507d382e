// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/kubernetes/pkg/proxy/apis"
)

func TestWrongRulesAreFoundAndShrunk(t *testing.T) {
	const enough, small = 20_000, 4
	for _, tt := range mistakes {
		t.Run(tt.name, func(t *testing.T) {
			with := func() Side { return mistaken{Ours(), tt.see} }
			_, found := search(*seed, enough, with)
			if found == nil {
				t.Fatalf("not found in %d histories", enough)
			}
			found = Shrink(found, with)
			if len(found.History) > small {
				t.Errorf("shrunk to %d steps, want at most %d", len(found.History), small)
			}
			t.Logf("\n%s", found)
		})
	}
}

// mistaken is a side that sees every step as one would that gets a rule wrong.
type mistaken struct {
	Side
	see func(Step) Step
}

func (m mistaken) apply(s Step) { m.Side.apply(m.see(s)) }

var mistakes = []struct {
	name string
	see  func(Step) Step
}{
	{"zone hints count when some endpoints have them", onSlices(func(s *discoveryv1.EndpointSlice) {
		hinted := func(e discoveryv1.Endpoint) bool { return e.Hints != nil && len(e.Hints.ForZones) > 0 }
		if !slices.ContainsFunc(s.Endpoints, hinted) {
			return
		}
		for i, e := range s.Endpoints {
			if !hinted(e) {
				s.Endpoints[i].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "elsewhere"}}}
			}
		}
	})},
	{"nothing serves while it terminates", onEndpoints(func(e *discoveryv1.Endpoint) {
		if e.Conditions.Terminating != nil && *e.Conditions.Terminating {
			e.Conditions.Serving = new(false)
		}
	})},
	{"node names are compared without case and blanks", onEndpoints(func(e *discoveryv1.Endpoint) {
		if e.NodeName != nil {
			e.NodeName = new(strings.ToLower(strings.TrimSpace(*e.NodeName)))
		}
	})},
	{"ipMode means nothing", onServices(func(s *corev1.Service) {
		for i := range s.Status.LoadBalancer.Ingress {
			s.Status.LoadBalancer.Ingress[i].IPMode = nil
		}
	})},
	{"a source range of length 0 is invalid", onServices(func(s *corev1.Service) {
		s.Spec.LoadBalancerSourceRanges = slices.DeleteFunc(s.Spec.LoadBalancerSourceRanges, func(r string) bool {
			return strings.HasSuffix(r, "/0")
		})
	})},
	{"externalTrafficPolicy means nothing to type ClusterIP", onServices(func(s *corev1.Service) {
		if s.Spec.Type == corev1.ServiceTypeClusterIP {
			s.Spec.ExternalTrafficPolicy = ""
		}
	})},
	{"a Service with an empty service-proxy-name is ours", onServices(func(s *corev1.Service) {
		if s.Labels[apis.LabelServiceProxyName] == "" {
			s.Labels = nil
		}
	})},
	{"health checks do not depend on the policy", onServices(func(s *corev1.Service) {
		if s.Spec.HealthCheckNodePort != 0 && s.Spec.Type == corev1.ServiceTypeLoadBalancer {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}
	})},
	{"affinity outlives its Service's wish", onServices(func(s *corev1.Service) {
		if s.Spec.SessionAffinityConfig != nil {
			s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		}
	})},
	{"slices are not deleted", func(s Step) Step {
		if s.DeleteSlice != nil {
			return Step{Node: baseNode()}
		}
		return s
	}},
}

func onServices(change func(*corev1.Service)) func(Step) Step {
	return func(s Step) Step {
		if s.Service != nil {
			s.Service = s.Service.DeepCopy()
			change(s.Service)
		}
		return s
	}
}

func onSlices(change func(*discoveryv1.EndpointSlice)) func(Step) Step {
	return func(s Step) Step {
		if s.Slice != nil {
			s.Slice = s.Slice.DeepCopy()
			change(s.Slice)
		}
		return s
	}
}

func onEndpoints(change func(*discoveryv1.Endpoint)) func(Step) Step {
	return onSlices(func(s *discoveryv1.EndpointSlice) {
		for i := range s.Endpoints {
			change(&s.Endpoints[i])
		}
	})
}
