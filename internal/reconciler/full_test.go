// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// What a Service that does not fit has got of a table's last rows would be missing
// when a neighbour gets another backend.
func TestAServiceThatDoesNotFitIntoMembersTakesNoRoom(t *testing.T) {
	w := smallWorld(t, testLimits)
	w.kernel.maxMembers = 4
	w.store.SetService(svcWith("small", "10.96.0.1", lb.UDP, 53))
	w.store.SetSlice(sliceOf("small", lb.UDP, 1, 2))
	w.apply()
	w.settled()

	w.store.SetService(svcWith("large", "10.96.0.2", lb.UDP, 53))
	w.store.SetSlice(sliceOf("large", lb.UDP, 1, 2, 3, 4, 5))
	mustFail(t, w.apply(), "large", "table is full")
	if n := len(w.kernel.members); n != 2 {
		t.Errorf("members have %d rows, want the 2 of the Service that fits", n)
	}
	mustFail(t, w.noteResult(w.rec.Retry()), "large", "table is full")

	w.store.SetSlice(sliceOf("small", lb.UDP, 2, 3, 4))
	mustFail(t, w.apply(), "large", "table is full")
	w.store.SetSlice(sliceOf("large", lb.UDP, 1))
	mustFail(t, w.noteResult(w.rec.Retry()), "large", "table is full")
	w.apply()
	w.settled()

	// A Service that outgrows the room goes on with what it has.
	w.store.SetSlice(sliceOf("large", lb.UDP, 1, 2, 3))
	mustFail(t, w.apply(), "large", "table is full")
	if n := len(w.kernel.members); n != 4 {
		t.Errorf("members have %d rows, want 4", n)
	}
	w.store.SetSlice(sliceOf("small", lb.UDP, 3))
	w.apply()
	w.noteResult(w.rec.Retry())
	w.settled()
}
