// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func TestParseQuery(t *testing.T) {
	service := func(namespace, name, port string) lb.Query {
		return lb.Query{Service: lb.Name{Namespace: namespace, Name: name}, Port: port}
	}
	dialled := func(vip string, port uint16) lb.Query { return lb.Query{VIP: netip.MustParseAddr(vip), Number: port} }
	for _, test := range []struct {
		arg  string
		want lb.Query
		err  string // what the error says, "" for none
	}{
		{arg: "web", want: service("default", "web", "")},
		{arg: "default/web", want: service("default", "web", "")},
		{arg: "web:http", want: service("default", "web", "http")},
		{arg: "kube-system/kube-dns:53", want: service("kube-system", "kube-dns", "53")},
		{arg: "kube-system/kube-dns:dns-tcp", want: service("kube-system", "kube-dns", "dns-tcp")},
		{arg: "web:8080-tls", want: service("default", "web", "8080-tls")},
		{arg: "fd00:80", want: service("default", "fd00", "80")}, // no address at all
		{arg: "10.96.0.1:80", want: dialled("10.96.0.1", 80)},
		{arg: "0.0.0.0:30080", want: dialled("0.0.0.0", 30080)},
		{arg: "[fd00::1]:80", want: dialled("fd00::1", 80)},
		{arg: "[::ffff:10.96.0.1]:80", want: dialled("10.96.0.1", 80)},
		{arg: "10.96.0.1:65535", want: dialled("10.96.0.1", 65535)},

		{arg: "10.96.0.1", err: "has no port: write 10.96.0.1:80"},
		{arg: "fd00::1", err: "has no port: write [fd00::1]:80"},
		{arg: "[fd00::1]", err: "has no port: write [fd00::1]:80"},
		{arg: "fd00::1:80", err: "has no port: write [fd00::1:80]:80"},
		{arg: "10.96.0.1:0", err: "is not an address and a port"},
		{arg: "10.96.0.1:http", err: "is not an address and a port"},
		{arg: "10.96.0.1:70000", err: "is not an address and a port"},
		{arg: "[fe80::1%eth0]:80", err: "is not an address and a port"},
		{arg: "[10.96.0.1:80", err: "is neither [NAMESPACE/]SERVICE[:PORT] nor VIP:PORT"},
		{arg: "10.96.0.300:80", err: "is neither [NAMESPACE/]SERVICE[:PORT] nor VIP:PORT"},
		{arg: "", err: "is neither"},
		{arg: "/web", err: "is neither"},
		{arg: "default/", err: "is neither"},
		{arg: "a/b/c", err: "is neither"},
		{arg: "default/web:a:b", err: "is neither"},
		{arg: "Web", err: "is neither"},
		{arg: "web with blanks", err: "is neither"},
		{arg: "web:", err: "is neither the name of a port nor a number"},
		{arg: "web:0", err: "is neither the name of a port nor a number"},
		{arg: "web:70000", err: "is neither the name of a port nor a number"},
		{arg: "web:HTTP", err: "is neither the name of a port nor a number"},
	} {
		t.Run(test.arg, func(t *testing.T) {
			got, err := parseQuery(test.arg)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("got %+v, error %v; want an error that says %q", got, err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func TestExplainFlagsThatDoNotGoTogether(t *testing.T) {
	for _, test := range []struct{ name, flags, want string }{
		{name: "a client that is no address", flags: "--client=web-0", want: `--client "web-0" is not an IP address`},
		{name: "an empty client", flags: "--client=", want: `--client "" is not an IP address`},
		{name: "a source other than files", flags: "--source=kubernetes", want: "is not file:DIR"},
		{name: "files without a directory", flags: "--source=file:", want: "is not file:DIR"},
		{name: "an agent has its own node name", flags: "--node-name=a", want: "--node-name is for --source file:DIR"},
		{name: "and node addresses", flags: "--nodeport-addresses=primary", want: "--nodeport-addresses is for --source file:DIR"},
		{name: "files are not asked", flags: "--source=file:. --socket=s", want: "--socket is for asking the agent"},
		{name: "files know no clients", flags: "--source=file:. --client=10.0.0.1", want: "give --bpf-root as well"},
		{name: "two arguments", flags: "web", want: `unexpected argument "web"`},
		{name: "an argument that is neither", flags: "--client=10.0.0.1 web/", want: "unexpected argument"},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdout, stderr, code := runCommand(append([]string{"explain", "default/web"}, strings.Fields(test.flags)...)...)
			if code != 1 || stdout != "" || !strings.Contains(stderr, test.want) || !strings.Contains(stderr, "run 'fairlead explain --help'") {
				t.Errorf("code %d, printed %q, error %q; want one that says %q", code, stdout, stderr, test.want)
			}
		})
	}
}

func TestExplainNeedsAnAgentOrFiles(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	_, stderr, code := runCommand("explain", "web", "--socket="+socket)
	if code != 1 || !strings.Contains(stderr, "no agent answers at "+socket) {
		t.Errorf("code %d, error %q", code, stderr)
	}
	_, stderr, code = runCommand("explain", "web", "--source=file:"+filepath.Dir(socket)+"/nowhere")
	if code != 1 || !strings.Contains(stderr, "does not exist") {
		t.Errorf("code %d, error %q", code, stderr)
	}
}

func TestExplainFromFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "web.yaml"), []byte(webManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	ask := func(args ...string) string {
		stdout, stderr, code := runCommand(append([]string{"explain", "--source=file:" + dir, "--node-name=node-a"}, args...)...)
		if code != 0 || stderr != "" {
			t.Fatalf("%v: code %d, error %q", args, code, stderr)
		}
		return stdout
	}
	want := `node node-a, zone zone-1

default/web port http (TCP, IPv4)
  traffic policies  internal Cluster, external Local
  affinity          none
  NodePort          reached at 127.0.0.1 (processes on the node), 192.0.2.1
  topology hints    none
  kernel            not compared

  FRONTEND       TYPE       CLIENTS INSIDE  CLIENTS OUTSIDE
  10.96.0.1:80   ClusterIP  clusterIP       clusterIP
  0.0.0.0:30080  NodePort   inside          outside

  SIDE               RULE                                            NEW CLIENTS GET
  clusterIP, inside  policy Cluster: all ready endpoints             2 backends
  outside            policy Local: the ready endpoints on this node  1 backend

  ENDPOINT         NODE    CONDITIONS  SLICE  IN OR OUT
  10.244.0.1:8080  node-a  ready       web-1  in
  10.244.0.2:8080  node-a  not ready   web-1  out: not ready
  10.244.1.1:8080  node-b  ready       web-1  in for clusterIP, inside
                                              out for outside: on another node (node-b), and the policy is Local
`
	for _, arg := range []string{"web", "default/web:http", "web:80", "10.96.0.1:80", "192.0.2.1:30080"} {
		if diff := cmp.Diff(want, ask(arg)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", arg, diff)
		}
	}
	var e lb.Explanation
	if err := json.Unmarshal([]byte(ask("web", "-o", "json")), &e); err != nil {
		t.Fatal(err)
	}
	if len(e.Ports) != 1 || e.Ports[0].Kernel != nil || len(e.Ports[0].Endpoints) != 3 {
		t.Errorf("as JSON: %+v", e)
	}
	if got, want := ask("10.96.0.1:81"), "no_port: the ClusterIP of Service default/web"; !strings.Contains(got, want) {
		t.Errorf("another port: %q, want %q in it", got, want)
	}
	_, stderr, code := runCommand("explain", "other", "--source=file:"+dir)
	if code != 1 || !strings.Contains(stderr, "no Service default/other") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("unknown Service: code %d, error %q", code, stderr)
	}
}

func TestExplainFromFilesComparesOnlyWhatIsPinned(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "web.yaml"), []byte(webManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"explain", "web", "--source=file:" + dir, "--bpf-root=" + filepath.Join(dir, "bpf")}
	stdout, stderr, code := runCommand(args...)
	if code != 0 || !strings.Contains(stdout, "not compared") {
		t.Errorf("code %d, printed %q, error %q", code, stdout, stderr)
	}
	_, stderr, code = runCommand(slices.Concat(args, []string{"--client=10.244.0.9"})...)
	if code != 1 || !strings.Contains(stderr, "no fairlead datapath is pinned there") {
		t.Errorf("with a client: code %d, error %q", code, stderr)
	}
}

// runCommand runs a command line in this process.
func runCommand(args ...string) (stdout, stderr string, code int) {
	var out, errs strings.Builder
	code = run(args, &out, &errs)
	return out.String(), errs.String(), code
}

const webManifest = `
apiVersion: v1
kind: Node
metadata:
  name: node-a
  labels: {topology.kubernetes.io/zone: zone-1}
status:
  addresses: [{type: InternalIP, address: 192.0.2.1}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1]
  externalTrafficPolicy: Local
  ports: [{name: http, port: 80, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: default
  labels: {kubernetes.io/service-name: web}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.244.0.1], nodeName: node-a}
- {addresses: [10.244.0.2], nodeName: node-a, conditions: {ready: false}}
- {addresses: [10.244.1.1], nodeName: node-b}
`
