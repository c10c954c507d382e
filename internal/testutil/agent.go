// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package testutil

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// How long an agent may take to become ready and to end after SIGTERM.
const (
	readyTimeout = 60 * time.Second
	stopTimeout  = 15 * time.Second
)

// buildOnce builds the program for BuildBinary.
var buildOnce = sync.OnceValues(func() (string, error) {
	// What earlier test processes have built goes first: nobody is told when
	// the last test of this one has ended.
	if err := cleanLeftovers(); err != nil {
		return "", err
	}
	gomod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find go.mod: %w", err)
	}
	dir, err := sandbox.TempDir(prefix)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "fairlead")
	build := exec.Command("go", "build", "-o", path, "./cmd/fairlead")
	build.Dir = filepath.Dir(strings.TrimSpace(string(gomod)))
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build fairlead: %w\n%s", err, out)
	}
	return path, nil
})

// BuildBinary returns the path of the program, built once for each test
// process, or of the one that FAIRLEAD_BINARY names.
func BuildBinary(t testing.TB) string {
	t.Helper()
	if path := os.Getenv("FAIRLEAD_BINARY"); path != "" {
		return path
	}
	path, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// AgentOptions say how an agent is started. Netns, CgroupRoot, BPFRoot and one
// of Source and Kubeconfig must be set.
type AgentOptions struct {
	Netns      *sandbox.Namespace // where it runs
	CgroupRoot string
	BPFRoot    string
	Source     string // file:DIR; empty for the API server of Kubeconfig
	Kubeconfig string
	NodeName   string   // "node" when empty
	ExtraArgs  []string // come last and so win
	// Through is a command that executes the program it is given with its
	// arguments; empty for none.
	Through []string
	// Unready starts the agent without waiting until it is ready.
	Unready bool
	// Output takes what the agent writes, in place of Logs, when it is not nil.
	Output *os.File
}

// Addresses agents of tests listen on, in their own namespace.
const (
	HealthzAddress = "127.0.0.1:10256"
	MetricsAddress = "127.0.0.1:10249"
)

// Agent is a running agent.
type Agent struct {
	netns *sandbox.Namespace
	cmd   *sandbox.Cmd
	log   *LogBuffer
	done  chan struct{} // closed when it has ended
	err   error         // how it has ended; to be read after done
	over  bool          // it was ended on purpose, and well
}

// StartAgent starts `fairlead agent` and waits until it is ready. It is ended
// with the test, and what it has logged is shown when the test has failed.
func StartAgent(t testing.TB, options AgentOptions) *Agent {
	t.Helper()
	RequireRoot(t)
	a := &Agent{netns: options.Netns, log: &LogBuffer{}, done: make(chan struct{})}
	// Not t.Context, which ends before the cleanup that ends the agent.
	line := slices.Concat(options.Through, []string{BuildBinary(t)}, options.args())
	a.cmd = a.netns.Command(context.Background(), line[0], line[1:]...)
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	if options.Output != nil {
		a.cmd.Stdout, a.cmd.Stderr = options.Output, options.Output
	}
	if err := a.cmd.Start(); err != nil {
		t.Fatalf("start agent: %v", err)
	}
	go func() {
		defer close(a.done)
		a.err = a.cmd.Wait()
	}()
	t.Cleanup(func() { a.cleanUp(t) })
	if !options.Unready {
		a.WaitReady(t)
	}
	return a
}

// args returns the command line.
func (o AgentOptions) args() []string {
	name := o.NodeName
	if name == "" {
		name = "node"
	}
	args := []string{
		"agent",
		"--node-name=" + name,
		"--cgroup-root=" + o.CgroupRoot,
		"--bpf-root=" + o.BPFRoot,
		"--healthz-bind-address=" + HealthzAddress,
		"--metrics-bind-address=" + MetricsAddress,
		"--log-format=console",
	}
	if o.Source != "" {
		args = append(args, "--source="+o.Source)
	}
	if o.Kubeconfig != "" {
		args = append(args, "--kubeconfig="+o.Kubeconfig)
	}
	return append(args, o.ExtraArgs...)
}

// WaitReady waits until /healthz says 200. The test fails when the agent ends
// before.
func (a *Agent) WaitReady(t testing.TB) {
	t.Helper()
	Eventually(t, readyTimeout, "agent ready", func() error {
		select {
		case <-a.done:
			t.Fatalf("agent has ended before it was ready: %v", a.err)
		default:
		}
		_, err := a.Get(HealthzAddress, "/healthz")
		return err
	})
}

// Get returns the body of a page the agent serves, such as /metrics at
// MetricsAddress. A status other than 200 is an error.
func (a *Agent) Get(addr, path string) (string, error) {
	client := http.Client{
		Transport: &http.Transport{DialContext: a.netns.Dial, DisableKeepAlives: true},
		Timeout:   5 * time.Second,
	}
	response, err := client.Get("http://" + addr + path)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("get %s: %s: %s", path, response.Status, body)
	}
	return string(body), nil
}

// Metric returns the sum of a metric over all series that have the given labels,
// such as `ip_family="IPv4"`.
func (a *Agent) Metric(name string, labels ...string) (float64, error) {
	page, err := a.Get(MetricsAddress, "/metrics")
	if err != nil {
		return 0, err
	}
	lacks := func(line string) func(string) bool {
		return func(label string) bool { return !strings.Contains(line, label) }
	}
	sum, found := 0.0, false
	for line := range strings.Lines(page) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != '{' && rest[0] != ' ' || slices.ContainsFunc(labels, lacks(line)) {
			continue
		}
		fields := strings.Fields(line)
		v, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum, found = sum+v, true
	}
	if !found {
		return 0, fmt.Errorf("/metrics has no %s", name)
	}
	return sum, nil
}

// Running tells whether the agent has not ended yet.
func (a *Agent) Running() bool {
	select {
	case <-a.done:
		return false
	default:
		return true
	}
}

// End ends the agent with a signal and waits for its end, which must be what the
// signal asks for: the exit code 0 after SIGTERM, death by SIGKILL. What it has
// logged is not shown any more when the test fails later: a test may end hundreds.
func (a *Agent) End(t testing.TB, signal syscall.Signal) {
	t.Helper()
	if !a.Running() {
		t.Fatalf("agent has ended by itself: %v\n%s", a.err, a.Logs())
	}
	if err := a.Kill(signal); err != nil {
		t.Fatalf("end agent: %v", err)
	}
	select {
	case <-a.done:
	case <-time.After(stopTimeout):
		t.Fatalf("agent still runs %s after %v", stopTimeout, signal)
	}
	var exit *exec.ExitError
	killed := errors.As(a.err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == signal
	if a.err != nil && !killed {
		t.Fatalf("agent ended with %v after %v\n%s", a.err, signal, a.Logs())
	}
	a.over = true
}

// Discard ends the agent, which may have ended by itself in whatever way, and
// forgets it as End does.
func (a *Agent) Discard(signal syscall.Signal) {
	_ = a.Kill(signal) // it may have ended
	<-a.done
	a.over = true
}

// Kill sends the agent a signal, without waiting for what it does about it.
func (a *Agent) Kill(signal os.Signal) error { return a.cmd.Process.Signal(signal) }

// PID returns the process that was started: the agent, unless it was started through
// another command.
func (a *Agent) PID() int { return a.cmd.Process.Pid }

// Wait waits until the agent has ended and returns what exec.Cmd.Wait would.
func (a *Agent) Wait() error {
	<-a.done
	return a.err
}

// Logs returns what the agent has written so far.
func (a *Agent) Logs() string { return a.log.String() }

// cleanUp ends the agent and reports how it went.
func (a *Agent) cleanUp(t testing.TB) {
	t.Helper()
	if a.over {
		return
	}
	if err := a.Kill(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("stop agent: %v", err)
	}
	select {
	case <-a.done:
	case <-time.After(stopTimeout):
		t.Errorf("agent still runs %s after SIGTERM", stopTimeout)
		_ = a.Kill(syscall.SIGKILL)
		<-a.done
	}
	if t.Failed() {
		t.Logf("the agent's log:\n%s", a.Logs())
	}
}

// LogBuffer takes the output of a program and may be read while it is written. The
// zero value is empty.
type LogBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (b *LogBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// String returns what was written so far.
func (b *LogBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
