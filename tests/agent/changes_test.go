// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

var errNotYet = errors.New("not yet")

const webPort = "ports: [{name: web, port: 80}]"

func TestNewConnectionsFollowTheNodesZone(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	c.manifests("web.yaml", service("web", 10, webPort), slice("web",
		endpoint(11, "hints: {forZones: [{name: a}]}"), endpoint(12, "hints: {forZones: [{name: b}]}")))
	c.start()
	c.answers(vip(10, 80), 11, 12)
	for _, zone := range []struct {
		name     string
		backends []int
	}{{"a", []int{11}}, {"b", []int{12}}, {"c", []int{11, 12}}} {
		c.manifests("node.yaml", thisNode(zone.name, "10.244.0.1"))
		c.answers(vip(10, 80), zone.backends...)
	}
}

func TestNewConnectionsFollowTheTrafficPolicies(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	here, elsewhere := endpoint(11, "nodeName: node"), endpoint(12, "nodeName: other")
	policy := func(internal, external string, endpoints ...string) {
		spec := fmt.Sprintf("%s, internalTrafficPolicy: %s, externalTrafficPolicy: %s", nodePorts, internal, external)
		c.manifests("web.yaml", service("web", 10, spec), slice("web", endpoints...))
	}
	policy("Cluster", "Cluster", here, elsewhere)
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	agent := c.start()
	const nodePort = "10.244.0.1:30080"
	c.answers(vip(10, 80), 11, 12)
	c.answers(nodePort, 11, 12)

	policy("Local", "Local", here, elsewhere)
	c.answers(vip(10, 80), 11)
	c.answers(nodePort, 11, 12) // external Local is for clients outside

	policy("Local", "Local", elsewhere)
	c.fails(c.client, vip(10, 80), syscall.EHOSTUNREACH)
	c.answers(nodePort, 12)
	noLocal := func(want float64) {
		t.Helper()
		for _, traffic := range []string{"internal", "external"} {
			testutil.Eventually(t, 10*time.Second, "services without local endpoints, "+traffic, func() error {
				const name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
				if n := metric(t, agent, name, `ip_family="IPv4"`, `traffic_policy="`+traffic+`"`); n != want {
					return fmt.Errorf("%v, want %v", n, want)
				}
				return nil
			})
		}
	}
	noLocal(1)
	policy("Cluster", "Cluster", here, elsewhere)
	c.answers(vip(10, 80), 11, 12)
	noLocal(0)
}

const affinity = webPort + ", sessionAffinity: ClientIP"

// keeps returns the one backend that answers many connections.
func (c *cluster) keeps(addr string) string {
	c.t.Helper()
	first := ""
	for range 30 {
		name, err := c.get(addr)
		if err != nil {
			c.t.Fatal(err)
		}
		if first == "" {
			first = name
		}
		if name != first {
			c.t.Fatalf("%s is answered by %s and %s, want one backend", addr, first, name)
		}
	}
	return first
}

func TestAffinitySurvivesTheAgentAndIsOnAndOffAtOnce(t *testing.T) {
	c := newCluster(t)
	for last := range 4 {
		c.backend(11 + last)
	}
	web := func(spec string) {
		c.manifests("web.yaml", service("web", 10, spec),
			slice("web", endpoint(11, ""), endpoint(12, ""), endpoint(13, ""), endpoint(14, "")))
	}
	web(affinity)
	agent := c.start()
	first := c.keeps(vip(10, 80))
	if err := agent.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	if got := c.keeps(vip(10, 80)); got != first {
		t.Errorf("without an agent the client gets %s, where it had %s", got, first)
	}
	c.start()
	if got := c.keeps(vip(10, 80)); got != first {
		t.Errorf("with the next agent the client gets %s, where it had %s", got, first)
	}

	web(webPort)
	c.answers(vip(10, 80), 11, 12, 13, 14)
	if got := c.affinities(); len(got) != 0 {
		t.Errorf("without affinity there are entries: %v", got)
	}
	web(affinity)
	testutil.Eventually(t, 10*time.Second, "affinity is on again", func() error {
		if _, err := c.get(vip(10, 80)); err != nil {
			return err
		}
		if len(c.affinities()) != 1 {
			return errNotYet
		}
		return nil
	})
	c.keeps(vip(10, 80))
}

// affinityRow is a row of inspect affinity.
type affinityRow struct {
	Client, Service, PortName, Protocol, Family string
	Backend                                     struct {
		Address string
		Port    int
	}
	AgeSeconds *int
}

func (c *cluster) affinities() []affinityRow {
	c.t.Helper()
	out, err := c.fairlead("inspect", "affinity", "-o", "json", "--bpf-root", c.bpfRoot)
	if err != nil {
		c.t.Fatalf("inspect affinity: %v: %s", err, out)
	}
	var rows []affinityRow
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		c.t.Fatalf("inspect affinity: %v in %s", err, out)
	}
	return rows
}

// A client whose backend has gone and come back chooses anew. That may be the
// same one again, by chance, but not always.
func TestBackendThatComesBackHasLostItsClients(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	all := map[string]string{"backend-11": endpoint(11, ""), "backend-12": endpoint(12, "")}
	both := slice("web", all["backend-11"], all["backend-12"])
	c.manifests("web.yaml", service("web", 10, affinity), both)
	c.start()
	backends := func(want int) {
		testutil.Eventually(t, 10*time.Second, fmt.Sprintf("%d backends", want), func() error {
			if got := c.frontends()["10.96.0.10:80/TCP"]; got != want {
				return fmt.Errorf("%d", got)
			}
			return nil
		})
	}
	for range 16 {
		had := c.keeps(vip(10, 80))
		rest := "backend-11"
		if had == rest {
			rest = "backend-12"
		}
		c.manifests("web.yaml", service("web", 10, affinity), slice("web", all[rest]))
		backends(1)
		if got := c.affinities(); len(got) != 0 {
			t.Fatalf("clients of a backend that is gone are remembered: %+v", got)
		}
		c.manifests("web.yaml", service("web", 10, affinity), both)
		backends(2)
		if c.keeps(vip(10, 80)) != had {
			return
		}
	}
	t.Error("a backend that comes back always gets its client back")
}
