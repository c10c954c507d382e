// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// wait leaves everything as it is.
func (w *world) wait(int) {
	// Not a wait for anything: this is what other rows are to be compared with.
	time.Sleep(time.Second)
}

func (w *world) terminate(int) {
	w.agent.End(w.t, syscall.SIGTERM)
	w.restart()
}

func (w *world) kill(int) {
	w.agent.End(w.t, syscall.SIGKILL)
	w.restart()
}

func (w *world) end() { w.agent.End(w.t, syscall.SIGKILL) }

// crash starts an agent that dies in the middle of its start, of its first apply, or
// of attaching its programs.
func (w *world) crash(int) {
	options := w.options()
	options.Unready = true
	agent := testutil.StartAgent(w.t, options)
	// Not a wait for anything: the moment of death is what varies.
	time.Sleep(rand.N(500 * time.Millisecond))
	agent.End(w.t, syscall.SIGKILL)
}

// revive starts an agent after many that have crashed. They have left nothing to
// mend.
func (w *world) revive() {
	w.restart()
	if n := w.metric("fairlead_table_writes_total"); n != 0 {
		w.t.Errorf("%v rows were written after crashes in a cluster that has not changed, want 0", n)
	}
}

// metric returns the sum of a metric of the agent.
func (w *world) metric(name string, labels ...string) float64 {
	w.t.Helper()
	v, err := w.agent.Metric(name, labels...)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) otherBuild(int) {
	for _, binary := range []string{w.otherBinary(), testutil.BuildBinary(w.t)} {
		w.agent.End(w.t, syscall.SIGKILL)
		w.agent = w.startAs(binary, w.options())
	}
}

// otherBinary returns the program as another version would be built, once, or what
// FAIRLEAD_CHAOS_OTHER names: one with another ABI, say.
func (w *world) otherBinary() string {
	w.t.Helper()
	if path := os.Getenv("FAIRLEAD_CHAOS_OTHER"); path != "" {
		return path
	}
	if w.other != "" {
		return w.other
	}
	gomod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		w.t.Fatal(err)
	}
	path := filepath.Join(w.t.TempDir(), "fairlead")
	build := exec.Command("go", "build", "-o", path, "-ldflags", "-X main.version=v99.0.0", "./cmd/fairlead")
	build.Dir = filepath.Dir(strings.TrimSpace(string(gomod)))
	if out, err := build.CombinedOutput(); err != nil {
		w.t.Fatalf("build fairlead: %v\n%s", err, out)
	}
	w.other = path
	return path
}

// reconfigure changes the configuration file and waits until the agent has begun
// anew with it.
func (w *world) reconfigure(i int) {
	const again = "the configuration has changed; starting anew"
	before := strings.Count(w.agent.Logs(), again)
	w.configureAgent(fmt.Sprintf("oomScoreAdj: %d\n", -900-i))
	testutil.Eventually(w.t, 30*time.Second, "the agent begins anew", func() error {
		if strings.Count(w.agent.Logs(), again) == before {
			return errNotYet
		}
		return nil
	})
	w.agent.WaitReady(w.t)
}
