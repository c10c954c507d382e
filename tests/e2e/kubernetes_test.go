// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// clusterTest is a part of TestKubernetes.
type clusterTest struct {
	name string
	run  func(*testing.T, *cluster)
}

// beside are tests that can run beside each other: each has its own namespace, and
// none stops what others need.
var beside = []clusterTest{
	{"simpleservice follows its replication controller", testSimpleService},
	{"simpleservice loses and regains its pods", testLostPods},
	{"simpleservice becomes ExternalName and comes back", testExternalName},
	{"simpleservice is deleted and created again", testRecreation},
	{"simple-server has two services for the same pods", testTwoServices},
	{"webapp rolls out without losing a request", testRollout},
	{"webapp is deleted with its pods and created again", testDeployAgain},
	{"dual-stack service is reached at both of its addresses", testDualStack},
	{"API server is reached through its own service", testAPIServerService},
	{"agent has the rights it needs and no more", testRights},
	{"DaemonSet of the manifests is accepted", testManifestAccepted},
	{"agent says that it starts", testEvents},
	{"Local policies keep clients to this node's pods", testLocalPolicies},
	{"trafficDistribution keeps traffic near", testTrafficDistribution},
	{"terminating pods are the last resort", testTerminatingPods},
	{"unready pods are reached where they are published", testUnreadyPodsPublished},
	{"session affinity lasts until its timeout", testSessionAffinity},
	{"source ranges keep clients from load-balancer IPs", testSourceRanges},
	{"NodePorts are reached at the node's addresses", testNodePorts},
	{"load-balancer and external IPs are reached from inside", testLoadBalancerIPs},
	{"Services change their types", testChangesOfType},
	{"ServiceCIDRs hold addresses that are nobody's", testServiceCIDRs},
	{"health check node port counts local endpoints", testHealthCheckPort},
	{"health check node port that is taken is reported", testHealthCheckPortTaken},
}

// alone are tests that change or count what all share: our Node, the agent and its
// metrics, the API server, NodePort 30000.
var alone = []clusterTest{
	{"how long changes take is measured", testProgrammingLatency},
	{"simple-server scales without losing a request", testScaleUnderLoad},
	{"traffic goes on while the API server is away", testAPIServerRestart},
	{"agent killed and started again writes nothing", testAgentRestart},
	{"load balancers leave a node that goes away", testNodeLeaves},
	{"simple-server is reached from outside by its NodePort", testOutsideNodePort},
	{"policy Local keeps clients outside to this node's pods", testOutsideLocal},
}

// TestKubernetes runs all that needs an API server, on one cluster.
func TestKubernetes(t *testing.T) {
	c := startCluster(t)
	t.Run("beside", func(t *testing.T) {
		for _, test := range beside {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				test.run(t, c)
			})
		}
	})
	for _, test := range alone {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

func testSimpleService(t *testing.T, c *cluster) {
	s := c.scenario(t, "simpleservice")
	s.apply(t, example("simpleservice.yaml"))
	addr := s.address(t, "simpleservice")
	for _, replicas := range []int{1, 2, 3, 1, 0, 2} {
		s.scale(t, "replicationcontrollers", "rcsise", replicas)
		pods := s.wantPods(t, "app=sise", replicas)
		if replicas == 0 {
			s.wantRefused(t, addr)
		} else {
			s.wantAnsweredBy(t, addr, pods...)
		}
	}
	s.wantRefused(t, undefinedPort(addr))
}

func testLostPods(t *testing.T, c *cluster) {
	s := c.scenario(t, "lost-pods")
	s.apply(t, example("simpleservice.yaml"))
	s.scale(t, "replicationcontrollers", "rcsise", 2)
	addr := s.address(t, "simpleservice")
	pods := s.wantPods(t, "app=sise", 2)
	s.wantAnsweredBy(t, addr, pods...)

	s.setReady(t, pods[0], false)
	s.wantAnsweredBy(t, addr, pods[1])
	s.setReady(t, pods[1], false)
	s.wantRefused(t, addr)
	s.setReady(t, pods[0], true)
	s.wantAnsweredBy(t, addr, pods[0])
	s.setReady(t, pods[1], true)
	s.wantAnsweredBy(t, addr, pods...)

	s.crash(t, pods[0])
	pods = s.wantReplacement(t, "app=sise", pods, pods[0])
	s.wantAnsweredBy(t, addr, pods...)

	s.deletePod(t, pods[1])
	pods = s.wantReplacement(t, "app=sise", pods, pods[1])
	s.wantAnsweredBy(t, addr, pods...)
}

func testExternalName(t *testing.T, c *cluster) {
	s := c.scenario(t, "external-name")
	s.apply(t, example("simpleservice.yaml"))
	addr := s.address(t, "simpleservice")
	pods := s.wantPods(t, "app=sise", 1)
	s.wantAnsweredBy(t, addr, pods...)

	s.updateService(t, "simpleservice", func(service *corev1.Service) {
		service.Spec.Type = corev1.ServiceTypeExternalName
		service.Spec.ExternalName = "service.example"
		service.Spec.ClusterIP, service.Spec.ClusterIPs = "", nil
	})
	s.wantUnreachable(t, addr)

	// The same address again, so that what it once led to cannot be mistaken
	// for what it leads to now.
	s.updateService(t, "simpleservice", func(service *corev1.Service) {
		service.Spec.Type = corev1.ServiceTypeClusterIP
		service.Spec.ExternalName = ""
		service.Spec.ClusterIP = hostOf(addr)
	})
	s.wantAnsweredBy(t, addr, pods...)
	s.wantRefused(t, undefinedPort(addr))
}

func testRecreation(t *testing.T, c *cluster) {
	s := c.scenario(t, "recreation")
	s.apply(t, example("simpleservice.yaml"))
	old := s.service(t, "simpleservice")
	addr := s.address(t, "simpleservice")
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=sise", 1)...)

	s.deleteService(t, "simpleservice")
	s.wantUnreachable(t, addr)

	// Another Service takes the address, as can happen at any time.
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "successor"},
		Spec:       corev1.ServiceSpec{ClusterIP: old.Spec.ClusterIP, Selector: map[string]string{"app": "other"}, Ports: old.Spec.Ports},
	}
	s.create(t, service)
	s.wantRefused(t, addr)
	s.deleteService(t, "successor")
	s.wantUnreachable(t, addr)

	service = &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: old.Name},
		Spec:       corev1.ServiceSpec{ClusterIP: old.Spec.ClusterIP, Selector: old.Spec.Selector, Ports: old.Spec.Ports},
	}
	s.create(t, service)
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=sise", 1)...)
}

func testTwoServices(t *testing.T, c *cluster) {
	s := c.scenario(t, "two-services")
	s.apply(t, example("simple-server.yaml"))
	plain, nodePort := s.address(t, "simple-server"), s.address(t, "simple-server-nodeport")
	pods := s.wantPods(t, "app=simple-server", 3)
	s.wantAnsweredBy(t, plain, pods...)
	s.wantAnsweredBy(t, nodePort, pods...)

	s.setReady(t, pods[2], false)
	s.wantAnsweredBy(t, plain, pods[:2]...)
	s.wantAnsweredBy(t, nodePort, pods[:2]...)

	s.deleteService(t, "simple-server")
	s.wantUnreachable(t, plain)
	s.wantAnsweredBy(t, nodePort, pods[:2]...)
}

func testScaleUnderLoad(t *testing.T, c *cluster) {
	s := c.scenario(t, "scale")
	s.apply(t, example("simple-server.yaml"))
	addr := s.address(t, "simple-server")
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=simple-server", 3)...)

	load := s.startLoad(addr)
	for _, replicas := range []int{5, 2, 4, 1} {
		s.scale(t, "replicasets", "simple-server", replicas)
		s.wantAnsweredBy(t, addr, s.wantPods(t, "app=simple-server", replicas)...)
	}
	// Pods that were taken away served a little longer: outlive them.
	s.wantObjects(t, "app=simple-server", 1)
	load.wantMore(t, 100)
	load.finish(t)
}

func testRollout(t *testing.T, c *cluster) {
	s := c.scenario(t, "rollout")
	s.apply(t, example("webapp.yaml"))
	addr := s.address(t, "webapp")
	old := s.wantPods(t, "app=webapp", 2)
	s.wantAnsweredBy(t, addr, old...)

	load := s.startLoad(addr)
	s.patch(t, "deployments", "webapp",
		`{"spec":{"template":{"spec":{"containers":[{"name":"webapp","image":"kubeguide/tomcat-app:v2"}]}}}}`)
	testutil.Eventually(t, settleTimeout, "the old pods are gone", func() error {
		for _, pod := range s.wantPods(t, "app=webapp", 2) {
			if slices.Contains(old, pod) {
				return fmt.Errorf("pod %s is still there", pod)
			}
		}
		return nil
	})
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=webapp", 2)...)
	s.wantObjects(t, "app=webapp", 2)
	load.wantMore(t, 100)
	load.finish(t)
}

func testDeployAgain(t *testing.T, c *cluster) {
	s := c.scenario(t, "deploy-again")
	s.apply(t, example("webapp.yaml"))
	addr := s.address(t, "webapp")
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=webapp", 2)...)

	background := metav1.DeletePropagationBackground
	err := s.client.AppsV1().Deployments(s.namespace).Delete(t.Context(), "webapp",
		metav1.DeleteOptions{PropagationPolicy: &background})
	if err != nil {
		t.Fatal(err)
	}
	s.wantRefused(t, addr)

	for _, object := range readManifest(t, example("webapp.yaml")) {
		if deployment, ok := object.(*appsv1.Deployment); ok {
			s.create(t, deployment)
		}
	}
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=webapp", 2)...)
}

func testDualStack(t *testing.T, c *cluster) {
	s := c.scenario(t, "dual-stack")
	s.apply(t, example("simpleservice.yaml"))
	s.scale(t, "replicationcontrollers", "rcsise", 2)
	requireDualStack := corev1.IPFamilyPolicyRequireDualStack
	s.updateService(t, "simpleservice", func(service *corev1.Service) {
		service.Spec.IPFamilyPolicy = &requireDualStack
	})
	addrs := s.addresses(t, "simpleservice")
	if len(addrs) != 2 {
		t.Fatalf("the service has the addresses %v, want two", addrs)
	}
	pods := s.wantPods(t, "app=sise", 2)
	for _, addr := range addrs {
		s.wantAnsweredBy(t, addr, pods...)
		s.wantRefused(t, undefinedPort(addr))
	}
	s.setReady(t, pods[0], false)
	for _, addr := range addrs {
		s.wantAnsweredBy(t, addr, pods[1])
	}
	s.setReady(t, pods[1], false)
	for _, addr := range addrs {
		s.wantRefused(t, addr)
	}
}

// The API server is a process of the node, not a pod, and what it answers can
// be checked by its certificate.
func testAPIServerService(t *testing.T, c *cluster) {
	s := &scenario{cluster: c, namespace: metav1.NamespaceDefault}
	url := "https://" + s.address(t, "kubernetes") + "/readyz"
	config := c.control.Config()
	certificate, err := tls.X509KeyPair(config.CertData, config.KeyData)
	if err != nil {
		t.Fatal(err)
	}
	authority := x509.NewCertPool()
	authority.AppendCertsFromPEM(config.CAData)
	client := http.Client{
		Transport: &http.Transport{
			DialContext:       c.dial,
			TLSClientConfig:   &tls.Config{RootCAs: authority, Certificates: []tls.Certificate{certificate}},
			DisableKeepAlives: true,
		},
		Timeout: 5 * time.Second,
	}
	testutil.Eventually(t, settleTimeout, "the API server answers at its ClusterIP", func() error {
		resp, err := client.Get(url)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok" {
			return fmt.Errorf("%s answers %s %q, %w", url, resp.Status, body, err)
		}
		return nil
	})
}

func testAPIServerRestart(t *testing.T, c *cluster) {
	s := c.scenario(t, "api-server-restart")
	s.apply(t, example("simpleservice.yaml"))
	addr := s.address(t, "simpleservice")
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=sise", 1)...)

	load := s.startLoad(addr)
	for _, end := range []func() error{c.control.StopAPIServer, c.control.KillAPIServer} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		load.wantMore(t, 200)
		if err := c.control.StartAPIServer(); err != nil {
			t.Fatal(err)
		}
		load.wantMore(t, 200)
	}
	// What changes afterwards arrives as before.
	s.scale(t, "replicationcontrollers", "rcsise", 3)
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=sise", 3)...)
	load.finish(t)
}
