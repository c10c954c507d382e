// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// A resolver connects a UDP socket to each address of a name to see which source
// address it would get, and sorts by that (RFC 6724). A Service without an
// endpoint in one family must not change the order.
func TestGetaddrinfoOrdersADualStackServiceAsWithoutUs(t *testing.T) {
	c := newCluster(t)
	for _, tool := range []string{"getent", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v (Debian has it in libc-bin or util-linux)", err)
		}
	}
	client, err := c.node.AddPod("dual", podAddr(3), netip.MustParseAddr("fd00:244::3"))
	if err != nil {
		t.Fatal(err)
	}
	c.backend(11)
	c.write("dual.yaml", `apiVersion: v1
kind: Service
metadata: {name: dual, namespace: test}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::a"]
  ipFamilies: [IPv4, IPv6]
  ports: [{port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: dual-4, namespace: test, labels: {kubernetes.io/service-name: dual}}
addressType: IPv4
ports: [{port: 9000}]
endpoints: [{addresses: [10.244.0.11]}]
`)
	// The second name has one address of ours only: if that were refused it
	// would come last. Resolvers ask with port 0, which no Service defines.
	names := map[string][]string{
		"dual.test":  {"fd00:96::a", "10.96.0.10"},
		"mixed.test": {"fd00:96::a", "10.244.0.11"},
	}
	order := func(when string) {
		for name, want := range names {
			if got := addresses(t, client, name, want); !slices.Equal(got, want) {
				t.Errorf("%s getaddrinfo orders %v, want %v", when, got, want)
			}
		}
	}
	order("without us")
	c.start()
	c.answers(vip(10, 80), 11)
	order("with us")
}

// addresses returns the order in which getaddrinfo, in a pod, gives the addresses
// of a name.
func addresses(t *testing.T, pod *sandbox.Namespace, name string, of []string) []string {
	t.Helper()
	var lines strings.Builder
	for _, addr := range of {
		lines.WriteString(addr + " " + name + "\n")
	}
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte(lines.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := pod.Command(t.Context(), "unshare", "--mount", "sh", "-c",
		`mount --bind "$0" /etc/hosts && exec getent ahosts "$1"`, hosts, name)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("getent: %v: %s", err, out)
	}
	var found []string
	for line := range strings.Lines(string(out)) {
		if addr, _, _ := strings.Cut(line, " "); !slices.Contains(found, addr) {
			found = append(found, addr)
		}
	}
	return found
}
