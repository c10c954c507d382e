// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package upgrade

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// build is a program and the ABI of its tables.
type build struct {
	binary string
	abi    int
}

func TestUpgradeAndRollbackWithAnotherLayout(t *testing.T) {
	testutil.RequireRoot(t)
	older, newer := build{testutil.BuildBinary(t), datapath.ABI}, build{buildOther(t), otherABI}
	w := newWorld(t)
	unknown := w.leaveUnknown()

	running := w.start(older.binary)
	says(t, running, "programs are on devices")
	w.fairleadServes(older)
	pods := startClients(w.client, inside)
	if err := w.outside.tell(outward); err != nil {
		t.Fatal(err)
	}
	w.progress(pods)
	stopWatch := w.watchHooks()

	for _, step := range []struct {
		to, from build
		signal   syscall.Signal
		killed   int // how many agents are killed on the way
	}{
		{to: newer, from: older, signal: syscall.SIGTERM},
		{to: older, from: newer, signal: syscall.SIGKILL, killed: 2},
		{to: newer, from: older, signal: syscall.SIGKILL, killed: 4},
		{to: older, from: newer, signal: syscall.SIGTERM},
	} {
		end(t, running, step.signal)
		for i := range step.killed {
			// Also by the version that is left.
			binary := []string{step.to.binary, step.from.binary}[i%2]
			a := w.startWith(binary, testutil.AgentOptions{Source: "file:" + w.dir, Unready: true})
			if i%2 == 0 {
				// The moment of death is what varies: from here on hooks change hands.
				says(t, a, "synced")
				time.Sleep(time.Duration(i) * 3 * time.Millisecond)
			}
			end(t, a, syscall.SIGKILL)
		}
		running = w.start(step.to.binary)
		w.served(step.to.abi, step.from.abi)
		w.progress(pods)
		w.fairleadServes(step.to)
		if _, err := os.Stat(filepath.Join(w.version(step.from.abi), "maps", "frontends")); err != nil {
			t.Errorf("the tables of v%d are gone: %v", step.from.abi, err)
		}
	}
	end(t, running, syscall.SIGTERM)
	w.withoutSource(newer, older)
	w.progress(pods)

	for _, wrong := range stopWatch() {
		t.Error(wrong)
	}
	outside, err := w.outside.stop()
	if err != nil {
		t.Fatal(err)
	}
	report(t, "pods", pods.stop())
	report(t, "outside", outside)
	for _, path := range unknown {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("a version that nobody knows has lost something: %v", err)
		}
	}
}

// withoutSource starts an agent that cannot reach its API server, while another
// version's programs serve.
func (w *world) withoutSource(to, from build) {
	w.t.Helper()
	kubeconfig := filepath.Join(w.t.TempDir(), "kubeconfig")
	text := `{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}],
users: [{name: a, user: {token: a}}], clusters: [{name: a, cluster: {server: "http://127.0.0.1:1"}}]}`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	a := w.startWith(to.binary, testutil.AgentOptions{Kubeconfig: kubeconfig, Unready: true})
	const waits = "another version's programs serve until"
	says(w.t, a, waits)
	want := fmt.Sprintf("programs of v%d serve until an agent of this version has synced", from.abi)
	testutil.Eventually(w.t, 30*time.Second, "status says who serves", func() error {
		if out := w.fairlead(to.binary, "status", "--cgroup-root="+w.cgroup.Path()); !strings.Contains(out, want) {
			return errors.New(out)
		}
		return nil
	})
	w.served(from.abi, to.abi)
	if n := strings.Count(a.Logs(), waits); n != 1 {
		w.t.Errorf("the log says %d times who serves", n)
	}
	end(w.t, a, syscall.SIGKILL)
}

// leaveUnknown pins maps as versions would of which nothing is known, and returns
// their pins.
func (w *world) leaveUnknown() (pins []string) {
	w.t.Helper()
	for _, dir := range []string{"v99/maps", "state99", "something"} {
		dir = filepath.Join(w.root, dir)
		pin := filepath.Join(dir, "flows")
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if err != nil {
			w.t.Fatal(err)
		}
		defer m.Close()
		if err := errors.Join(os.MkdirAll(dir, 0o700), m.Pin(pin)); err != nil {
			w.t.Fatal(err)
		}
		pins = append(pins, pin)
	}
	return pins
}

// fairleadServes wants the build's own commands to show what it serves.
func (w *world) fairleadServes(b build) {
	w.t.Helper()
	for _, want := range []struct{ args, text string }{
		{"inspect frontends", "10.244.0.11:9000"},
		{"inspect services", "test/sticky"},
		{"status --cgroup-root=" + w.cgroup.Path(), "8 of 8 attached"},
	} {
		testutil.Eventually(w.t, 30*time.Second, want.args, func() error {
			if out := w.fairlead(b.binary, strings.Fields(want.args)...); !strings.Contains(out, want.text) {
				return fmt.Errorf("v%d: no %q in\n%s", b.abi, want.text, out)
			}
			return nil
		})
	}
}

// progress waits until clients of each kind have done some more.
func (w *world) progress(pods *clients) {
	w.t.Helper()
	const kinds, more = 6, 20
	var before []tally
	testutil.Eventually(w.t, 60*time.Second, "clients go on", func() error {
		outside, err := w.outside.progress()
		if err != nil {
			return err
		}
		now := []tally{pods.progress(), outside}
		for i, t := range now {
			if len(t.Failed) > 0 {
				w.t.Fatalf("%d failed, such as: %s", len(t.Failed), t.Failed[0])
			}
			if len(t.Exchanges) < kinds {
				return fmt.Errorf("not all have begun: %v", t.Exchanges)
			}
			for kind, n := range t.Exchanges {
				if before != nil && n < before[i].Exchanges[kind]+more {
					return fmt.Errorf("%s: %d more", kind, n-before[i].Exchanges[kind])
				}
			}
		}
		if before == nil {
			before = now
			return errors.New("just begun")
		}
		return nil
	})
}

// report says what clients have done; nothing may have failed.
func report(t *testing.T, who string, done tally) {
	t.Helper()
	for kind, n := range done.Exchanges {
		t.Logf("%s: %s: %d exchanges", who, kind, n)
	}
	if len(done.Failed) > 0 {
		t.Errorf("%s: %d failed, such as:\n%s", who, len(done.Failed), strings.Join(done.Failed[:min(len(done.Failed), 5)], "\n"))
	}
}

// end ends an agent.
func end(t *testing.T, a *testutil.Agent, signal syscall.Signal) {
	t.Helper()
	if err := a.Kill(signal); err != nil {
		t.Fatal(err)
	}
	_ = a.Wait()
}
