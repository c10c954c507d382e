// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"sync"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// contact follows whether the API server answers for one resource. It logs the
// first failure of a row, the first refusal, which somebody has to do something about,
// and the recovery, not what lies between.
type contact struct {
	log      *zap.Logger
	server   func() string // where requests go
	resource string

	mu      sync.Mutex
	since   time.Time // of the first failure; zero while the server answers
	refused bool      // since then, and that was logged
}

// outcome takes note of how a request ended: err is nil or why it failed.
// Failures that are part of the protocol are none.
func (c *contact) outcome(err error) {
	if isProtocol(err) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.since.IsZero()
	if err != nil && first {
		c.since = time.Now()
	}
	switch {
	case err != nil && isFinal(err) && !c.refused:
		c.refused = true
		c.log.Warn("api server refuses us, or is none that we trust: going on with what it said last",
			logfield.Server(c.server()), logfield.Resource(c.resource), logfield.Error(cause(err)))
	case err != nil && first:
		c.log.Warn("api server does not answer: going on with what it said last",
			logfield.Server(c.server()), logfield.Resource(c.resource), logfield.Error(cause(err)))
	case err == nil && !first:
		c.log.Info("api server answers again",
			logfield.Server(c.server()), logfield.Resource(c.resource), logfield.Took(time.Since(c.since)))
		c.since, c.refused = time.Time{}, false
	}
}

// away returns for how long the server has not answered, 0 when it does.
func (c *contact) away() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.since.IsZero() {
		return 0
	}
	return time.Since(c.since)
}

// isProtocol tells whether err is an answer that the Reflector deals with by
// asking differently: a resource version that is too old or too new, or a
// server that cannot stream its lists.
func isProtocol(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.IsInvalid(err) ||
		apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge)
}
