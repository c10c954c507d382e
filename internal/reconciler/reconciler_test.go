// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

// compareTables compares as == does what it can, and no list like an empty one.
var compareTables = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Transformer("list", func(l []lb.Backend) []lb.Backend { return append([]lb.Backend{}, l...) }),
}

var testLimits = reconciler.Limits{Services: 1 << 10, Slots: 1 << 12}

// meaning is what tables say, without the numbers they say it with.
type meaning struct {
	Frontends     map[lb.FrontendKey]string
	Services      map[lb.ServicePort]serviceMeaning
	Members       map[lb.ServicePort]map[lb.Use][]lb.Backend
	Sources       map[lb.ServicePort][]netip.Prefix
	NodeAddresses map[netip.Addr]lb.NodeAddress
	ServiceCIDRs  []netip.Prefix
	Problems      map[lb.Name]lb.Problem
}

type serviceMeaning struct {
	Sides        [lb.Sides][]lb.Backend
	Elsewhere    [lb.Sides]bool
	Affinity     uint32
	Restricted   bool
	NodeAllowed  bool
	OutsideLocal bool
}

func newMeaning() meaning {
	return meaning{
		Frontends: map[lb.FrontendKey]string{},
		Services:  map[lb.ServicePort]serviceMeaning{},
		Members:   map[lb.ServicePort]map[lb.Use][]lb.Backend{},
		Sources:   map[lb.ServicePort][]netip.Prefix{},
	}
}

func (m meaning) addMembers(sp lb.ServicePort, use lb.Use, backends ...lb.Backend) {
	if len(backends) == 0 {
		return
	}
	if m.Members[sp] == nil {
		m.Members[sp] = map[lb.Use][]lb.Backend{}
	}
	all := slices.Concat(m.Members[sp][use], backends)
	slices.SortFunc(all, lb.Backend.Compare)
	m.Members[sp][use] = all
}

// meaningOf fails the test if a reader could stumble over the tables, or if
// they hold a row that nobody needs.
func meaningOf(tb testing.TB, t lb.Tables) meaning {
	tb.Helper()
	for _, err := range t.Check() {
		tb.Errorf("check: %v", err)
	}
	m := newMeaning()
	m.NodeAddresses, m.Problems = t.NodeAddresses, t.Problems
	m.ServiceCIDRs = slices.SortedFunc(maps.Keys(t.ServiceCIDRs), netip.Prefix.Compare)
	for key, f := range t.Frontends {
		m.Frontends[key] = f.Kind.String()
		if f.Service != lb.NoService {
			m.Frontends[key] += " of " + t.Names[f.Service].String()
		}
	}
	for id, sp := range t.Names {
		if _, twice := m.Services[sp]; twice {
			tb.Errorf("%v has two IDs", sp)
		}
		row := t.Services[id]
		s := serviceMeaning{
			Affinity: row.Affinity, Restricted: row.Restricted, NodeAllowed: row.NodeAllowed, OutsideLocal: row.OutsideLocal,
		}
		for i, r := range row.Sides {
			s.Sides[i] = slices.SortedFunc(slices.Values(t.Backends(r)), lb.Backend.Compare)
			s.Elsewhere[i] = r.Elsewhere()
		}
		m.Services[sp] = s
	}
	for member := range t.Members {
		m.addMembers(t.Names[member.Service], member.Use, member.Backend)
	}
	for source := range t.Sources {
		sp := t.Names[source.Service]
		m.Sources[sp] = append(m.Sources[sp], source.Prefix)
		slices.SortFunc(m.Sources[sp], netip.Prefix.Compare)
	}
	return m
}

// wantMeaning is what tables should say when all is wanted.
func wantMeaning(all lb.Delta) meaning {
	m := newMeaning()
	m.NodeAddresses, m.Problems = all.NodeAddresses, all.Problems
	m.ServiceCIDRs = slices.SortedFunc(maps.Keys(all.ServiceCIDRs), netip.Prefix.Compare)
	for key, owner := range all.Frontends {
		m.Frontends[key] = owner.Kind.String()
		if !key.IsWildcard() {
			m.Frontends[key] += " of " + owner.Service.String()
		}
	}
	for sp, b := range all.Services {
		s := serviceMeaning{
			Affinity: b.Affinity, Restricted: b.Restricted, NodeAllowed: b.NodeAllowed, OutsideLocal: b.OutsideLocal,
		}
		for i, set := range b.Sides {
			s.Sides[i], s.Elsewhere[i] = set.Backends, set.Elsewhere
			if b.Affinity > 0 {
				m.addMembers(sp, lb.UseOn(lb.Side(i)), set.Backends...)
			}
		}
		m.Services[sp] = s
		if sp.Protocol == lb.UDP {
			m.addMembers(sp, lb.UseServing, b.Serving...)
		}
		if len(b.Sources) > 0 {
			m.Sources[sp] = b.Sources
		}
	}
	return m
}

// world is a store, a reconciler and a kernel, with a random history.
type world struct {
	tb     testing.TB
	rng    *rand.Rand
	store  *lb.Store
	rec    *reconciler.Reconciler
	kernel *fakeKernel
}

var storeConfig = lb.Config{NodeName: "here"}

func newWorld(tb testing.TB, seed uint64) *world {
	kernel := newFake(tb, testLimits)
	kernel.wanted = []lb.Delta{{}}
	return &world{
		tb:     tb,
		rng:    rand.New(rand.NewPCG(seed, 0)),
		store:  lb.NewStore(storeConfig),
		rec:    reconciler.New(kernel, testLimits),
		kernel: kernel,
	}
}

// change alters a few objects: few names, addresses and ports, so that they
// often get in each other's way.
func (w *world) change() {
	for range 1 + w.rng.IntN(4) {
		service := lb.Name{Namespace: "ns", Name: fmt.Sprint("svc", w.rng.IntN(4))}
		slice := lb.Name{Namespace: "ns", Name: fmt.Sprint("slice", w.rng.IntN(6))}
		switch n := w.rng.IntN(12); {
		case n == 0:
			w.store.DeleteService(service)
		case n == 1:
			w.store.DeleteSlice(slice)
		case n == 2:
			w.changeNode()
		case n < 6:
			w.store.SetService(w.service(service))
		default:
			w.store.SetSlice(w.slice(slice))
		}
	}
}

// changeNode alters what is known of the node.
func (w *world) changeNode() {
	switch w.rng.IntN(3) {
	case 0:
		w.store.SetLocalAddresses(some(w.rng, []netip.Addr{
			netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("fd09::1")}))
	case 1:
		w.store.SetNodePorts(lb.NodePorts{Loopback: w.rng.IntN(2) == 0})
	case 2:
		w.store.SetServiceCIDRs(some(w.rng, []netip.Prefix{
			netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("10.96.0.0/31"), netip.MustParsePrefix("fd00::/112")}))
	}
}

// some returns some of the list, in the order of the list.
func some[T any](rng *rand.Rand, list []T) []T {
	var out []T
	for _, x := range list {
		if rng.IntN(2) == 0 {
			out = append(out, x)
		}
	}
	return out
}

var testPorts = []lb.Port{
	{Name: "web", Protocol: lb.TCP, Number: 80, NodePort: 30080},
	{Name: "alt", Protocol: lb.TCP, Number: 80, NodePort: 30081},
	{Name: "web", Protocol: lb.TCP, Number: 8080, NodePort: 30080},
	{Name: "dns", Protocol: lb.UDP, Number: 53, NodePort: 30053},
	{Name: "dns2", Protocol: lb.UDP, Number: 53, NodePort: 30053},
}

// Addresses that are a Service's load-balancer IP one day and another one's
// external IP the next, and sources of which some hold others.
var (
	testVIPs    = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("fd02::1")}
	testSources = []netip.Prefix{
		netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("10.9.1.0/24"), netip.MustParsePrefix("10.9.1.128/25"),
		netip.MustParsePrefix("10.8.0.0/13"), netip.MustParsePrefix("fd09::/64"), netip.MustParsePrefix("fd09::/32"),
	}
)

func (w *world) service(name lb.Name) lb.Service {
	svc := lb.Service{Name: name, Created: time.Unix(int64(w.rng.IntN(3)), 0)}
	svc.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(w.rng.IntN(3))})}
	if w.rng.IntN(3) == 0 {
		svc.ClusterIPs = append(svc.ClusterIPs, netip.MustParseAddr(fmt.Sprintf("fd00::%d", w.rng.IntN(2))))
	}
	if svc.Foreign = w.rng.IntN(8) == 0; svc.Foreign {
		return svc
	}
	for _, i := range w.rng.Perm(len(testPorts))[:1+w.rng.IntN(3)] {
		svc.Ports = append(svc.Ports, testPorts[i])
		if w.rng.IntN(2) == 0 {
			svc.Ports[len(svc.Ports)-1].NodePort = 0
		}
	}
	svc.LoadBalancerIPs, svc.ExternalIPs = some(w.rng, testVIPs), some(w.rng, testVIPs)
	svc.InternalLocal, svc.ExternalLocal = w.rng.IntN(3) == 0, w.rng.IntN(3) == 0
	svc.Affinity = uint32(10 * max(0, w.rng.IntN(4)-1))
	if w.rng.IntN(2) == 0 {
		svc.Sources = some(w.rng, testSources)
	}
	return svc
}

func (w *world) slice(name lb.Name) lb.Slice {
	s := lb.Slice{Name: name, Service: fmt.Sprint("svc", w.rng.IntN(4)), Family: lb.IPv4}
	if w.rng.IntN(4) == 0 {
		s.Family = lb.IPv6
	}
	s.Ports = []lb.SlicePort{
		{Name: "web", Protocol: lb.TCP, Number: uint16(8080 + w.rng.IntN(2))},
		{Name: "alt", Protocol: lb.TCP, Number: 9090},
		{Name: "dns", Protocol: lb.UDP, Number: 5353},
		{Name: "dns2", Protocol: lb.UDP, Number: 5353},
	}
	for range w.rng.IntN(5) {
		e := lb.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(w.rng.IntN(6))})}
		if s.Family == lb.IPv6 {
			e.Addr = netip.MustParseAddr(fmt.Sprintf("fd01::%d", w.rng.IntN(6)))
		}
		e.Ready = w.rng.IntN(2) == 0
		e.Serving = e.Ready || w.rng.IntN(2) == 0
		e.Terminating = w.rng.IntN(3) == 0
		e.Node = []string{"here", "there"}[w.rng.IntN(2)]
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// apply brings the store's changes into the kernel.
func (w *world) apply() reconciler.Result {
	d := w.store.Changes()
	w.kernel.wanted = append(w.kernel.wanted, w.store.All())
	return w.noteResult(w.rec.Apply(d))
}

func (w *world) applyAll() reconciler.Result {
	all := w.store.All()
	w.kernel.wanted = append(w.kernel.wanted, all)
	return w.noteResult(w.rec.ApplyAll(all))
}

// noteResult checks that nothing pending is a secret and, when all is as
// wanted, that readers have nothing but that from now on.
func (w *world) noteResult(res reconciler.Result) reconciler.Result {
	w.tb.Helper()
	if len(res.Failed) > 0 && !w.rec.Pending() {
		w.tb.Errorf("failed %v, but nothing is pending", res.Failed)
	}
	w.kernel.checkRestricted()
	if !w.rec.Pending() {
		w.kernel.wanted = w.kernel.wanted[len(w.kernel.wanted)-1:]
		clear(w.kernel.lacking)
	}
	return res
}

// settled fails the test unless the kernel holds what is wanted, the
// reconciler knows it and has nothing more to write.
func (w *world) settled() {
	w.tb.Helper()
	all := w.store.All()
	if w.rec.Pending() {
		w.tb.Error("something is pending")
	}
	if diff := cmp.Diff(wantMeaning(all), meaningOf(w.tb, w.kernel.load()), compareTables); diff != "" {
		w.tb.Errorf("the kernel differs from what is wanted (-want +got):\n%s", diff)
	}
	if n := w.kernel.load().Differences(w.rec.Tables()); n > 0 {
		w.tb.Errorf("the reconciler is mistaken about %d rows of the kernel (-kernel +reconciler):\n%s", n,
			cmp.Diff(w.kernel.load().String(), w.rec.Tables().String()))
	}
	calls := w.kernel.calls
	if res := w.applyAll(); res.Writes+res.Deletes > 0 || w.kernel.calls != calls {
		w.tb.Errorf("a second apply made %d writes and %d deletes in %d calls", res.Writes, res.Deletes, w.kernel.calls-calls)
	}
}

// restart forgets the reconciler and starts another one from what the kernel
// holds.
func (w *world) restart() {
	w.rec = reconciler.New(w.kernel, testLimits)
	w.rec.Adopt(w.kernel.load())
	w.rec.FreeIDs(w.kernel.remember)
}

const steps = 6

// seeds returns how many random histories to go through.
func seeds(n int) uint64 {
	if testing.Short() {
		return uint64(n)/10 + 1
	}
	return uint64(n)
}

func TestReadersMeetOnlyWhatIsWanted(t *testing.T) {
	for seed := range seeds(80) {
		w := newWorld(t, seed)
		for range 4 * steps {
			w.change()
			if w.rng.IntN(8) == 0 {
				w.applyAll()
			} else {
				w.apply()
			}
			if w.rng.IntN(4) == 0 {
				w.rec.FreeIDs(w.kernel.remember)
			}
			if w.rng.IntN(4) == 0 { // sockets come to an end
				clear(w.kernel.remembered)
				w.kernel.hold()
			}
			w.settled()
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// countCalls returns how many calls the history of a seed makes.
func countCalls(t *testing.T, seed uint64) int {
	w := newWorld(t, seed)
	for range steps {
		w.change()
		w.apply()
	}
	return w.kernel.calls
}

func TestOneFailedWriteIsMadeGoodByRetry(t *testing.T) {
	for seed := range seeds(10) {
		for n := range countCalls(t, seed) {
			w := newWorld(t, seed)
			w.kernel.fails = func(_ string, call int) bool { return call == n+1 }
			for range steps {
				w.change()
				w.apply()
			}
			w.noteResult(w.rec.Retry())
			w.settled()
			if t.Failed() {
				t.Fatalf("seed %d, call %d", seed, n+1)
			}
		}
	}
}

func TestWritesThatFailForGood(t *testing.T) {
	for seed := range seeds(10) {
		for n := range countCalls(t, seed) {
			w := newWorld(t, seed)
			w.kernel.fails = func(_ string, call int) bool { return call > n }
			for range steps {
				w.change()
				w.apply()
			}
			w.noteResult(w.rec.Retry())
			w.kernel.fails = func(string, int) bool { return false }
			w.noteResult(w.rec.Retry())
			w.settled()
			if t.Failed() {
				t.Fatalf("seed %d, from call %d on", seed, n+1)
			}
		}
	}
}

// failingOps are the methods of Kernel that fail for a while.
var failingOps = []string{
	"SetFrontend", "DeleteFrontend", "SetRange", "SetOptions", "SetSlots", "SetMember", "DeleteMember",
	"SetSource", "DeleteSource", "SetNodeAddress", "DeleteNodeAddress", "SetServiceCIDR", "DeleteServiceCIDR",
	"SetName", "DeleteName", "SetProblem", "DeleteProblem", "WaitReaders",
}

func TestEachOperationFailingForAWhile(t *testing.T) {
	for _, failing := range failingOps {
		t.Run(failing, func(t *testing.T) {
			for seed := range seeds(20) {
				w := newWorld(t, seed)
				for step := range 3 * steps {
					w.kernel.fails = func(op string, _ int) bool { return op == failing && step%3 > 0 }
					w.change()
					w.apply()
					if step%3 == 0 {
						w.noteResult(w.rec.Retry())
						w.settled()
					}
				}
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

func TestAnAgentMayDieAfterAnyWrite(t *testing.T) {
	for seed := range seeds(10) {
		for n := range countCalls(t, seed) {
			w := newWorld(t, seed)
			dead := false
			w.kernel.fails = func(_ string, call int) bool { dead = dead || call > n; return dead }
			for range steps {
				w.change()
				w.apply()
				if dead {
					break
				}
			}
			w.kernel.fails = func(string, int) bool { return false }
			w.restart()
			if n%2 == 0 { // the cluster goes on while the agent is away
				w.change()
			}
			w.applyAll()
			w.settled()
			if t.Failed() {
				t.Fatalf("seed %d, died before call %d", seed, n+1)
			}
		}
	}
}

func TestRepairMakesDamagedTablesGood(t *testing.T) {
	for seed := range seeds(200) {
		w := newWorld(t, seed)
		for range 2 * steps {
			w.change()
			w.apply()
		}
		w.kernel.damage()
		for range 1 + w.rng.IntN(5) {
			w.damage()
		}
		before := w.kernel.load()
		w.rec.Adopt(w.kernel.load())
		res := w.rec.ApplyAll(w.store.All())
		changed := w.kernel.load().Differences(before) > 0
		if written := res.Writes+res.Deletes > 0; written != changed {
			t.Errorf("%d writes and %d deletes, but changed is %v", res.Writes, res.Deletes, changed)
		}
		w.settled()
		if t.Failed() {
			t.Fatalf("seed %d, damaged tables were:\n%v", seed, before)
		}
	}
}

// damage alters a row as no reconciler would.
func (w *world) damage() {
	id := lb.ServiceID(1 + w.rng.IntN(12))
	other := lb.ServiceID(1 + w.rng.IntN(12))
	key := lb.FrontendKey{VIP: netip.AddrFrom4([4]byte{10, 96, 0, byte(w.rng.IntN(3))}), Port: 80, Protocol: lb.TCP}
	backend := lb.Backend{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(w.rng.IntN(6))}), Port: 5353}
	source := lb.Source{Service: id, Prefix: testSources[w.rng.IntN(len(testSources))]}
	addr := []netip.Addr{netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("192.168.1.9")}[w.rng.IntN(2)]
	k := w.kernel
	row := k.rows[id]
	switch w.rng.IntN(17) {
	case 0:
		delete(k.frontends, key)
	case 1:
		k.frontends[key] = lb.Frontend{Service: id, Kind: lb.FrontendKind(w.rng.IntN(7))}
	case 2:
		k.frontends[lb.FrontendKey{VIP: key.VIP}] = lb.Frontend{Service: id, Kind: lb.KindClusterIP}
	case 3:
		delete(k.names, id)
	case 4:
		k.names[id] = lb.ServicePort{Service: lb.Name{Namespace: "ns", Name: "svc1"}, Port: "web", Protocol: lb.TCP, Family: lb.IPv4}
	case 5:
		k.rows[id] = k.rows[other]
	case 6: // one side has what another service has, or another side
		row.Sides[w.rng.IntN(lb.Sides)] = k.rows[other].Sides[w.rng.IntN(lb.Sides)]
		k.rows[id] = row
	case 7: // sides that overlap in part
		r := &row.Sides[w.rng.IntN(lb.Sides)]
		r.Base++
		k.rows[id] = row
	case 8:
		k.slots[row.Sides[w.rng.IntN(lb.Sides)].Base] = backend
	case 9:
		k.members[lb.Member{Service: id, Backend: backend, Use: lb.Use(w.rng.IntN(6))}] = struct{}{}
	case 10:
		maps.DeleteFunc(k.members, func(m lb.Member, _ struct{}) bool { return m.Service == id && w.rng.IntN(3) == 0 })
	case 11:
		row.Affinity, row.Restricted, row.NodeAllowed = uint32(w.rng.IntN(2)), w.rng.IntN(2) == 0, w.rng.IntN(2) == 0
		row.OutsideLocal = w.rng.IntN(2) == 0
		k.rows[id] = row
	case 12:
		k.sources[source] = struct{}{}
	case 13:
		maps.DeleteFunc(k.sources, func(s lb.Source, _ struct{}) bool { return s.Service == id })
	case 14:
		k.addresses[addr] = lb.NodeAddress(1 + w.rng.IntN(3))
	case 15:
		delete(k.addresses, addr)
	case 16:
		k.cidrs[netip.MustParsePrefix("10.0.0.0/8")] = struct{}{}
		delete(k.cidrs, netip.MustParsePrefix("10.96.0.0/12"))
	}
}
