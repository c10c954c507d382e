// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"errors"
	"path/filepath"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

// attachAtStart puts our programs on the hooks at once, unless another version's
// programs serve: these go on, with tables that say more than ours, until takeOver.
func (a *agent) attachAtStart() error {
	if a.switching {
		a.log.Info("another version's programs serve until all Services are in the tables of this one")
		return nil
	}
	if devices, err := datapath.OtherDevicesPaths(a.root); err == nil && len(devices) == 0 {
		a.alone.give()
	}
	if err := a.datapath.Serve(); err != nil {
		return err
	}
	for _, hook := range attach.Hooks() {
		if err := attach.Attach(a.cgroup, hook, a.datapath.Program(hook.Program), datapath.LinkPath(a.root, hook.Name)); err != nil {
			return err
		}
	}
	a.attached()
	return nil
}

// attached begins to look after our programs, which are on all hooks by now.
func (a *agent) attached() {
	a.lookFrom(a.cgroup)
	a.log.Info("hooks attached", logfield.Version(a.state.Version), logfield.Cgroup(a.cgroup.Path), logfield.Count(len(attach.Hooks())))
}

// takeOver puts our programs in the place of other versions', once, when our tables
// are complete as an apply with result r shows. What cannot be done now is tried
// again after the next one.
func (a *agent) takeOver(r reconciler.Result) {
	if a.tookOver || !a.applied || a.broken(r) {
		return
	}
	a.filled.give()
	if a.switching {
		if err := a.takeHooks(); err != nil {
			a.once("hooks of another version cannot be taken over; trying again", err)
			a.health.Queued() // what clients get is not what we have written
			a.scheduleRetry(true, false)
			return
		}
		a.switching = false
	}
	// What has no hook of ours, or was there twice.
	removed, err := datapath.RemoveOtherLinks(a.root)
	if err != nil {
		a.once("hooks of another version cannot be removed; both serve the node", err)
	}
	if len(removed) > 0 {
		a.log.Info("removed hooks of another version", logfield.Count(len(removed)))
	}
	a.tookOver = err == nil
	if a.devices != nil {
		a.devices.ready.give()
		a.devices.synced.give()
		return
	}
	a.removeOtherPackets()
	a.alone.give()
}

// takeHooks puts our programs on all hooks. A hook that has another version's program
// has ours from one packet to the next, with the same state.
func (a *agent) takeHooks() error {
	others, err := datapath.OtherLinks(a.root)
	if err != nil {
		return err
	}
	if err := a.datapath.Serve(); err != nil {
		return err
	}
	taken := 0
	var errs []error
	for _, hook := range attach.Hooks() {
		var same []string
		for _, pin := range others {
			if filepath.Base(pin) == hook.Name {
				same = append(same, pin)
			}
		}
		from, err := attach.TakeOver(a.cgroup, hook, a.datapath.Program(hook.Program), datapath.LinkPath(a.root, hook.Name), same)
		if from {
			taken++
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	a.attached()
	a.log.Info("took over from another version", logfield.Count(taken))
	return nil
}

// once logs what goes wrong with taking over, each reason once.
func (a *agent) once(message string, err error) {
	if a.switchFailing != err.Error() {
		a.switchFailing = err.Error()
		a.log.Warn(message, logfield.Error(err))
	}
}
