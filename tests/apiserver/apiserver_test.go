// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package apiserver

import (
	"os"
	"syscall"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// TestAPIServer is the life of one node: each part goes on where the one before has
// ended.
func TestAPIServer(t *testing.T) {
	w := newWorld(t)
	for _, part := range []struct {
		name string
		run  func(*world)
	}{
		{"not there at the first start: it is waited for", func(w *world) {
			w.startAgent()
			for _, i := range upTo(40) {
				w.createService(i)
				w.fill(i)
			}
			w.logs("api server cannot be reached: trying again until it can")
			if _, err := w.agent.Get(testutil.HealthzAddress, "/healthz"); err == nil {
				w.Error("healthy with nothing to serve")
			}
			if _, err := w.agent.Get(testutil.HealthzAddress, "/livez"); err != nil {
				w.Errorf("an agent that waits is restarted: %v", err)
			}
			w.proxy.open()
			w.agent.WaitReady(w)
			w.serves(upTo(40)...)
		}},
		{"connections that are half open are noticed", func(w *world) {
			w.proxy.stall()
			w.remove(40)
			w.serves(upTo(39)...)
		}},
		{"not there when an agent starts again: what the kernel holds is served", func(w *world) {
			w.killAgent()
			w.check(w.control.KillAPIServer())
			w.startAgent()
			w.logs("adopted")
			w.serves(upTo(39)...)
			w.check(w.control.StartAPIServer())
			w.connect()
			w.agent.WaitReady(w)
			w.serves(upTo(39)...)
			if n := w.metric("fairlead_repaired_rows_total"); n != 0 {
				w.Errorf("%v rows repaired", n)
			}
		}},
		{"deletions that were missed, and whose history is compacted, are made up for", func(w *world) {
			w.check(w.agent.Kill(syscall.SIGSTOP))
			w.remove(39)
			w.empty(38)
			w.restartServer(nil) // it begins with what there is: 410 Gone for what was before
			w.check(w.agent.Kill(syscall.SIGCONT))
			w.serves(upTo(37)...)
		}},
		{"token and authority are rotated: what the files have now is used", func(w *world) {
			w.newToken()
			w.restartServer(w.control.ReplaceCA) // it knows the old token no more
			w.remove(37)
			w.remove(36)
			w.logs("api server refuses us, or is none that we trust")
			w.serves(upTo(37)...)
			w.writeCA()
			w.serves(upTo(35)...)
		}},
		{"moved: an address that it had is used, also by the next agent", func(w *world) {
			info, err := os.Stat(w.remembered)
			w.check(err)
			if info.Mode().Perm() != 0o600 {
				w.Errorf("others may read what is remembered: %v", info.Mode())
			}
			w.proxy.close()
			w.remove(35)
			w.serves(upTo(34)...)
			w.logs("using one that it had")
			state, err := agent.AskSource(w.Context(), agent.SocketPath(w.options.BPFRoot))
			if err != nil || state.Configured || state.APIServer != w.control.URL() {
				w.Errorf("%+v, %v: want that it asks %s, which is not configured", state, err, w.control.URL())
			}
			w.killAgent()
			w.startAgent()
			w.agent.WaitReady(w)
			w.remove(34)
			w.serves(upTo(33)...)
		}},
		{"restored from a backup: what was undone is undone", func(w *world) {
			backup, err := w.control.SaveData()
			w.check(err)
			w.remove(33)
			w.createService(41)
			w.fill(41)
			w.serves(append(upTo(32), 41)...)
			w.restartServer(func() error { return w.control.RestoreData(backup) })
			w.serves(upTo(33)...)
		}},
		{"scaled to zero by their owners: passes at once", func(w *world) {
			for _, i := range upTo(33) {
				w.empty(i)
			}
			w.serves()
			if n := w.metric("fairlead_guard_held_total"); n != 0 {
				w.Errorf("held %v times", n)
			}
			for _, i := range upTo(33) {
				w.fill(i)
			}
			w.serves(upTo(33)...)
		}},
		{"restarted empty: done once it was said twice", func(w *world) {
			w.killAgent()
			// No account will be left.
			w.options.Kubeconfig = w.control.Kubeconfig(w, "agent", "system:masters")
			w.startAgent()
			w.agent.WaitReady(w)
			w.restartServer(func() error { return w.control.RestoreData("") })
			w.logs("guard: a list would take the last endpoints of many Services at once")
			w.logs("guard: the source has looked again")
			w.serves()
			if total, held := w.metric("fairlead_guard_held_total"), w.metric("fairlead_guard_held"); total != 1 || held != 0 {
				w.Errorf("held %v times, now %v, want 1 and 0", total, held)
			}
		}},
	} {
		if !t.Run(part.name, func(t *testing.T) {
			w.T = t
			part.run(w)
		}) {
			return // each needs what the one before has left
		}
	}
}
