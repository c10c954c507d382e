// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package agent tests the program `fairlead agent` as a whole, with Services
// from files and real traffic between namespaces: what must not break when it
// ends, and what it says when something is wrong.
package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// cluster is a node with a client, backends and a directory of manifests.
type cluster struct {
	t       *testing.T
	node    *sandbox.Node
	cgroup  *sandbox.Cgroup
	bpfRoot string
	dir     string
	client  *sandbox.Namespace
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	testutil.RequireRoot(t)
	c := &cluster{
		t: t, node: testutil.Node(t), cgroup: testutil.Cgroup(t),
		bpfRoot: testutil.BPFRoot(t), dir: t.TempDir(),
	}
	c.client = c.pod("client", 2)
	return c
}

// pod adds a pod with the address 10.244.0.last.
func (c *cluster) pod(name string, last int) *sandbox.Namespace {
	c.t.Helper()
	pod, err := c.node.AddPod(name, podAddr(last))
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

func podAddr(last int) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, 0, byte(last)}) }

// backend adds a pod that answers on TCP and UDP port 9000 with its name.
func (c *cluster) backend(last int) {
	c.t.Helper()
	name := "backend-" + strconv.Itoa(last)
	pod := c.pod(name, last)
	for _, serve := range []func(*sandbox.Namespace, string, string) (*sandbox.Server, error){sandbox.ServeHTTP, sandbox.ServeUDPEcho} {
		server, err := serve(pod, net.JoinHostPort(podAddr(last).String(), "9000"), name)
		if err != nil {
			c.t.Fatal(err)
		}
		c.t.Cleanup(func() { _ = server.Close() })
	}
}

// start starts an agent for the cluster.
func (c *cluster) start(args ...string) *testutil.Agent {
	c.t.Helper()
	return testutil.StartAgent(c.t, c.options(args...))
}

func (c *cluster) options(args ...string) testutil.AgentOptions {
	return testutil.AgentOptions{
		Netns: c.node.Namespace(), CgroupRoot: c.cgroup.Path(), BPFRoot: c.bpfRoot,
		Source: "file:" + c.dir, ExtraArgs: args,
	}
}

// service writes the manifest of a Service with the ClusterIP 10.96.0.vip, ports
// 80/TCP and 53/UDP, and the backends 10.244.0.x:9000.
func (c *cluster) service(name string, vip int, backends ...int) {
	c.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: test}
spec:
  clusterIP: 10.96.0.%[2]d
  ports: [{name: web, port: 80}, {name: dns, port: 53, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, namespace: test, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: web, port: 9000, protocol: TCP}, {name: dns, port: 9000, protocol: UDP}]
endpoints:
`, name, vip)
	if len(backends) == 0 {
		b.WriteString("  []\n")
	}
	for _, last := range backends {
		fmt.Fprintf(&b, "- addresses: [%v]\n", podAddr(last))
	}
	c.write(name+".yaml", b.String())
}

// write puts a file into the directory in one step.
func (c *cluster) write(name, text string) {
	c.t.Helper()
	aside := filepath.Join(c.dir, name+".new")
	if err := os.WriteFile(aside, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(aside, filepath.Join(c.dir, name)); err != nil {
		c.t.Fatal(err)
	}
}

func vip(last, port int) string { return fmt.Sprintf("10.96.0.%d:%d", last, port) }

// get makes one TCP connection from the client and returns who answered.
func (c *cluster) get(addr string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	conn, err := c.client.Dial(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	buf := make([]byte, 4096)
	var answer strings.Builder
	for {
		n, err := conn.Read(buf)
		answer.Write(buf[:n])
		if err != nil {
			break
		}
	}
	_, body, found := strings.Cut(answer.String(), "\r\n\r\n")
	if !found {
		return "", fmt.Errorf("no answer from %s: %q", addr, answer.String())
	}
	name, _, _ := strings.Cut(body, " ")
	return name, nil
}

// exchange sends one datagram on a connected socket and returns who answered.
func exchange(conn net.Conn) (string, error) {
	if err := conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte("?")); err != nil {
		return "", err
	}
	buf := make([]byte, 256)
	n, err := conn.Read(buf)
	if err != nil {
		return "", err
	}
	name, _, _ := strings.Cut(string(buf[:n]), " ")
	return name, nil
}

func (c *cluster) dialUDP(addr string) net.Conn {
	c.t.Helper()
	conn, err := c.client.Dial(context.Background(), "udp", addr)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// answers waits until addr is answered by just these backends.
func (c *cluster) answers(addr string, backends ...int) {
	c.t.Helper()
	want := map[string]bool{}
	for _, last := range backends {
		want["backend-"+strconv.Itoa(last)] = true
	}
	testutil.Eventually(c.t, 10*time.Second, fmt.Sprintf("%s answered by %v", addr, backends), func() error {
		got := map[string]bool{}
		for range 20 * len(backends) {
			name, err := c.get(addr)
			if err != nil {
				return err
			}
			got[name] = true
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("answered by %v, want %v", got, want)
		}
		return nil
	})
}

// fairlead runs the program in the node and returns what it printed.
func (c *cluster) fairlead(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, testutil.BuildBinary(c.t), args...).CombinedOutput()
	return string(out), err
}

// frontends returns what inspect says each VIP and port leads to.
func (c *cluster) frontends() map[string]int {
	c.t.Helper()
	out, err := c.fairlead("inspect", "frontends", "-o", "json", "--bpf-root", c.bpfRoot)
	if err != nil {
		c.t.Fatalf("inspect: %v: %s", err, out)
	}
	var rows []struct {
		VIP      string
		Port     int
		Protocol string
		Backends []struct{ Address string }
	}
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		c.t.Fatalf("inspect: %v in %s", err, out)
	}
	got := map[string]int{}
	for _, r := range rows {
		got[fmt.Sprintf("%s:%d/%s", r.VIP, r.Port, r.Protocol)] = len(r.Backends)
	}
	return got
}

// metric returns the sum of a metric over all labels.
func metric(t *testing.T, a *testutil.Agent, name string) float64 {
	t.Helper()
	page, err := a.Get(testutil.MetricsAddress, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	sum, found := 0.0, false
	for line := range strings.Lines(page) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		fields := strings.Fields(line)
		v, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			t.Fatalf("metric %s: %v", name, err)
		}
		sum, found = sum+v, true
	}
	if !found {
		t.Fatalf("/metrics has no %s", name)
	}
	return sum
}
