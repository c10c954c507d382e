// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"fmt"
	"runtime/debug"
	"strings"
)

// Side is a service proxy that takes steps and says what it makes of them.
type Side interface {
	apply(Step)
	answer() Answer
}

// Difference is a history after which the two sides do not say the same.
type Difference struct {
	History History
	Step    int // the last one taken, from 0
	Text    string
	// Undefined tells that kube-proxy panicked: there is nothing to live up to,
	// and the history should not have been generated.
	Undefined bool
}

// String returns the history as YAML with the difference as a comment after it.
func (d *Difference) String() string {
	text := strings.ReplaceAll(strings.TrimSpace(d.Text), "\n", "\n# ")
	return fmt.Sprintf("%s--- # after step %d\n# %s\n", d.History, d.Step+1, text)
}

// Compare takes both kube-proxy and the given side through a history. It returns
// nil when they agree after every step that is not quiet. A panic of either is a
// difference.
func Compare(h History, with Side) (diff *Difference) {
	up := newUpstream()
	taken, theirs := 0, true
	defer func() {
		if e := recover(); e != nil {
			diff = &Difference{h, taken, fmt.Sprintf("panic: %v\n%s", e, debug.Stack()), theirs}
		}
	}()
	for i, step := range h {
		taken, theirs = i, true
		up.apply(step)
		theirs = false
		with.apply(step)
		if step.Quiet && i < len(h)-1 {
			continue
		}
		theirs = true
		want, doubts := up.answer(), up.doubts()
		theirs = false
		got := with.answer()
		want.without(doubts)
		got.without(doubts)
		if !want.equal(got) {
			return &Difference{History: h, Step: i, Text: want.diff(got)}
		}
	}
	return nil
}
