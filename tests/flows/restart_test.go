// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"errors"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// clients connect, exchange and transfer until stop is called.
type clients struct {
	done    chan struct{}
	running sync.WaitGroup

	exchanges, transfers atomic.Int64

	mu     sync.Mutex
	failed []error
}

// startClients uses local and remote backends from outside and from a pod, at a pace
// that leaves time for agents.
func startClients(t *testing.T, w *world) *clients {
	t.Helper()
	c := &clients{done: make(chan struct{})}
	for _, name := range []string{"local", "remote"} {
		for _, from := range []*host{w.client, w.a2} {
			for _, f := range families {
				tcp := w.services[name].nodePort(f, w.a)
				udp := clusterIPEntry.vip(w.services[name], f, "udp", w.a)
				kept, err := open(from.ns, tcp, "echo", patience)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = kept.Close() })
				c.running.Go(func() { c.exchange(from, kept, tcp, udp) })
				c.running.Go(func() { c.transfer(from, tcp) })
			}
		}
	}
	return c
}

// exchange makes connections, sends datagrams from new sockets and uses a connection
// that is there from the beginning.
func (c *clients) exchange(from *host, kept *conn, tcp, udp netip.AddrPort) {
	c.repeat(10*time.Millisecond, func() error {
		_, tcpErr := ask(from.ns, "tcp", tcp, patience)
		_, udpErr := ask(from.ns, "udp", udp, patience)
		c.exchanges.Add(1)
		return errors.Join(tcpErr, udpErr, kept.echo(patience))
	})
}

// transfer downloads so slowly that agents come and go meanwhile.
func (c *clients) transfer(from *host, to netip.AddrPort) {
	pace := time.NewTicker(100 * time.Millisecond)
	defer pace.Stop()
	c.repeat(time.Millisecond, func() error {
		_, err := transfer(from.ns, to, "send", 32<<20, func(int64) { <-pace.C })
		c.transfers.Add(1)
		return err
	})
}

// repeat runs f until the end.
func (c *clients) repeat(every time.Duration, f func() error) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-tick.C:
		}
		if err := f(); err != nil {
			c.mu.Lock()
			c.failed = append(c.failed, err)
			c.mu.Unlock()
		}
	}
}

// stop ends all of them and fails the test when something has failed.
func (c *clients) stop(t *testing.T) {
	t.Helper()
	close(c.done)
	c.running.Wait()
	exchanges, transfers := c.exchanges.Load(), c.transfers.Load()
	t.Logf("%d exchanges, %d transfers of 32 MiB, %d failed", exchanges, transfers, len(c.failed))
	if exchanges < 500 || transfers < 8 {
		t.Error("too few to mean anything")
	}
	if len(c.failed) > 0 {
		t.Errorf("%d failed, such as: %v", len(c.failed), errors.Join(c.failed[:min(len(c.failed), 5)]...))
	}
}

// Both nodes' agents are killed, started, and replaced by those of another build,
// while clients outside and pods use what they have programmed.
func TestAgentsEndAndAreUpgradedUnderFlows(t *testing.T) {
	w := newWorld(t, bridged)
	w.start(t)
	other := buildOther(t)
	running := startClients(t, w)
	kill := func(n *node) {
		if err := n.agent.Kill(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = n.agent.Wait()
	}
	for _, n := range []*node{w.a, w.b} {
		kill(n)
		n.start(t, w.dir)
	}
	t.Run("by another build", func(t *testing.T) {
		ours := testutil.BuildBinary(t)
		for _, binary := range []string{other, ours} {
			t.Setenv("FAIRLEAD_BINARY", binary)
			for _, n := range []*node{w.a, w.b} {
				kill(n)
				n.start(t, w.dir)
			}
		}
		running.stop(t)
	})
}

// buildOther returns the program as another version would be built.
func buildOther(t *testing.T) string {
	t.Helper()
	gomod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "fairlead")
	build := exec.Command("go", "build", "-o", path, "-ldflags", "-X main.version=v99.0.0", "./cmd/fairlead")
	build.Dir = filepath.Dir(strings.TrimSpace(string(gomod)))
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build fairlead: %v\n%s", err, out)
	}
	return path
}
