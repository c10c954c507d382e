// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/sockets"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// world is a node with a client pod, three backend pods and the socket path,
// without the rest of the agent.
type world struct {
	node   *sandbox.Node
	client *sandbox.Namespace
	pods   map[string]*sandbox.Namespace // the backend pods
	cgroup *sandbox.Cgroup
	root   string

	datapath   *datapath.Datapath
	store      *lb.Store
	reconciler *reconciler.Reconciler
	ender      *sockets.Ender
	stopEnder  func()
	ended      ended
	ticket     uint64 // of the last request to the Ender

	vips int // handed out so far
}

// ended is how many sockets the Ender said it has ended, and at whose request
// last.
type ended struct {
	sync.Mutex
	gone, came int
	ticket     uint64
	err        error
}

// Ports that every backend pod serves: pod "a" answers on port 8081 with
// "a:8081", over TCP and UDP.
var backendPorts = []uint16{8080, 8081, 8082, 8083}

// Addresses of the backend pods, in both families.
var pods = map[string][2]netip.Addr{
	"a": {netip.MustParseAddr("10.244.0.11"), netip.MustParseAddr("fd00:244::11")},
	"b": {netip.MustParseAddr("10.244.0.12"), netip.MustParseAddr("fd00:244::12")},
	"c": {netip.MustParseAddr("10.244.0.13"), netip.MustParseAddr("fd00:244::13")},
}

var clientAddr = [2]netip.Addr{netip.MustParseAddr("10.244.0.2"), netip.MustParseAddr("fd00:244::2")}

// nodeName is the name of the node, nodeAddr are the addresses its Node object
// has. The node has addresses beside these: otherNodeAddr and the pods' gateway.
const nodeName = "node"

var (
	nodeAddr      = [2]netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::10")}
	otherNodeAddr = [2]netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8::11")}
)

// newWorld builds a world that is gone when the test ends.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{
		node: testutil.Node(t), root: testutil.BPFRoot(t), pods: map[string]*sandbox.Namespace{},
		store: lb.NewStore(lb.Config{NodeName: nodeName, NodePorts: usualNodePorts}),
	}
	for _, addr := range slices.Concat(nodeAddr[:], otherNodeAddr[:]) {
		w.addNodeAddr(t, addr)
	}
	var err error
	w.client, err = w.node.AddPod("client", clientAddr[0], clientAddr[1])
	must(t, err)
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		pod, err := w.node.AddPod(name, pods[name][0], pods[name][1])
		must(t, err)
		w.pods[name] = pod
		for _, addr := range pods[name] {
			for _, port := range backendPorts {
				w.serve(t, pod, netip.AddrPortFrom(addr, port), fmt.Sprintf("%s:%d", name, port))
			}
		}
	}
	// The servers' sockets are made before, so that the hooks and counters see
	// the client's alone.
	w.cgroup = testutil.Cgroup(t)
	w.start(t)
	t.Cleanup(func() { w.stop(t) })
	w.store.SetNode(lb.Node{Addresses: nodeAddr[:], Eligible: true})
	w.apply(t)
	return w
}

// worldTest is a test that leaves the world as it was, but for Services.
type worldTest struct {
	name string
	f    func(t *testing.T, w *world)
}

// inOneWorld runs tests one after the other in a new world: to make one takes
// longer than most tests.
func inOneWorld(t *testing.T, tests []worldTest) {
	t.Helper()
	w := newWorld(t)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.f(t, w) })
	}
}

// addNodeAddr gives the node an address, unless it has it.
func (w *world) addNodeAddr(t *testing.T, addr netip.Addr) {
	t.Helper()
	err := w.node.Namespace().AddAddr(sandbox.Bridge, netip.PrefixFrom(addr, addr.BitLen()))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		t.Fatal(err)
	}
}

// serve answers on TCP and UDP with name until the test ends. A TCP connection
// stays until the client ends it.
func (w *world) serve(t *testing.T, pod *sandbox.Namespace, at netip.AddrPort, name string) {
	t.Helper()
	for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
		w.serveOne(t, protocol, pod, at, name)
	}
}

// serveOne is serve for one protocol.
func (w *world) serveOne(t *testing.T, protocol lb.Protocol, pod *sandbox.Namespace, at netip.AddrPort, name string) {
	t.Helper()
	if protocol == lb.UDP {
		udp, err := sandbox.ServeUDPEcho(pod, at.String(), name)
		must(t, err)
		t.Cleanup(func() { must(t, udp.Close()) })
		return
	}
	network := "tcp"
	if at.Addr().Is4() {
		network = "tcp4" // or package net takes 0.0.0.0 for both families
	}
	tcp, err := pod.Listen(network, at.String())
	must(t, err)
	t.Cleanup(func() { must(t, tcp.Close()) })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go greet(c, name)
		}
	}()
}

func greet(c net.Conn, name string) {
	defer c.Close()
	if _, err := fmt.Fprintln(c, name); err != nil {
		return
	}
	_, _ = c.Read(make([]byte, 1)) // until the client is gone
}

// start loads the datapath and attaches it, as an agent does that comes up. What
// is pinned already is adopted.
func (w *world) start(t *testing.T) {
	t.Helper()
	cgroup, err := attach.OpenCgroup(w.cgroup.Path())
	must(t, err)
	var cookie uint64
	must(t, w.node.Namespace().Do(func() (err error) { cookie, err = attach.NetnsCookie(); return err }))
	w.datapath, err = datapath.Open(datapath.Config{
		Root: w.root, CgroupID: cgroup.ID, HostNetnsCookie: cookie,
		Sizes: datapath.Sizes{Frontends: 2048, Services: 512, Slots: 4096, Members: 16384, SourceRanges: 256, Peers: 1024},
	})
	must(t, err)
	services, slots := w.datapath.Limits()
	w.reconciler = reconciler.New(w.datapath, reconciler.Limits{Services: services, Slots: slots})
	held, err := w.datapath.Load()
	must(t, err)
	w.reconciler.Adopt(held)
	r := w.reconciler.ApplyAll(w.store.All())
	if again := len(held.NodeAddresses) > 0; len(r.Failed) > 0 || again && r.Writes+r.Deletes > 0 {
		t.Fatalf("start wrote %d rows, deleted %d, failed with %v; want nothing to do", r.Writes, r.Deletes, r.Failed)
	}
	for _, h := range attach.Hooks() {
		must(t, attach.Attach(cgroup, h, w.datapath.Program(h.Program), datapath.LinkPath(w.root, h.Name)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.ender = sockets.NewEnder(w.datapath, func(r sockets.Report) {
		w.ended.Lock()
		defer w.ended.Unlock()
		w.ended.gone += r.Gone
		w.ended.came += r.Came
		w.ended.ticket = r.Ticket
		if r.Err != nil {
			w.ended.err = r.Err
		}
	})
	var running sync.WaitGroup
	running.Go(func() { w.ender.Run(ctx) })
	w.stopEnder = func() {
		cancel()
		running.Wait()
	}
}

// stop leaves everything in the kernel, as an agent does that goes down.
func (w *world) stop(t *testing.T) {
	t.Helper()
	w.stopEnder()
	w.ended.Lock()
	defer w.ended.Unlock()
	if w.ended.err != nil {
		t.Errorf("ending sockets: %v", w.ended.err)
	}
	must(t, w.datapath.Close())
}

// needIterators skips a test about finding UDP sockets.
func (w *world) needIterators(t *testing.T) {
	t.Helper()
	if err := w.datapath.NoIterators; err != nil {
		t.Skipf("this kernel cannot look for UDP sockets: %v", err)
	}
}

// vip returns an IPv4 and an IPv6 address that no other Service has.
func (w *world) vip() [2]netip.Addr {
	w.vips++
	n := byte(w.vips)
	return [2]netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, n}), netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x96, 15: n})}
}

// service is a Service in both families, with each port on the same number.
type service struct {
	w        *world
	spec     lb.Service
	vips     [2]netip.Addr
	backends map[string]lb.Endpoint // by name, without the address
	slices   []lb.Name

	// What the Services of expose have beside their ClusterIPs.
	balancers, externals [2]netip.Addr
	nodePort             uint16
}

// servicePort is the port of every Service of the tests.
const servicePort = 80

// service makes a Service whose backends are named like "a:8080". It has one port
// and no frontends but its ClusterIPs.
func (w *world) service(t *testing.T, protocol lb.Protocol, backends ...string) *service {
	t.Helper()
	s := w.newService()
	s.spec.Ports = []lb.Port{{Protocol: protocol, Number: servicePort}}
	w.store.SetService(s.spec)
	s.set(t, backends...)
	return s
}

// expose makes a Service that has frontends of every kind, for TCP and for UDP,
// all changed as change says, which may be nil.
func (w *world) expose(t *testing.T, change func(*lb.Service), backends ...string) *service {
	t.Helper()
	s := w.newService()
	n := byte(w.vips)
	s.nodePort = 30000 + uint16(n)
	s.balancers = [2]netip.Addr{netip.AddrFrom4([4]byte{198, 51, 100, n}), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 1, 15: n})}
	s.externals = [2]netip.Addr{netip.AddrFrom4([4]byte{203, 0, 113, n}), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 2, 15: n})}
	s.spec.LoadBalancerIPs, s.spec.ExternalIPs = s.balancers[:], s.externals[:]
	s.spec.Ports = []lb.Port{
		{Name: "tcp", Protocol: lb.TCP, Number: servicePort, NodePort: s.nodePort},
		{Name: "udp", Protocol: lb.UDP, Number: servicePort, NodePort: s.nodePort},
	}
	if change != nil {
		change(&s.spec)
	}
	w.store.SetService(s.spec)
	s.set(t, backends...)
	return s
}

func (w *world) newService() *service {
	s := &service{w: w, vips: w.vip(), backends: map[string]lb.Endpoint{}}
	s.spec = lb.Service{
		Name: lb.Name{Namespace: "default", Name: fmt.Sprintf("service-%d", w.vips)}, ClusterIPs: s.vips[:],
	}
	return s
}

// update changes the Service itself. What change puts into it must be new.
func (s *service) update(t *testing.T, change func(*lb.Service)) {
	t.Helper()
	change(&s.spec)
	s.w.store.SetService(s.spec)
	s.w.apply(t)
}

// set gives the Service these ready backends alone.
func (s *service) set(t *testing.T, backends ...string) {
	t.Helper()
	clear(s.backends)
	for _, b := range backends {
		s.backends[b] = lb.Endpoint{Ready: true, Serving: true}
	}
	s.apply(t)
}

// condition sets a backend's conditions, and what else an endpoint has.
func (s *service) condition(t *testing.T, backend string, e lb.Endpoint) {
	t.Helper()
	s.backends[backend] = e
	s.apply(t)
}

// apply brings the Service's slices, one for each backend and family, into the
// kernel.
func (s *service) apply(t *testing.T) {
	t.Helper()
	for _, name := range s.slices {
		s.w.store.DeleteSlice(name)
	}
	s.slices = nil
	for _, name := range slices.Sorted(maps.Keys(s.backends)) {
		for i, family := range []lb.Family{lb.IPv4, lb.IPv6} {
			at := backendAddr(name, i)
			e := s.backends[name]
			e.Addr = at.Addr()
			slice := lb.Slice{
				Name:    lb.Name{Namespace: "default", Name: fmt.Sprintf("%s-%s-%v", s.spec.Name.Name, name, family)},
				Service: s.spec.Name.Name, Family: family, Endpoints: []lb.Endpoint{e},
			}
			for _, port := range s.spec.Ports {
				slice.Ports = append(slice.Ports, lb.SlicePort{Name: port.Name, Protocol: port.Protocol, Number: at.Port()})
			}
			s.w.store.SetSlice(slice)
			s.slices = append(s.slices, slice.Name)
		}
	}
	s.w.apply(t)
}

// remove deletes the Service and its slices.
func (s *service) remove(t *testing.T) {
	t.Helper()
	s.w.store.DeleteService(s.spec.Name)
	clear(s.backends)
	s.apply(t)
}

// backendAddr returns the address that a backend has in a family: 0 for IPv4,
// 1 for IPv6.
func backendAddr(name string, family int) netip.AddrPort {
	var port uint16
	if _, err := fmt.Sscanf(name[2:], "%d", &port); err != nil {
		panic(err) // a typing error in a test
	}
	return netip.AddrPortFrom(pods[name[:1]][family], port)
}

// apply brings what has changed into the kernel and does what follows from it, as
// an agent does.
func (w *world) apply(t *testing.T) {
	t.Helper()
	r := w.reconciler.Apply(w.store.Changes())
	for name, err := range r.Failed {
		t.Fatalf("apply Service %v: %v", name, err)
	}
	if r.Unremembered {
		w.forgetAffinities(t)
	}
	if r.Stranded || len(r.Answered) > 0 {
		w.ticket++
		w.ender.Ask(sockets.Request{Answered: r.Answered, Ticket: w.ticket})
	}
}

// waitWalk waits until the Ender has done what was asked of it so far.
func (w *world) waitWalk(t *testing.T) {
	t.Helper()
	testutil.Eventually(t, testutil.Patience(), "walk over the sockets", func() error {
		w.ended.Lock()
		defer w.ended.Unlock()
		if w.ended.ticket < w.ticket {
			return fmt.Errorf("request %d of %d is done", w.ended.ticket, w.ticket)
		}
		return nil
	})
}

// forgetAffinities deletes the entries that lead nowhere any more.
func (w *world) forgetAffinities(t *testing.T) {
	t.Helper()
	_, err := w.datapath.ForgetAffinities(func(e datapath.AffinityEntry) bool {
		for side := range lb.Side(lb.Sides) {
			if w.reconciler.HasMember(lb.Member{Service: e.Service, Backend: e.Backend, Use: lb.UseOn(side)}) {
				return false
			}
		}
		return true
	})
	must(t, err)
}

// counters returns how much each counter has grown during f; those that have
// not are left out.
func (w *world) counters(t *testing.T, f func()) map[string]uint64 {
	t.Helper()
	before := w.readCounters(t)
	f()
	after := w.readCounters(t)
	maps.DeleteFunc(after, func(name string, n uint64) bool { return n == before[name] })
	for name := range after {
		after[name] -= before[name]
	}
	return after
}

func (w *world) readCounters(t *testing.T) map[string]uint64 {
	t.Helper()
	list, err := w.datapath.Counters()
	must(t, err)
	out := map[string]uint64{}
	for _, c := range list {
		out[c.Name] = c.Value
	}
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// usualNodePorts is where NodePorts are reached unless a test says otherwise.
var usualNodePorts = lb.NodePorts{Primary: true, Loopback: true}
