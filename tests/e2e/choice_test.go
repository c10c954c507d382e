// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// The controller turns trafficDistribution into hints. The agent follows them as
// long as they have something for its node, or for the zone its Node is in now.
func testTrafficDistribution(t *testing.T, c *cluster) {
	s := c.scenario(t, "traffic-distribution")
	distributions := map[string]string{
		"close": corev1.ServiceTrafficDistributionPreferClose,
		"zone":  corev1.ServiceTrafficDistributionPreferSameZone,
		"node":  corev1.ServiceTrafficDistributionPreferSameNode,
	}
	addrs := map[string]string{}
	for name, distribution := range distributions {
		s.expose(t, name, func(spec *corev1.ServiceSpec) { spec.TrafficDistribution = new(distribution) })
		addrs[name] = s.address(t, name)
	}
	s.expose(t, "none", nil)
	none := s.address(t, "none")
	wantAll := func(pods ...string) {
		t.Helper()
		for _, addr := range addrs {
			s.wantAnsweredBy(t, addr, pods...)
		}
	}
	own, neighbour := s.runPod(t, "own", nodeName), s.runPod(t, "neighbour", neighbourName)
	distant := s.runPod(t, "distant", distantName)

	s.wantAnsweredBy(t, none, own, neighbour, distant)
	s.wantAnsweredBy(t, addrs["close"], own, neighbour)
	s.wantAnsweredBy(t, addrs["zone"], own, neighbour)
	s.wantAnsweredBy(t, addrs["node"], own)
	s.wantExplained(t, "zone", zoneName, map[string]string{
		nodeName: "", neighbourName: "", distantName: "its hints are for other zones (" + distantZone + ")",
	})
	s.wantExplained(t, "node", zoneName, map[string]string{
		nodeName: "", neighbourName: "its hints are for other nodes (" + neighbourName + ")",
		distantName: "its hints are for other nodes (" + distantName + ")",
	})

	s.setReady(t, own, false)
	wantAll(neighbour)
	connection := s.connect(t, addrs["zone"])
	t.Cleanup(func() { s.moveTo(t, zoneName) })
	s.moveTo(t, distantZone)
	wantAll(distant)
	connection.wantAnsweredBy(t, neighbour)
	s.wantExplained(t, "zone", distantZone, map[string]string{
		nodeName: "not ready", neighbourName: "its hints are for other zones (" + zoneName + ")", distantName: "",
	})
	s.setReady(t, distant, false)
	wantAll(neighbour)
	s.wantExplained(t, "zone", distantZone, map[string]string{
		nodeName: "not ready", neighbourName: "", distantName: "not ready",
	})
	s.setReady(t, distant, true)
	wantAll(distant)
	s.moveTo(t, "")
	wantAll(neighbour, distant)
}

// moveTo changes the zone of our Node, to none when it is empty.
func (c *cluster) moveTo(t *testing.T, zone string) {
	t.Helper()
	c.updateNode(t, func(node *corev1.Node) {
		node.Labels = nil
		if zone != "" {
			node.Labels = map[string]string{corev1.LabelTopologyZone: zone}
		}
	})
}

// wantExplained asks fairlead explain about the only port of a Service and checks
// the zone and, for each Node, why clients of the ClusterIP do not get the endpoint
// that is on it; empty for one that they get.
func (s *scenario) wantExplained(t *testing.T, service, zone string, reasons map[string]string) {
	t.Helper()
	e := s.explain(t, service)
	if e.Node != nodeName || e.Zone != zone || len(e.Ports) != 1 {
		t.Errorf("explain %s: node %q, zone %q, %d ports; want %s, %s, 1", service, e.Node, e.Zone, len(e.Ports), nodeName, zone)
		return
	}
	port := e.Ports[0]
	if port.Kernel == nil || len(port.Kernel) > 0 {
		t.Errorf("explain %s: the kernel differs: %q", service, port.Kernel)
	}
	got := map[string]string{}
	for _, endpoint := range port.Endpoints {
		got[endpoint.Node] = endpoint.Out[lb.SideClusterIP.String()]
	}
	if fmt.Sprint(got) != fmt.Sprint(reasons) {
		t.Errorf("explain %s: endpoints of these nodes are out because %q, want %q", service, got, reasons)
	}
}

// explain returns what fairlead explain says about a Service.
func (s *scenario) explain(t *testing.T, service string, flags ...string) lb.Explanation {
	t.Helper()
	args := append([]string{"explain", s.namespace + "/" + service, "--bpf-root=" + s.options.BPFRoot, "--output=json"}, flags...)
	out, err := s.node.Namespace().Command(t.Context(), testutil.BuildBinary(t), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("fairlead explain %s/%s: %v\n%s", s.namespace, service, err, out)
	}
	var e lb.Explanation
	if err := json.Unmarshal(out, &e); err != nil {
		t.Fatalf("fairlead explain %s/%s: %v\n%s", s.namespace, service, err, out)
	}
	return e
}

// A client keeps its pod, whichever way it dials the Service, until the time is
// over, the pod is gone, or the Service wants it no more.
func testSessionAffinity(t *testing.T, c *cluster) {
	s := c.scenario(t, "session-affinity")
	service := s.expose(t, "web", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeNodePort
		spec.SessionAffinity = corev1.ServiceAffinityClientIP
	})
	var pods []string
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		pods = append(pods, s.runPod(t, name, nodeName))
	}
	clusterIP, nodePort := s.address(t, "web"), nodePorts(service)[0]

	// Which one it keeps is settled once all five are known.
	testutil.Eventually(t, settleTimeout, "five endpoints", func() error {
		if n := len(s.explain(t, "web").Ports[0].Endpoints); n != len(pods) {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	kept, err := s.get(clusterIP)
	if err != nil {
		t.Fatal(err)
	}
	s.wantAnsweredBy(t, clusterIP, kept)
	s.wantAnsweredBy(t, nodePort, kept)

	s.setReady(t, kept, false)
	var next string
	testutil.Eventually(t, settleTimeout, "another pod answers", func() error {
		if next, err = s.get(clusterIP); err == nil && next == kept {
			err = fmt.Errorf("%s still does", kept)
		}
		return err
	})
	s.setReady(t, kept, true)
	s.wantAnsweredBy(t, nodePort, next)

	const timeout = 2 * time.Second
	s.updateService(t, "web", func(service *corev1.Service) {
		service.Spec.SessionAffinityConfig.ClientIP.TimeoutSeconds = new(int32(timeout / time.Second))
	})
	testutil.Eventually(t, settleTimeout, "another pod answers after a pause", func() error {
		s.waitIdle(t, "web", timeout)
		pod, err := s.get(clusterIP)
		if err == nil && pod == next {
			err = fmt.Errorf("%s still does", pod)
		}
		return err
	})

	s.updateService(t, "web", func(service *corev1.Service) {
		service.Spec.SessionAffinity, service.Spec.SessionAffinityConfig = corev1.ServiceAffinityNone, nil
	})
	s.wantAnsweredBy(t, clusterIP, pods...)
}

// waitIdle waits until the client pod has made no connection to a Service for
// longer than the given time, as far as its affinity knows.
func (s *scenario) waitIdle(t *testing.T, service string, idle time.Duration) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, "the client's entry is old", func() error {
		for _, entry := range s.explain(t, service, "--client="+podAddrs(clientHost)[0].String()).Ports[0].Affinity {
			if age := time.Duration(entry.AgeSeconds) * time.Second; age <= idle {
				return fmt.Errorf("it is %v old", age)
			}
		}
		return nil
	})
}
