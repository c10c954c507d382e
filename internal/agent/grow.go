// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

// After a failure tables are grown again after growFirst, then twice that, and so on
// up to growLast.
const (
	growFirst = 10 * time.Second
	growLast  = 10 * time.Minute
)

// growth is what became of the attempts to grow tables.
type growth struct {
	failing string    // what was logged of the last one
	next    time.Time // when it is tried again
	pause   time.Duration
}

// makeRoom grows tables that are full, as result r says, or nearly so. What had no
// room is written then, and the result is that of both.
func (a *agent) makeRoom(r reconciler.Result) reconciler.Result {
	for {
		full := fullTables(r)
		wanted := a.crowded(full)
		if len(wanted) == 0 || time.Now().Before(a.growth.next) {
			return r
		}
		start := time.Now()
		grown, err := a.datapath.Grow(wanted, a.exchangePrograms)
		if a.growth.failed(err) {
			a.log.Warn("tables cannot grow; trying again later", logfield.Error(err))
		}
		for _, g := range grown {
			a.log.Info("table has grown", logfield.Table(g.Table), logfield.Old(int(g.From)), logfield.New(int(g.To)), logfield.Took(time.Since(start)))
		}
		if len(grown) == 0 {
			return r
		}
		services, slots := a.datapath.Limits()
		a.reconciler.Grow(reconciler.Limits{Services: services, Slots: slots})
		if len(full) == 0 {
			return r
		}
		r = both(r, a.reconciler.Retry())
	}
}

// failed notes how an attempt went, and tells whether that is worth a word.
func (g *growth) failed(err error) bool {
	if err == nil {
		*g = growth{}
		return false
	}
	news := err.Error() != g.failing
	g.failing = err.Error()
	g.pause = min(max(2*g.pause, growFirst), growLast)
	g.next = time.Now().Add(g.pause)
	return news
}

// fullTables returns the tables that had no room for something.
func fullTables(r reconciler.Result) map[string]bool {
	tables := map[string]bool{}
	for _, err := range r.Failed {
		if full := (*lb.FullError)(nil); errors.As(err, &full) {
			tables[full.Table] = true
		}
	}
	return tables
}

// crowded returns the tables that can grow and should, with the rows that are wanted
// of each: those that are full, and those of which three quarters are.
func (a *agent) crowded(full map[string]bool) map[string]uint32 {
	taken := a.reconciler.Taken()
	a.kernel.slots.Store(int64(taken.Slots))
	fills := a.kernel.Tables()
	var demand map[string]int
	wanted := map[string]uint32{}
	for table, f := range fills {
		if table == datapath.TableServices {
			f.Rows = uint32(taken.Services) // those at rest as well
		}
		switch {
		case f.Size >= f.Max:
		case full[table]:
			if demand == nil {
				demand = demandOf(a.reconciler.Demand())
			}
			wanted[table] = uint32(demand[table] + demand[table]/3)
		case 4*uint64(f.Rows) > 3*uint64(f.Size):
			wanted[table] = 0 // twice as large will do
		}
	}
	return wanted
}

// demandOf says by table how many rows are wanted.
func demandOf(d reconciler.Demand) map[string]int {
	return map[string]int{
		datapath.TableFrontends: d.Frontends, datapath.TableServices: d.Services, datapath.TableSlots: d.Slots,
		datapath.TableMembers: d.Members, datapath.TableSourceRanges: d.Sources,
	}
}

// exchangePrograms puts programs in the place of ours, on hooks and devices.
func (a *agent) exchangePrograms(program func(name string) *ebpf.Program) error {
	for _, hook := range attach.Hooks() {
		pin := datapath.LinkPath(a.root, hook.Name)
		if _, err := os.Lstat(pin); a.switching && err != nil {
			continue // another version's program is there
		}
		if err := attach.Attach(a.cgroup, hook, program(hook.Program), pin); err != nil {
			return fmt.Errorf("exchange programs: %w", err)
		}
	}
	if a.tc != nil {
		a.tc.Replace(packetPrograms(program))
	}
	return nil
}

// both returns the result of two steps, the second of which has tried again what had
// failed in the first.
func both(first, second reconciler.Result) reconciler.Result {
	second.Writes += first.Writes
	second.Deletes += first.Deletes
	second.Stranded = second.Stranded || first.Stranded
	second.Unremembered = second.Unremembered || first.Unremembered
	answered := slices.Concat(first.Answered, second.Answered)
	slices.SortFunc(answered, lb.FrontendKey.Compare)
	second.Answered = slices.Compact(answered)
	return second
}
