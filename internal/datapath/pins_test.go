// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// TestPinsAreKept lets somebody take pins away; what another process reads is what
// the datapath writes.
func TestPinsAreKept(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, Sizes{})
	key := frontendKey("10.96.0.1:80", lb.TCP)
	if err := d.SetFrontend(key, lb.Frontend{Service: 1, Kind: lb.KindClusterIP}); err != nil {
		t.Fatal(err)
	}
	count := 0
	for name := range d.maps {
		if isPinned(name) {
			count++
		}
	}
	for _, tt := range []struct {
		name string
		do   func() error
		want int // maps that are pinned anew
	}{
		{"nothing happens", func() error { return nil }, 0},
		{"a pin is removed", func() error { return os.Remove(MapPath(root, "frontends")) }, 1},
		{"two pins change places", func() error {
			return unix.Renameat2(unix.AT_FDCWD, MapPath(root, "frontends"), unix.AT_FDCWD, MapPath(root, "members"), unix.RENAME_EXCHANGE)
		}, 2},
		{"the root is removed", func() error { return os.RemoveAll(root) }, count},
		{"another file system is mounted", func() error {
			if err := unix.Unmount(filepath.Dir(root), unix.MNT_DETACH); err != nil {
				return err
			}
			_, err := sandbox.MountBPFFS(filepath.Dir(root)) // BPFRoot unmounts whatever is there
			return err
		}, count},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.do(); err != nil {
				t.Fatal(err)
			}
			if got, err := d.KeepPins(); err != nil || len(got) != tt.want {
				t.Fatalf("%v, %v; want %d maps", got, err, tt.want)
			}
			if got, err := d.KeepPins(); err != nil || len(got) != 0 {
				t.Errorf("again: %v, %v; want nothing left to do", got, err)
			}
			view, err := OpenView(root)
			if err != nil {
				t.Fatal(err)
			}
			defer view.Close()
			if tables, err := view.Load(); err != nil || tables.Frontends[key].Service != 1 {
				t.Errorf("what is pinned holds %v, %v", tables.Frontends, err)
			}
			if locked, err := Locked(root); err != nil || !locked {
				t.Errorf("locked: %v, %v; want that no other agent can begin", locked, err)
			}
		})
	}
}

func TestARootOfAnotherAgentIsLeftAlone(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, Sizes{})
	if _, err := d.KeepPins(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	other := openDatapath(t, root, Sizes{})
	if got, err := d.KeepPins(); err == nil || got != nil {
		t.Errorf("%v, %v; want an error about the root", got, err)
	}
	if got, err := other.KeepPins(); err != nil || len(got) > 0 {
		t.Errorf("the other: %v, %v; want it left alone", got, err)
	}
}

func TestDigestTellsOfEveryTable(t *testing.T) {
	d := openDatapath(t, testutil.BPFRoot(t), Sizes{})
	digest := func() uint64 {
		t.Helper()
		n, err := d.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	seen := []uint64{digest()}
	key, backend := frontendKey("10.96.0.1:80", lb.TCP), lb.Backend{Addr: netip.MustParseAddr("10.0.0.1"), Port: 80}
	prefix := netip.MustParsePrefix("192.0.2.0/24")
	for _, tt := range []struct {
		table string
		write func() error
	}{
		{"frontends", func() error { return d.SetFrontend(key, lb.Frontend{Service: 1, Kind: lb.KindClusterIP}) }},
		{"frontends, the value", func() error { return d.SetFrontend(key, lb.Frontend{Service: 2, Kind: lb.KindClusterIP}) }},
		{"services", func() error { return d.SetOptions(1, lb.ServiceRow{Affinity: 3}) }},
		{"slots", func() error { return d.SetSlots(7, []lb.Backend{backend}) }},
		{"members", func() error { return d.SetMember(lb.Member{Service: 1, Backend: backend}) }},
		{"source_ranges", func() error { return d.SetSource(lb.Source{Service: 1, Prefix: prefix}) }},
		{"node_addresses", func() error { return d.SetNodeAddress(backend.Addr, lb.NodeAddressOpen) }},
		{"service_cidrs", func() error { return d.SetServiceCIDR(prefix) }},
		{"names", func() error { return d.SetName(1, lb.ServicePort{Service: lb.Name{Namespace: "a", Name: "b"}}) }},
		{"problems", func() error { return d.SetProblem(lb.Name{Namespace: "a", Name: "b"}, "full") }},
		{"cluster_cidrs", func() error { return d.SetClusterCIDRs([]netip.Prefix{prefix}) }},
		{"frontend_gate", func() error { d.gateMem[5] ^= 1; return nil }},
	} {
		if err := tt.write(); err != nil {
			t.Fatal(err)
		}
		now := digest()
		if slices.Contains(seen, now) {
			t.Errorf("%s: the digest is one of before", tt.table)
		}
		if again := digest(); again != now {
			t.Errorf("%s: the digest of the same rows is another one", tt.table)
		}
		seen = append(seen, now)
	}
}
