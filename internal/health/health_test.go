// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package health

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func TestAnswers(t *testing.T) {
	const timeout = time.Minute
	for _, tt := range []struct {
		name           string
		do             func(*Tracker, func(time.Duration))
		healthz, livez int
	}{
		{"before the first sync only livez is well", func(*Tracker, func(time.Duration)) {}, 503, 200},
		{"after the first sync both are", func(tr *Tracker, _ func(time.Duration)) { tr.Queued(); tr.Applied() }, 200, 200},
		{"a change may wait as long as the timeout", func(tr *Tracker, pass func(time.Duration)) {
			tr.Applied()
			tr.Queued()
			pass(timeout)
		}, 200, 200},
		{"a change that waits longer makes both unwell", func(tr *Tracker, pass func(time.Duration)) {
			tr.Applied()
			tr.Queued()
			pass(timeout + time.Second)
		}, 503, 503},
		{"the oldest change counts", func(tr *Tracker, pass func(time.Duration)) {
			tr.Applied()
			tr.Queued()
			pass(timeout)
			tr.Queued()
			pass(time.Second)
		}, 503, 503},
		{"applying mends it", func(tr *Tracker, pass func(time.Duration)) {
			tr.Applied()
			tr.Queued()
			pass(2 * timeout)
			tr.Applied()
		}, 200, 200},
		{"quiet is not stuck", func(tr *Tracker, pass func(time.Duration)) { tr.Applied(); pass(24 * time.Hour) }, 200, 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
			tracker := NewTracker(timeout)
			tracker.now = func() time.Time { return now }
			tt.do(tracker, func(d time.Duration) { now = now.Add(d) })
			check(t, "healthz", tracker.Healthz, tt.healthz, now)
			check(t, "livez", tracker.Livez, tt.livez, now)
		})
	}
}

// check asks a handler and looks at code, headers and the body's agreement with
// the code.
func check(t *testing.T, name string, h http.HandlerFunc, code int, now time.Time) {
	t.Helper()
	rec := httptest.NewRecorder()
	h(rec, httptest.NewRequest(http.MethodGet, "/"+name, nil))
	if rec.Code != code {
		t.Errorf("%s: code %d, want %d", name, rec.Code, code)
	}
	if got := rec.Header().Get("Content-Type"); got != "application/json" {
		t.Errorf("%s: content type %q", name, got)
	}
	var b struct {
		CurrentTime  time.Time
		LastUpdated  time.Time
		Healthy      bool
		NodeEligible *bool
		Status       map[string]struct{ Healthy bool }
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &b); err != nil {
		t.Fatalf("%s: %v in %s", name, err, rec.Body)
	}
	if b.Healthy != (code == 200) {
		t.Errorf("%s: healthy %v with code %d", name, b.Healthy, code)
	}
	if !b.CurrentTime.Equal(now) {
		t.Errorf("%s: currentTime %v, want %v", name, b.CurrentTime, now)
	}
	if (b.NodeEligible != nil) != (name == "healthz") {
		t.Errorf("%s: nodeEligible %v; only healthz speaks of the node", name, b.NodeEligible)
	}
	if len(b.Status) != 2 {
		t.Errorf("%s: status %v, want both families", name, b.Status)
	}
}
