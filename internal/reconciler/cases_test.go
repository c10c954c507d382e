// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

func nsName(name string) lb.Name { return lb.Name{Namespace: "ns", Name: name} }

// svcWith returns a Service with one port, named "p".
func svcWith(name, ip string, protocol lb.Protocol, port uint16) lb.Service {
	return lb.Service{
		Name:       nsName(name),
		ClusterIPs: []netip.Addr{netip.MustParseAddr(ip)},
		Ports:      []lb.Port{{Name: "p", Protocol: protocol, Number: port}},
	}
}

// sliceOf returns the slice of a Service made by svcWith, with ready endpoints
// 10.0.0.n for each n.
func sliceOf(service string, protocol lb.Protocol, n ...byte) lb.Slice {
	s := lb.Slice{
		Name:    nsName(service + "-slice"),
		Service: service,
		Family:  lb.IPv4,
		Ports:   []lb.SlicePort{{Name: "p", Protocol: protocol, Number: 9000}},
	}
	for _, b := range n {
		s.Endpoints = append(s.Endpoints, lb.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 0, 0, b}), Ready: true, Serving: true})
	}
	return s
}

// smallWorld returns a world with tables of other sizes.
func smallWorld(tb testing.TB, limits reconciler.Limits) *world {
	w := newWorld(tb, 0)
	w.kernel.limits = limits
	w.rec = reconciler.New(w.kernel, limits)
	return w
}

// mustFail fails the test unless exactly this Service has failed, with an error
// that contains text.
func mustFail(t *testing.T, res reconciler.Result, name, text string) {
	t.Helper()
	err := res.Failed[nsName(name)]
	if len(res.Failed) != 1 || err == nil || !strings.Contains(err.Error(), text) {
		t.Fatalf("failed %v, want only ns/%s because of %q", res.Failed, name, text)
	}
}

func TestIDsRestUntilNobodyRemembersThem(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart=", restart), func(t *testing.T) {
			w := smallWorld(t, reconciler.Limits{Services: 4, Slots: 64})
			w.store.SetSlice(sliceOf("dns", lb.UDP, 1, 2))
			for range 3 {
				w.store.SetService(svcWith("dns", "10.96.0.10", lb.UDP, 53))
				w.apply()
				w.settled()
				w.store.DeleteService(nsName("dns"))
				w.apply()
				w.settled()
			}
			if restart {
				w.rec = reconciler.New(w.kernel, w.kernel.limits)
				w.rec.Adopt(w.kernel.load())
				w.applyAll()
			}
			w.store.SetService(svcWith("dns", "10.96.0.10", lb.UDP, 53))
			mustFail(t, w.apply(), "dns", "--max-services")

			w.rec.FreeIDs(w.kernel.remember)
			mustFail(t, w.noteResult(w.rec.Retry()), "dns", "--max-services")

			delete(w.kernel.remembered, 2)
			w.rec.FreeIDs(w.kernel.remember)
			if res := w.noteResult(w.rec.Retry()); len(res.Failed) > 0 {
				t.Fatalf("failed %v although an ID is free", res.Failed)
			}
			if got := w.kernel.rows[2].Sides[lb.SideClusterIP].Generation; got != 3 {
				t.Errorf("the ID's new service has generation %d, want one after the old service's 2", got)
			}
			w.settled()
		})
	}
}

func TestRepairOfTablesThatWereEmptiedTakesNoIDAway(t *testing.T) {
	w := smallWorld(t, reconciler.Limits{Services: 3, Slots: 64})
	w.store.SetService(svcWith("web", "10.96.0.1", lb.TCP, 80))
	w.store.SetSlice(sliceOf("web", lb.TCP, 1))
	w.apply()
	for range 4 {
		w.kernel.damage()
		clear(w.kernel.frontends)
		clear(w.kernel.names)
		clear(w.kernel.rows)
		clear(w.kernel.remembered)
		w.rec.Adopt(w.kernel.load())
		w.rec.FreeIDs(w.kernel.remember)
		w.rec.ApplyAll(w.store.All())
		w.settled()
	}
}

func TestFullSlotsFailOnlyTheServiceThatDoesNotFit(t *testing.T) {
	w := smallWorld(t, reconciler.Limits{Services: 64, Slots: 8})
	for i, name := range []string{"a", "b"} {
		w.store.SetService(svcWith(name, fmt.Sprint("10.96.0.", i+1), lb.TCP, 80))
	}
	w.store.SetSlice(sliceOf("a", lb.TCP, 1, 2, 3))
	w.store.SetSlice(sliceOf("b", lb.TCP, 4))
	w.apply()
	w.settled()

	w.store.SetSlice(sliceOf("a", lb.TCP, 1, 2, 3, 4, 5))
	w.store.SetSlice(sliceOf("b", lb.TCP, 4, 5))
	mustFail(t, w.apply(), "a", "--max-slots")
	m := meaningOf(t, w.kernel.load())
	if n := len(m.Frontends); n != 4 {
		t.Errorf("%d frontends, want all 4", n)
	}
	if p := m.Problems[nsName("a")]; !strings.Contains(string(p), "--max-slots") {
		t.Errorf("the problem is %q, want one that names --max-slots", p)
	}

	w.store.DeleteService(nsName("b"))
	mustFail(t, w.apply(), "a", "--max-slots") // it is not named by the change
	if res := w.noteResult(w.rec.Retry()); len(res.Failed) > 0 {
		t.Errorf("failed %v although there is room", res.Failed)
	}
	w.settled()
}

func TestRetryMakesRoomBeforeItUsesIt(t *testing.T) {
	w := newWorld(t, 0)
	w.kernel.maxFrontends = 2
	w.store.SetService(svcWith("a", "10.96.0.1", lb.TCP, 80))
	w.apply()
	w.store.SetService(svcWith("a", "10.96.0.2", lb.TCP, 80))
	mustFail(t, w.apply(), "a", "full")
	if len(w.kernel.frontends) != 2 {
		t.Errorf("frontends %v, want the old ones for as long as the new ones fail", w.kernel.frontends)
	}
	if res := w.noteResult(w.rec.Retry()); len(res.Failed) > 0 {
		t.Errorf("failed %v", res.Failed)
	}
	w.settled()
}

// restrictedTo returns the Service "a", with a load-balancer IP that is for one
// range alone.
func restrictedTo(sources ...string) lb.Service {
	svc := svcWith("a", "10.96.0.1", lb.UDP, 80)
	svc.LoadBalancerIPs = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	for _, s := range sources {
		svc.Sources = append(svc.Sources, netip.MustParsePrefix(s))
	}
	return svc
}

func TestARestrictionIsInForceAlsoWhenAWriteFails(t *testing.T) {
	for _, op := range []string{"SetSource", "SetMember", "SetSlots", "SetRange"} {
		for _, affinity := range []uint32{0, 30} {
			t.Run(fmt.Sprintf("%s with affinity %d", op, affinity), func(t *testing.T) {
				w := newWorld(t, 0)
				w.store.SetService(restrictedTo())
				w.store.SetSlice(sliceOf("a", lb.UDP, 1))
				w.apply()
				w.settled()

				w.kernel.fails = func(o string, _ int) bool { return o == op }
				svc := restrictedTo("10.9.0.0/16")
				svc.Affinity = affinity
				w.store.SetService(svc)
				w.store.SetSlice(sliceOf("a", lb.UDP, 1, 2))
				mustFail(t, w.apply(), "a", "injected")
				if row := w.kernel.rows[1]; !row.Restricted || row.Affinity > 0 {
					t.Errorf("the row is %+v, want a restricted one, and no affinity before the flip", row)
				}
				w.kernel.fails = func(string, int) bool { return false }
				w.noteResult(w.rec.Retry())
				w.settled()
			})
		}
	}
}

func TestASourceThatDoesNotFitKeepsNobodyOutWhoseSourceDoes(t *testing.T) {
	w := newWorld(t, 0)
	w.store.SetService(restrictedTo())
	w.store.SetSlice(sliceOf("a", lb.UDP, 1))
	w.apply()
	w.kernel.maxSources = 1
	w.store.SetService(restrictedTo("10.8.0.0/16", "10.9.0.0/16"))
	mustFail(t, w.apply(), "a", "full")
	if !w.kernel.rows[1].Restricted || len(w.kernel.sources) != 1 {
		t.Errorf("the row is %+v and sources are %v, want a restricted one and what fits", w.kernel.rows[1], w.kernel.sources)
	}
	w.kernel.maxSources = 0
	w.noteResult(w.rec.Retry())
	w.settled()
}

func TestTheNodeIsKeptOutAlsoWhenAWriteFailsAndLetInOnlyWithTheRest(t *testing.T) {
	w := newWorld(t, 0)
	w.store.SetLocalAddresses([]netip.Addr{netip.MustParseAddr("10.9.0.1")})
	steps := []struct {
		what    string
		service lb.Service
		allowed bool // with the rest, not before
	}{
		{"becomes restricted, without the node", restrictedTo("10.8.0.0/16"), false},
		{"with the node", restrictedTo("10.8.0.0/16", "10.9.0.0/16"), true},
		{"without the node again", restrictedTo("10.8.0.0/16"), false},
		{"open", restrictedTo(), true},
	}
	w.store.SetService(restrictedTo())
	w.apply()
	for i, step := range steps {
		w.kernel.fails = func(op string, _ int) bool { return op == "SetSlots" }
		w.store.SetService(step.service)
		w.store.SetSlice(sliceOf("a", lb.UDP, byte(i+1)))
		mustFail(t, w.apply(), "a", "injected")
		if row := w.kernel.rows[1]; !row.Restricted || row.NodeAllowed {
			t.Errorf("%s: the row is %+v when the slots fail, want the node kept out", step.what, row)
		}
		w.kernel.fails = func(string, int) bool { return false }
		w.noteResult(w.rec.Retry())
		if row := w.kernel.rows[1]; (!row.Restricted || row.NodeAllowed) != step.allowed {
			t.Errorf("%s: the row is %+v, want node allowed %v", step.what, row, step.allowed)
		}
		w.settled()
	}
}

func TestAWildcardWaitsForProgramsThatMissedItsPorts(t *testing.T) {
	w := newWorld(t, 0)
	wildcard := lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.1")}
	port := lb.FrontendKey{VIP: wildcard.VIP, Port: 80, Protocol: lb.TCP}
	expect := func(what string, want ...lb.FrontendKey) {
		t.Helper()
		for _, key := range []lb.FrontendKey{port, wildcard} {
			if f, ok := w.kernel.frontends[key]; (ok && f.Kind == lb.KindClusterIP) != slices.Contains(want, key) {
				t.Errorf("%s: frontends %v, want %v of the ClusterIP", what, w.kernel.frontends, want)
			}
		}
	}
	foreign := svcWith("a", "10.96.0.1", lb.TCP, 80)
	foreign.Foreign, foreign.Ports = true, nil
	for _, before := range []*lb.Service{nil, &foreign} {
		if before != nil {
			w.store.SetService(*before)
			w.apply()
			w.settled()
		}
		expect("before")
		w.kernel.fails = func(op string, _ int) bool { return op == "WaitReaders" }
		w.store.SetService(svcWith("a", "10.96.0.1", lb.TCP, 80))
		w.store.SetService(svcWith("b", "10.96.0.2", lb.TCP, 80))
		res := w.apply()
		if res.Failed[nsName("a")] == nil {
			t.Errorf("failed %v, want ns/a", res.Failed)
		}
		expect("no grace period", port)

		w.kernel.fails = func(string, int) bool { return false }
		graces := w.kernel.graces
		w.noteResult(w.rec.Retry())
		expect("retried", port, wildcard)
		// A wildcard that is replaced has a grace period after it, too.
		if n := w.kernel.graces - graces; before == nil && n != 1 {
			t.Errorf("%d grace periods for two wildcards, want 1", n)
		}
		w.settled()
	}
}

func TestAWildcardOfAnotherProxyWaitsForNobody(t *testing.T) {
	w := newWorld(t, 0)
	foreign := svcWith("a", "10.96.0.1", lb.TCP, 80)
	foreign.Foreign, foreign.Ports = true, nil
	more := svcWith("b", "10.96.0.2", lb.TCP, 80)
	w.store.SetService(more)
	w.apply()
	w.settled()
	graces := w.kernel.graces
	more.Ports = append(more.Ports, lb.Port{Name: "q", Protocol: lb.TCP, Number: 81})
	w.store.SetService(foreign)
	w.store.SetService(more)
	w.apply()
	if n := w.kernel.graces - graces; n != 0 {
		t.Errorf("%d grace periods, want none", n)
	}
	w.settled()
}

func TestAServiceGoesOnceItsLastFrontendHasMoved(t *testing.T) {
	w := newWorld(t, 0)
	w.store.SetSlice(sliceOf("a", lb.TCP, 1))
	w.store.SetSlice(sliceOf("b", lb.TCP, 2))
	w.store.SetService(svcWith("a", "10.96.0.1", lb.TCP, 80))
	w.apply()

	w.kernel.fails = func(op string, _ int) bool { return op == "SetFrontend" }
	w.store.DeleteService(nsName("a"))
	w.store.SetService(svcWith("b", "10.96.0.1", lb.TCP, 80))
	mustFail(t, w.apply(), "b", "injected")

	w.kernel.fails = func(string, int) bool { return false }
	w.store.SetSlice(sliceOf("b", lb.TCP, 3))
	w.apply() // names only b
	w.settled()
}

func TestServicesThatShareABlockArePartedByRepair(t *testing.T) {
	w := newWorld(t, 0)
	for i, name := range []string{"a", "b"} {
		w.store.SetService(svcWith(name, fmt.Sprint("10.96.0.", i+1), lb.TCP, 80))
		w.store.SetSlice(sliceOf(name, lb.TCP, 1, 2))
	}
	w.apply()
	w.kernel.damage()
	w.kernel.rows[2] = w.kernel.rows[1]
	w.rec.Adopt(w.kernel.load())
	w.applyAll()
	w.settled()
}

func TestABlockOfTwoServicesIsNotUsedAgainWhileOneHasIt(t *testing.T) {
	w := newWorld(t, 0)
	for i, name := range []string{"a", "b"} {
		w.store.SetService(svcWith(name, fmt.Sprint("10.96.0.", i+1), lb.TCP, 80))
		w.store.SetSlice(sliceOf(name, lb.TCP, 1, 2))
	}
	w.apply()
	w.kernel.damage()
	w.kernel.rows[2] = w.kernel.rows[1]
	w.rec.Adopt(w.kernel.load())
	w.store.SetSlice(sliceOf("a", lb.TCP)) // it leaves the block to b, who has no right to it
	w.applyAll()
	w.settled()
}

func TestSidesMayShareABlockButNotAPart(t *testing.T) {
	w := newWorld(t, 0)
	svc := svcWith("a", "10.96.0.1", lb.TCP, 80)
	svc.ExternalLocal = true
	slice := sliceOf("a", lb.TCP, 1, 2, 3)
	slice.Endpoints[2].Node = storeConfig.NodeName
	w.store.SetService(svc)
	w.store.SetSlice(slice)
	w.apply()
	row := w.kernel.rows[1]
	if row.Sides[lb.SideClusterIP] != row.Sides[lb.SideInside] || row.Sides[lb.SideOutside].Count != 1 {
		t.Fatalf("the sides are %+v, want equal ones to share a block", row.Sides)
	}
	w.restart()
	w.settled()

	w.kernel.damage()
	row.Sides[lb.SideOutside].Base = row.Sides[lb.SideInside].Base + 2 // the same backend, in the others' block
	w.kernel.rows[1] = row
	w.rec.Adopt(w.kernel.load())
	w.applyAll()
	if got := w.kernel.rows[1].Sides[lb.SideInside]; got != row.Sides[lb.SideInside] {
		t.Errorf("the side that had the block first has %+v now, want it as it was: %+v", got, row.Sides[lb.SideInside])
	}
	w.settled()
}

func TestRowsBeyondTheLimitsAreReplaced(t *testing.T) {
	w := newWorld(t, 0)
	w.store.SetService(svcWith("a", "10.96.0.1", lb.UDP, 80))
	w.store.SetSlice(sliceOf("a", lb.UDP, 1, 2))
	w.apply()
	w.kernel.damage()
	tables := w.kernel.load()
	const beyond = lb.ServiceID(1 << 20)
	for key, f := range tables.Frontends {
		if f.Service != lb.NoService {
			tables.Frontends[key] = lb.Frontend{Service: beyond, Kind: f.Kind}
		}
	}
	tables.Names[beyond] = tables.Names[1]
	r := lb.Range{Base: 1 << 23, Count: 2, Generation: 1}
	tables.Services[beyond] = lb.ServiceRow{Sides: [lb.Sides]lb.Range{r, r, r}}
	w.kernel.frontends, w.kernel.names = tables.Frontends, map[lb.ServiceID]lb.ServicePort{1: tables.Names[1], beyond: tables.Names[1]}
	w.rec.Adopt(tables)
	w.applyAll()
	w.settled()
}

func TestTheOrderOfSlotsMeansNothing(t *testing.T) {
	w := newWorld(t, 0)
	w.store.SetService(svcWith("a", "10.96.0.1", lb.TCP, 80))
	w.store.SetSlice(sliceOf("a", lb.TCP, 1, 2))
	w.apply()
	w.kernel.slots[0], w.kernel.slots[1] = w.kernel.slots[1], w.kernel.slots[0]
	w.restart()
	w.settled()
}

func TestNothingIsDeletedBeforeEverythingIsKnown(t *testing.T) {
	w := newWorld(t, 0)
	w.store.SetService(svcWith("a", "10.96.0.1", lb.TCP, 80))
	w.store.SetSlice(sliceOf("a", lb.TCP, 1, 2))
	w.apply()
	w.restart()
	w.store = lb.NewStore(storeConfig)
	w.store.SetService(svcWith("b", "10.96.0.2", lb.TCP, 80))
	if res := w.apply(); res.Deletes > 0 || len(w.kernel.frontends) != 4 {
		t.Errorf("%d deletes, frontends %v", res.Deletes, w.kernel.frontends)
	}
}

func TestResultTellsWhichUDPFrontendsAreAnswered(t *testing.T) {
	key := lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.10"), Port: 53, Protocol: lb.UDP}
	w := newWorld(t, 0)
	expect := func(what string, res reconciler.Result, want ...lb.FrontendKey) {
		t.Helper()
		if diff := cmp.Diff(want, res.Answered, compareTables); diff != "" {
			t.Errorf("%s: answered (-want +got):\n%s", what, diff)
		}
	}
	w.store.SetService(svcWith("dns", "10.96.0.10", lb.UDP, 53))
	w.store.SetService(svcWith("web", "10.96.0.11", lb.TCP, 80))
	w.store.SetSlice(sliceOf("web", lb.TCP, 1))
	expect("no endpoint yet, and TCP", w.apply())
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1))
	expect("first endpoint", w.apply(), key)
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1, 2))
	expect("second endpoint", w.apply())
	w.restart()
	expect("adopted", w.applyAll())
	w.store.DeleteService(nsName("dns"))
	expect("gone", w.apply())
	w.store.SetService(svcWith("dns", "10.96.0.10", lb.UDP, 53))
	expect("new frontend", w.apply(), key)

	w.store.DeleteService(nsName("dns"))
	w.store.SetService(svcWith("dns2", "10.96.0.10", lb.UDP, 53))
	expect("moved to a service without endpoints", w.apply())
	w.store.DeleteService(nsName("dns2"))
	w.store.SetService(svcWith("dns", "10.96.0.10", lb.UDP, 53))
	expect("moved to a service with endpoints", w.apply(), key)
}

func TestAFrontendIsAnsweredOnTheSideThatItsClientsAreOn(t *testing.T) {
	clusterIP := lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.10"), Port: 53, Protocol: lb.UDP}
	nodePort := lb.FrontendKey{VIP: netip.IPv4Unspecified(), Port: 30053, Protocol: lb.UDP}
	external := lb.FrontendKey{VIP: netip.MustParseAddr("192.0.2.1"), Port: 53, Protocol: lb.UDP}
	w := newWorld(t, 0)
	expect := func(what string, res reconciler.Result, want ...lb.FrontendKey) {
		t.Helper()
		if diff := cmp.Diff(want, res.Answered, compareTables); diff != "" {
			t.Errorf("%s: answered (-want +got):\n%s", what, diff)
		}
	}
	svc := svcWith("dns", "10.96.0.10", lb.UDP, 53)
	svc.InternalLocal = true
	svc.Ports[0].NodePort = 30053
	svc.ExternalIPs = []netip.Addr{external.VIP}
	w.store.SetService(svc)
	expect("no endpoint yet", w.apply())
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1))
	expect("an endpoint elsewhere", w.apply(), nodePort, external)
	local := sliceOf("dns", lb.UDP, 1)
	local.Endpoints[0].Node = storeConfig.NodeName
	w.store.SetSlice(local)
	expect("it is here", w.apply(), clusterIP)

	svc.InternalLocal, svc.ExternalLocal = false, true
	w.store.SetService(svc)
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1))
	expect("outside clients have none", w.apply())
	svc.ExternalLocal = false
	w.store.SetService(svc)
	expect("outside clients have one", w.apply())
}

func TestResultTellsWhenAffinitiesAreUnremembered(t *testing.T) {
	w := newWorld(t, 0)
	expect := func(what string, res reconciler.Result, unremembered, stranded bool) {
		t.Helper()
		if res.Unremembered != unremembered || res.Stranded != stranded {
			t.Errorf("%s: unremembered is %v and stranded is %v", what, res.Unremembered, res.Stranded)
		}
	}
	svc := svcWith("dns", "10.96.0.10", lb.UDP, 53)
	svc.Affinity = 60
	w.store.SetService(svc)
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1, 2))
	expect("new", w.apply(), false, false)
	svc.Affinity = 90
	w.store.SetService(svc)
	expect("another timeout", w.apply(), false, false)
	s := sliceOf("dns", lb.UDP, 1, 2)
	s.Endpoints[1] = lb.Endpoint{Addr: s.Endpoints[1].Addr, Serving: true, Terminating: true}
	w.store.SetSlice(s)
	expect("a backend terminates", w.apply(), true, false)
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1))
	expect("it is gone", w.apply(), false, true)
	svc.Affinity = 0
	w.store.SetService(svc)
	expect("no affinity any more", w.apply(), true, false)
	w.settled()
}

func TestResultTellsWhenSocketsAreStranded(t *testing.T) {
	w := newWorld(t, 0)
	expect := func(what string, res reconciler.Result, want bool) {
		t.Helper()
		if res.Stranded != want {
			t.Errorf("%s: stranded is %v", what, res.Stranded)
		}
	}
	w.store.SetService(svcWith("dns", "10.96.0.10", lb.UDP, 53))
	w.store.SetService(svcWith("web", "10.96.0.11", lb.TCP, 80))
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1, 2, 3))
	w.store.SetSlice(sliceOf("web", lb.TCP, 1, 2))
	expect("all new", w.apply(), false)
	w.store.SetSlice(sliceOf("web", lb.TCP, 1))
	expect("TCP backend gone", w.apply(), false)
	s := sliceOf("dns", lb.UDP, 1, 2, 3)
	s.Endpoints[2] = lb.Endpoint{Addr: s.Endpoints[2].Addr, Serving: true, Terminating: true}
	w.store.SetSlice(s)
	expect("UDP backend terminating but serving", w.apply(), false)
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1, 2))
	expect("UDP backend gone", w.apply(), true)
	w.store.DeleteService(nsName("dns"))
	expect("UDP service gone", w.apply(), true)
	w.settled()
}

// manyServices fills a store with n Services of ten endpoints each.
func manyServices(n int) *lb.Store {
	store := lb.NewStore(storeConfig)
	for i := range n {
		store.SetService(numbered(i))
		store.SetSlice(numberedSlice(i, 10))
	}
	return store
}

func numbered(i int) lb.Service {
	protocol := lb.TCP
	if i%10 == 0 {
		protocol = lb.UDP
	}
	return svcWith(fmt.Sprint("svc", i), netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}).String(), protocol, 80)
}

func numberedSlice(i, endpoints int) lb.Slice {
	svc := numbered(i)
	s := sliceOf(svc.Name.Name, svc.Ports[0].Protocol)
	for e := range endpoints {
		addr := netip.AddrFrom4([4]byte{10, byte(e), byte(i >> 8), byte(i)})
		s.Endpoints = append(s.Endpoints, lb.Endpoint{Addr: addr, Ready: true, Serving: true})
	}
	return s
}

// nullKernel takes every write and keeps nothing, so that what is measured is
// the reconciler.
type nullKernel struct{ calls int }

func (k *nullKernel) write() error { k.calls++; return nil }

func (k *nullKernel) SetFrontend(lb.FrontendKey, lb.Frontend) error   { return k.write() }
func (k *nullKernel) DeleteFrontend(lb.FrontendKey) error             { return k.write() }
func (k *nullKernel) SetRange(lb.ServiceID, lb.Side, lb.Range) error  { return k.write() }
func (k *nullKernel) SetOptions(lb.ServiceID, lb.ServiceRow) error    { return k.write() }
func (k *nullKernel) SetSlots(uint32, []lb.Backend) error             { return k.write() }
func (k *nullKernel) SetMember(lb.Member) error                       { return k.write() }
func (k *nullKernel) DeleteMember(lb.Member) error                    { return k.write() }
func (k *nullKernel) SetSource(lb.Source) error                       { return k.write() }
func (k *nullKernel) DeleteSource(lb.Source) error                    { return k.write() }
func (k *nullKernel) SetNodeAddress(netip.Addr, lb.NodeAddress) error { return k.write() }
func (k *nullKernel) DeleteNodeAddress(netip.Addr) error              { return k.write() }
func (k *nullKernel) SetServiceCIDR(netip.Prefix) error               { return k.write() }
func (k *nullKernel) DeleteServiceCIDR(netip.Prefix) error            { return k.write() }
func (k *nullKernel) SetName(lb.ServiceID, lb.ServicePort) error      { return k.write() }
func (k *nullKernel) DeleteName(lb.ServiceID) error                   { return k.write() }
func (k *nullKernel) SetProblem(lb.Name, lb.Problem) error            { return k.write() }
func (k *nullKernel) DeleteProblem(lb.Name) error                     { return k.write() }
func (k *nullKernel) WaitReaders() error                              { return k.write() }

var bigLimits = reconciler.Limits{Services: 1 << 16, Slots: 1 << 19}

func TestTheCostOfAChangeDoesNotDependOnWhatExists(t *testing.T) {
	type cost struct {
		calls, writes, deletes int
		allocs                 float64
	}
	measure := func(services int) cost {
		store, kernel := manyServices(services), &nullKernel{}
		rec := reconciler.New(kernel, bigLimits)
		rec.ApplyAll(store.All())
		var c cost
		n := 9
		c.allocs = testing.AllocsPerRun(20, func() {
			n = 19 - n // nine endpoints, then ten
			store.SetSlice(numberedSlice(0, n))
			calls := kernel.calls
			res := rec.Apply(store.Changes())
			if n == 9 {
				c.calls, c.writes, c.deletes = kernel.calls-calls, res.Writes, res.Deletes
			}
		})
		return c
	}
	few, many := measure(10), measure(10_000)
	want := cost{calls: 6, writes: 12, deletes: 1} // nine slots and three ranges, a member; and a grace period
	if got := (cost{calls: few.calls, writes: few.writes, deletes: few.deletes}); got != want {
		t.Errorf("an endpoint that goes costs %+v, want %+v", got, want)
	}
	if many.calls != few.calls || many.writes != few.writes || many.allocs > few.allocs+2 {
		t.Errorf("among 10,000 services it costs %+v, among 10 %+v", many, few)
	}
	t.Logf("%+v", many)
}

func TestGracePeriodsOfABatch(t *testing.T) {
	w := newWorld(t, 0)
	expect := func(what string, want int) {
		t.Helper()
		before := w.kernel.graces
		w.apply()
		if got := w.kernel.graces - before; got != want {
			t.Errorf("%s: %d grace periods, want %d", what, got, want)
		}
	}
	for i := range 5 {
		w.store.SetService(numbered(i))
		w.store.SetSlice(numberedSlice(i, 3))
	}
	expect("only new services", 1) // between their ports and their wildcards
	more := numbered(0)
	more.Ports = append(more.Ports, lb.Port{Name: "q", Protocol: lb.TCP, Number: 81})
	w.store.SetService(more)
	expect("a port more beside a wildcard", 0)
	w.store.SetService(numbered(0))
	expect("a port less", 1)
	for i := range 5 {
		w.store.SetSlice(numberedSlice(i, 2))
	}
	expect("five services flip", 1)
	for i := range 5 {
		w.store.DeleteService(numbered(i).Name)
	}
	expect("five services go", 1)
	for i := range 5 {
		w.store.SetService(numbered(i))
	}
	w.apply()
	for i := range 3 {
		svc := numbered(i)
		svc.Ports[0].Name = ""
		w.store.SetService(svc)
	}
	expect("three frontends change owner", 3)
	w.settled()
}

func TestANodeAddressThatChangesIsReplacedLikeAFrontend(t *testing.T) {
	w := newWorld(t, 0)
	a, b, c := netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("192.168.1.2"), netip.MustParseAddr("192.168.1.3")
	apply := func(addrs map[netip.Addr]lb.NodeAddress) (graces int) {
		t.Helper()
		before := w.kernel.graces
		all := lb.Delta{NodeAddresses: addrs}
		w.kernel.wanted = append(w.kernel.wanted, all)
		if res := w.noteResult(w.rec.ApplyAll(all)); len(res.Failed) > 0 {
			t.Errorf("failed %v", res.Failed)
		}
		if diff := cmp.Diff(addrs, w.kernel.addresses, compareTables); diff != "" {
			t.Errorf("node addresses (-want +got):\n%s", diff)
		}
		return w.kernel.graces - before
	}
	if n := apply(map[netip.Addr]lb.NodeAddress{a: lb.NodeAddressOpen, b: lb.NodeAddressOpen}); n != 0 {
		t.Errorf("two new: %d grace periods, want none", n)
	}
	if n := apply(map[netip.Addr]lb.NodeAddress{a: lb.NodeAddressLoopback, b: lb.NodeAddressLoopback, c: lb.NodeAddressOpen}); n != 2 {
		t.Errorf("one new and two replaced: %d grace periods, want one after each replaced", n)
	}
	if n := apply(map[netip.Addr]lb.NodeAddress{}); n != 1 {
		t.Errorf("all gone: %d grace periods, want 1", n)
	}
}

func TestAServiceCIDRWaitsForFrontendsOfOtherBatches(t *testing.T) {
	w := newWorld(t, 0)
	w.kernel.fails = func(op string, _ int) bool { return op == "SetFrontend" }
	w.store.SetService(svcWith("a", "10.96.0.1", lb.TCP, 80))
	mustFail(t, w.apply(), "a", "injected")
	w.kernel.fails = func(string, int) bool { return false }
	w.store.SetServiceCIDRs([]netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")})
	mustFail(t, w.apply(), "a", "injected") // it is not named by the change
	if len(w.kernel.cidrs) > 0 || !w.rec.Pending() {
		t.Errorf("service CIDRs %v, want none while a frontend is missing, and a retry", w.kernel.cidrs)
	}
	w.noteResult(w.rec.Retry())
	w.settled()
}

func TestMemoryAtSize(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	store := manyServices(10_000)
	rec := reconciler.New(&nullKernel{}, bigLimits)
	rec.ApplyAll(store.All())
	runtime.GC()
	runtime.ReadMemStats(&after)
	const limit = 60 << 20 // of the 100 MB that the whole agent may use
	if used := after.HeapAlloc - before.HeapAlloc; used > limit {
		t.Errorf("10,000 services with 100,000 endpoints take %d MiB, want at most %d", used>>20, limit>>20)
	} else {
		t.Logf("%.1f MiB", float64(used)/(1<<20))
	}
	runtime.KeepAlive(store)
	runtime.KeepAlive(rec)
}

func BenchmarkOneEndpointAmong10000Services(b *testing.B) {
	store := manyServices(10_000)
	rec := reconciler.New(&nullKernel{}, bigLimits)
	rec.ApplyAll(store.All())
	b.ReportAllocs()
	n := 9
	for b.Loop() {
		n = 19 - n
		store.SetSlice(numberedSlice(5000, n))
		rec.Apply(store.Changes())
	}
}

func BenchmarkFirstApplyOf10000Services(b *testing.B) {
	all := manyServices(10_000).All()
	b.ReportAllocs()
	for b.Loop() {
		reconciler.New(&nullKernel{}, bigLimits).ApplyAll(all)
	}
}

func BenchmarkRepairOf10000UnchangedServices(b *testing.B) {
	all := manyServices(10_000).All()
	rec := reconciler.New(&nullKernel{}, bigLimits)
	rec.ApplyAll(all)
	tables := rec.Tables()
	b.ReportAllocs()
	for b.Loop() {
		rec.Adopt(tables)
		if res := rec.ApplyAll(all); res.Writes > 0 {
			b.Fatal(res)
		}
	}
}

// otherTables leaves of the kernel's tables what tables of another layout share with
// them: names and the generations that ranges have had.
func (w *world) otherTables() {
	k := newFake(w.tb, w.kernel.limits)
	k.wanted, k.names, k.remembered = []lb.Delta{{}}, w.kernel.names, w.kernel.remembered
	for id, row := range w.kernel.rows {
		var left lb.ServiceRow
		for side, r := range row.Sides {
			left.Sides[side].Generation = r.Generation
		}
		k.rows[id] = left
	}
	w.kernel = k
	w.rec = reconciler.New(k, k.limits)
	w.rec.Adopt(k.load())
}

func TestOtherTablesHaveTheSameIDsAndLaterGenerations(t *testing.T) {
	w := smallWorld(t, reconciler.Limits{Services: 8, Slots: 64})
	for i, name := range []string{"a", "b", "c", "d"} {
		w.store.SetService(svcWith(name, fmt.Sprint("10.96.0.", i+1), lb.UDP, 80))
		w.store.SetSlice(sliceOf(name, lb.UDP, byte(i+1), byte(i+2)))
	}
	w.apply()
	w.store.DeleteService(lb.Name{Namespace: "ns", Name: "b"})
	w.apply()
	names, rows := maps.Clone(w.kernel.names), maps.Clone(w.kernel.rows)

	w.store.DeleteService(lb.Name{Namespace: "ns", Name: "c"})
	w.store.SetService(svcWith("e", "10.96.0.5", lb.UDP, 80))
	w.store.SetSlice(sliceOf("e", lb.UDP, 9))
	w.otherTables()
	w.applyAll()
	w.settled()
	for id, name := range names {
		if now, ok := w.kernel.names[id]; ok && now != name {
			t.Errorf("ID %d was %v and is %v now", id, name, now)
		}
	}
	for id, name := range w.kernel.names {
		old, known := rows[id]
		if _, named := names[id]; known && !named {
			t.Errorf("%v has got ID %d, which sockets may remember", name, id)
		}
		for side, r := range w.kernel.rows[id].Sides {
			if known && r.Generation <= old.Sides[side].Generation {
				t.Errorf("%v: generation %d after %d", name, r.Generation, old.Sides[side].Generation)
			}
		}
	}
	if len(w.kernel.names) != 3 {
		t.Errorf("names are %v, want those of a, d and e", w.kernel.names)
	}

	// Nobody remembers the IDs of b and c, so that all there are can be had.
	clear(w.kernel.remembered)
	w.rec.FreeIDs(w.kernel.remember)
	for i := range 4 {
		w.store.SetService(svcWith(fmt.Sprint("more", i), fmt.Sprint("10.96.1.", i), lb.UDP, 80))
	}
	if r := w.apply(); len(r.Failed) > 0 {
		t.Errorf("%d services have no ID", len(r.Failed))
	}
}

// What the fuzzer of tables found, and its like: rows of problems that were never
// deleted, or written at each start.
func TestProblemsThatAnyTablesHoldAreMadeGood(t *testing.T) {
	for _, tt := range []struct {
		name string
		row  lb.Name
		text lb.Problem
	}{
		{"without text", nsName("gone"), ""},
		{"of nobody", lb.Name{}, "x"},
		{"of a Service that has none", nsName("web"), "x"},
	} {
		w := smallWorld(t, testLimits)
		w.store.SetService(svcWith("web", "10.96.0.1", lb.TCP, 80))
		w.applyAll()
		w.kernel.problems[tt.row] = tt.text
		w.restart()
		w.applyAll()
		w.settled()
	}

	w := smallWorld(t, testLimits)
	all := w.store.All()
	all.Problems[nsName("web")] = lb.Problem(strings.Repeat("x", 2*lb.MaxProblem))
	w.rec.ApplyAll(all)
	if n := len(w.kernel.problems[nsName("web")]); n != lb.MaxProblem {
		t.Errorf("%d bytes of a problem were written, the tables hold %d", n, lb.MaxProblem)
	}
	w.restart()
	if res := w.rec.ApplyAll(all); res.Writes > 0 {
		t.Errorf("%d writes for a problem that is there as far as it can be", res.Writes)
	}
}

func TestWhatHadNoRoomIsWrittenWhenTablesHaveGrown(t *testing.T) {
	w := smallWorld(t, reconciler.Limits{Services: 2, Slots: 2})
	w.store.SetService(svcWith("a", "10.96.0.1", lb.UDP, 80))
	w.store.SetSlice(sliceOf("a", lb.UDP, 1, 2))
	w.store.SetService(svcWith("b", "10.96.0.2", lb.UDP, 80))
	w.store.SetSlice(sliceOf("b", lb.UDP, 1, 2, 3))
	full := func(r reconciler.Result, table string) {
		t.Helper()
		var err *lb.FullError
		if mustFail(t, r, "b", "no room"); !errors.As(r.Failed[nsName("b")], &err) || err.Table != table {
			t.Fatalf("%v does not say that %s is full", r.Failed, table)
		}
	}
	full(w.apply(), "services")
	if got, want := w.rec.Demand(), (reconciler.Demand{Frontends: 4, Services: 3, Slots: 5, Members: 5}); got != want {
		t.Errorf("demand is %+v, want %+v", got, want)
	}
	grow := func(limits reconciler.Limits) reconciler.Result {
		w.kernel.limits = limits
		w.rec.Grow(limits)
		return w.noteResult(w.rec.Retry())
	}
	full(grow(reconciler.Limits{Services: 4, Slots: 2}), "slots")
	grow(reconciler.Limits{Services: 4, Slots: 8})
	w.settled()
	if got, want := w.rec.Taken(), (reconciler.Limits{Services: 3, Slots: 5}); got != want {
		t.Errorf("taken are %+v, want %+v", got, want)
	}
}
