// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// The port that the API server allocates for a Service tells load balancers how
// many endpoints the node has.
func testHealthCheckPort(t *testing.T, c *cluster) {
	s := c.scenario(t, "health-check-port")
	service := s.expose(t, "web", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeLoadBalancer
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	})
	if service.Spec.HealthCheckNodePort == 0 {
		t.Fatal("the API server has allocated no health check node port")
	}
	s.runPod(t, "far", distantName)
	s.wantLocalEndpoints(t, "web", 0)
	near := s.runPod(t, "near", nodeName)
	s.wantLocalEndpoints(t, "web", 1)
	s.runPod(t, "near-too", nodeName)
	s.wantLocalEndpoints(t, "web", 2)
	// It is serving still, but load balancers should look for somebody else.
	s.deletePod(t, near)
	s.wantLocalEndpoints(t, "web", 1)

	// The number is given back, so nobody may answer there any more.
	addr := healthCheckAddr(service)
	s.updateService(t, "web", func(service *corev1.Service) {
		service.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
		service.Spec.HealthCheckNodePort = 0
	})
	s.wantRefused(t, addr)
}

// While somebody else has the port people are told, and when it is free it is
// opened.
func testHealthCheckPortTaken(t *testing.T, c *cluster) {
	s := c.scenario(t, "health-check-port-taken")
	const port = 30080
	other, err := c.node.Namespace().Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Close() }) // it is closed already when all went well
	s.expose(t, "web", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeLoadBalancer
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		spec.HealthCheckNodePort = port
	})
	c.wantEvent(t, s.namespace, "Service", "web", "FailedToStartServiceHealthcheck", corev1.EventTypeWarning)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	s.runPod(t, "pod", nodeName)
	s.wantLocalEndpoints(t, "web", 1)
}

// wantLocalEndpoints fails the test unless the health check node port of a Service
// comes to report n endpoints.
func (s *scenario) wantLocalEndpoints(t *testing.T, name string, n int) {
	t.Helper()
	want := http.StatusOK
	if n == 0 {
		want = http.StatusServiceUnavailable
	}
	url := "http://" + healthCheckAddr(s.service(t, name))
	testutil.Eventually(t, settleTimeout, fmt.Sprintf("%s has %d local endpoints", name, n), func() error {
		status, text, err := s.page(url)
		if err != nil {
			return err
		}
		var body struct {
			Service        struct{ Namespace, Name string }
			LocalEndpoints int
		}
		if err := json.Unmarshal([]byte(text), &body); err != nil {
			return fmt.Errorf("%q: %w", text, err)
		}
		if status != want || body.LocalEndpoints != n || body.Service.Namespace != s.namespace || body.Service.Name != name {
			return fmt.Errorf("%s answers %d %s", url, status, text)
		}
		return nil
	})
}

func healthCheckAddr(service *corev1.Service) string {
	return fmt.Sprintf("%s:%d", nodeAddrs[0], service.Spec.HealthCheckNodePort)
}

// page returns the status and the text of a page.
func (d *dialer) page(url string) (status int, text string, err error) {
	response, err := d.http.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

func testEvents(t *testing.T, c *cluster) {
	c.wantEvent(t, metav1.NamespaceDefault, "Node", nodeName, "Starting", corev1.EventTypeNormal)
}

// wantEvent fails the test unless the agent comes to record an Event about an
// object.
func (c *cluster) wantEvent(t *testing.T, namespace, kind, name, reason, eventType string) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, "event "+reason, func() error {
		events, err := c.client.EventsV1().Events(namespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.Regarding.Kind == kind && e.Regarding.Name == name && e.Reason == reason && e.Type == eventType &&
				e.ReportingController == "fairlead" {
				return nil
			}
		}
		return fmt.Errorf("%s %s has %d others in its namespace", kind, name, len(events.Items))
	})
}

// Load balancers leave a node that is about to go, or that the API server does not
// know. Whoever is there still goes on being served, by a new agent, too.
func testNodeLeaves(t *testing.T, c *cluster) {
	s := c.scenario(t, "node-leaves")
	service := s.expose(t, "web", func(spec *corev1.ServiceSpec) { spec.Type = corev1.ServiceTypeNodePort })
	addr, nodePort := s.address(t, "web"), nodePorts(service)[0]
	// The controller takes Pods of a Node that is gone out of their slices.
	pod := s.runPod(t, "pod", distantName)
	s.wantAnsweredBy(t, addr, pod)
	s.wantAnsweredBy(t, nodePort, pod)
	s.wantHealth(t, http.StatusOK)

	taint := corev1.Taint{Key: "ToBeDeletedByClusterAutoscaler", Value: "1", Effect: corev1.TaintEffectNoSchedule}
	c.updateNode(t, func(node *corev1.Node) { node.Spec.Taints = append(node.Spec.Taints, taint) })
	s.wantHealth(t, http.StatusServiceUnavailable)
	s.wantAnsweredBy(t, nodePort, pod)
	c.updateNode(t, func(node *corev1.Node) {
		node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taint.Key })
	})
	s.wantHealth(t, http.StatusOK)

	c.updateNode(t, func(node *corev1.Node) { node.Finalizers = []string{"fairlead.test/stay"} })
	if err := c.client.CoreV1().Nodes().Delete(t.Context(), nodeName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.wantHealth(t, http.StatusServiceUnavailable)
	s.wantAnsweredBy(t, nodePort, pod)

	c.updateNode(t, func(node *corev1.Node) { node.Finalizers = nil })
	c.wantLogged(t, "no Node of this name")
	s.wantAnsweredBy(t, nodePort, pod)
	s.restartWithoutNode(t)
	s.wantAnsweredBy(t, nodePort, pod)
	s.wantAnsweredBy(t, addr, pod)
	if err := registerNode(t.Context(), c.client, nodeName, zoneName); err != nil {
		t.Fatal(err)
	}
	s.wantHealth(t, http.StatusOK)
	s.wantAnsweredBy(t, nodePort, pod)
	s.wantAnsweredBy(t, addr, pod)
}

// restartWithoutNode starts a new agent while there is no Node of its name.
func (c *cluster) restartWithoutNode(t *testing.T) {
	t.Helper()
	if err := c.agent.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.agent.Wait(); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	c.agent = testutil.StartAgent(c.suite, c.options)
	c.wantLogged(t, "synced")
	c.wantHealth(t, http.StatusServiceUnavailable)
}

// wantLogged waits until the agent has logged a text.
func (c *cluster) wantLogged(t *testing.T, text string) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, "the agent logs "+text, func() error {
		if !strings.Contains(c.agent.Logs(), text) {
			return errors.New("it has not yet")
		}
		return nil
	})
}

// wantHealth fails the test unless /healthz comes to answer with a status, while
// /livez is well.
func (c *cluster) wantHealth(t *testing.T, status int) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, fmt.Sprintf("/healthz says %d", status), func() error {
		got, text, err := c.process.page("http://" + testutil.HealthzAddress + "/healthz")
		if err == nil && got != status {
			err = fmt.Errorf("it says %d %s", got, text)
		}
		return err
	})
	if got, text, err := c.process.page("http://" + testutil.HealthzAddress + "/livez"); err != nil || got != http.StatusOK {
		t.Errorf("/livez says %d %s, %v; want 200", got, text, err)
	}
}

// How long a change of endpoints took is measured from when it happened, which the
// controller writes into the slice.
func testProgrammingLatency(t *testing.T, c *cluster) {
	s := c.scenario(t, "programming-latency")
	s.expose(t, "web", nil)
	addr, pod := s.address(t, "web"), s.runPod(t, "pod", nodeName)
	s.wantAnsweredBy(t, addr, pod)

	const name, family = "kubeproxy_network_programming_duration_seconds", `ip_family="IPv4"`
	count := func() float64 { return c.metric(t, name+"_count", family) }
	before := count()
	// The API counts in seconds: what happens in the same one is no news to the
	// controller.
	last := time.Now().Unix()
	testutil.Eventually(t, settleTimeout, "another second", func() error {
		if time.Now().Unix() == last {
			return errors.New("it is the same still")
		}
		return nil
	})
	s.setReady(t, pod, false)
	s.wantRefused(t, addr)
	testutil.Eventually(t, settleTimeout, "the change was measured", func() error {
		if count() <= before {
			return fmt.Errorf("the count is %v as before", before)
		}
		return nil
	})
	// A time that was read wrongly, or the age of a slice, would be out of bounds.
	if fast, all := c.metric(t, name+"_bucket", family+`,le="60"`), count(); fast != all {
		t.Errorf("%v of %v changes took less than a minute", fast, all)
	}
}

// metric returns the sum of the agent's samples of a name whose labels have the
// given text in them.
func (c *cluster) metric(t *testing.T, name, labels string) float64 {
	t.Helper()
	text, err := c.agent.Get(testutil.MetricsAddress, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	var sum float64
	found := false
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || !strings.ContainsAny(rest[:1], "{ ") || !strings.Contains(rest, labels) {
			continue
		}
		fields := strings.Fields(rest)
		value, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			t.Fatalf("metric %q: %v", line, err)
		}
		sum += value
		found = true
	}
	if !found {
		t.Fatalf("there is no metric %s with %s", name, labels)
	}
	return sum
}
