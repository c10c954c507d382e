// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package health

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

// Tracker knows whether changes reach the kernel in time. Its methods may be
// called from any goroutine.
type Tracker struct {
	timeout time.Duration
	now     func() time.Time

	mu       sync.Mutex
	synced   bool
	leaving  bool // load balancers should not send to this node
	applies  uint64
	queued   time.Time // when the oldest change that is not in the kernel came; zero if none
	last     time.Time // when the tables were last brought up to date
	problem  string    // why the tables are of no use, "" while they are
	observer Observer
}

// Observer is told the status code of every answer. A nil func is not called;
// the others are called from the goroutines that answer.
type Observer struct {
	Healthz func(code int)
	Livez   func(code int)
}

// NewTracker returns a Tracker that is unhealthy while a change has waited for
// timeout. kube-proxy waits two sync periods, a minute.
func NewTracker(timeout time.Duration) *Tracker {
	t := &Tracker{timeout: timeout, now: time.Now}
	t.last = t.now()
	return t
}

// Observe makes o the observer of the answers from now on.
func (t *Tracker) Observe(o Observer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.observer = o
}

// SetNodeEligible notes whether load balancers may send to this node: its Node is
// known, is not being deleted and is not tainted ToBeDeletedByClusterAutoscaler.
// Whoever watches the Node begins with false, as it is not known yet. Where there
// is none to watch nobody calls this, and the node is eligible.
func (t *Tracker) SetNodeEligible(eligible bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leaving = !eligible
}

// SetProblem notes why connections are not translated although the tables are up to
// date; "" says that they are, or that it is not known. Only /healthz tells of it:
// to start anew would not help, and health check node ports are for clients whom
// packets bring, not sockets on this node.
func (t *Tracker) SetProblem(problem string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.problem = problem
}

// Queued notes that a change has arrived. Changes before the first sync do not
// count.
func (t *Tracker) Queued() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.synced && t.queued.IsZero() {
		t.queued = t.now()
	}
}

// Applied notes that everything queued has been dealt with, and that the sources
// have synced. A Service that could not be written does not count against the
// node: the others work, and taking the node out of service would break them.
func (t *Tracker) Applied() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.queued, t.last, t.synced = time.Time{}, t.now(), true
	t.applies++
}

// Applies returns how often Applied was called.
func (t *Tracker) Applies() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.applies
}

// QueuedUnless is Queued if Applied has not been called since Applies returned
// this: for who has seen a change wait, and cannot know what happened to it since.
func (t *Tracker) QueuedUnless(applies uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.synced && t.queued.IsZero() && t.applies == applies {
		t.queued = t.now()
	}
}

// Healthy tells whether no change waits for too long. It asks neither whether
// anything has been applied yet nor whether the node is eligible.
func (t *Tracker) Healthy() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.healthy(t.now())
}

func (t *Tracker) healthy(now time.Time) bool {
	return t.queued.IsZero() || now.Sub(t.queued) < t.timeout
}

// family is the health of one address family, as kube-proxy reports it. Both
// are kept by one agent here and always agree.
type family struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// body is what kube-proxy answers.
type body struct {
	LastUpdated time.Time `json:"lastUpdated"`
	CurrentTime time.Time `json:"currentTime"`
	// NodeEligible is nil on /livez.
	NodeEligible *bool `json:"nodeEligible,omitempty"`
	// Healthy does not take the node into account, on /healthz either: only the
	// status code does.
	Healthy bool              `json:"healthy"`
	Status  map[string]family `json:"status"`
	// Problem is ours: kube-proxy has no such field.
	Problem string `json:"problem,omitempty"`
}

// newBody returns the body of an answer with code. LastUpdated is the time of the
// last sync for each family; for the whole it is now while all is well, since
// clients take an old one for a node that is stuck.
func (t *Tracker) newBody(now time.Time, healthy bool, code int) body {
	f := family{LastUpdated: t.last, Healthy: healthy}
	b := body{
		LastUpdated: t.last, CurrentTime: now, Healthy: healthy,
		Status: map[string]family{"IPv4": f, "IPv6": f},
	}
	if code == http.StatusOK {
		b.LastUpdated = now
	}
	return b
}

// Healthz answers 200 while the tables are kept up to date and the node is
// eligible. It answers 503 otherwise, before the first sync is in the kernel, and
// while there is a problem, which it names.
func (t *Tracker) Healthz(w http.ResponseWriter, _ *http.Request) {
	t.mu.Lock()
	now, eligible := t.now(), !t.leaving
	healthy := t.healthy(now) && t.synced && t.problem == ""
	code := statusCode(healthy && eligible)
	b := t.newBody(now, healthy, code)
	b.NodeEligible, b.Problem = &eligible, t.problem
	observe := t.observer.Healthz
	t.mu.Unlock()
	answer(w, code, b, observe)
}

// Livez is Healthz without the node and the first sync: an agent that waits for
// its API server must not be restarted for it.
func (t *Tracker) Livez(w http.ResponseWriter, _ *http.Request) {
	t.mu.Lock()
	now := t.now()
	healthy := t.healthy(now)
	code := statusCode(healthy)
	b := t.newBody(now, healthy, code)
	observe := t.observer.Livez
	t.mu.Unlock()
	answer(w, code, b, observe)
}

func statusCode(well bool) int {
	if well {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}

// answer sends b and tells observe, which may be nil.
func answer(w http.ResponseWriter, code int, b body, observe func(code int)) {
	if observe != nil {
		observe(code)
	}
	// Times, booleans and strings cannot fail to be encoded.
	text, _ := json.Marshal(b)
	send(w, code, text)
}

// send answers with JSON text.
func send(w http.ResponseWriter, code int, text []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	// The client may be gone; there is nobody to tell.
	_, _ = w.Write(text)
}
