// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-lb/fairlead/internal/privileges"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// pidOf returns the process ID of the agent.
func (c *cluster) pidOf() int {
	c.t.Helper()
	out, err := c.fairleadInNode("status", "-o", "json", "--bpf-root", c.bpfRoot)
	var status struct{ Agent struct{ PID int } }
	if jsonErr := json.NewDecoder(strings.NewReader(out)).Decode(&status); jsonErr != nil {
		c.t.Fatalf("status: %v, %v\n%s", err, jsonErr, out)
	}
	return status.Agent.PID
}

// agentBelow returns the process that the processes of a container end in.
func agentBelow(t *testing.T, pid int) int {
	t.Helper()
	for {
		children := ""
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		if err != nil || len(threads) == 0 {
			t.Fatalf("no process %d: %v", pid, err)
		}
		for _, thread := range threads {
			text, _ := os.ReadFile(thread) // the thread may have ended
			children += string(text)
		}
		if children == "" {
			return pid
		}
		if pid, err = strconv.Atoi(strings.TrimSpace(children)); err != nil {
			t.Fatal(err)
		}
	}
}

// bits returns the number that /proc shows for capabilities.
func bits(t *testing.T, names []string) string {
	t.Helper()
	var set uint64
	for _, name := range names {
		number := slices.Index(capabilityNames, strings.TrimPrefix(name, "CAP_"))
		if number < 0 {
			t.Fatalf("no capability is called %s", name)
		}
		set |= 1 << number
	}
	return fmt.Sprintf("%016x", set)
}

// wantCapabilities compares those of all threads of a process.
func wantCapabilities(t *testing.T, pid int, names []string) {
	t.Helper()
	want := map[string]string{
		"CapInh": bits(t, nil), "CapAmb": bits(t, nil), "NoNewPrivs": "1",
		"CapPrm": bits(t, names), "CapEff": bits(t, names), "CapBnd": bits(t, names),
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) < 2 {
		t.Fatalf("threads of process %d: %v, %v", pid, threads, err)
	}
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(line, ":")
			if want[name] == "" {
				continue
			}
			found++
			if got := strings.TrimSpace(value); got != want[name] {
				t.Errorf("%s: %s is %s, want %s", thread, name, got, want[name])
			}
		}
		if found != len(want) {
			t.Errorf("%s says %d of %d things", thread, found, len(want))
		}
	}
}

// endsStaleSockets moves a UDP Service from one backend to another and waits until
// a socket that is connected to the first one is ended.
func (c *cluster) endsStaleSockets() {
	c.t.Helper()
	c.service("web", 10, 11)
	c.answers(vip(10, 80), 11)
	conn := c.dialUDP(vip(10, 53))
	if name, err := exchange(conn); err != nil || name != "backend-11" {
		c.t.Fatalf("answered by %q, %v", name, err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		c.t.Fatal(err)
	}
	ended := blocked(conn.Read)
	c.service("web", 10, 12)
	select {
	case err := <-ended:
		if !errors.Is(err, syscall.ECONNABORTED) {
			c.t.Errorf("the socket got %v, want ECONNABORTED", err)
		}
	case <-time.After(20 * time.Second):
		c.t.Error("the stale socket was not ended")
	}
}

// However much root gives it: threads that come later, to enter other namespaces,
// have no more either.
func TestAgentGivesUpWhatItDoesNotNeed(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	agent := c.start()
	c.endsStaleSockets()
	var kept []string
	for _, k := range privileges.Needed() {
		kept = append(kept, k.Name)
	}
	pid := c.pidOf()
	wantCapabilities(t, pid, kept)
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || strings.TrimSpace(string(name)) != filepath.Base(testutil.BuildBinary(t)) {
		t.Errorf("the process is called %q, %v", name, err)
	}
	if strings.Contains(agent.Logs(), "a capability is missing") {
		t.Error("root is said to lack a capability")
	}
	err := filepath.WalkDir(c.bpfRoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v: others may look for pins there", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestAgentWorksWithTheCapabilitiesOfTheManifest(t *testing.T) {
	t.Run("sockets", func(t *testing.T) {
		c := newCluster(t)
		c.backend(11)
		c.backend(12)
		agent := testutil.StartAgent(t, c.inContainer(manifestCapabilities(t)))
		c.endsStaleSockets()
		c.answers(vip(10, 80), 12)
		var given []string
		for _, name := range manifestCapabilities(t) {
			given = append(given, string(name))
		}
		wantCapabilities(t, agentBelow(t, agent.PID()), given)
		// The agent sees the node's cgroups and writes the node's settings, though
		// it has a cgroup namespace of its own and /proc/sys is read-only there.
		says(t, agent.Logs, "only processes below this cgroup are served")
		if _, err := os.Stat("/proc/sys/net/netfilter/nf_conntrack_max"); err == nil {
			says(t, agent.Logs, "connection tracking set")
		}
		if log := agent.Logs(); strings.Contains(log, "read-only") || strings.Contains(log, "a capability is missing") {
			t.Errorf("the log has complaints:\n%s", log)
		}
	})
	t.Run("packets", func(t *testing.T) {
		c := newQuietCluster(t)
		c.backend(11)
		c.service("web", 10, 11)
		testutil.StartAgent(t, c.inContainer(manifestCapabilities(t)))
		c.answers(vip(10, 80), 11)
		if out, err := c.fairleadInNode("inspect", "flows", "--bpf-root", c.bpfRoot); err != nil || !strings.Contains(out, vip(10, 80)) {
			t.Errorf("the connections were no flows of the packet path: %v\n%s", err, out)
		}
	})
}

// without returns the capabilities of the manifest but for some.
func without(t *testing.T, names ...corev1.Capability) []corev1.Capability {
	t.Helper()
	var rest []corev1.Capability
	for _, given := range manifestCapabilities(t) {
		if !slices.Contains(names, given) {
			rest = append(rest, given)
		}
	}
	if len(rest)+len(names) != len(manifestCapabilities(t)) {
		t.Fatalf("the manifest does not give all of %v", names)
	}
	return rest
}

func TestAgentRefusesToStartBelowTheMinimum(t *testing.T) {
	c := newQuietCluster(t)
	for _, capability := range privileges.Needed() {
		if !capability.Required {
			continue
		}
		name := corev1.Capability(strings.TrimPrefix(capability.Name, "CAP_"))
		// CAP_SYS_ADMIN, which the kernel takes for the others, goes as well.
		options := c.inContainer(without(t, name, "SYS_ADMIN"))
		options.Unready = true
		agent := testutil.StartAgent(t, options)
		if err := agent.Wait(); err == nil {
			t.Errorf("without %s the agent ended well", name)
		}
		if log := agent.Logs(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "cannot work without "+capability.Name+" (for ") {
			t.Errorf("without %s: %q, want one line that says so", name, log)
		}
	}
}

func TestAgentSaysWhoseFileItMayNotRead(t *testing.T) {
	c := newQuietCluster(t)
	file := filepath.Join(t.TempDir(), "config.yaml")
	const nobody = 65534
	if err := errors.Join(
		os.WriteFile(file, []byte("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"), 0o600),
		os.Chown(file, nobody, nobody),
	); err != nil {
		t.Fatal(err)
	}
	options := c.options("--config=" + file)
	options.Unready = true
	agent := testutil.StartAgent(t, options)
	if err := agent.Wait(); err == nil {
		t.Error("the agent ended well")
	}
	if log := agent.Logs(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "permission denied (it belongs to user 65534") {
		t.Errorf("%q, want one line that says whose the file is", log)
	}
}

// What falls away without a capability is told, and nothing else falls away.
func TestAgentWorksWithoutOptionalCapabilities(t *testing.T) {
	tests := map[string]func(c *cluster, agent *testutil.Agent){
		"CAP_SYS_ADMIN": func(c *cluster, agent *testutil.Agent) {
			conn := c.dialUDP(vip(10, 53))
			if _, err := exchange(conn); err != nil {
				t.Fatal(err)
			}
			if err := conn.SetDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			ended := blocked(conn.Read)
			c.service("web", 10, 12)
			c.answers(vip(10, 80), 12)
			select {
			case err := <-ended:
				t.Errorf("the stale socket got %v; then SECURITY.md says too much", err)
			default:
			}
			if log := agent.Logs(); strings.Contains(log, "looking for stale UDP sockets failed") {
				t.Errorf("the agent tries what it cannot do:\n%s", log)
			}
		},
		"CAP_SYS_PTRACE": func(c *cluster, agent *testutil.Agent) {
			says(t, agent.Logs, "/proc/sys is read-only here: the container needs hostPID and CAP_SYS_PTRACE")
			c.endsStaleSockets() // whose namespace has a name
		},
	}
	for _, capability := range privileges.Needed() {
		if capability.Required || capability.Without == "" {
			continue
		}
		t.Run(capability.Name, func(t *testing.T) {
			check, found := tests[capability.Name]
			if !found {
				t.Fatal("nothing shows what falls away without it")
			}
			c := newCluster(t)
			c.backend(11)
			c.backend(12)
			c.service("web", 10, 11)
			name := corev1.Capability(strings.TrimPrefix(capability.Name, "CAP_"))
			agent := testutil.StartAgent(t, c.inContainer(without(t, name)))
			c.answers(vip(10, 80), 11)
			saysOnce(t, agent.Logs, "a capability is missing")
			says(t, agent.Logs, strconv.Quote(capability.Name))
			says(t, agent.Logs, capability.Without)
			testutil.Eventually(t, 20*time.Second, "status tells and is content", func() error {
				out, err := c.fairleadInNode("status", "--bpf-root", c.bpfRoot)
				if err != nil || !strings.Contains(out, "without    "+capability.Name+": "+capability.Without) {
					return fmt.Errorf("%w\n%s", err, out)
				}
				return nil
			})
			check(c, agent)
		})
	}
}
