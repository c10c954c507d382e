// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// apiServer returns the slice of default/kubernetes with one API server.
func apiServer(address string) string {
	return `apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kubernetes, namespace: default, labels: {kubernetes.io/service-name: kubernetes}}
addressType: IPv4
ports: [{name: https, port: 6443}]
endpoints: [{addresses: [` + address + `]}]
`
}

// A Service asks for the API server, the kubelet, and an address of somebody else.
// What is sent there goes on to its real owner.
func TestNobodyTakesWhatIsReservedOrOutsideTheRanges(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	const node, allowed, outside = "10.244.0.1", "198.51.100.7", "10.244.0.12"
	for name, at := range map[string]string{"api-server": node + ":6443", "kubelet": node + ":10250"} {
		server, err := sandbox.ServeHTTP(c.node.Namespace(), at, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Close() })
	}
	victim, err := sandbox.ServeHTTP(c.pod("victim", 12), outside+":6443", "victim")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = victim.Close() })
	c.manifests("node.yaml", thisNode("a", node))
	c.manifests("kubernetes.yaml", apiServer(node))
	const ports = "ports: [{name: web, port: 6443}, {name: kubelet, port: 10250}]"
	c.manifests("thief.yaml",
		service("thief", 10, ports+", externalIPs: ["+node+", "+allowed+", "+outside+"]"),
		strings.ReplaceAll(slice("thief", endpoint(11, "")), "{name: dns, port: 9000, protocol: UDP}", "{name: kubelet, port: 9000}"))
	agent := c.start("--external-ip-cidrs=198.51.100.0/24,10.244.0.1/32")

	c.answers(vip(10, 6443), 11)
	c.answers(allowed+":6443", 11)
	c.answers(allowed+":10250", 11)
	for at, want := range map[string]string{node + ":6443": "api-server", node + ":10250": "kubelet", outside + ":6443": "victim"} {
		if got, err := c.get(at); got != want {
			t.Errorf("%s is answered by %q, %v; want %s", at, got, err, want)
		}
	}
	saysOnce(t, agent.Logs, "asks for what no Service gets")
	if n := metric(t, agent, "fairlead_frontends_refused"); n != 4 {
		t.Errorf("fairlead_frontends_refused is %v, want 4: the node's two, and the victim's", n)
	}
	const api = node + ":6443/TCP is reserved, an API server listens there"
	page := c.explain("test/thief")
	for _, want := range []string{"problem: " + api, "nobody: reserved, an API server listens there", "nobody: reserved, --reserved has it",
		"nobody: outside --external-ip-cidrs", "kernel            agrees"} {
		if !strings.Contains(page, want) {
			t.Errorf("explain does not say %q:\n%s", want, page)
		}
	}
	if page := c.explain(node + ":6443"); !strings.Contains(page, "Service test/thief asks, is reserved") {
		t.Errorf("explain %s:6443 says %q", node, page)
	}
	if out, err := c.fairlead("inspect", "services", "--bpf-root", c.bpfRoot); err != nil || !strings.Contains(out, api) {
		t.Errorf("inspect services: %v; want it to say %q:\n%s", err, api, out)
	}

	t.Log("the API server moves away: its address is anybody's again")
	c.manifests("kubernetes.yaml", apiServer("10.244.0.3"))
	c.answers(node+":6443", 11)
	t.Log("and comes back")
	c.manifests("kubernetes.yaml", apiServer(node))
	testutil.Eventually(t, 20*time.Second, "the API server is reached again", func() error {
		if got, err := c.get(node + ":6443"); got != "api-server" {
			return fmt.Errorf("answered by %q, %v", got, err)
		}
		return nil
	})
}
