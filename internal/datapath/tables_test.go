// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// numbered returns the i-th of many frontend keys.
func numbered(i int) lb.FrontendKey {
	vip := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})
	return lb.FrontendKey{VIP: vip, Port: 80, Protocol: lb.TCP}
}

// TestTables shares one datapath, since the verifier takes its time. Each test
// leaves the tables empty.
func TestTables(t *testing.T) {
	d := openDatapath(t, testutil.BPFRoot(t), Sizes{Frontends: 8192, Services: 64, Slots: 256, Members: 8192, Peers: 64})
	for _, tc := range []struct {
		name string
		test func(*testing.T, *Datapath)
	}{
		{"Load returns what was written", testLoad},
		{"writes are counted", testWrites},
		{"full maps name the flag that helps", testFull},
		{"numbers outside the maps are refused", testNumbers},
		{"names that do not fit are refused", testNames},
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
		fatal(t, tables.SetService(id, lb.Range{}))
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
		want.Services[1] = lb.Range{Base: 11, Count: 1, Generation: 6}
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
	want := map[string]uint64{"frontends": 4, "names": 3, "services": 4, "slots": 3, "members": 3, "problems": 1}
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
	if diff := cmp.Diff(want, since()); diff != "" {
		t.Errorf("reading and the agent's state are counted (-want +got):\n%s", diff)
	}
}

func testFull(t *testing.T, d *Datapath) {
	const rows = 8192
	fill := func(put func(i int) error) error {
		for i := range rows + 1 {
			if err := put(i); err != nil {
				return err
			}
		}
		return nil
	}
	for _, tc := range []struct {
		table string
		put   func(i int) error
		want  string
	}{
		{"frontends", func(i int) error { return d.SetFrontend(numbered(i), lb.Frontend{Kind: lb.KindClusterIP}) },
			"update frontends 10.96.32.0:80/TCP: "},
		{"members", func(i int) error {
			return d.SetMember(lb.Member{Service: 1, Backend: lb.Backend{Addr: numbered(i).VIP, Port: 53}})
		}, "update members 10.96.32.0:53: "},
	} {
		t.Run(tc.table, func(t *testing.T) {
			before := d.Writes()[tc.table]
			err := fill(tc.put)
			if !errors.Is(err, unix.E2BIG) {
				t.Fatalf("error is %v, want E2BIG", err)
			}
			help := "(the map is full at 8192 rows; raise --max-" + tc.table + ")"
			if !strings.HasPrefix(err.Error(), tc.want) || !strings.Contains(err.Error(), help) {
				t.Errorf("error %q does not say %q and %q", err, tc.want, help)
			}
			if n := d.Writes()[tc.table] - before; n != rows {
				t.Errorf("%d writes are counted, %d succeeded", n, rows)
			}
		})
	}
}

func testNumbers(t *testing.T, d *Datapath) {
	b := backend("10.244.0.2:80")
	fatal(t, d.SetService(63, lb.Range{}))
	fatal(t, d.SetSlots(255, []lb.Backend{b}))
	for name, err := range map[string]error{
		// The mapped memory is a whole page, the map is not.
		"the first service ID beyond":  d.SetService(64, lb.Range{}),
		"a service ID far beyond":      d.SetService(1<<31, lb.Range{}),
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
	if first, last := counters[0].Name, counters[len(counters)-1].Name; first != "connect_tcp_pass" || last != "peer_lost" {
		t.Errorf("counters go from %s to %s", first, last)
	}
}
