// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package agent tests the program `fairlead agent` as a whole, with Services
// from files and real traffic between namespaces: what must not break when it
// ends, and what it says when something is wrong.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	program "github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/datapath"
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

// newCluster returns a cluster whose agent serves this process. The test must not
// be parallel.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	return clusterIn(t, testutil.Cgroup(t))
}

// newQuietCluster returns a cluster whose agent serves nobody: what this process
// connects to, it connects to. The test may be parallel.
func newQuietCluster(t *testing.T) *cluster {
	t.Helper()
	testutil.RequireRoot(t)
	cgroup, err := sandbox.NewCgroup("fairlead-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cgroup.Close(); err != nil {
			t.Error(err)
		}
	})
	return clusterIn(t, cgroup)
}

func clusterIn(t *testing.T, cgroup *sandbox.Cgroup) *cluster {
	t.Helper()
	c := &cluster{
		t: t, node: testutil.Node(t), cgroup: cgroup,
		bpfRoot: testutil.BPFRoot(t), dir: t.TempDir(),
	}
	// An agent that is killed leaves its socket.
	socket := program.SocketPath(c.bpfRoot)
	t.Cleanup(func() { _ = os.Remove(socket) })
	// The node says at once that nobody has an address, however often.
	err := c.node.Namespace().Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/icmp_ratelimit", []byte("0"), 0)
	})
	if err != nil {
		t.Fatal(err)
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

// service returns the manifest of a Service in namespace test with the ClusterIP
// 10.96.0.vip and what else its spec says, in YAML's flow style.
func service(name string, vip int, spec string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: test}
spec: {clusterIP: 10.96.0.%d, %s}
`, name, vip, spec)
}

// loadBalancer returns the manifest of a Service with a load-balancer IP.
func loadBalancer(name string, vip int, spec, ip string) string {
	return service(name, vip, "type: LoadBalancer, "+spec) + "status: {loadBalancer: {ingress: [{ip: " + ip + "}]}}\n"
}

// slice returns the manifest of an EndpointSlice with the ports 9000 of both
// protocols, called web and dns.
func slice(service string, endpoints ...string) string {
	return fmt.Sprintf(`apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, namespace: test, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: web, port: 9000}, {name: dns, port: 9000, protocol: UDP}]
endpoints: [%[2]s]
`, service, strings.Join(endpoints, ", "))
}

// endpoint returns one of slice's, with more of its fields.
func endpoint(last int, more string) string {
	if more != "" {
		more = ", " + more
	}
	return fmt.Sprintf("{addresses: [%v]%s}", podAddr(last), more)
}

// thisNode returns the manifest of the Node the agent runs on.
func thisNode(zone string, addresses ...string) string {
	for i, a := range addresses {
		addresses[i] = "{type: InternalIP, address: " + a + "}"
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Node
metadata: {name: node, labels: {topology.kubernetes.io/zone: %s}}
status: {addresses: [%s]}
`, zone, strings.Join(addresses, ", "))
}

// manifests puts several objects into one file.
func (c *cluster) manifests(name string, objects ...string) {
	c.t.Helper()
	c.write(name, strings.Join(objects, "---\n"))
}

// write puts a file into the directory in one step.
func (c *cluster) write(name, text string) {
	c.t.Helper()
	testutil.WriteFile(c.t, filepath.Join(c.dir, name), text)
}

func vip(last, port int) string { return fmt.Sprintf("10.96.0.%d:%d", last, port) }

// get makes one TCP connection from the client and returns who answered.
func (c *cluster) get(addr string) (string, error) { return get(c.client, addr) }

// get makes one TCP connection from a namespace and returns who answered.
func get(from *sandbox.Namespace, addr string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	conn, err := from.Dial(ctx, "tcp", addr)
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
	c.answersTo(c.client, addr, backends...)
}

// answersTo is answers for connections from any namespace.
func (c *cluster) answersTo(from *sandbox.Namespace, addr string, backends ...int) {
	c.t.Helper()
	want := map[string]bool{}
	for _, last := range backends {
		want["backend-"+strconv.Itoa(last)] = true
	}
	testutil.Eventually(c.t, 10*time.Second, fmt.Sprintf("%s answered by %v", addr, backends), func() error {
		got := map[string]bool{}
		for range 20 * len(backends) {
			name, err := get(from, addr)
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

// fails waits until connections from a namespace fail with an error.
func (c *cluster) fails(from *sandbox.Namespace, addr string, want syscall.Errno) {
	c.t.Helper()
	testutil.Eventually(c.t, 10*time.Second, fmt.Sprintf("%s fails with %v", addr, want), func() error {
		name, err := get(from, addr)
		if !errors.Is(err, want) {
			return fmt.Errorf("answered by %q, error %v", name, err)
		}
		return nil
	})
}

// fairlead runs the program and returns what it printed.
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

// says waits until an agent's log holds want. What an agent does can be seen before
// what it says of it: it may speak afterwards, and a pipe is in between.
func says(t *testing.T, logs func() string, want string) {
	t.Helper()
	testutil.Eventually(t, 10*time.Second, fmt.Sprintf("%q in the log", want), func() error {
		if !strings.Contains(logs(), want) {
			return errNotYet
		}
		return nil
	})
}

// saysOnce is says for what an agent is to say no more than once.
func saysOnce(t *testing.T, logs func() string, want string) {
	t.Helper()
	says(t, logs, want)
	if n := strings.Count(logs(), want); n != 1 {
		t.Errorf("%q is in the log %d times, want once", want, n)
	}
}

// pinnedMap opens a map of the agent.
func (c *cluster) pinnedMap(name string) *ebpf.Map {
	c.t.Helper()
	m, err := ebpf.LoadPinnedMap(datapath.MapPath(c.bpfRoot, name), nil)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = m.Close() })
	return m
}

// metric is Metric of an agent that must have it.
func metric(t *testing.T, a *testutil.Agent, name string, labels ...string) float64 {
	t.Helper()
	v, err := a.Metric(name, labels...)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
