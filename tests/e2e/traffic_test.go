// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
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

// dialer is somebody who makes connections: a pod, or the processes of the node.
type dialer struct {
	dial dialFunc
	http *http.Client // whose connections dial makes
}

// dialFunc is the type of sandbox.Namespace.Dial.
type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

func newDialer(dial dialFunc) *dialer {
	return &dialer{dial: dial, http: &http.Client{
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true},
		Timeout:   5 * time.Second,
	}}
}

// get makes one request on a new connection and returns the name of the Pod that
// answered.
func (d *dialer) get(addr string) (string, error) {
	resp, err := d.http.Get("http://" + addr)
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
func (d *dialer) wantAnsweredBy(t *testing.T, addr string, pods ...string) {
	t.Helper()
	wantAnswers(t, d.get, addr, pods...)
}

// wantAnswers is wantAnsweredBy for requests of any kind.
func wantAnswers(t *testing.T, get func(addr string) (string, error), addr string, pods ...string) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, addr+" is answered by the right pods", func() error {
		answers := map[string]int{}
		for range samples {
			pod, err := get(addr)
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

// wantRefused fails the test unless connections to addr come to be refused: the
// address is a Service's, but nobody serves the port.
func (d *dialer) wantRefused(t *testing.T, addr string) {
	t.Helper()
	d.wantFailure(t, addr, unix.ECONNREFUSED)
}

// wantUnreachable fails the test unless connections to addr come to fail with "no
// route to host". That says that a policy keeps the client away, or that addr is
// in a ServiceCIDR and no Service's.
func (d *dialer) wantUnreachable(t *testing.T, addr string) {
	t.Helper()
	d.wantFailure(t, addr, unix.EHOSTUNREACH)
}

// wantUntouched fails the test unless connections to addr come to go where they
// would without us, which for an address that is far away is nowhere.
func (d *dialer) wantUntouched(t *testing.T, addr string) {
	t.Helper()
	d.wantFailure(t, addr, unix.ENETUNREACH)
}

// wantFailure fails the test unless, within settleTimeout, connections to addr fail
// with want, ten times on end.
func (d *dialer) wantFailure(t *testing.T, addr string, want error) {
	t.Helper()
	wantFailures(t, d.get, addr, want)
}

// wantFailures is wantFailure for requests of any kind.
func wantFailures(t *testing.T, get func(addr string) (string, error), addr string, want error) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, fmt.Sprintf("%s: %v", addr, want), func() error {
		for range 10 {
			pod, err := get(addr)
			if err == nil {
				return fmt.Errorf("%s was answered by %s", addr, pod)
			}
			if !errors.Is(err, want) {
				return fmt.Errorf("want %v: %w", want, err)
			}
		}
		return nil
	})
}

// connection is one that lasts.
type connection struct {
	addr   string
	conn   net.Conn
	answer *bufio.Reader
}

// connect makes a connection that is closed when the test ends.
func (d *dialer) connect(t *testing.T, addr string) *connection {
	t.Helper()
	conn, err := d.dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // the server may have closed it first
	return &connection{addr: addr, conn: conn, answer: bufio.NewReader(conn)}
}

// wantAnsweredBy fails the test unless a request on the connection is answered by
// the given Pod.
func (c *connection) wantAnsweredBy(t *testing.T, pod string) {
	t.Helper()
	if err := c.conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c.conn, "GET / HTTP/1.1\r\nHost: server\r\n\r\n"); err != nil {
		t.Fatalf("the connection to %s is broken: %v", c.addr, err)
	}
	response, err := http.ReadResponse(c.answer, nil)
	if err != nil {
		t.Fatalf("the connection to %s is broken: %v", c.addr, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || !strings.HasPrefix(string(body), pod+" ") {
		t.Errorf("the connection to %s was answered with %q, %v; want %s as before", c.addr, body, err, pod)
	}
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
func (d *dialer) startLoad(addr string) *load {
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
			_, err := d.get(addr)
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
