// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// prefix begins the names of all we make; testutil removes what killed runs left.
const prefix = "fairlead-test"

// families are indices of addrs.
const (
	ipv4 = iota
	ipv6
	families
)

// addrs are the addresses of something, one in each family.
type addrs [families]netip.Addr

func both(v4, v6 string) addrs {
	return addrs{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

// world is the network of the test:
//
//	outside ── node: pods with clients, pods with backends
//	            └─── other: a node with backends
//
// The agent runs on node, and serves its pods' sockets and who is outside.
type world struct {
	t        *testing.T
	parent   *testing.T // of t, while that is a subtest's
	node     *sandbox.Node
	outside  *sandbox.Namespace
	clients  []*sandbox.Namespace
	backends []endpoint
	cgroup   *sandbox.Cgroup
	bpfRoot  string
	dir      string // the manifests
	config   string // the configuration file
	socket   string
	services map[string]service
	agent    *testutil.Agent
	load     load
	ration   *ration // of the agent, while it has one
	other    string  // the program as another version would be built
}

// Where things are.
var (
	nodeAddrs    = both("192.0.2.11", "2001:db8:2::11")
	otherAddrs   = both("192.0.2.12", "2001:db8:2::12")
	outsideAddrs = both("198.51.100.10", "2001:db8:51::10")
)

const (
	clientPods    = 4
	localBackends = 4
	otherBackends = 2
)

// newWorld builds a network with Services, whose agent does not run yet.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, node: testutil.Node(t), dir: t.TempDir(), bpfRoot: testutil.BPFRoot(t)}
	w.config, w.socket = filepath.Join(t.TempDir(), "config.yaml"), filepath.Join(t.TempDir(), "agent.sock")
	var err error
	if w.cgroup, err = sandbox.NewCgroup(prefix); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.cgroup.Close(); err != nil {
			t.Error(err)
		}
	})
	network, err := sandbox.NewNetwork(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.Close(); err != nil {
			t.Error(err)
		}
	})
	other := w.connect(network)
	for i := range clientPods {
		w.clients = append(w.clients, w.pod(fmt.Sprintf("client-%d", i), podAddrs(2+i)))
	}
	for i := range localBackends {
		e := endpoint{name: fmt.Sprintf("local-%d", i), node: "node", addrs: podAddrs(20 + i)}
		e.ns = w.pod(e.name, e.addrs)
		w.backends = append(w.backends, e)
	}
	for i := range otherBackends {
		e := endpoint{name: fmt.Sprintf("other-%d", i), node: "other", ns: other, addrs: both(
			fmt.Sprintf("10.244.1.%d", 20+i), fmt.Sprintf("fd00:244:1::%d", 20+i))}
		w.configure(other, "addr add %s/32 dev lo\naddr add %s/128 dev lo nodad", e.addrs[ipv4], e.addrs[ipv6])
		w.backends = append(w.backends, e)
	}
	w.addServices()
	return w
}

// connect adds the node's links to clients outside and to the other node, which it
// returns.
func (w *world) connect(network *sandbox.Network) (other *sandbox.Namespace) {
	w.t.Helper()
	var err error
	if w.outside, err = network.AddNamespace("outside"); err != nil {
		w.t.Fatal(err)
	}
	if other, err = network.AddNamespace("other"); err != nil {
		w.t.Fatal(err)
	}
	node := w.node.Namespace()
	w.configure(node, `
		link add up0 type veth peer name eth0 netns %s
		addr add 198.51.100.1/24 dev up0
		addr add 2001:db8:51::1/64 dev up0 nodad
		link set up0 up
		link add up1 type veth peer name eth0 netns %s
		addr add %s/24 dev up1
		addr add %s/64 dev up1 nodad
		link set up1 up
		route add 10.244.1.0/24 via %s
		route add fd00:244:1::/48 via %s`,
		w.outside.Name(), other.Name(), nodeAddrs[ipv4], nodeAddrs[ipv6], otherAddrs[ipv4], otherAddrs[ipv6])
	w.configure(w.outside, `
		addr add %s/24 dev eth0
		addr add %s/64 dev eth0 nodad
		link set eth0 up
		route add default via 198.51.100.1
		route add ::/0 via 2001:db8:51::1`, outsideAddrs[ipv4], outsideAddrs[ipv6])
	w.configure(other, `
		addr add %s/24 dev eth0
		addr add %s/64 dev eth0 nodad
		link set eth0 up
		route add default via %s
		route add ::/0 via %s`, otherAddrs[ipv4], otherAddrs[ipv6], nodeAddrs[ipv4], nodeAddrs[ipv6])
	// The node's sockets stay away from the ports of agents.
	if err := node.SetSysctl("ipv4/ip_local_port_range", "12000 19999"); err != nil {
		w.t.Fatal(err)
	}
	return other
}

// configure runs ip(8) commands made from a format.
func (w *world) configure(ns *sandbox.Namespace, format string, args ...any) {
	w.t.Helper()
	if err := ns.Configure(fmt.Sprintf(format, args...)); err != nil {
		w.t.Fatal(err)
	}
}

func podAddrs(last int) addrs {
	return both(fmt.Sprintf("10.244.0.%d", last), fmt.Sprintf("fd00:244::%d", last))
}

func (w *world) pod(name string, a addrs) *sandbox.Namespace {
	w.t.Helper()
	ns, err := w.node.AddPod(name, a[:]...)
	if err != nil {
		w.t.Fatal(err)
	}
	return ns
}

// start starts the node's agent, as restart does, for the first time.
func (w *world) start(args ...string) {
	w.t.Helper()
	w.write("cluster.yaml", clusterManifests)
	for _, s := range w.services {
		w.apply(s)
	}
	w.configureAgent("")
	w.restart(args...)
	for f := range families {
		testutil.Eventually(w.t, 30*time.Second, "clients outside are served", func() error {
			for _, to := range w.targets("tcp", f) {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				conn, err := w.outside.Dial(ctx, "tcp", to.At.String())
				if err != nil {
					return err
				}
				_ = conn.Close()
			}
			return nil
		})
	}
}

// restart starts the node's agent and waits until it is ready.
func (w *world) restart(args ...string) {
	w.t.Helper()
	w.agent = testutil.StartAgent(w.t, w.options(args...))
}

func (w *world) options(args ...string) testutil.AgentOptions {
	flags := []string{
		"--config=" + w.config, "--socket=" + w.socket,
		fmt.Sprintf("--cluster-cidr=%s,%s", clusterCIDRs[ipv4], clusterCIDRs[ipv6]),
	}
	return testutil.AgentOptions{
		Netns: w.node.Namespace(), CgroupRoot: w.cgroup.Path(), BPFRoot: w.bpfRoot,
		Source: "file:" + w.dir, ExtraArgs: append(flags, args...),
	}
}

// configureAgent writes the configuration file.
func (w *world) configureAgent(more string) {
	w.t.Helper()
	testutil.WriteFile(w.t, w.config, "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"+more)
}

// write puts a manifest into the agent's directory in one step.
func (w *world) write(name, text string) {
	w.t.Helper()
	testutil.WriteFile(w.t, filepath.Join(w.dir, name), text)
}

// startLoad starts the clients.
func (w *world) startLoad() {
	w.t.Helper()
	cgroup, err := os.Open(w.cgroup.Path())
	if err != nil {
		w.t.Fatal(err)
	}
	defer cgroup.Close()
	var inPods, outside []task
	for i, ns := range w.clients {
		inPods = append(inPods, w.podTasks(ns, i%families)...)
	}
	for f := range families {
		outside = append(outside, w.outsideTasks(f)...)
	}
	w.load.start(w.t, w.node.Namespace(), cgroup, inPods)
	w.load.start(w.t, w.outside, nil, outside)
}

// pace is the time between two steps of a client.
const pace = 50 * time.Millisecond

// podTasks are what the clients of one pod do. Each uses both families where it can
// and else the one it is given.
func (w *world) podTasks(ns *sandbox.Namespace, f int) []task {
	tcp, udp := w.targets("tcp", ipv4, ipv6), w.targets("udp", ipv4, ipv6)
	steady := func(network string) []target { return only(w.targets(network, f), steadyServices...) }
	tasks := []task{
		{Do: "connect", Targets: tcp}, {Do: "exchange", Targets: udp},
		{Do: "datagrams", Targets: clusterIPs(w.targets("udp", f))},
		{Do: "keep TCP", Targets: steady("tcp")}, {Do: "keep TCP", Targets: only(tcp, changing...)},
		{Do: "keep UDP", Targets: steady("udp")}, {Do: "move UDP", Targets: only(udp, changing...)},
		{Do: "affinity", Targets: only(w.targets("tcp", f), sticky)},
	}
	return in(ns, tasks)
}

// outsideTasks are what clients outside do. They send datagrams to no Service whose
// backends go: an answer that is on its way when its backend stops serving is lost
// with the flow, and nobody can tell them.
func (w *world) outsideTasks(f int) []task {
	tcp, udp := w.targets("tcp", f), w.targets("udp", f)
	return in(w.outside, []task{
		{Do: "connect", Targets: tcp}, {Do: "exchange", Targets: only(udp, slices.Concat(steadyServices, []string{sticky})...)},
		{Do: "keep TCP", Targets: only(tcp, steadyServices...)}, {Do: "keep TCP", Targets: only(tcp, changing...)},
		{Do: "keep UDP", Targets: only(udp, steadyServices...)},
		{Do: "affinity", Targets: only(tcp, sticky)},
	})
}

func in(ns *sandbox.Namespace, tasks []task) []task {
	for i := range tasks {
		tasks[i].Netns, tasks[i].Every = ns.Path(), pace
	}
	return tasks
}

// targets are all ways into all Services.
func (w *world) targets(network string, of ...int) []target {
	var out []target
	for _, name := range names {
		for _, f := range of {
			for _, at := range w.services[name].vips(network, f) {
				out = append(out, target{At: at, Service: name})
			}
		}
	}
	return out
}

// only keeps the targets that lead to some Services.
func only(targets []target, services ...string) []target {
	return slices.DeleteFunc(slices.Clone(targets), func(t target) bool { return !slices.Contains(services, t.Service) })
}

// clusterIPs keeps the targets of which each Service has one: two that share a
// backend are hard to tell apart by its answers to one socket.
func clusterIPs(targets []target) []target {
	return slices.DeleteFunc(slices.Clone(targets), func(t target) bool { return !isClusterIP(t.At.Addr()) })
}

func isClusterIP(a netip.Addr) bool {
	return slices.ContainsFunc(serviceCIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
}

var clusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}

var serviceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}

// Services by what happens to them. Those that are steady keep all their backends
// in every row of the table.
const (
	sticky   = "sticky" // with an affinity, and steady too
	rolled   = "rolled"
	scaled   = "scaled"
	flapping = "flapping"
)

var (
	steadyServices = []string{"steady-1", "steady-2", "steady-3", "steady-4"}
	changing       = []string{rolled, scaled, flapping}
	names          = slices.Concat(steadyServices, changing, []string{sticky})
)

// Ports of every Service, at all its addresses but the node's.
const (
	tcpPort = 80
	udpPort = 53
)

// service is a Service of both families with a ClusterIP, a load-balancer IP and
// NodePorts, all of which follow from its number.
type service struct {
	name      string
	number    int
	spec      string // more of it, in YAML's flow style: "key: value, ..."
	endpoints []endpoint
}

// endpoint is a pod with backends, one for each Service, at different ports.
type endpoint struct {
	name, node string
	ns         *sandbox.Namespace
	addrs      addrs
	conditions string // in YAML's flow style; ready when empty
}

const (
	notReady    = "ready: false, serving: false"
	terminating = "ready: false, serving: true, terminating: true"
)

// as returns the endpoint with other conditions.
func (e endpoint) as(conditions string) endpoint {
	e.conditions = conditions
	return e
}

// addServices makes the Services and starts their backends.
func (w *world) addServices() {
	w.t.Helper()
	w.services = map[string]service{}
	for i, name := range names {
		s := service{name: name, number: 1 + i, endpoints: w.backends}
		if name == sticky {
			s.spec = "sessionAffinity: ClientIP"
		}
		w.services[name] = s
		for _, e := range w.backends {
			for _, a := range e.addrs {
				serve(w.t, e.ns, netip.AddrPortFrom(a, s.targetPort()), name, e.name)
			}
		}
	}
}

func (s service) targetPort() uint16 { return uint16(9000 + s.number) }

func (s service) nodePort() uint16 { return uint16(30000 + s.number) }

func (s service) clusterIP() addrs {
	return both(fmt.Sprintf("10.96.0.%d", s.number), fmt.Sprintf("fd00:96::%d", s.number))
}

func (s service) loadBalancerIP() addrs {
	return both(fmt.Sprintf("203.0.113.%d", s.number), fmt.Sprintf("2001:db8:113::%d", s.number))
}

// vips are the ways into a Service: its ClusterIP, load-balancer IP and NodePort.
func (s service) vips(network string, f int) []netip.AddrPort {
	port := uint16(tcpPort)
	if network == "udp" {
		port = udpPort
	}
	return []netip.AddrPort{
		netip.AddrPortFrom(s.clusterIP()[f], port), netip.AddrPortFrom(s.loadBalancerIP()[f], port),
		netip.AddrPortFrom(nodeAddrs[f], s.nodePort()),
	}
}

// apply writes the manifests of a Service, in place of those it had before.
func (w *world) apply(s service) {
	w.t.Helper()
	w.write(s.name+".yaml", s.manifests())
}

func (s service) manifests() string {
	cluster, lb := s.clusterIP(), s.loadBalancerIP()
	spec := s.spec
	if spec != "" {
		spec += ", "
	}
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata: {name: %s, namespace: test}
spec: {%s
  type: LoadBalancer, ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv4, IPv6],
  clusterIP: %s, clusterIPs: [%[3]s, '%s'],
  ports: [
    {name: web, port: %d, targetPort: %[6]d, nodePort: %[7]d},
    {name: dns, port: %[8]d, targetPort: %[6]d, nodePort: %[7]d, protocol: UDP}]}
status: {loadBalancer: {ingress: [{ip: %[9]s}, {ip: '%[10]s'}]}}
`, s.name, spec, cluster[ipv4], cluster[ipv6], tcpPort, s.targetPort(), s.nodePort(), udpPort, lb[ipv4], lb[ipv6])
	for f, family := range []string{"IPv4", "IPv6"} {
		fmt.Fprintf(&b, `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-%[2]d, namespace: test, labels: {kubernetes.io/service-name: %[1]s}}
addressType: %[3]s
ports: [{name: web, port: %[4]d}, {name: dns, port: %[4]d, protocol: UDP}]
endpoints: [`, s.name, f, family, s.targetPort())
		for _, e := range s.endpoints {
			fmt.Fprintf(&b, "{addresses: ['%s'], nodeName: %s, conditions: {%s}}, ", e.addrs[f], e.node, e.conditions)
		}
		b.WriteString("]\n")
	}
	return b.String()
}

// clusterManifests are the node and the ranges of ClusterIPs.
var clusterManifests = fmt.Sprintf(`apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [%s, '%s']}
---
apiVersion: v1
kind: Node
metadata: {name: node}
status: {addresses: [{type: InternalIP, address: '%s'}, {type: InternalIP, address: '%s'}]}
`, serviceCIDRs[ipv4], serviceCIDRs[ipv6], nodeAddrs[ipv4], nodeAddrs[ipv6])

var errNotYet = errors.New("not yet")
