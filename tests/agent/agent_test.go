// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// load sends requests until stop is called, which returns how many there were
// and the errors among them.
func load(send func() error) (stop func() (int64, []error)) {
	var (
		done   = make(chan struct{})
		wg     sync.WaitGroup
		count  atomic.Int64
		mu     sync.Mutex
		failed []error
	)
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				count.Add(1)
				if err := send(); err != nil {
					mu.Lock()
					failed = append(failed, err)
					mu.Unlock()
				}
			}
		})
	}
	return func() (int64, []error) {
		close(done)
		wg.Wait()
		return count.Load(), failed
	}
}

// The agent is killed again and again, at moments that move through its start,
// while clients connect: nothing they do may fail.
func TestKillingTheAgentBreaksNothing(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	c.service("web", 10, 11, 12)
	agent := c.start()
	c.answers(vip(10, 80), 11, 12)

	stopTCP := load(func() error { _, err := c.get(vip(10, 80)); return err })
	kept := c.dialUDP(vip(10, 53))
	stopUDP := load(func() error {
		conn, err := c.client.Dial(t.Context(), "udp", vip(10, 53))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = exchange(conn)
		return err
	})
	if _, err := exchange(kept); err != nil {
		t.Fatal(err)
	}
	kill := func(a *testutil.Agent) {
		if err := a.Kill(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = a.Wait()
	}
	kill(agent)
	for i := range 12 {
		options := c.options()
		options.Unready = true
		a := testutil.StartAgent(t, options)
		// Not a wait for anything: the moment of death is what varies.
		time.Sleep(time.Duration(i) * 30 * time.Millisecond)
		kill(a)
	}
	agent = c.start()
	if n := metric(t, agent, "fairlead_table_writes_total"); n != 0 {
		t.Errorf("%v rows were written after a restart with an unchanged cluster, want 0", n)
	}
	c.backend(13)
	c.service("web", 10, 11, 12, 13)
	c.answers(vip(10, 80), 11, 12, 13)

	for name, stop := range map[string]func() (int64, []error){"TCP": stopTCP, "UDP": stopUDP} {
		n, failed := stop()
		if len(failed) > 0 {
			t.Errorf("%d of %d %s exchanges failed, the first with: %v", len(failed), n, name, failed[0])
		}
		if n < 1000 {
			t.Errorf("only %d %s exchanges: too few to mean anything", n, name)
		}
		t.Logf("%s: %d exchanges, %d failed", name, n, len(failed))
	}
	if _, err := exchange(kept); err != nil {
		t.Errorf("a UDP socket that was connected all the time: %v", err)
	}
}

func TestTerminatingTheAgentLeavesTheDatapath(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.service("web", 10, 11)
	agent := c.start()
	if err := agent.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := agent.Wait(); err != nil {
		t.Errorf("after SIGTERM the agent ended with %v, want exit code 0", err)
	}
	c.answers(vip(10, 80), 11)
	if got := c.frontends(); got["10.96.0.10:80/TCP"] != 1 {
		t.Errorf("inspect without an agent shows %v", got)
	}

	// While the agent is away the Service goes; the next one deletes it.
	c.write("web.yaml", "")
	c.service("other", 11, 11)
	c.start()
	c.answers(vip(11, 80), 11)
	if got := c.frontends(); len(got) != 2 || got["10.96.0.11:80/TCP"] != 1 || got["10.96.0.11:53/UDP"] != 1 {
		t.Errorf("after a restart inspect shows %v, want only what there is", got)
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	c := newCluster(t)
	c.service("web", 10)
	first := c.start()
	options := c.options()
	options.Unready = true
	second := testutil.StartAgent(t, options)
	if err := second.Wait(); err == nil {
		t.Error("a second agent on the same --bpf-root ended well")
	}
	if got := second.Logs(); !strings.Contains(got, "a running fairlead agent (pid ") || !strings.Contains(got, "--bpf-root") {
		t.Errorf("the second agent does not say what is wrong: %q", got)
	}
	if _, err := first.Get(testutil.HealthzAddress, "/healthz"); err != nil {
		t.Errorf("the first agent suffers: %v", err)
	}
}

// A ClusterIP with two ports takes three rows of frontends; there is room for
// two such Services.
func TestFullMapHurtsOnlyTheServiceThatDoesNotFit(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.service("a", 1, 11)
	c.service("b", 2, 11)
	agent := c.start("--max-frontends=6")
	c.answers(vip(1, 80), 11)
	c.answers(vip(2, 80), 11)

	c.service("c", 3, 11)
	testutil.Eventually(t, 10*time.Second, "the full map is reported", func() error {
		if !strings.Contains(agent.Logs(), "raise --max-frontends") {
			return errors.New("the log does not say what to do")
		}
		if n := metric(t, agent, "fairlead_services_failed"); n != 1 {
			return fmt.Errorf("fairlead_services_failed is %v, want 1", n)
		}
		return nil
	})
	out, err := c.fairlead("inspect", "services", "--bpf-root", c.bpfRoot)
	if err != nil || !strings.Contains(out, "test/c") || !strings.Contains(out, "raise --max-frontends") {
		t.Errorf("inspect services does not show the problem of test/c: %v\n%s", err, out)
	}
	if _, err := agent.Get(testutil.HealthzAddress, "/healthz"); err != nil {
		t.Errorf("the node counts as unhealthy for one Service: %v", err)
	}
	c.answers(vip(1, 80), 11)
	c.backend(12)
	c.service("a", 1, 11, 12)
	c.answers(vip(1, 80), 11, 12)

	c.write("b.yaml", "")
	c.answers(vip(3, 80), 11)
	testutil.Eventually(t, 10*time.Second, "recovery is reported", func() error {
		if n := metric(t, agent, "fairlead_services_failed"); n != 0 {
			return fmt.Errorf("fairlead_services_failed is %v, want 0", n)
		}
		return nil
	})
	says(t, agent.Logs, "has no problem any more")
}

func TestInvalidManifestIsNamedAndTheRestLives(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.service("web", 10, 11)
	agent := c.start()
	c.write("bad.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: broken, namespace: test}\nspec: {clusterIP: 10.96.0.77, ports: 17}\n")
	testutil.Eventually(t, 10*time.Second, "a warning with its name", func() error {
		if log := agent.Logs(); !strings.Contains(log, "bad.yaml") || !strings.Contains(log, "broken") {
			return errors.New("the log does not name the object")
		}
		return nil
	})
	c.answers(vip(10, 80), 11)
	if n := metric(t, agent, "fairlead_invalid_objects_total"); n == 0 {
		t.Error("fairlead_invalid_objects_total is 0")
	}
}

// blocked reads from conn in the background and returns the error.
func blocked(read func([]byte) (int, error)) <-chan error {
	out := make(chan error, 1)
	go func() {
		_, err := read(make([]byte, 64))
		out <- err
	}()
	return out
}

func TestConnectedUDPSocketIsEndedWithItsBackend(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	c.service("dns", 10, 11)
	first := c.start()
	old := c.dialUDP(vip(10, 53))
	if name, err := exchange(old); err != nil || name != "backend-11" {
		t.Fatalf("answered by %q, %v", name, err)
	}
	// The socket is older than the agent that has to end it.
	if err := first.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	agent := c.start()
	other := c.dialUDP("10.244.0.11:9000")
	if err := errors.Join(old.SetDeadline(time.Time{}), other.SetDeadline(time.Time{})); err != nil {
		t.Fatal(err)
	}
	ended, untouched := blocked(old.Read), blocked(other.Read)

	c.service("dns", 10, 12)
	select {
	case err := <-ended:
		if !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("the blocked reader got %v, want ECONNABORTED", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the socket was not ended")
	}
	select {
	case err := <-untouched:
		t.Errorf("a socket that had dialled the pod itself was ended, too: %v", err)
	default:
	}
	if name, err := exchange(c.dialUDP(vip(10, 53))); err != nil || name != "backend-12" {
		t.Errorf("a new socket is answered by %q, %v; want backend-12", name, err)
	}
	testutil.Eventually(t, 5*time.Second, "the metric counts it", func() error {
		if n := metric(t, agent, "fairlead_udp_sockets_ended_total"); n != 1 {
			return fmt.Errorf("fairlead_udp_sockets_ended_total is %v, want 1", n)
		}
		return nil
	})
}

// Whoever served the addresses before the first agent, kube-proxy say, serves the
// sockets that are connected to them by kernel connection tracking.
func TestSocketsOfWhoeverServedBeforeAreLeftAlone(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.service("dns", 10, 11)
	theirs := blocked(c.dialUDP(vip(10, 53)).Read)
	agent := c.start()
	if name, err := exchange(c.dialUDP(vip(10, 53))); err != nil || name != "backend-11" {
		t.Fatalf("a new socket is answered by %q, %v; want backend-11", name, err)
	}
	// Another search for sockets has gone through all of them when it has ended
	// this one.
	ours := blocked(c.dialUDP(vip(20, 53)).Read)
	c.service("late", 20, 11)
	select {
	case err := <-ours:
		if !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("the socket connected before its Service got %v, want ECONNABORTED", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the socket connected before its Service was not ended")
	}
	select {
	case err := <-theirs:
		t.Errorf("the socket connected before the agent got %v", err)
	default:
	}
	testutil.Eventually(t, 5*time.Second, "the metric counts one", func() error {
		if n := metric(t, agent, "fairlead_udp_sockets_ended_total"); n != 1 {
			return fmt.Errorf("fairlead_udp_sockets_ended_total is %v, want 1", n)
		}
		return nil
	})
}

func TestUDPSocketConnectedBeforeTheServiceReachesABackend(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before func(*cluster)
	}{
		{"before the Service existed", func(c *cluster) { c.service("other", 20, 11) }},
		{"before its first endpoint existed", func(c *cluster) { c.service("dns", 10) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t)
			c.backend(11)
			tt.before(c)
			c.start()
			early := c.dialUDP(vip(10, 53))
			ended := blocked(early.Read)
			c.service("dns", 10, 11)
			select {
			case err := <-ended:
				if !errors.Is(err, syscall.ECONNABORTED) {
					t.Errorf("the early socket got %v, want ECONNABORTED", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("the early socket was left alone with nobody")
			}
			if name, err := exchange(c.dialUDP(vip(10, 53))); err != nil || name != "backend-11" {
				t.Errorf("after connecting again answered by %q, %v", name, err)
			}
		})
	}
}

// A Service that waits for room gets it soon, however much else changes.
func TestFullMapIsRetriedWhileOthersChange(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	c.service("a", 1, 11)
	c.service("b", 2, 11)
	c.start("--max-frontends=6")
	c.answers(vip(1, 80), 11)
	c.service("c", 3, 11)
	stop := make(chan struct{})
	changing := make(chan struct{})
	go func() {
		defer close(changing)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Millisecond):
				c.service("a", 1, 11+i%2)
			}
		}
	}()
	defer func() { close(stop); <-changing }()
	c.write("b.yaml", "")
	c.answers(vip(3, 80), 11)
}

// Service IDs of Services that are gone can be had again.
func TestServiceIDsAreUsedAgain(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	// A SYN that is sent again once there is the Service makes a flow, which would
	// have the ID for as long as it lasts.
	c.start("--max-services=7", "--packet-path=off")
	for i := range 12 {
		c.service(fmt.Sprintf("s%d", i), 1+i, 11)
		c.answers(vip(1+i, 80), 11)
		c.write(fmt.Sprintf("s%d.yaml", i), "")
	}
}

// repairs returns how many complete applies there were: the first one and every
// repair pass.
func repairs(t *testing.T, a *testutil.Agent) float64 {
	t.Helper()
	return metric(t, a, "kubeproxy_sync_full_proxy_rules_duration_seconds_count", `ip_family="IPv4"`)
}

func TestDamageIsRepairedAndCounted(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.service("web", 10, 11)
	agent := c.start("--repair-interval=200ms", "--max-frontends=6")
	c.answers(vip(10, 80), 11)
	c.service("other", 11, 11)
	c.answers(vip(11, 80), 11)
	c.service("more", 12, 11) // does not fit, which is no damage
	full := repairs(t, agent)
	testutil.Eventually(t, 10*time.Second, "some repair passes", func() error {
		if n := repairs(t, agent); n < full+3 {
			return fmt.Errorf("%v passes", n)
		}
		return nil
	})
	if n := metric(t, agent, "fairlead_repaired_rows_total"); n != 0 {
		t.Errorf("%v rows were repaired though nothing was damaged", n)
	}

	c.write("more.yaml", "") // or it takes the room of the row that is deleted
	testutil.Eventually(t, 10*time.Second, "nothing fails", func() error {
		if n := metric(t, agent, "fairlead_services_failed"); n != 0 {
			return fmt.Errorf("fairlead_services_failed is %v", n)
		}
		return nil
	})
	damage := c.pinnedMap("frontends")
	key := make([]byte, damage.KeySize())
	if err := damage.NextKey(nil, key); err != nil {
		t.Fatal(err)
	}
	if err := damage.Delete(key); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 10*time.Second, "the row is back and counted", func() error {
		if n := metric(t, agent, "fairlead_repaired_rows_total"); n != 1 {
			return fmt.Errorf("fairlead_repaired_rows_total is %v, want 1", n)
		}
		return damage.Lookup(key, make([]byte, damage.ValueSize()))
	})
	c.answers(vip(10, 80), 11)
	c.answers(vip(11, 80), 11)
}

func TestAgentRefusesWhatCannotWork(t *testing.T) {
	c := newCluster(t)
	for flag, want := range map[string]string{
		"--healthz-bind-address=nonsense":    "not an address and a port",
		"--metrics-bind-address=127.0.0.1:0": "port \"0\"",
		"--metrics-bind-address=here:80":     "not an IP address",
		"--repair-interval=0":                "not above zero",
		"--api-server=https://192.0.2.1":     "are for --source=kubernetes",
		"--log-level=loud":                   "none of debug",
		"--max-slots=1":                      "not between",
		"--max-flows=1":                      "not between",
		"--packet-path=maybe":                "neither on nor off",
		"--devices=eth0,auto":                "auto stands alone",
		"--snat-ports=61000":                 "the first and the last port",
		"--snat-ports=2-1":                   "above",
		"--cluster-cidr=10.0.0.0":            "not a CIDR",
		"--external-ip-cidrs=10.0.0.0":       "not a CIDR",
		"--load-balancer-cidrs=":             "say all, none, or CIDRs",
		"--reserved=22":                      "not an address and a port",
	} {
		options := c.options(flag)
		options.Unready = true
		a := testutil.StartAgent(t, options)
		if err := a.Wait(); err == nil {
			t.Errorf("%s: the agent ended well", flag)
		}
		if log := a.Logs(); strings.Count(log, "\n") != 1 || !strings.Contains(log, want) {
			t.Errorf("%s: %q, want one line that says %q", flag, log, want)
		}
	}
	// Tab completion leaves a slash behind a directory.
	c.service("web", 10)
	c.bpfRoot += "/"
	c.start()
}
