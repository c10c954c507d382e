// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestAttemptsToGrowBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g growth
		for i, want := range []time.Duration{growFirst, 2 * growFirst, 4 * growFirst} {
			if news := g.failed(errors.New("no memory")); news != (i == 0) {
				t.Errorf("attempt %d: worth a word: %v", i+1, news)
			}
			if pause := time.Until(g.next); pause != want {
				t.Errorf("attempt %d: %v until the next, want %v", i+1, pause, want)
			}
		}
		for range 20 {
			g.failed(errors.New("no memory"))
		}
		if pause := time.Until(g.next); pause != growLast {
			t.Errorf("%v until the next, want no more than %v", pause, growLast)
		}
		if !g.failed(errors.New("another")) {
			t.Error("another reason is not told")
		}
		if g.failed(nil); time.Now().Before(g.next) || g.failing != "" {
			t.Errorf("after success there is left %+v", g)
		}
	})
}
