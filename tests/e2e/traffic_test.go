// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

const (
	// settleTimeout is how long a change of the API may take to show in the
	// answers. It is generous: how fast Fairlead is, benchmarks tell.
	settleTimeout = 20 * time.Second
	// samples is how many requests show which pods answer. One of four pods is
	// missed by all of them once in ten million times.
	samples = 60
)

// get makes one request on a new connection from the client pod and returns the
// name of the Pod that answered.
func (c *cluster) get(addr string) (string, error) {
	resp, err := c.http.Get("http://" + addr)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	pod, _, found := strings.Cut(string(body), " ")
	if resp.StatusCode != http.StatusOK || !found {
		return "", fmt.Errorf("%s answers %s: %q", addr, resp.Status, body)
	}
	return pod, nil
}

// wantAnsweredBy fails the test unless, within settleTimeout, all requests to
// addr succeed and the given pods, and no others, answer them.
func (c *cluster) wantAnsweredBy(t *testing.T, addr string, pods ...string) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, addr+" is answered by the right pods", func() error {
		answers := map[string]int{}
		for range samples {
			pod, err := c.get(addr)
			if err != nil {
				return err
			}
			if !slices.Contains(pods, pod) {
				return fmt.Errorf("%s was answered by %s, want only %v", addr, pod, pods)
			}
			answers[pod]++
		}
		if len(answers) != len(pods) {
			return fmt.Errorf("%s was answered by %v, want all of %v",
				addr, slices.Sorted(maps.Keys(answers)), pods)
		}
		return nil
	})
}

// wantRefused fails the test unless, within settleTimeout, connections to addr
// are refused, and stay so.
func (c *cluster) wantRefused(t *testing.T, addr string) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, addr+" is refused", func() error {
		for range 10 {
			pod, err := c.get(addr)
			if err == nil {
				return fmt.Errorf("%s was answered by %s, want a refusal", addr, pod)
			}
			if !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("want a refusal: %w", err)
			}
		}
		return nil
	})
}

// wantNobody fails the test unless, within settleTimeout, nobody can be reached
// at addr: it is no Service's any more.
func (c *cluster) wantNobody(t *testing.T, addr string) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, addr+" belongs to nobody", func() error {
		// The sandbox drops what has no owner, so one second is enough.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		conn, err := c.clientPod.Dial(ctx, "tcp", addr)
		if err == nil {
			return errors.Join(errors.New("somebody accepts connections"), conn.Close())
		}
		return nil
	})
}

// load is a stream of requests that must not fail.
type load struct {
	addr string
	stop chan struct{}
	done sync.WaitGroup

	mu       sync.Mutex
	requests int
	failures []error
}

// startLoad sends requests to addr, one after the other on new connections and
// at most 500 in a second, until finish is called.
func (c *cluster) startLoad(addr string) *load {
	l := &load{addr: addr, stop: make(chan struct{})}
	l.done.Go(func() {
		// The control plane needs the processors as well.
		pace := time.NewTicker(2 * time.Millisecond)
		defer pace.Stop()
		for {
			select {
			case <-l.stop:
				return
			case <-pace.C:
			}
			_, err := c.get(addr)
			l.mu.Lock()
			l.requests++
			if err != nil {
				l.failures = append(l.failures, fmt.Errorf("request %d: %w", l.requests, err))
			}
			l.mu.Unlock()
		}
	})
	return l
}

// wantMore waits until n more requests have been made.
func (l *load) wantMore(t *testing.T, n int) {
	t.Helper()
	count := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.requests
	}
	goal := count() + n
	testutil.Eventually(t, settleTimeout, "the load goes on", func() error {
		if got := count(); got < goal {
			return fmt.Errorf("%d requests to %s were made, want %d", got, l.addr, goal)
		}
		return nil
	})
}

// finish ends the stream and fails the test when a request has failed.
func (l *load) finish(t *testing.T) {
	t.Helper()
	close(l.stop)
	l.done.Wait()
	if len(l.failures) > 0 {
		t.Errorf("%d of %d requests to %s failed, first: %v",
			len(l.failures), l.requests, l.addr, l.failures[0])
	}
	t.Logf("%d requests to %s, %d failed", l.requests, l.addr, len(l.failures))
}
