// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// anotherServes makes it look as if another version had served since.
func anotherServes(t *testing.T, root string) {
	t.Helper()
	_ = os.Remove(servingPath(root))
	fatal(t, os.Symlink("../v99", servingPath(root)))
}

func TestTablesFromBeforeAnotherVersionServedAreMadeAnew(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	if d.Switching {
		t.Error("a new root is said to be another version's")
	}
	fatal(t, d.Serve())
	rows := sample()
	write(t, d.Tables, rows)
	fatal(t, errors.Join(d.SetDevices([]Device{{Index: 2}}), d.AddFlow(tcpFlow())))
	closeDatapath(t, d)

	d = openDatapath(t, root, small)
	wantLoaded(t, d.Tables, rows)
	if d.Switching {
		t.Error("our own tables are said to be another version's")
	}
	closeDatapath(t, d)

	anotherServes(t, root)
	d = openDatapath(t, root, small)
	if !d.Switching {
		t.Error("nothing tells that another version serves")
	}
	want := lb.NewTables()
	want.Names = rows.Names
	for id, row := range rows.Services {
		var left lb.ServiceRow
		for side, r := range row.Sides {
			left.Sides[side].Generation = r.Generation
		}
		want.Services[id] = left
	}
	got, err := d.Load()
	fatal(t, err)
	if diff := cmp.Diff(want.String(), got.String()); diff != "" {
		t.Errorf("of the tables other rows are left than names and generations (-want +got):\n%s", diff)
	}
	flows, err1 := d.Flows()
	devices, err2 := d.Devices()
	if err := errors.Join(err1, err2); err != nil || len(flows) != 1 || len(devices) != 0 {
		t.Errorf("flows %v, devices %v, %v; want the flow, which is state, and no device", flows, devices, err)
	}

	t.Run("until they serve", func(t *testing.T) {
		fatal(t, d.Serve())
		write(t, d.Tables, rows)
		closeDatapath(t, d)
		d := openDatapath(t, root, small)
		if d.Switching {
			t.Error("our own tables are said to be another version's")
		}
		wantLoaded(t, d.Tables, rows)
		if err := d.Serve(); err != nil {
			t.Errorf("a second time: %v", err)
		}
	})
}

func TestAnotherVersionsLinkIsReasonToWait(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	fatal(t, d.Serve())
	write(t, d.Tables, sample())
	// Anything that is pinned there counts.
	fatal(t, d.grace.Pin(filepath.Join(makeDir(t, root, "v99", "links"), "connect4")))
	closeDatapath(t, d)

	d = openDatapath(t, root, small)
	if !d.Switching {
		t.Error("nothing tells that another version has a hook")
	}
	// It has served with these, as the link beside the state says.
	wantLoaded(t, d.Tables, sample())
}

func TestGenerationsGoOnInOtherTables(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	fatal(t, d.Serve())
	const id, side = 7, lb.SideInside
	fatal(t, d.SetRange(id, side, lb.Range{Count: 1, Generation: 41}))
	closeDatapath(t, d)
	anotherServes(t, root)
	d = openDatapath(t, root, small)
	rows, err := d.Load()
	fatal(t, err)
	if got := rows.Services[id].Sides[side]; got != (lb.Range{Generation: 41}) {
		t.Errorf("the range is %+v, want an empty one of generation 41", got)
	}
	if got := rows.Services[id].Sides[lb.SideOutside]; got != (lb.Range{}) {
		t.Errorf("another side's is %+v", got)
	}
}

func TestStateBoundsServiceIDs(t *testing.T) {
	root := testutil.BPFRoot(t)
	d := openDatapath(t, root, small)
	fatal(t, d.Serve())
	closeDatapath(t, d)
	anotherServes(t, root)
	larger := small
	larger.Services *= 2
	d = openDatapath(t, root, larger)
	if services, _ := d.Limits(); services != int(small.Services) {
		t.Errorf("there are %d service IDs, want the %d that names has room for", services, small.Services)
	}
	if err := d.SetRange(lb.ServiceID(small.Services), lb.SideInside, lb.Range{}); err == nil {
		t.Error("a range of an ID beyond can be written")
	}
}
