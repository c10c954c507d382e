// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package health answers /healthz and /livez as kube-proxy does: load balancers
// and the kubelet ask whether this node's Services are kept up to date.
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

	mu     sync.Mutex
	synced bool
	queued time.Time // when the oldest change that is not in the kernel came; zero if none
	last   time.Time // when the tables were last brought up to date
}

// NewTracker returns a Tracker that is unhealthy while a change has waited for
// longer than timeout. kube-proxy waits two sync periods, a minute.
func NewTracker(timeout time.Duration) *Tracker {
	return &Tracker{timeout: timeout, now: time.Now}
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
}

// family is the health of one address family, as kube-proxy reports it. Both
// are kept by one agent here and always agree.
type family struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// body is what kube-proxy answers.
type body struct {
	LastUpdated  time.Time         `json:"lastUpdated"`
	CurrentTime  time.Time         `json:"currentTime"`
	NodeEligible *bool             `json:"nodeEligible,omitempty"`
	Healthy      bool              `json:"healthy"`
	Status       map[string]family `json:"status"`
}

func (t *Tracker) state() (b body, synced bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	healthy := t.queued.IsZero() || now.Sub(t.queued) <= t.timeout
	last := t.last
	if healthy && t.synced {
		// As kube-proxy has it: nothing is waiting, so all is as of now.
		last = now
	}
	f := family{LastUpdated: last, Healthy: healthy}
	return body{
		LastUpdated: last, CurrentTime: now, Healthy: healthy,
		Status: map[string]family{"IPv4": f, "IPv6": f},
	}, t.synced
}

// Healthy tells whether no change waits for too long. It does not ask whether
// anything has been applied yet.
func (t *Tracker) Healthy() bool {
	b, _ := t.state()
	return b.Healthy
}

// Healthz answers 200 while the tables are kept up to date, 503 otherwise and
// before the first sync is in the kernel.
func (t *Tracker) Healthz(w http.ResponseWriter, _ *http.Request) {
	b, synced := t.state()
	// Taints and deletion of the Node are not watched yet.
	eligible := true
	b.NodeEligible = &eligible
	b.Healthy = b.Healthy && synced
	write(w, b)
}

// Livez is Healthz without the first sync: an agent that waits for its API
// server must not be restarted for it.
func (t *Tracker) Livez(w http.ResponseWriter, _ *http.Request) {
	b, _ := t.state()
	write(w, b)
}

func write(w http.ResponseWriter, b body) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if !b.Healthy {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	// The client may be gone; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(b)
}
