// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	program "github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// explain asks the agent about arg and returns the page. An agent can be ready a
// moment before it listens.
func (c *cluster) explain(arg string, flags ...string) (page string) {
	c.t.Helper()
	args := append([]string{"explain", arg, "--bpf-root", c.bpfRoot}, flags...)
	testutil.Eventually(c.t, 5*time.Second, strings.Join(args, " "), func() error {
		out, err := c.fairlead(args...)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		page = out
		return nil
	})
	return page
}

// explainJSON is explain for programs.
func (c *cluster) explainJSON(arg string, flags ...string) lb.Explanation {
	c.t.Helper()
	out := c.explain(arg, append(flags, "-o", "json")...)
	var e lb.Explanation
	if err := json.Unmarshal([]byte(out), &e); err != nil {
		c.t.Fatalf("explain %s: %v in %s", arg, err, out)
	}
	return e
}

// refuses wants explain to fail with one line that says want.
func (c *cluster) refuses(arg, want string) {
	c.t.Helper()
	out, err := c.fairlead("explain", arg, "--bpf-root", c.bpfRoot)
	if err == nil || strings.Count(out, "\n") != 1 || !strings.Contains(out, want) {
		c.t.Errorf("explain %s: %v, %q; want one line that says %q", arg, err, out, want)
	}
}

const explained = `node node, zone a

test/web port web (TCP, IPv4)
  traffic policies  internal Cluster, external Local
  affinity          ClientIP, until 3h0m0s after the client's last new connection
  NodePort          reached at 10.244.0.1, 127.0.0.1 (processes on the node)
  topology hints    none
  kernel            agrees

  FRONTEND       TYPE       CLIENTS INSIDE  CLIENTS OUTSIDE
  10.96.0.10:80  ClusterIP  clusterIP       clusterIP
  0.0.0.0:30080  NodePort   inside          outside

  SIDE               RULE                                            NEW CLIENTS GET
  clusterIP, inside  policy Cluster: all ready endpoints             2 backends
  outside            policy Local: the ready endpoints on this node  1 backend

  ENDPOINT          NODE   CONDITIONS  SLICE  IN OR OUT
  10.244.0.11:9000  node   ready       web-1  in
  10.244.0.12:9000  other  ready       web-1  in for clusterIP, inside
                                              out for outside: on another node (other), and the policy is Local
  10.244.0.13:9000  node   not ready   web-1  out: not ready
`

// explainedCluster has the Service of explained.
func explainedCluster(t *testing.T) *cluster {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	c.manifests("web.yaml",
		service("web", 10, nodePorts+", externalTrafficPolicy: Local, sessionAffinity: ClientIP"),
		slice("web", endpoint(11, "nodeName: node"), endpoint(12, "nodeName: other"),
			endpoint(13, "nodeName: node, conditions: {ready: false}")))
	return c
}

func TestExplainTellsWhatTheAgentDoesAndWhetherTheKernelDoesIt(t *testing.T) {
	c := explainedCluster(t)
	agent := c.start()
	for _, arg := range []string{"test/web", "test/web:web", "test/web:80", "10.96.0.10:80", "10.244.0.1:30080"} {
		if diff := cmp.Diff(explained, c.explain(arg)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", arg, diff)
		}
	}
	e := c.explainJSON("test/web")
	if e.Node != "node" || e.Zone != "a" || len(e.Ports) != 1 || e.Ports[0].Kernel == nil || len(e.Ports[0].Kernel) != 0 {
		t.Errorf("as JSON %+v, want one port and a kernel that agrees", e)
	}
	if got, want := c.explain("10.96.0.10:81"), "no_port: the ClusterIP of Service test/web"; !strings.Contains(got, want) {
		t.Errorf("of a port that is not defined it says %q, want %q", got, want)
	}
	c.refuses("test/nobody", "no Service test/nobody is served here")
	c.refuses("test/web:nothing", `no port "nothing"`)
	c.explainsClients()

	flipWord(2)(t, c.pinnedMap("services"))
	differs := c.explainJSON("test/web").Ports[0].Kernel
	missing := func(d string) bool {
		return strings.HasPrefix(d, "outside: the kernel has ") && strings.HasSuffix(d, "wanted is [10.244.0.11:9000]")
	}
	if !slices.ContainsFunc(differs, missing) {
		t.Errorf("differences with a damaged kernel are %q", differs)
	}
	if page := c.explain("test/web"); !strings.Contains(page, "kernel            differs:") {
		t.Errorf("the page does not tell of them:\n%s", page)
	}

	if err := agent.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	c.refuses("test/web", "no agent answers at "+program.SocketPath(c.bpfRoot))
}

// explainsClients is about --client and inspect affinity.
func (c *cluster) explainsClients() {
	t := c.t
	t.Helper()
	const nobody = "\nclient 10.244.0.2 keeps no backend\n"
	if page := c.explain("test/web", "--client=10.244.0.2"); !strings.HasSuffix(page, nobody) {
		t.Errorf("before the client's first connection:\n%s", page)
	}
	kept := strings.TrimPrefix(c.keeps(vip(10, 80)), "backend-")
	a := c.explainJSON("test/web", "--client=10.244.0.2").Ports[0].Affinity
	if len(a) != 1 || a[0].Client != "10.244.0.2" || a[0].Backend != "10.244.0."+kept+":9000" || a[0].AgeSeconds > 60 {
		t.Errorf("the client keeps %s, explain says %+v", kept, a)
	}
	if page := c.explain("test/web", "--client=10.244.0.9"); !strings.HasSuffix(page, "\nclient 10.244.0.9 keeps no backend\n") {
		t.Errorf("about another client:\n%s", page)
	}
	rows := c.affinities()
	if len(rows) != 1 {
		t.Fatalf("inspect affinity: %+v, want one row", rows)
	}
	r := rows[0]
	if r.Client != "10.244.0.2" || r.Service != "test/web" || r.PortName != "web" || r.Protocol != "TCP" || r.Family != "IPv4" ||
		r.Backend.Address != "10.244.0."+kept || r.Backend.Port != 9000 || r.AgeSeconds == nil {
		t.Errorf("inspect affinity: %+v", r)
	}
	// Processes on the node are one client, whatever their address.
	if _, err := get(c.node.Namespace(), vip(10, 80)); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"10.244.0.1", "127.0.0.1"} {
		if a := c.explainJSON("test/web", "--client="+address).Ports[0].Affinity; len(a) != 1 {
			t.Errorf("the node as client %s: %+v, want its backend", address, a)
		}
	}
}

func TestInspectTellsInsideFromOutside(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.fillTables()
	c.start()
	out, err := c.fairlead("inspect", "frontends", "-o", "json", "--bpf-root", c.bpfRoot)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	type endpoint struct {
		Address string
		Port    int
	}
	var rows []struct {
		VIP, Type, Protocol        string
		Backends, ExternalBackends []endpoint
	}
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, r := range rows {
		if r.Protocol == "TCP" {
			got[r.VIP+" "+r.Type] = fmt.Sprint(r.Backends, " ", r.ExternalBackends)
		}
	}
	const both, here = "[{10.244.0.11 9000} {10.244.0.12 9000}]", "[{10.244.0.11 9000}]"
	want := map[string]string{
		"10.96.0.10 ClusterIP":      both + " []",
		"0.0.0.0 NodePort":          both + " " + here,
		"203.0.113.10 LoadBalancer": both + " " + here,
		"198.51.100.7 ExternalIP":   both + " " + here,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("frontends (-want +got):\n%s", diff)
	}
}

func TestEveryRootHasASocketOfItsOwnForRootAlone(t *testing.T) {
	t.Parallel()
	one, two := newQuietCluster(t), newQuietCluster(t)
	one.service("one", 10)
	two.service("two", 10)
	first := one.start()
	two.start()
	one.explain("test/one")
	two.explain("test/two")
	one.refuses("test/two", "no Service test/two")

	socket := program.SocketPath(one.bpfRoot)
	if socket == program.SocketPath(two.bpfRoot) {
		t.Errorf("both agents are asked at %s", socket)
	}
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%s has mode %v, want a socket for root alone", socket, info.Mode())
	}
	if dir, err := os.Stat(filepath.Dir(socket)); err != nil || dir.Mode().Perm()&0o022 != 0 {
		t.Errorf("others may write to the directory of %s: %v, %v", socket, dir.Mode(), err)
	}

	// A socket that a killed agent has left is nobody's.
	if err := first.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	if _, err := os.Stat(socket); err != nil {
		t.Fatalf("the killed agent took its socket along, so this shows nothing: %v", err)
	}
	one.refuses("test/one", "no agent answers at "+socket)
	next := one.start()
	one.explain("test/one")
	if err := next.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = next.Wait()

	// A socket that somebody listens on is left alone; the agent serves all the same.
	agent := one.start("--socket=" + program.SocketPath(two.bpfRoot))
	says(t, agent.Logs, "another process listens there (give --socket)")
	two.explain("test/two")
}
