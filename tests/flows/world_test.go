// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// prefix begins the names of all we make; testutil removes what killed runs left.
const prefix = "fairlead-test"

// family is an index into addrs.
type family int

const (
	ipv4 family = iota
	ipv6
)

var families = []family{ipv4, ipv6}

func (f family) String() string { return []string{"IPv4", "IPv6"}[f] }

// addrs are the addresses of something, one in each family.
type addrs [2]netip.Addr

func both(v4, v6 string) addrs {
	return addrs{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

// world is the network of a test:
//
//	client, stranger ── router ── node a: pods a1 a2 a3
//	                         └─── node b: pod b1
//
// The router sends all addresses of Services to node a, so that this is where
// flows from outside begin. Nodes and clients have it as their default route.
type world struct {
	shape            shape
	net              *sandbox.Network
	router           *sandbox.Namespace
	client, stranger *host
	a, b             *node
	a1, a2, a3, b1   *host              // a3 is on another bridge than a1 and a2
	services         map[string]service // by name
	dir              string             // the manifests
	tunnels          []*sandbox.L3Link
}

// host is something with an address: a client, a pod or a node.
type host struct {
	name  string
	ns    *sandbox.Namespace
	addrs addrs
	// What a pod's link is called on the node, and the bridge it is a port of, if any.
	link, bridge string
}

// node is one of the two nodes.
type node struct {
	host
	number  int // 1 or 2, in its addresses
	bpfRoot string
	cgroup  *sandbox.Cgroup
	socket  string
	agent   *testutil.Agent
}

// Where clients and nodes are.
var (
	clientAddrs   = both("198.51.100.10", "2001:db8:51::10")
	strangerAddrs = both("198.51.100.20", "2001:db8:51::20")
	nodeAddrs     = map[int]addrs{1: both("192.0.2.11", "2001:db8:2::11"), 2: both("192.0.2.12", "2001:db8:2::12")}
)

// podAddrs returns the addresses of a pod; those from 128 on are on the second
// bridge of bridged shapes.
func podAddrs(node, last int) addrs {
	return both(fmt.Sprintf("10.244.%d.%d", node, last), fmt.Sprintf("fd00:244:%d:%d::%d", node, last/128, last))
}

// newWorld builds a network whose agents do not run yet, and proves that it works
// without them.
func newWorld(t *testing.T, s shape) *world {
	t.Helper()
	testutil.RequireRoot(t)
	network, err := sandbox.NewNetwork(prefix)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{shape: s, net: network, dir: t.TempDir()}
	t.Cleanup(func() { w.close(t) })

	w.router = w.namespace(t, "router")
	w.buildRouter(t)
	w.client = w.outside(t, "client", clientAddrs)
	w.stranger = w.outside(t, "stranger", strangerAddrs)
	w.a, w.b = w.node(t, "a", 1), w.node(t, "b", 2)
	s.connect(t, w)
	w.a1, w.a2, w.a3 = w.pod(t, w.a, 10), w.pod(t, w.a, 11), w.pod(t, w.a, 130)
	w.b1 = w.pod(t, w.b, 10)
	for _, n := range []*node{w.a, w.b} {
		firewall(t, n.ns, s)
	}
	for _, h := range []*host{w.a1, w.a2, w.a3, w.b1, &w.a.host, &w.b.host} {
		serve(t, h, backendPort)
	}
	w.prove(t)
	w.addServices()
	return w
}

func (w *world) close(t *testing.T) {
	for _, tunnel := range w.tunnels {
		if err := tunnel.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := w.net.Close(); err != nil {
		t.Error(err)
	}
}

func (w *world) namespace(t *testing.T, name string) *sandbox.Namespace {
	t.Helper()
	ns, err := w.net.AddNamespace(name)
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// configure runs ip(8) commands made from a format.
func configure(t *testing.T, ns *sandbox.Namespace, format string, args ...any) {
	t.Helper()
	if err := ns.Configure(fmt.Sprintf(format, args...)); err != nil {
		t.Fatal(err)
	}
}

// sysctl sets keys below net, given as "key value" in lines.
func sysctl(t *testing.T, ns *sandbox.Namespace, settings string) {
	t.Helper()
	for line := range strings.Lines(settings) {
		key, value, found := strings.Cut(strings.TrimSpace(line), " ")
		if !found {
			continue
		}
		if err := ns.SetSysctl(key, value); err != nil {
			t.Fatal(err)
		}
	}
}

// forwarding makes a namespace a router that says without delay what is wrong.
const forwarding = `
	ipv4/ip_forward 1
	ipv6/conf/all/forwarding 1
	ipv6/conf/default/forwarding 1
	ipv4/icmp_ratelimit 0
	ipv4/icmp_msgs_per_sec 100000
	ipv4/icmp_msgs_burst 100000
	ipv6/icmp/ratelimit 0
`

// buildRouter makes the router with a bridge for the clients and one for nodes,
// which a shape need not use.
func (w *world) buildRouter(t *testing.T) {
	t.Helper()
	sysctl(t, w.router, forwarding)
	sysctl(t, w.router, withoutBridgeFilter)
	configure(t, w.router, `
		link add clients type bridge mcast_snooping 0
		addr add 198.51.100.1/24 dev clients
		addr add 2001:db8:51::1/64 dev clients nodad
		link set clients up
		link add underlay type bridge mcast_snooping 0
		addr add 192.0.2.1/24 dev underlay
		addr add 2001:db8:2::1/64 dev underlay nodad
		link set underlay up`)
}

// routeServices makes the router send what is for Services to node a.
func (w *world) routeServices(t *testing.T) {
	t.Helper()
	for _, net := range []string{"10.96.0.0/16", "203.0.113.0/24"} {
		configure(t, w.router, "route add %s via %s", net, w.a.addrs[ipv4])
	}
	for _, net := range []string{"fd00:96::/112", "2001:db8:113::/64"} {
		configure(t, w.router, "route add %s via %s", net, w.a.addrs[ipv6])
	}
}

// outside adds a client behind the router.
func (w *world) outside(t *testing.T, name string, a addrs) *host {
	t.Helper()
	h := &host{name: name, ns: w.namespace(t, name), addrs: a}
	w.plug(t, w.router, "clients", name, h, "eth0")
	configure(t, h.ns, `
		addr add %s/24 dev eth0
		addr add %s/64 dev eth0 nodad
		route add default via 198.51.100.1
		route add ::/0 via 2001:db8:51::1`, a[ipv4], a[ipv6])
	return h
}

// plug connects a link of a host to a new port of a bridge; both are up.
func (w *world) plug(t *testing.T, ns *sandbox.Namespace, bridge, port string, h *host, link string) {
	t.Helper()
	configure(t, ns, `
		link add %[1]s type veth peer name %[2]s netns %[3]s
		link set %[1]s master %[4]s up`, port, link, h.ns.Name(), bridge)
	configure(t, h.ns, "link set %s up", link)
}

// node adds a node without links.
func (w *world) node(t *testing.T, name string, number int) *node {
	t.Helper()
	n := &node{host: host{name: name, ns: w.namespace(t, "node-"+name), addrs: nodeAddrs[number]}, number: number}
	sysctl(t, n.ns, forwarding)
	// Local sockets stay away from the ports that tests use as sources, and from
	// the agents' own.
	sysctl(t, n.ns, "ipv4/ip_local_port_range 12000 19999\n")
	return n
}

// underlay connects a node to the router's bridge; its addresses are on the link.
func (w *world) underlay(t *testing.T, n *node) {
	t.Helper()
	w.plug(t, w.router, "underlay", "node-"+n.name, &n.host, "eth0")
	configure(t, n.ns, `
		addr add %s/24 dev eth0
		addr add %s/64 dev eth0 nodad
		route add default via 192.0.2.1
		route add ::/0 via 2001:db8:2::1`, n.addrs[ipv4], n.addrs[ipv6])
}

// routePods makes a node reach the pods of the other one through it.
func (w *world) routePods(t *testing.T, from, to *node) {
	t.Helper()
	configure(t, from.ns, `
		route add 10.244.%[1]d.0/24 via %[2]s
		route add fd00:244:%[1]d::/48 via %[3]s`, to.number, to.addrs[ipv4], to.addrs[ipv6])
}

// pod adds a pod to a node in the way of the shape.
func (w *world) pod(t *testing.T, n *node, last int) *host {
	t.Helper()
	name := fmt.Sprintf("pod-%s-%d", n.name, last)
	h := &host{name: name, ns: w.namespace(t, name), addrs: podAddrs(n.number, last), link: fmt.Sprintf("pod%d", last)}
	w.shape.pod(t, n, h, last)
	return h
}

// firewall makes a node do what many do: track connections, from their beginning
// only, and drop what fits none. So a flow must be seen in both directions or in
// none.
func firewall(t *testing.T, ns *sandbox.Namespace, s shape) {
	t.Helper()
	sysctl(t, ns, s.sysctls)
	if s.noFirewall {
		return
	}
	rules := `
table inet filter {
	chain forward {
		type filter hook forward priority filter; policy accept;
		ct state invalid counter drop
	}
}
`
	if s.masquerade {
		rules += `
table inet pods {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
		ip6 saddr fd00:244::/32 ip6 daddr != fd00:244::/32 masquerade
	}
}
`
	}
	if err := ns.Firewall(rules); err != nil {
		t.Fatal(err)
	}
	sysctl(t, ns, "netfilter/nf_conntrack_tcp_loose 0\n")
}

// prove waits until pods, nodes and clients reach each other without Fairlead:
// bridges and neighbours take a moment.
func (w *world) prove(t *testing.T) {
	t.Helper()
	for _, way := range []struct {
		from, to *host
	}{
		{w.client, &w.a.host}, {w.stranger, &w.b.host}, {&w.a.host, &w.b.host}, {&w.a.host, w.b1}, {&w.b.host, w.a1},
		{w.a2, w.a1}, {w.a3, w.a1}, {w.a1, w.b1}, {w.b1, w.a3}, {w.a1, &w.b.host}, {w.a2, &w.a.host},
	} {
		for _, f := range families {
			what := fmt.Sprintf("%s reaches %s without Fairlead by %s", way.from.name, way.to.name, f)
			testutil.Eventually(t, 10*time.Second, what, func() error {
				for _, network := range []string{"tcp", "udp"} {
					if _, err := ask(way.from.ns, network, netip.AddrPortFrom(way.to.addrs[f], backendPort), time.Second); err != nil {
						return err
					}
				}
				return nil
			})
		}
	}
}

// start writes the manifests every test has and starts both agents.
func (w *world) start(t *testing.T, args ...string) {
	t.Helper()
	w.write(t, "cluster.yaml", clusterManifests(w))
	for _, s := range w.services {
		w.apply(t, s)
	}
	for _, n := range []*node{w.a, w.b} {
		n.prepare(t)
		n.start(t, w.dir, append(w.shape.args, args...)...)
	}
	t.Cleanup(func() { w.explain(t) })
	first := w.services["local"].nodePort(ipv4, w.a)
	testutil.Eventually(t, 20*time.Second, "the first flow", func() error {
		_, err := ask(w.client.ns, "tcp", first, time.Second)
		return err
	})
}

// prepare gives a node what its agents share.
func (n *node) prepare(t *testing.T) {
	t.Helper()
	cgroup, err := sandbox.NewCgroup(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cgroup.Close(); err != nil {
			t.Error(err)
		}
	})
	n.cgroup, n.bpfRoot = cgroup, testutil.BPFRoot(t)
	n.socket = filepath.Join(t.TempDir(), "agent.sock")
}

// start starts the node's agent and waits until it is ready.
func (n *node) start(t *testing.T, dir string, args ...string) {
	t.Helper()
	n.agent = testutil.StartAgent(t, n.options(dir, args...))
}

func (n *node) options(dir string, args ...string) testutil.AgentOptions {
	flags := []string{
		"--socket=" + n.socket,
		"--packet-path=on",
		"--cluster-cidr=10.244.0.0/16,fd00:244::/32",
	}
	return testutil.AgentOptions{
		Netns: n.ns, CgroupRoot: n.cgroup.Path(), BPFRoot: n.bpfRoot,
		Source: "file:" + dir, NodeName: n.name, ExtraArgs: append(flags, args...),
	}
}

// fairlead runs a subcommand that reads what a node's agent has pinned.
func (n *node) fairlead(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, testutil.BuildBinary(t), append(args, "--bpf-root="+n.bpfRoot)...).CombinedOutput()
	return string(out), err
}

// write puts a manifest into the agents' directory in one step.
func (w *world) write(t *testing.T, name, text string) {
	t.Helper()
	testutil.WriteFile(t, filepath.Join(w.dir, name), text)
}
