// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package health

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// start is the time at which Trackers are made here.
var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// tracked is a Tracker with a clock that stands still.
type tracked struct {
	*Tracker
	at time.Time
}

func newTracked(timeout time.Duration) *tracked {
	tr := &tracked{Tracker: NewTracker(timeout), at: start}
	tr.now = func() time.Time { return tr.at }
	tr.last = start
	return tr
}

func (tr *tracked) pass(d time.Duration) { tr.at = tr.at.Add(d) }

// quiet syncs and lets a minute pass.
func (tr *tracked) quiet() {
	tr.Applied()
	tr.pass(time.Minute)
}

func TestAnswers(t *testing.T) {
	const timeout = time.Minute
	for _, tt := range []struct {
		name           string
		do             func(*tracked)
		healthz, livez int
	}{
		{"before the first sync only livez is well", func(*tracked) {}, 503, 200},
		{"a change before the first sync does not wait", func(tr *tracked) {
			tr.Queued()
			tr.pass(2 * timeout)
		}, 503, 200},
		{"after the first sync both are", func(tr *tracked) { tr.Queued(); tr.Applied() }, 200, 200},
		{"a change may wait for less than the timeout", func(tr *tracked) {
			tr.Applied()
			tr.Queued()
			tr.pass(timeout - time.Nanosecond)
		}, 200, 200},
		{"a change that waits longer makes both unwell", func(tr *tracked) {
			tr.Applied()
			tr.Queued()
			tr.pass(timeout)
		}, 503, 503},
		{"the oldest change counts", func(tr *tracked) {
			tr.Applied()
			tr.Queued()
			tr.pass(timeout - time.Second)
			tr.Queued()
			tr.pass(time.Second)
		}, 503, 503},
		{"applying mends it", func(tr *tracked) {
			tr.Applied()
			tr.Queued()
			tr.pass(2 * timeout)
			tr.Applied()
		}, 200, 200},
		{"quiet is not stuck", func(tr *tracked) { tr.Applied(); tr.pass(24 * time.Hour) }, 200, 200},
		{"a node that is unknown or leaves is for healthz alone", func(tr *tracked) {
			tr.Applied()
			tr.SetNodeEligible(false)
		}, 503, 200},
		{"a node may come back", func(tr *tracked) {
			tr.Applied()
			tr.SetNodeEligible(false)
			tr.SetNodeEligible(true)
		}, 200, 200},
		{"an eligible node does not make up for a sync that is missing", func(tr *tracked) {
			tr.SetNodeEligible(true)
		}, 503, 200},
		{"connections that are not translated are for healthz alone", func(tr *tracked) {
			tr.Applied()
			tr.SetProblem("not translated")
		}, 503, 200},
		{"which may be over", func(tr *tracked) {
			tr.Applied()
			tr.SetProblem("not translated")
			tr.SetProblem("")
		}, 200, 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr := newTracked(timeout)
			tt.do(tr)
			if rec := get(tr.Healthz); rec.Code != tt.healthz {
				t.Errorf("healthz: code %d, want %d: %s", rec.Code, tt.healthz, rec.Body)
			}
			if rec := get(tr.Livez); rec.Code != tt.livez {
				t.Errorf("livez: code %d, want %d: %s", rec.Code, tt.livez, rec.Body)
			}
			if got, want := tr.Healthy(), tt.livez == 200; got != want {
				t.Errorf("Healthy() is %v, want %v: livez and health check node ports agree", got, want)
			}
		})
	}
}

func get(h http.HandlerFunc) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	h(rec, httptest.NewRequest(http.MethodGet, "/", http.NoBody))
	return rec
}

// TestBodies holds the whole bodies, as kube-proxy 1.36.3 writes them in the same
// states. The last sync is at 03:04:05 and it is asked a minute later.
func TestBodies(t *testing.T) {
	const (
		synced = `"2026-01-02T03:04:05Z"`
		now    = `"2026-01-02T03:05:05Z"`
		well   = `"status":{"IPv4":{"lastUpdated":` + synced + `,"healthy":true},"IPv6":{"lastUpdated":` + synced + `,"healthy":true}}}`
		stuck  = `"status":{"IPv4":{"lastUpdated":` + synced + `,"healthy":false},"IPv6":{"lastUpdated":` + synced + `,"healthy":false}}}`
	)
	for _, tt := range []struct {
		name           string
		do             func(*tracked)
		healthz, livez string
	}{
		{"while all is well it is updated now, each family when it was synced", (*tracked).quiet,
			`{"lastUpdated":` + now + `,"currentTime":` + now + `,"nodeEligible":true,"healthy":true,` + well,
			`{"lastUpdated":` + now + `,"currentTime":` + now + `,"healthy":true,` + well},
		{"stuck, it is updated when it was synced", func(tr *tracked) { tr.quiet(); tr.queued = start },
			`{"lastUpdated":` + synced + `,"currentTime":` + now + `,"nodeEligible":true,"healthy":false,` + stuck,
			`{"lastUpdated":` + synced + `,"currentTime":` + now + `,"healthy":false,` + stuck},
		{"a node that leaves is healthy and not eligible", func(tr *tracked) { tr.quiet(); tr.SetNodeEligible(false) },
			`{"lastUpdated":` + synced + `,"currentTime":` + now + `,"nodeEligible":false,"healthy":true,` + well,
			`{"lastUpdated":` + now + `,"currentTime":` + now + `,"healthy":true,` + well},
		{"before the first sync healthz has the time of the start", func(tr *tracked) { tr.pass(time.Minute) },
			`{"lastUpdated":` + synced + `,"currentTime":` + now + `,"nodeEligible":true,"healthy":false,` + stuck,
			`{"lastUpdated":` + now + `,"currentTime":` + now + `,"healthy":true,` + well},
		{"a problem is named after all that kube-proxy has", func(tr *tracked) { tr.quiet(); tr.SetProblem("not translated") },
			`{"lastUpdated":` + synced + `,"currentTime":` + now + `,"nodeEligible":true,"healthy":false,` +
				strings.TrimSuffix(stuck, "}") + `,"problem":"not translated"}`,
			`{"lastUpdated":` + now + `,"currentTime":` + now + `,"healthy":true,` + well},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr := newTracked(time.Minute)
			tt.do(tr)
			for path, want := range map[string]string{"healthz": tt.healthz, "livez": tt.livez} {
				rec := get(map[string]http.HandlerFunc{"healthz": tr.Healthz, "livez": tr.Livez}[path])
				if diff := cmp.Diff(want, rec.Body.String()); diff != "" {
					t.Errorf("%s: -kube-proxy +ours:\n%s", path, diff)
				}
				checkHeaders(t, rec.Header())
			}
		})
	}
}

func checkHeaders(t *testing.T, h http.Header) {
	t.Helper()
	if got := h.Get("Content-Type"); got != "application/json" {
		t.Errorf("content type %q", got)
	}
	if got := h.Get("X-Content-Type-Options"); got != "nosniff" {
		t.Errorf("content type options %q", got)
	}
}

func TestAnswersAreObserved(t *testing.T) {
	tr := NewTracker(time.Minute)
	get(tr.Healthz) // nobody is told
	var healthz, livez []int
	tr.Observe(Observer{
		Healthz: func(code int) { healthz = append(healthz, code) },
		Livez:   func(code int) { livez = append(livez, code) },
	})
	get(tr.Healthz)
	get(tr.Livez)
	tr.Applied()
	get(tr.Healthz)
	if diff := cmp.Diff([]int{503, 200}, healthz); diff != "" {
		t.Errorf("healthz: -want +got:\n%s", diff)
	}
	if diff := cmp.Diff([]int{200}, livez); diff != "" {
		t.Errorf("livez: -want +got:\n%s", diff)
	}
}
