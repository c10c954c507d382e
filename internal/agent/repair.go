// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

// Tables that have no place in lb.Tables, as /metrics calls them.
const (
	devicesTable = "devices"
	cidrsTable   = "cluster_cidrs"
	gateTable    = "frontend_gate"
)

// rowsWrong is what the log says of rows that somebody else has changed.
const rowsWrong = "rows were missing or wrong in the kernel; repairing them"

// proven is what the tables were when all rows were last compared and found right.
type proven struct {
	known  bool
	digest uint64
	writes uint64 // of ours until then
}

// repair compares the kernel with what is wanted and puts right what is not. Where
// neither we nor anybody else has written since the last time, there is nothing to
// compare row by row.
func (a *agent) repair() {
	if !a.applied || a.guard.holds() {
		return
	}
	start := time.Now()
	now := a.lookAtTables()
	if now.known && now == a.proven && !a.unsettled() {
		a.finish(start, reconciler.Result{}, true)
	} else if !a.repairRows(start, now) {
		return
	}
	a.forgetAffinities()
	a.askWalk(nil)
}

// unsettled tells that there are rows which are not what is wanted, as far as we know.
func (a *agent) unsettled() bool { return a.reconciler.Pending() || len(a.failing) > 0 }

// lookAtTables returns what the tables are now, whatever they should be.
func (a *agent) lookAtTables() proven {
	digest, err := a.datapath.Digest()
	p := proven{known: err == nil, digest: digest} // Load will say why not
	for table, n := range a.datapath.Writes() {
		if table != devicesTable { // another goroutine's, and not in the digest
			p.writes += n
		}
	}
	return p
}

// repairRows compares row by row. now is what the tables were before. It returns
// false when they cannot be read.
func (a *agent) repairRows(start time.Time, now proven) bool {
	a.expelStrangers()
	gates := a.datapath.GateRepairs()
	held, err := a.datapath.Load()
	if err != nil {
		a.log.Warn("repair: the kernel's tables cannot be read", logfield.Error(err))
		return false
	}
	// Against what we have written, not against what is wanted: a Service that
	// cannot be written is no damage.
	damages := held.Damages(a.reconciler.Tables())
	if len(damages) == 0 {
		// Otherwise the gate has been made to fit the rows that are wrong.
		if n := a.datapath.GateRepairs() - gates; n > 0 {
			damages = []lb.Damage{{Table: gateTable, Rows: n}}
		}
	}
	if n := a.repairClusterCIDRs(); n > 0 {
		damages = append(damages, lb.Damage{Table: cidrsTable, Rows: n})
	}
	a.reportDamages(damages)
	var r reconciler.Result
	if len(damages) > 0 || a.unsettled() {
		a.reconciler.Adopt(held)
		r = a.makeRoom(a.reconciler.ApplyAll(a.store.All()))
	}
	a.finish(start, r, true)
	a.takeOver(r)
	// What was read before the comparison has been found right by it, and who has
	// written since makes a difference next time.
	a.proven = proven{}
	if len(damages) == 0 && r.Writes+r.Deletes == 0 {
		a.proven = now
	}
	return true
}

// repairClusterCIDRs returns how many rows were wrong.
func (a *agent) repairClusterCIDRs() int {
	before := a.datapath.Writes()[cidrsTable]
	if err := a.datapath.SetClusterCIDRs(a.clusterCIDRs); err != nil {
		a.log.Warn("repair: cluster CIDRs cannot be put right", logfield.Error(err))
	}
	return int(a.datapath.Writes()[cidrsTable] - before)
}

// mendDevices makes the rows of devices these, and returns how many were wrong. It is
// for the goroutine that writes such rows.
func (a *agent) mendDevices(want []datapath.Device) (int, error) {
	before := a.datapath.Writes()[devicesTable]
	err := a.datapath.SetDevices(want)
	wrong := a.datapath.Writes()[devicesTable] - before
	a.metrics.RepairedRows.WithLabelValues(devicesTable).Add(float64(wrong))
	return int(wrong), err
}

// reportDamages counts and names rows that were missing or wrong.
func (a *agent) reportDamages(damages []lb.Damage) {
	for _, d := range damages {
		a.metrics.RepairedRows.WithLabelValues(d.Table).Add(float64(d.Rows))
		a.log.Warn(rowsWrong, logfield.Table(d.Table), logfield.Count(d.Rows), logfield.Rows(d.Examples))
	}
}

// expelStrangers deletes what only somebody else can have written into the tables.
func (a *agent) expelStrangers() {
	damages, err := a.datapath.ExpelStrangers()
	for _, d := range damages {
		a.metrics.RepairedRows.WithLabelValues(d.Table).Add(float64(d.Rows))
		a.log.Warn("somebody else has written rows into the kernel's tables; deleted them", logfield.Table(d.Table), logfield.Count(d.Rows))
	}
	if err != nil {
		a.log.Warn("rows that somebody else has written cannot be deleted", logfield.Error(err))
	}
}
