// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// beginSmall makes all maps that can grow with 64 rows.
func beginSmall(t *testing.T) {
	t.Helper()
	before := maps.Clone(firstSizes)
	for name := range firstSizes {
		firstSizes[name] = 64
	}
	t.Cleanup(func() { firstSizes = before })
}

// growing are sizes up to which such maps can grow, not all by doubling.
var growing = Sizes{
	Frontends: 300, Services: 256, Slots: 1024, Members: 256, SourceRanges: 256, Affinity: 64, Peers: 64, Flows: 4096,
}

func openGrowing(t *testing.T, root string) *Datapath {
	t.Helper()
	return openConfig(t, Config{Root: root, Sizes: growing, Grow: true})
}

var everyTable = []string{TableFrontends, TableMembers, TableServices, TableSlots, TableSourceRanges}

// nobody is attached: programs go nowhere.
func nobody(func(string) *ebpf.Program) error { return nil }

func grow(t *testing.T, d *Datapath, want map[string]uint32) []Growth {
	t.Helper()
	got, err := d.Grow(want, nobody)
	fatal(t, err)
	return got
}

func TestTablesGrow(t *testing.T) {
	beginSmall(t)
	root := testutil.BPFRoot(t)
	d := openGrowing(t, root)
	rows := sample()
	write(t, d.Tables, rows)
	if len(d.Resized) > 0 {
		t.Errorf("maps that can grow are said not to have the size asked for: %v", d.Resized)
	}
	view, err := OpenView(root)
	fatal(t, err)
	defer view.Close()

	all := map[string]uint32{}
	for _, table := range everyTable {
		all[table] = 0
	}
	var want []Growth
	for _, table := range everyTable {
		want = append(want, Growth{table, 64, 128})
	}
	var seen []string
	got, err := d.Grow(all, func(program func(string) *ebpf.Program) error {
		if program("sock_connect4") == d.Program("sock_connect4") {
			seen = append(seen, "old")
		} else {
			seen = append(seen, "new")
		}
		return nil
	})
	fatal(t, err)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("grown are (-want +got):\n%s", diff)
	}
	if !slices.Equal(seen, []string{"new"}) {
		t.Errorf("attached are %v programs, want the new ones once", seen)
	}
	wantLoaded(t, d.Tables, rows)
	wantLoaded(t, view.Tables, rows) // what it has open is what it was
	if services, slots := d.Limits(); services != 128 || slots != 128 {
		t.Errorf("limits are %d, %d, want 128", services, slots)
	}

	t.Run("to what is wanted, and no further than they may", func(t *testing.T) {
		got := grow(t, d, map[string]uint32{TableFrontends: 1000, TableSlots: 500, TableMembers: 10})
		want := []Growth{{TableFrontends, 128, 300}, {TableMembers, 128, 256}, {TableSlots, 128, 512}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("grown are (-want +got):\n%s", diff)
		}
		if got := grow(t, d, map[string]uint32{TableFrontends: 1000, TableMembers: 0}); len(got) > 0 {
			t.Errorf("grown are %v beyond the ceilings", got)
		}
	})
	t.Run("and are written from then on", func(t *testing.T) {
		for i := range 250 {
			rows.Frontends[numbered(i)] = lb.Frontend{Service: 2, Kind: lb.KindClusterIP}
		}
		write(t, d.Tables, rows)
		fatal(t, d.SetSlots(511, []lb.Backend{backend("10.244.0.9:1")}))
		wantLoaded(t, d.Tables, rows)
		if f := d.Fill()[TableFrontends]; f != (Fill{Rows: uint32(len(rows.Frontends)), Size: 300, Max: 300}) {
			t.Errorf("frontends are filled %+v", f)
		}
		if err := d.SetRange(127, lb.SideInside, lb.Range{}); err != nil {
			t.Error(err)
		}
	})
	t.Run("for those who come later", func(t *testing.T) {
		closeDatapath(t, d)
		again := openGrowing(t, root)
		wantLoaded(t, again.Tables, rows)
		if len(again.Resized) > 0 || again.maps[bpfMapFrontends].MaxEntries() != 300 {
			t.Errorf("frontends has room for %d rows; resized: %v", again.maps[bpfMapFrontends].MaxEntries(), again.Resized)
		}
		closeDatapath(t, again)
		smaller := growing
		smaller.Frontends, smaller.Slots = 299, 600
		again = openConfig(t, Config{Root: root, Sizes: smaller, Grow: true})
		if !slices.Equal(again.Resized, []string{bpfMapFrontends}) {
			t.Errorf("resized are %v, want frontends, which has more rows than it may", again.Resized)
		}
	})
}

// TestAFailedGrowthLeavesEverythingAsItWas fails it in each of its steps.
func TestAFailedGrowthLeavesEverythingAsItWas(t *testing.T) {
	beginSmall(t)
	root := testutil.BPFRoot(t)
	d := openGrowing(t, root)
	rows := sample()
	write(t, d.Tables, rows)
	all := map[string]uint32{TableFrontends: 0, TableServices: 0, TableSlots: 0}
	last := MapPath(root, bpfMapSlots) + asideSuffix
	refused := errors.New("refused")
	for _, tc := range []struct {
		name   string
		before func(t *testing.T)
		attach func(calls int) error
		calls  int
	}{
		{
			name: "when a larger map cannot be pinned",
			before: func(t *testing.T) {
				child := makeDir(t, last, "child")
				t.Cleanup(func() { fatal(t, errors.Join(os.Remove(child), os.Remove(last))) })
			},
		}, {
			name: "when programs cannot be attached",
			attach: func(calls int) error {
				if calls == 1 {
					return refused
				}
				return nil
			},
			calls: 2,
		}, {
			name: "when a pin cannot be moved",
			attach: func(calls int) error {
				if calls == 1 {
					return os.Remove(last)
				}
				return nil
			},
			calls: 2,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.before != nil {
				tc.before(t)
			}
			calls, current := 0, d.Program("sock_connect4")
			_, err := d.Grow(all, func(program func(string) *ebpf.Program) error {
				calls++
				if old := program("sock_connect4") == current; old != (calls == 2) {
					t.Errorf("call %d: old programs: %v", calls, old)
				}
				return tc.attach(calls)
			})
			if err == nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("it ends with %v, want one line", err)
			}
			if calls != tc.calls {
				t.Errorf("programs were attached %d times, want %d", calls, tc.calls)
			}
			wantLoaded(t, d.Tables, rows)
			for _, name := range []string{bpfMapFrontends, bpfMapServices, bpfMapNames, mapGenerations, bpfMapSlots} {
				m, err := ebpf.LoadPinnedMap(MapPath(root, name), nil)
				fatal(t, err)
				same, err := sameMap(m, d.maps[name])
				fatal(t, errors.Join(err, m.Close()))
				if !same || d.maps[name].MaxEntries() != 64 {
					t.Errorf("%s has %d rows; it is pinned: %v", name, d.maps[name].MaxEntries(), same)
				}
			}
		})
	}
	if got := grow(t, d, all); len(got) != 3 {
		t.Errorf("later %v grow", got)
	}
}

// TestOthersReadWhileTablesGrow is about the goroutines that look for what is over, and
// about who asks for metrics. It means most with the race detector.
func TestOthersReadWhileTablesGrow(t *testing.T) {
	beginSmall(t)
	d := openGrowing(t, testutil.BPFRoot(t))
	member := lb.Member{Service: 1, Backend: backend("10.244.0.2:80")}
	fatal(t, d.SetMember(member))
	done := make(chan struct{})
	var running sync.WaitGroup
	for what, read := range map[string]func() error{
		"a member": func() error {
			there, err := d.HasMember(member)
			if err == nil && !there {
				err = errors.New("it is not there")
			}
			return err
		},
		"counters": func() error { _, err := d.Counters(); return err },
		"flows":    func() error { _, err := d.Flows(); return err },
		"sockets":  func() error { _, err := d.WalkOrigins(); return err },
		"fill": func() error {
			if f := d.Fill()[TableMembers]; f.Rows != 1 || f.Size > f.Max {
				return fmt.Errorf("%+v", f)
			}
			return nil
		},
	} {
		running.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := read(); err != nil {
					t.Errorf("%s: %v", what, err)
					return
				}
			}
		})
	}
	for range 2 {
		grow(t, d, map[string]uint32{TableMembers: 0, TableServices: 0})
	}
	close(done)
	running.Wait()
}

func sameMap(a, b *ebpf.Map) (bool, error) {
	infoA, err1 := a.Info()
	infoB, err2 := b.Info()
	if err := errors.Join(err1, err2); err != nil {
		return false, err
	}
	idA, _ := infoA.ID()
	idB, _ := infoB.ID()
	return idA == idB, nil
}

func TestPinsOfAGrowthThatWasKilledAreRemoved(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	left := MapPath(root, bpfMapMembers) + asideSuffix
	fatal(t, d.grace.Pin(left))
	closeDatapath(t, d)
	openDatapath(t, root, small)
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", filepath.Base(left), err)
	}
}

// TestNamesSayHowLargeOtherTablesBegin is about state that has grown under another
// version.
func TestNamesSayHowLargeOtherTablesBegin(t *testing.T) {
	beginSmall(t)
	root := testutil.BPFRoot(t)
	d := openGrowing(t, root)
	fatal(t, d.Serve())
	grow(t, d, map[string]uint32{TableServices: 0})
	fatal(t, d.SetName(100, lb.ServicePort{Service: lb.Name{Namespace: "a", Name: "b"}, Family: lb.IPv4, Protocol: lb.TCP}))
	closeDatapath(t, d)
	anotherServes(t, root)
	d = openGrowing(t, root)
	if services, _ := d.Limits(); services != 128 {
		t.Errorf("there are %d service IDs, want the 128 of names", services)
	}
}
