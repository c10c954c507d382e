// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// other is an address of the node that its Node does not name.
var other = netip.MustParsePrefix("192.0.2.1/32")

const nodePorts = "type: NodePort, ports: [{name: web, port: 80, nodePort: 30080}]"

// nodePortCluster has a Service with NodePort 30080 and one backend, 11, and a
// node with a second address.
func nodePortCluster(t *testing.T) *cluster {
	c := newCluster(t)
	c.backend(11)
	c.manifests("web.yaml", service("web", 10, nodePorts), slice("web", endpoint(11, "")))
	if err := c.node.Namespace().AddAddr(sandbox.Bridge, other); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestNodePortsAreAtTheAddressesOfTheNodeObject(t *testing.T) {
	c := nodePortCluster(t)
	c.start()
	host := c.node.Namespace()
	t.Log("without a Node")
	c.answers("192.0.2.1:30080", 11)
	c.answers("10.244.0.1:30080", 11)
	c.answersTo(host, "127.0.0.1:30080", 11)

	named := func(when string) {
		t.Log(when)
		c.answers("10.244.0.1:30080", 11)
		c.answersTo(host, "10.244.0.1:30080", 11)
		c.answersTo(host, "127.0.0.1:30080", 11)
		c.fails(c.client, "192.0.2.1:30080", syscall.ECONNREFUSED)
		c.fails(c.client, "127.0.0.1:30080", syscall.ECONNREFUSED) // its own
	}
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	named("with a Node")

	if err := os.Remove(filepath.Join(c.dir, "node.yaml")); err != nil {
		t.Fatal(err)
	}
	c.manifests("more.yaml", service("more", 11, webPort), slice("more", endpoint(11, "")))
	c.answers(vip(11, 80), 11) // so the files have been read again
	named("where they were when the Node is gone")

	c.manifests("node.yaml", thisNode("a", "192.0.2.1"))
	c.answers("192.0.2.1:30080", 11)
	c.fails(c.client, "10.244.0.1:30080", syscall.ECONNREFUSED)
}

func TestNodePortsFollowTheAddressesOfTheNodesDevicesWithinASecond(t *testing.T) {
	c := nodePortCluster(t)
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	c.start("--nodeport-addresses=192.0.2.0/24")
	host := c.node.Namespace()
	c.answers("192.0.2.1:30080", 11)
	c.answersTo(host, "127.0.0.1:30080", 11)
	c.fails(c.client, "10.244.0.1:30080", syscall.ECONNREFUSED)

	late := netip.MustParsePrefix("192.0.2.7/32")
	for range 3 {
		changed := time.Now()
		if err := host.AddAddr(sandbox.Bridge, late); err != nil {
			t.Fatal(err)
		}
		within(t, changed, "a new address leads to NodePorts", func() bool {
			_, err := c.get("192.0.2.7:30080")
			return err == nil
		})
		changed = time.Now()
		if err := host.RemoveAddr(sandbox.Bridge, late); err != nil {
			t.Fatal(err)
		}
		// The node itself need not wait for an answer to know that nobody is there.
		within(t, changed, "an address that is gone does not", func() bool {
			_, err := get(host, "192.0.2.7:30080")
			return err != nil
		})
	}
	c.answers("192.0.2.1:30080", 11)
}

// within polls until done, and fails the test when that is more than a second
// after changed.
func within(t *testing.T, changed time.Time, what string, done func() bool) {
	t.Helper()
	testutil.Eventually(t, 10*time.Second, what, func() error {
		if !done() {
			return errNotYet
		}
		return nil
	})
	if took := time.Since(changed); took > time.Second {
		t.Errorf("%s after %v, want within a second", what, took)
	}
}
