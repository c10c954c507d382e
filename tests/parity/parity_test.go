// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"flag"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

var (
	histories = flag.Uint64("histories", 200_000, "how many random histories to compare")
	seed      = flag.Uint64("seed", 1, "seed of the first history; the others have the numbers after it")
)

func TestMain(m *testing.M) {
	flag.Parse()
	// Histories are short-lived and little else is: collecting less often saves a
	// third of the time.
	debug.SetGCPercent(800)
	// kube-proxy complains about each absurd object at length.
	klog.SetLogger(logr.Discard())
	os.Exit(m.Run())
}

func TestFairleadChoosesWhatKubeProxyChooses(t *testing.T) {
	n := *histories
	if testing.Short() {
		n = min(n, 10_000)
	}
	began := time.Now()
	at, found := search(*seed, n, Ours)
	if found != nil {
		t.Fatalf("seed %d differs (run it alone with -histories 1 -seed %d); the smallest history like it:\n%s",
			at, at, Shrink(found, Ours))
	}
	t.Logf("seeds %d to %d: no difference in %v", *seed, *seed+n-1, time.Since(began).Round(time.Millisecond))
}

// search compares the n histories from a seed on and returns the first that
// differs, with its seed.
func search(from, n uint64, with func() Side) (at uint64, found *Difference) {
	var next, stop atomic.Uint64
	stop.Store(n)
	var mu sync.Mutex
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			// Histories before the first known difference are looked at all the
			// same, so that the answer does not depend on who is faster.
			for i := next.Add(1) - 1; i < stop.Load(); i = next.Add(1) - 1 {
				d := Compare(Generate(newSeeded(from+i)), with())
				if d == nil {
					continue
				}
				mu.Lock()
				if i < stop.Load() {
					stop.Store(i)
					at, found = from+i, d
				}
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	return at, found
}

func FuzzParity(f *testing.F) {
	for n := range uint64(8) {
		r := &recording{choices: newSeeded(n)}
		Generate(r)
		f.Add(r.bytes)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if found := Compare(Generate(&recorded{data}), Ours()); found != nil {
			t.Fatalf("the smallest history like it:\n%s", Shrink(found, Ours))
		}
	})
}
