// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// A Local policy keeps a client to the endpoints of its node where it applies, and
// only there: clients on this node reach a NodePort or a load-balancer IP of
// externalTrafficPolicy Local as if the policy were Cluster.
func testLocalPolicies(t *testing.T, c *cluster) {
	s := c.scenario(t, "local-policies")
	far := s.runPod(t, "far", distantName)
	const loadBalancerIP = "203.0.113.1"
	service := s.expose(t, "local", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeLoadBalancer
		spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	})
	s.setIngress(t, "local", corev1.LoadBalancerIngress{IP: loadBalancerIP})
	clusterIP := s.address(t, "local")
	external := []string{nodePorts(service)[0], loadBalancerIP + ":80"}
	wantExternal := func(pods ...string) {
		t.Helper()
		for _, addr := range external {
			s.wantAnsweredBy(t, addr, pods...)
			s.process.wantAnsweredBy(t, addr, pods...)
		}
	}

	wantExternal(far)
	s.wantUnreachable(t, clusterIP)
	s.process.wantUnreachable(t, clusterIP)

	near := s.runPod(t, "near", nodeName)
	wantExternal(near, far)
	s.wantAnsweredBy(t, clusterIP, near)

	s.setReady(t, near, false)
	wantExternal(far)
	s.wantUnreachable(t, clusterIP)

	s.updateService(t, "local", func(service *corev1.Service) {
		service.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyCluster)
	})
	s.wantAnsweredBy(t, clusterIP, far)

	s.setReady(t, far, false)
	for _, addr := range append(external, clusterIP) {
		s.wantRefused(t, addr)
	}
}

// A pod that is deleted and goes on serving keeps its connections. It gets new ones
// only where nobody else is ready: anywhere, or on this node under policy Local.
func testTerminatingPods(t *testing.T, c *cluster) {
	s := c.scenario(t, "terminating-pods")
	s.expose(t, "cluster", nil)
	s.expose(t, "local", func(spec *corev1.ServiceSpec) {
		spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
	})
	addr, local := s.address(t, "cluster"), s.address(t, "local")

	leaving := s.runPod(t, "leaving", nodeName)
	s.wantAnsweredBy(t, addr, leaving)
	connection := s.connect(t, addr)
	connection.wantAnsweredBy(t, leaving)
	staying := s.runPod(t, "staying", distantName)
	s.wantAnsweredBy(t, addr, leaving, staying)

	s.deletePod(t, leaving)
	s.wantAnsweredBy(t, addr, staying)
	s.wantAnsweredBy(t, local, leaving)
	connection.wantAnsweredBy(t, leaving)

	s.setReady(t, staying, false)
	s.wantAnsweredBy(t, addr, leaving)
	s.setReady(t, staying, true)
	s.wantAnsweredBy(t, addr, staying)
	s.deletePod(t, staying)
	s.wantAnsweredBy(t, addr, leaving, staying)

	// One that fails its probe serves no more, though it still answers.
	s.setReady(t, leaving, false)
	s.wantAnsweredBy(t, addr, staying)
	s.wantUnreachable(t, local)
	connection.wantAnsweredBy(t, leaving)
	s.setReady(t, staying, false)
	s.wantRefused(t, addr)
}

func testUnreadyPodsPublished(t *testing.T, c *cluster) {
	s := c.scenario(t, "unready-pods")
	s.expose(t, "web", nil)
	addr := s.address(t, "web")
	pods := []string{s.runPod(t, "a", nodeName), s.runPod(t, "b", distantName)}
	s.wantAnsweredBy(t, addr, pods...)
	s.setReady(t, pods[0], false)
	s.setReady(t, pods[1], false)
	s.wantRefused(t, addr)
	s.updateService(t, "web", func(service *corev1.Service) { service.Spec.PublishNotReadyAddresses = true })
	s.wantAnsweredBy(t, addr, pods...)
	s.updateService(t, "web", func(service *corev1.Service) { service.Spec.PublishNotReadyAddresses = false })
	s.wantRefused(t, addr)
}

// loadBalancerSourceRanges are for load-balancer IPs alone. A pod is known by its
// own address, a process of the node by the node's.
func testSourceRanges(t *testing.T, c *cluster) {
	s := c.scenario(t, "source-ranges")
	const loadBalancerIP = "203.0.113.2"
	pod, node := podAddrs(clientHost)[0].String()+"/32", nodeAddrs[0].String()+"/32"
	service := s.expose(t, "web", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeLoadBalancer
		spec.LoadBalancerSourceRanges = []string{pod}
	})
	s.setIngress(t, "web", corev1.LoadBalancerIngress{IP: loadBalancerIP})
	server := s.runPod(t, "server", nodeName)
	addr := loadBalancerIP + ":80"
	allow := func(ranges ...string) {
		s.updateService(t, "web", func(service *corev1.Service) { service.Spec.LoadBalancerSourceRanges = ranges })
	}

	s.wantAnsweredBy(t, addr, server)
	s.process.wantUnreachable(t, addr)
	allow(node)
	s.process.wantAnsweredBy(t, addr, server)
	s.wantUnreachable(t, addr)
	for _, open := range []string{nodePorts(service)[0], s.address(t, "web")} {
		s.wantAnsweredBy(t, open, server)
	}
	allow("198.51.100.0/24", "0.0.0.0/0")
	s.wantAnsweredBy(t, addr, server)
	allow("198.51.100.0/24")
	s.wantUnreachable(t, addr)
	s.process.wantUnreachable(t, addr)
	allow()
	s.wantAnsweredBy(t, addr, server)
	s.process.wantAnsweredBy(t, addr, server)
}
