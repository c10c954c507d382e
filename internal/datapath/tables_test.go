// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// numbered returns the i-th of many frontend keys.
func numbered(i int) lb.FrontendKey {
	vip := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})
	return lb.FrontendKey{VIP: vip, Port: 80, Protocol: lb.TCP}
}

// numberedPrefix returns the i-th of many prefixes of every length.
func numberedPrefix(i int) netip.Prefix {
	a := netip.AddrFrom16([16]byte{0: 0x20, 1: byte(i >> 8), 2: byte(i), 15: 1})
	return netip.PrefixFrom(a, 24+i%105).Masked()
}

// TestTables shares one datapath, since the verifier takes its time. Each test
// leaves the tables empty.
func TestTables(t *testing.T) {
	d := openDatapath(t, testutil.BPFRoot(t), Sizes{
		Frontends: 8192, Services: 64, Slots: 256, Members: 8192, SourceRanges: 8192, Affinity: 8192, Peers: 64, Flows: 16384,
	})
	for _, tc := range []struct {
		name string
		test func(*testing.T, *Datapath)
	}{
		{"Load returns what was written", testLoad},
		{"writes are counted", testWrites},
		{"full maps name the flag that helps", testFull},
		{"numbers outside the maps are refused", testNumbers},
		{"names that do not fit are refused", testNames},
		{"a row replaces the one before", testReplaced},
		{"sources are found by service and longest prefix", testSources},
		{"service CIDRs are found by family and prefix", testServiceCIDRs},
		{"affinities are listed and forgotten", testAffinities},
		{"devices are written where they differ", testDevices},
		{"cluster CIDRs are written where they differ", testClusterCIDRs},
		{"flows are joined from their entries", testFlows},
		{"a flow is deleted when it is over", testDeleteFlow},
		{"a flow that a packet comes for is not deleted", testFlowRace},
		{"a gate has a bit for every row and no other", testGate},
		{"a gate is never without a bit that is needed", testGateReader},
		{"counters have the names of the ABI", testCounters},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, d) })
		rows, err := d.Load()
		fatal(t, err)
		erase(t, d.Tables, rows)
	}
}

func erase(t testing.TB, tables *Tables, rows lb.Tables) {
	t.Helper()
	for k := range rows.Frontends {
		fatal(t, tables.DeleteFrontend(k))
	}
	for m := range rows.Members {
		fatal(t, tables.DeleteMember(m))
	}
	for id := range rows.Names {
		fatal(t, tables.DeleteName(id))
	}
	for id := range rows.Services {
		for side := range lb.Side(lb.Sides) {
			fatal(t, tables.SetRange(id, side, lb.Range{}))
		}
		fatal(t, tables.SetOptions(id, lb.ServiceRow{}))
	}
	for s := range rows.Sources {
		fatal(t, tables.DeleteSource(s))
	}
	for a := range rows.NodeAddresses {
		fatal(t, tables.DeleteNodeAddress(a))
	}
	for p := range rows.ServiceCIDRs {
		fatal(t, tables.DeleteServiceCIDR(p))
	}
	for name := range rows.Problems {
		fatal(t, tables.DeleteProblem(name))
	}
}

func testLoad(t *testing.T, d *Datapath) {
	t.Run("nothing", func(t *testing.T) { wantLoaded(t, d.Tables, lb.NewTables()) })

	t.Run("rows of every kind", func(t *testing.T) {
		write(t, d.Tables, sample())
		wantLoaded(t, d.Tables, sample())
	})

	t.Run("more rows than one batch holds", func(t *testing.T) {
		want := sample()
		for i := range 5000 {
			want.Frontends[numbered(i)] = lb.Frontend{Service: 2, Kind: lb.KindClusterIP}
			want.Members[lb.Member{Service: 1, Backend: lb.Backend{Addr: numbered(i).VIP, Port: 53}}] = struct{}{}
			want.Sources[lb.Source{Service: 2, Prefix: numberedPrefix(i)}] = struct{}{}
		}
		write(t, d.Tables, want)
		wantLoaded(t, d.Tables, want)
	})

	t.Run("what a second write replaced", func(t *testing.T) {
		want, err := d.Load()
		if err != nil {
			t.Fatal(err)
		}
		want.Frontends[numbered(7)] = lb.Frontend{Service: 3, Kind: lb.KindClusterIP}
		want.Services[1] = lb.ServiceRow{Sides: [lb.Sides]lb.Range{
			{Base: 12, Count: 1, Generation: 2}, {Base: 11, Count: 1, Generation: 6}, lb.Range{}.NextEmpty(true),
		}}
		delete(want.Slots, 10) // still there, but in nobody's range
		write(t, d.Tables, want)
		wantLoaded(t, d.Tables, want)
	})

	t.Run("without what was deleted", func(t *testing.T) {
		rows, err := d.Load()
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // deleting what is not there is no error
			erase(t, d.Tables, rows)
		}
		wantLoaded(t, d.Tables, lb.NewTables())
	})
}

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testWrites(t *testing.T, d *Datapath) {
	before := d.Writes()
	since := func() map[string]uint64 {
		n := d.Writes()
		for table := range n {
			n[table] -= before[table]
		}
		return n
	}
	write(t, d.Tables, sample())
	want := map[string]uint64{
		"frontends": 9, "names": 3, "services": 4 * (lb.Sides + 1), "slots": 4, "members": 7, "problems": 1,
		"source_ranges": 3, "node_addresses": 3, "service_cidrs": 2,
		"devices": 0, "cluster_cidrs": 0,
	}
	if diff := cmp.Diff(want, since()); diff != "" {
		t.Errorf("after every row was written once (-want +got):\n%s", diff)
	}
	fatal(t, d.DeleteFrontend(frontendKey("10.96.0.10:53", lb.UDP)))
	fatal(t, d.DeleteFrontend(frontendKey("10.96.0.10:53", lb.UDP))) // nothing to delete, nothing to count
	fatal(t, d.SetSlots(0, []lb.Backend{backend("10.244.0.2:1"), backend("10.244.0.2:2")}))
	want["frontends"]++
	want["slots"] += 2
	if diff := cmp.Diff(want, since()); diff != "" {
		t.Errorf("after one deletion and two slots more (-want +got):\n%s", diff)
	}
	_, err := d.Load()
	fatal(t, err)
	fatal(t, d.SetAgentState(AgentState{PID: 1}))
	_, err = d.Affinities()
	fatal(t, err)
	if diff := cmp.Diff(want, since()); diff != "" {
		t.Errorf("reading and the agent's state are counted (-want +got):\n%s", diff)
	}
}

func testFull(t *testing.T, d *Datapath) {
	for _, tc := range []struct {
		table string
		rows  int
		put   func(i int) error
		want  string
		help  string
	}{
		{
			"frontends", 8192,
			func(i int) error { return d.SetFrontend(numbered(i), lb.Frontend{Kind: lb.KindClusterIP}) },
			"update frontends 10.96.32.0:80/TCP: ", "; raise --max-frontends)",
		},
		{
			"members", 8192,
			func(i int) error {
				return d.SetMember(lb.Member{Service: 1, Backend: lb.Backend{Addr: numbered(i).VIP, Port: 53}})
			},
			"update members 10.96.32.0:53: ", "; raise --max-members)",
		},
		{
			"source_ranges", 8192,
			func(i int) error {
				return d.SetSource(lb.Source{Service: 1, Prefix: netip.PrefixFrom(numbered(i).VIP, 32)})
			},
			"update source_ranges 10.96.32.0/32: ", "; raise --max-source-ranges)",
		},
		{
			"node_addresses", 16384,
			func(i int) error { return d.SetNodeAddress(numbered(i).VIP, lb.NodeAddressOpen) },
			"update node_addresses 10.96.64.0: ", ")",
		},
		{
			"service_cidrs", 1024,
			func(i int) error { return d.SetServiceCIDR(netip.PrefixFrom(numbered(i).VIP, 32)) },
			"update service_cidrs 10.96.4.0/32: ", ")",
		},
	} {
		t.Run(tc.table, func(t *testing.T) {
			before := d.Writes()[tc.table]
			for i := range tc.rows {
				fatal(t, tc.put(i))
			}
			err := tc.put(tc.rows)
			if err == nil {
				t.Fatalf("row %d fits", tc.rows+1)
			}
			help := fmt.Sprintf("(the map is full at %d rows%s", tc.rows, tc.help)
			if !strings.HasPrefix(err.Error(), tc.want) || !strings.HasSuffix(err.Error(), help) {
				t.Errorf("error %q does not begin with %q and end with %q", err, tc.want, help)
			}
			if n := d.Writes()[tc.table] - before; n != uint64(tc.rows) {
				t.Errorf("%d writes are counted, %d succeeded", n, tc.rows)
			}
		})
	}
}

func testNumbers(t *testing.T, d *Datapath) {
	b := backend("10.244.0.2:80")
	fatal(t, d.SetRange(63, lb.SideOutside, lb.Range{}))
	fatal(t, d.SetOptions(63, lb.ServiceRow{}))
	fatal(t, d.SetSlots(255, []lb.Backend{b}))
	for name, err := range map[string]error{
		// The mapped memory is a whole page, the map is not.
		"the first service ID beyond":  d.SetRange(64, 0, lb.Range{}),
		"a service ID far beyond":      d.SetRange(1<<31, 0, lb.Range{}),
		"options of an ID beyond":      d.SetOptions(64, lb.ServiceRow{}),
		"the first side beyond":        d.SetRange(63, lb.Sides, lb.Range{}),
		"the first slot beyond":        d.SetSlots(256, []lb.Backend{b}),
		"a block that ends beyond":     d.SetSlots(255, []lb.Backend{b, b}),
		"a slot at the end of numbers": d.SetSlots(^uint32(0), []lb.Backend{b}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if services, slots := d.Limits(); services != 64 || slots != 256 {
		t.Errorf("limits are %d services and %d slots, want 64 and 256", services, slots)
	}
}

// testReplaced shows that no word of a service touches another one.
func testReplaced(t *testing.T, d *Datapath) {
	want := lb.NewTables()
	want.Services[5] = lb.ServiceRow{
		Sides:    [lb.Sides]lb.Range{{Generation: 1}, {Generation: 2}, {Generation: 3}},
		Affinity: 10800, NodeAllowed: true, OutsideLocal: true,
	}
	want.NodeAddresses[netip.MustParseAddr("192.0.2.1")] = lb.NodeAddressOpen
	want.ServiceCIDRs[netip.MustParsePrefix("10.96.0.0/12")] = struct{}{}
	for range 2 { // what is there may be written again
		write(t, d.Tables, want)
		wantLoaded(t, d.Tables, want)
	}
	for side := range lb.Side(lb.Sides) {
		row := want.Services[5]
		row.Sides[side] = lb.Range{Generation: lb.MaxGeneration}
		fatal(t, d.SetRange(5, side, row.Sides[side]))
		want.Services[5] = row
		wantLoaded(t, d.Tables, want)
	}
	row := want.Services[5]
	row.Affinity, row.Restricted, row.NodeAllowed, row.OutsideLocal = 1<<32-1, true, false, false
	fatal(t, d.SetOptions(5, lb.ServiceRow{Affinity: 1<<32 - 1, Restricted: true})) // ranges are ignored
	want.Services[5] = row
	fatal(t, d.SetNodeAddress(netip.MustParseAddr("192.0.2.1"), lb.NodeAddressLoopback))
	want.NodeAddresses[netip.MustParseAddr("192.0.2.1")] = lb.NodeAddressLoopback
	wantLoaded(t, d.Tables, want)
}

// found tells whether a trie holds a prefix of key.
func found(t *testing.T, d *Datapath, table string, key any) bool {
	t.Helper()
	var value uint8
	err := d.maps[table].Lookup(key, &value)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

func testSources(t *testing.T, d *Datapath) {
	for service, prefixes := range map[lb.ServiceID][]string{
		1: {"192.0.2.0/25", "198.51.100.7/32", "2001:db8::/32"},
		2: {"0.0.0.0/0"},
		3: {"::/0"},
	} {
		for _, p := range prefixes {
			fatal(t, d.SetSource(lb.Source{Service: service, Prefix: netip.MustParsePrefix(p)}))
		}
	}
	for _, tc := range []struct {
		name    string
		service lb.ServiceID
		client  string
		allowed bool
	}{
		{"in the range", 1, "192.0.2.127", true},
		{"beside the range", 1, "192.0.2.128", false},
		{"the single address", 1, "198.51.100.7", true},
		{"beside the single address", 1, "198.51.100.6", false},
		{"in the IPv6 range", 1, "2001:db8:ffff::1", true},
		{"beside the IPv6 range", 1, "2001:db9::1", false},
		{"in the range of another service", 4, "192.0.2.1", false},
		{"any IPv4 address", 2, "203.0.113.1", true},
		{"IPv6 where all of IPv4 is allowed", 2, "2001:db8::1", false},
		{"any IPv6 address", 3, "2001:db8::1", true},
	} {
		client := netip.MustParseAddr(tc.client)
		key := encodeSource(lb.Source{Service: tc.service, Prefix: netip.PrefixFrom(client, client.BitLen())})
		if got := found(t, d, bpfMapSourceRanges, &key); got != tc.allowed {
			t.Errorf("%s: %s may use service %d: %v, want %v", tc.name, client, tc.service, got, tc.allowed)
		}
	}
	t.Run("a range that goes leaves the larger one", func(t *testing.T) {
		fatal(t, d.SetSource(lb.Source{Service: 2, Prefix: netip.MustParsePrefix("203.0.113.0/24")}))
		fatal(t, d.DeleteSource(lb.Source{Service: 2, Prefix: netip.MustParsePrefix("0.0.0.0/0")}))
		for client, want := range map[string]bool{"203.0.113.1/32": true, "203.0.112.1/32": false} {
			key := encodeSource(lb.Source{Service: 2, Prefix: netip.MustParsePrefix(client)})
			if got := found(t, d, bpfMapSourceRanges, &key); got != want {
				t.Errorf("%s is found: %v, want %v", client, got, want)
			}
		}
	})
}

func testServiceCIDRs(t *testing.T, d *Datapath) {
	for _, p := range []string{"10.96.0.0/12", "fd00:96::/112"} {
		fatal(t, d.SetServiceCIDR(netip.MustParsePrefix(p)))
	}
	for addr, want := range map[string]bool{
		"10.96.0.0": true, "10.111.255.255": true, "10.112.0.0": false,
		"fd00:96::ffff": true, "fd00:96::1:0": false,
		"::a60:1": false, // ends like 10.96.0.1
	} {
		a := netip.MustParseAddr(addr)
		key := encodeCIDR(netip.PrefixFrom(a, a.BitLen()))
		if got := found(t, d, bpfMapServiceCidrs, &key); got != want {
			t.Errorf("%s is in a service CIDR: %v, want %v", a, got, want)
		}
	}
}

// remember writes an affinity entry as programs do, a while ago.
func remember(t *testing.T, d *Datapath, e AffinityEntry) {
	t.Helper()
	var now unix.Timespec
	fatal(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	key := bpfAffinityKey{Netns: e.Netns, ServiceId: uint32(e.Service)}
	value := bpfAffinity{
		Backend: encodeAddr(e.Backend.Addr), Port: networkPort(e.Backend.Port),
		Client: encodeAddr(e.Client), LastSec: uint32(now.Sec - int64(e.Age/time.Second)),
	}
	fatal(t, d.maps[bpfMapAffinity].Put(&key, &value))
}

func testAffinities(t *testing.T, d *Datapath) {
	list := func() map[uint64]AffinityEntry {
		t.Helper()
		entries, err := d.Affinities()
		fatal(t, err)
		out := map[uint64]AffinityEntry{}
		for _, e := range entries {
			// The clock may have moved on.
			e.Age = e.Age.Truncate(time.Hour)
			out[e.Netns] = e
		}
		if len(out) != len(entries) {
			t.Errorf("%d entries are listed, %d of them different", len(entries), len(out))
		}
		return out
	}
	forget := func(gone func(AffinityEntry) bool) int {
		t.Helper()
		n, err := d.ForgetAffinities(gone)
		fatal(t, err)
		return n
	}
	if got := list(); len(got) != 0 {
		t.Errorf("there are entries before any client: %v", got)
	}
	want := map[uint64]AffinityEntry{}
	for i := range 3000 { // more than one batch holds
		e := AffinityEntry{
			Netns: uint64(i + 1), Client: numbered(i).VIP, Service: lb.ServiceID(i % 3),
			Backend: backend("10.244.0.2:5353"), Age: time.Duration(i%4) * time.Hour,
		}
		remember(t, d, e)
		want[e.Netns] = e
	}
	wantEntries := func() {
		t.Helper()
		if diff := cmp.Diff(want, list(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("other entries than were made (-want +got):\n%s", diff)
		}
	}
	wantEntries()

	old := func(e AffinityEntry) bool { return e.Service == 2 && e.Age >= 2*time.Hour }
	before := len(want)
	maps.DeleteFunc(want, func(_ uint64, e AffinityEntry) bool { return old(e) })
	for _, n := range []int{before - len(want), 0} {
		if got := forget(old); got != n {
			t.Errorf("%d entries are forgotten, want %d", got, n)
		}
		wantEntries()
	}
	// A client that has connected since it was listed keeps what it got then: the
	// calls are for the list, before deleting, and for what was deleted.
	leaving, next := backend("10.244.0.2:5353"), backend("10.244.0.9:5353")
	for call, name := range []string{1: "after the list", 2: "while it is deleted"} {
		if name == "" {
			continue
		}
		victim := want[1]
		remember(t, d, victim)
		calls := 0
		n := forget(func(e AffinityEntry) bool {
			gone := e.Netns == victim.Netns && e.Backend == leaving
			if gone {
				if calls++; calls == call {
					changed := victim
					changed.Backend = next
					remember(t, d, changed)
				}
			}
			return gone
		})
		if n != 0 || list()[victim.Netns].Backend != next {
			t.Errorf("a client that has changed %s: %d forgotten, it has %v", name, n, list()[victim.Netns].Backend)
		}
	}
	forget(func(AffinityEntry) bool { return true })
	clear(want)
	wantEntries()
}

func testNames(t *testing.T, d *Datapath) {
	long := lb.Name{Namespace: "default", Name: strings.Repeat("x", 64)}
	err := d.SetName(1, lb.ServicePort{Service: long, Protocol: lb.TCP, Family: lb.IPv4})
	if want := fmt.Sprintf("name of service %v/TCP/IPv4: ", long); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("error %v does not begin with %q", err, want)
	}
	if err := d.SetProblem(long, "too long"); err == nil {
		t.Error("the problem of a Service with a name too long can be written")
	}
	fatal(t, d.DeleteProblem(long))
	wantLoaded(t, d.Tables, lb.NewTables())
}

func testCounters(t *testing.T, d *Datapath) {
	counters, err := d.Counters()
	fatal(t, err)
	if n := int(d.maps[bpfMapCounters].MaxEntries()); len(counters) != n {
		t.Errorf("%d counters have names, the map holds %d", len(counters), n)
	}
	for i, c := range counters {
		if c.Name == "" || c.Value != 0 {
			t.Errorf("counter %d is %+v, want a name and 0", i, c)
		}
	}
	if first, last := counters[0].Name, counters[len(counters)-1].Name; first != "connect_tcp_pass" || last != "drop_source" {
		t.Errorf("counters go from %s to %s", first, last)
	}
}
