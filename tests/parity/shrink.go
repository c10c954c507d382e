// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"iter"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Shrink returns a difference whose history has nothing left that can be taken
// away: no step, and nothing in an object. with makes a fresh side to compare
// kube-proxy with. Every try makes the history smaller, so it ends. What is
// undefined for kube-proxy stays as it is.
func Shrink(d *Difference, with func() Side) *Difference {
	for again := !d.Undefined; again; {
		again = false
		for smaller := range smallerHistories(d.History) {
			if found := Compare(smaller, with()); found != nil && !found.Undefined {
				d, again = found, true
				break
			}
		}
	}
	return d
}

// smallerHistories yields histories with something taken away, the largest parts
// first.
func smallerHistories(h History) iter.Seq[History] {
	return func(yield func(History) bool) {
		for n := len(h) / 2; n > 0; n /= 2 {
			for i := 0; i+n <= len(h); i++ {
				if !yield(slices.Delete(slices.Clone(h), i, i+n)) {
					return
				}
			}
		}
		for i, step := range h {
			for smaller := range smallerSteps(step) {
				changed := slices.Clone(h)
				changed[i] = smaller
				if !yield(changed) {
					return
				}
			}
		}
	}
}

// smallerSteps yields the step with less in its object.
func smallerSteps(s Step) iter.Seq[Step] {
	return func(yield func(Step) bool) {
		if s.Quiet {
			loud := s
			loud.Quiet = false
			if !yield(loud) {
				return
			}
		}
		switch {
		case s.Service != nil:
			for smaller := range smallerObjects(s.Service, serviceReductions(s.Service)) {
				if !yield(Step{Service: smaller, Quiet: s.Quiet}) {
					return
				}
			}
		case s.Slice != nil:
			for smaller := range smallerObjects(s.Slice, sliceReductions(s.Slice)) {
				if !yield(Step{Slice: smaller, Quiet: s.Quiet}) {
					return
				}
			}
		case s.Node != nil && len(s.Node.Labels) > 0:
			yield(Step{Node: baseNode(), Quiet: s.Quiet})
		}
	}
}

// reduction takes something away from an object. It returns false when it was
// not there.
type reduction[T any] func(T) bool

// smallerObjects yields a copy of the object for each reduction that takes
// something away.
func smallerObjects[T interface{ DeepCopy() T }](object T, reductions []reduction[T]) iter.Seq[T] {
	return func(yield func(T) bool) {
		for _, reduce := range reductions {
			if smaller := object.DeepCopy(); reduce(smaller) && !yield(smaller) {
				return
			}
		}
	}
}

func serviceReductions(s *corev1.Service) []reduction[*corev1.Service] {
	out := []reduction[*corev1.Service]{
		func(s *corev1.Service) bool { return clearMap(&s.Labels) },
		func(s *corev1.Service) bool { return clearList(&s.Spec.ExternalIPs) },
		func(s *corev1.Service) bool { return clearList(&s.Spec.LoadBalancerSourceRanges) },
		func(s *corev1.Service) bool { return clearList(&s.Status.LoadBalancer.Ingress) },
		func(s *corev1.Service) bool { return zero(&s.Spec.InternalTrafficPolicy) },
		func(s *corev1.Service) bool { return zero(&s.Spec.ExternalTrafficPolicy) },
		func(s *corev1.Service) bool { return zero(&s.Spec.SessionAffinity) },
		func(s *corev1.Service) bool { return zero(&s.Spec.TrafficDistribution) },
		func(s *corev1.Service) bool { return zero(&s.Spec.AllocateLoadBalancerNodePorts) },
		func(s *corev1.Service) bool { return zero(&s.Spec.PublishNotReadyAddresses) },
		func(s *corev1.Service) bool { return zero(&s.Spec.HealthCheckNodePort) },
		func(s *corev1.Service) bool {
			// kube-proxy relies on the timeout being there with ClientIP.
			return s.Spec.SessionAffinity != corev1.ServiceAffinityClientIP && zero(&s.Spec.SessionAffinityConfig)
		},
		plainType,
		keepFamily(0),
		keepFamily(1),
	}
	for i := range s.Spec.ExternalIPs {
		out = append(out, func(s *corev1.Service) bool { return remove(&s.Spec.ExternalIPs, i) })
	}
	for i := range s.Spec.LoadBalancerSourceRanges {
		out = append(out, func(s *corev1.Service) bool { return remove(&s.Spec.LoadBalancerSourceRanges, i) })
	}
	for i := range s.Status.LoadBalancer.Ingress {
		out = append(out,
			func(s *corev1.Service) bool { return remove(&s.Status.LoadBalancer.Ingress, i) },
			func(s *corev1.Service) bool { return zero(&s.Status.LoadBalancer.Ingress[i].IPMode) })
	}
	for i := range s.Spec.Ports {
		out = append(out,
			func(s *corev1.Service) bool { return len(s.Spec.Ports) > 1 && remove(&s.Spec.Ports, i) },
			func(s *corev1.Service) bool { return zero(&s.Spec.Ports[i].NodePort) },
		)
	}
	return out
}

// plainType makes the Service one of type ClusterIP, with what that type lacks
// taken away.
func plainType(s *corev1.Service) bool {
	if s.Spec.Type == corev1.ServiceTypeClusterIP {
		return false
	}
	s.Spec.Type = corev1.ServiceTypeClusterIP
	for i := range s.Spec.Ports {
		s.Spec.Ports[i].NodePort = 0
	}
	return true
}

// keepFamily makes a dual-stack Service one of its first or second family.
func keepFamily(i int) reduction[*corev1.Service] {
	return func(s *corev1.Service) bool {
		if len(s.Spec.IPFamilies) < 2 || len(s.Spec.ClusterIPs) < 2 {
			return false
		}
		s.Spec.IPFamilies, s.Spec.ClusterIPs = s.Spec.IPFamilies[i:i+1], s.Spec.ClusterIPs[i:i+1]
		s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
		return true
	}
}

func sliceReductions(s *discoveryv1.EndpointSlice) []reduction[*discoveryv1.EndpointSlice] {
	var out []reduction[*discoveryv1.EndpointSlice]
	for i := range s.Ports {
		out = append(out, func(s *discoveryv1.EndpointSlice) bool { return remove(&s.Ports, i) })
	}
	for i := range s.Endpoints {
		out = append(out, func(s *discoveryv1.EndpointSlice) bool { return remove(&s.Endpoints, i) })
	}
	for i := range s.Endpoints {
		for _, reduce := range endpointReductions {
			out = append(out, func(s *discoveryv1.EndpointSlice) bool { return reduce(&s.Endpoints[i]) })
		}
	}
	return append(out,
		func(s *discoveryv1.EndpointSlice) bool { return removeKey(s.Labels, corev1.IsHeadlessService) },
		func(s *discoveryv1.EndpointSlice) bool { return clearMap(&s.Labels) })
}

var endpointReductions = []reduction[*discoveryv1.Endpoint]{
	func(e *discoveryv1.Endpoint) bool { return zero(&e.Hints) },
	func(e *discoveryv1.Endpoint) bool { return e.Hints != nil && clearList(&e.Hints.ForZones) },
	func(e *discoveryv1.Endpoint) bool { return e.Hints != nil && clearList(&e.Hints.ForNodes) },
	func(e *discoveryv1.Endpoint) bool {
		return e.Hints != nil && len(e.Hints.ForZones) > 1 && remove(&e.Hints.ForZones, 1)
	},
	func(e *discoveryv1.Endpoint) bool {
		return e.Hints != nil && len(e.Hints.ForNodes) > 1 && remove(&e.Hints.ForNodes, 1)
	},
	func(e *discoveryv1.Endpoint) bool { return zero(&e.NodeName) },
	func(e *discoveryv1.Endpoint) bool { return zero(&e.Conditions.Ready) },
	func(e *discoveryv1.Endpoint) bool { return zero(&e.Conditions.Serving) },
	func(e *discoveryv1.Endpoint) bool { return zero(&e.Conditions.Terminating) },
	func(e *discoveryv1.Endpoint) bool { return len(e.Addresses) > 1 && remove(&e.Addresses, 1) },
}

// zero sets what p points to to its zero value.
func zero[T comparable](p *T) bool {
	var none T
	old := *p
	*p = none
	return old != none
}

func clearList[T any](list *[]T) bool {
	had := len(*list) > 0
	*list = nil
	return had
}

func clearMap(m *map[string]string) bool {
	had := len(*m) > 0
	*m = nil
	return had
}

func removeKey(m map[string]string, key string) bool {
	_, had := m[key]
	delete(m, key)
	return had
}

func remove[T any](list *[]T, i int) bool {
	*list = slices.Delete(*list, i, i+1)
	return true
}
