// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// NodePorts that the API server chose lead to the pods from wherever a client of
// this node may dial them, on both families.
func testNodePorts(t *testing.T, c *cluster) {
	s := c.scenario(t, "node-ports")
	service := s.expose(t, "web", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeNodePort
		spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
	})
	pods := []string{s.runPod(t, "a", nodeName), s.runPod(t, "b", distantName)}
	for _, addr := range nodePorts(service) {
		s.wantAnsweredBy(t, addr, pods...)
		s.process.wantAnsweredBy(t, addr, pods...)
		s.wantRefused(t, undefinedPort(addr))
	}
	for _, loopback := range []string{"127.0.0.1", "[::1]"} {
		addr := fmt.Sprintf("%s:%d", loopback, service.Spec.Ports[0].NodePort)
		s.process.wantAnsweredBy(t, addr, pods...)
		s.wantRefused(t, addr) // the pod's own
	}
}

// What a cloud's controller writes into the status, and an administrator into
// externalIPs, is reached without leaving the node, unless the mode is Proxy.
func testLoadBalancerIPs(t *testing.T, c *cluster) {
	s := c.scenario(t, "load-balancer-ips")
	const vip, proxied, external = "203.0.113.10", "203.0.113.11", "203.0.113.12"
	s.expose(t, "web", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeLoadBalancer
		spec.ExternalIPs = []string{external}
	})
	pod := s.runPod(t, "pod", nodeName)
	s.wantAnsweredBy(t, external+":80", pod)
	s.wantUntouched(t, external+":81") // ports are refused at ClusterIPs alone
	for _, mode := range []struct{ vip, proxied string }{{vip, proxied}, {proxied, vip}} {
		s.setIngress(t, "web",
			corev1.LoadBalancerIngress{IP: mode.vip, IPMode: new(corev1.LoadBalancerIPModeVIP)},
			corev1.LoadBalancerIngress{IP: mode.proxied, IPMode: new(corev1.LoadBalancerIPModeProxy)},
			corev1.LoadBalancerIngress{Hostname: "lb.example"})
		s.wantAnsweredBy(t, mode.vip+":80", pod)
		s.process.wantAnsweredBy(t, mode.vip+":80", pod)
		s.wantUntouched(t, mode.proxied+":80")
		s.process.wantUntouched(t, mode.proxied+":80")
	}
	s.setIngress(t, "web")
	s.wantUntouched(t, proxied+":80")
	s.updateService(t, "web", func(service *corev1.Service) { service.Spec.ExternalIPs = nil })
	s.wantUntouched(t, external+":80")
}

// A Service may become anything at any time. Nothing of what it was remains.
func testChangesOfType(t *testing.T, c *cluster) {
	s := c.scenario(t, "changes-of-type")
	s.expose(t, "web", nil)
	clusterIP := s.address(t, "web")
	pod := s.runPod(t, "pod", nodeName)
	s.wantAnsweredBy(t, clusterIP, pod)
	become := func(kind corev1.ServiceType) *corev1.Service {
		s.updateService(t, "web", func(service *corev1.Service) {
			service.Spec.Type = kind
			service.Spec.ExternalName, service.Spec.ClusterIP, service.Spec.ClusterIPs = "", hostOf(clusterIP), nil
			if kind == corev1.ServiceTypeExternalName {
				service.Spec.ExternalName, service.Spec.ClusterIP = "service.example", ""
			}
			if kind == corev1.ServiceTypeExternalName || kind == corev1.ServiceTypeClusterIP {
				service.Spec.Ports[0].NodePort = 0
			}
		})
		return s.service(t, "web")
	}
	// One port for all times it has one, so that what is left of it would be seen.
	nodePort := nodePorts(become(corev1.ServiceTypeNodePort))[0]
	for range 2 {
		s.wantAnsweredBy(t, clusterIP, pod)
		s.wantAnsweredBy(t, nodePort, pod)
		become(corev1.ServiceTypeExternalName)
		s.wantUnreachable(t, clusterIP)
		s.wantRefused(t, nodePort)
		become(corev1.ServiceTypeClusterIP)
		s.wantAnsweredBy(t, clusterIP, pod)
		s.wantRefused(t, nodePort)
		nodePort = nodePorts(become(corev1.ServiceTypeNodePort))[0]
	}
	s.wantAnsweredBy(t, nodePort, pod)
}

// An address in a ServiceCIDR that no Service has is nobody's, from the moment
// that the object is created until it is gone.
func testServiceCIDRs(t *testing.T, c *cluster) {
	s := c.scenario(t, "service-cidrs")
	// Low addresses: the API server takes those last when it chooses.
	for _, addr := range []string{"10.96.0.20:80", "[fd00:96::14]:80"} {
		s.wantUnreachable(t, addr)
		s.process.wantUnreachable(t, addr)
	}
	const unused4, unused6, used = "10.97.0.20:80", "[fd00:97::14]:80", "10.97.0.10:80"
	s.wantUntouched(t, unused4)
	cidrs := c.client.NetworkingV1().ServiceCIDRs()
	second := &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: "second"},
		Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.97.0.0/24", "fd00:97::/112"}},
	}
	if _, err := cidrs.Create(t.Context(), second, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.wantUnreachable(t, unused4)
	s.wantUnreachable(t, unused6)

	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{ClusterIP: hostOf(used), Selector: serverLabels, Ports: []corev1.ServicePort{serverPort}},
	}
	testutil.Eventually(t, settleTimeout, "the API server gives out addresses of the second range", func() error {
		return create(t.Context(), c.client, s.namespace, service)
	})
	s.wantAnsweredBy(t, used, s.runPod(t, "pod", nodeName))
	s.wantRefused(t, undefinedPort(used))
	s.deleteService(t, "web")
	s.wantUnreachable(t, used)

	if err := cidrs.Delete(t.Context(), "second", metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	for _, addr := range []string{used, unused4, unused6} {
		s.wantUntouched(t, addr)
	}
}

// hostOf returns the address of "address:port".
func hostOf(addr string) string { return netip.MustParseAddrPort(addr).Addr().String() }
