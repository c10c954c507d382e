// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// node is what the commands look at: a root and a cgroup, and this test in the
// part of the agent.
type node struct {
	binary, root string
	cgroup       attach.Cgroup
	agent        *datapath.Datapath
}

func newNode(t *testing.T) *node {
	t.Helper()
	cgroup, err := attach.OpenCgroup(testutil.Cgroup(t).Path())
	if err != nil {
		t.Fatal(err)
	}
	return &node{binary: testutil.BuildBinary(t), root: testutil.BPFRoot(t), cgroup: cgroup}
}

// start does what an agent does first.
func (n *node) start(t *testing.T) {
	t.Helper()
	var err error
	n.agent, err = datapath.Open(datapath.Config{Root: n.root, CgroupID: n.cgroup.ID})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.stop(t) })
	n.setState(t, time.Time{})
}

// stop ends the agent's part. The datapath stays.
func (n *node) stop(t *testing.T) {
	t.Helper()
	if n.agent != nil {
		if err := n.agent.Close(); err != nil {
			t.Error(err)
		}
		n.agent = nil
	}
}

func (n *node) setState(t *testing.T, synced time.Time) {
	t.Helper()
	err := n.agent.SetAgentState(datapath.AgentState{
		Started: time.Now(), Synced: synced, CgroupID: n.cgroup.ID, PID: os.Getpid(), Version: "v0-test",
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (n *node) attach(t *testing.T) {
	t.Helper()
	for _, hook := range attach.Hooks() {
		pin := datapath.LinkPath(n.root, hook.Name)
		if err := attach.Attach(n.cgroup, hook, n.agent.Program(hook.Program), pin); err != nil {
			t.Fatal(err)
		}
	}
}

// run runs a command with --bpf-root and returns what it printed and its exit
// code.
func (n *node) run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), n.binary, append(args, "--bpf-root="+n.root)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if lines := strings.Count(errs.String(), "\n"); lines != cmd.ProcessState.ExitCode() {
		t.Errorf("%v: exit code %d with %d lines on standard error:\n%s", args, cmd.ProcessState.ExitCode(), lines, errs.String())
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// wantStatus runs status and looks for patterns in what it prints, first of all
// in the error; "" stands for success.
func (n *node) wantStatus(t *testing.T, wantErr string, args []string, wantOut ...string) {
	t.Helper()
	stdout, stderr, code := n.run(t, append([]string{"status"}, args...)...)
	if (code == 0) != (wantErr == "") || !regexp.MustCompile(wantErr).MatchString(stderr) {
		t.Errorf("status %v: exit code %d and %q, want an error like %q", args, code, stderr, wantErr)
	}
	for _, want := range wantOut {
		if !regexp.MustCompile("(?m)" + want).MatchString(stdout) {
			t.Errorf("status %v: no match for %q in\n%s", args, want, stdout)
		}
	}
}

// program enters a Service with two ports and one that could not be programmed.
func (n *node) program(t *testing.T) {
	t.Helper()
	vip := netip.MustParseAddr("10.96.0.10")
	backend := func(s string) lb.Backend {
		ap := netip.MustParseAddrPort(s)
		return lb.Backend{Addr: ap.Addr(), Port: ap.Port()}
	}
	dns := lb.Name{Namespace: "kube-system", Name: "kube-dns"}
	d := n.agent
	for _, err := range []error{
		d.SetSlots(0, []lb.Backend{backend("10.244.0.2:53"), backend("10.244.0.3:53")}),
		d.SetName(1, lb.ServicePort{Service: dns, Port: "dns", Protocol: lb.UDP, Family: lb.IPv4}),
		d.SetName(2, lb.ServicePort{Service: dns, Port: "metrics", Protocol: lb.TCP, Family: lb.IPv4}),
		d.SetRange(1, lb.SideClusterIP, lb.Range{Count: 2, Generation: 1}),
		d.SetRange(2, lb.SideClusterIP, lb.Range{Generation: 1}),
		d.SetFrontend(lb.FrontendKey{VIP: vip, Port: 53, Protocol: lb.UDP}, lb.Frontend{Service: 1, Kind: lb.KindClusterIP}),
		d.SetFrontend(lb.FrontendKey{VIP: vip, Port: 9153, Protocol: lb.TCP}, lb.Frontend{Service: 2, Kind: lb.KindClusterIP}),
		d.SetFrontend(lb.FrontendKey{VIP: vip}, lb.Frontend{Kind: lb.KindClusterIP}),
		d.SetProblem(lb.Name{Namespace: "default", Name: "huge"}, "no room"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestStatusFollowsTheAgent(t *testing.T) {
	n := newNode(t)
	n.wantStatus(t, "no fairlead datapath is pinned there", nil)

	n.start(t)
	n.wantStatus(t, "not healthy: all hooks: not attached; the agent has not synced yet\n$", nil,
		`^hooks +0 of 8 attached; all hooks: not attached$`, `^last sync +never$`)

	n.attach(t)
	n.wantStatus(t, "^fairlead: not healthy: the agent has not synced yet\n$", nil, `^hooks +8 of 8 attached$`)

	n.program(t)
	n.setState(t, time.Now())
	n.wantStatus(t, "", nil, `^agent +running, version v0-test, pid \d+, started \d+s ago$`, `^last sync +\d+s ago$`,
		`^services +2 programmed, 1 with a problem`, `^kernel +Linux \S+$`, `^ +stale UDP sockets: `)
	n.wantStatus(t, "", []string{"--cgroup-root=" + n.cgroup.Path}, `^cgroup +`+regexp.QuoteMeta(n.cgroup.Path))
	n.wantStatus(t, `all hooks: on cgroup \d+ instead of \d+\n$`,
		[]string{"--cgroup-root=" + filepath.Dir(n.cgroup.Path)})
	n.wantStatus(t, "is not a cgroup2 directory", []string{"--cgroup-root=/tmp"})

	if err := os.Remove(datapath.LinkPath(n.root, "connect6")); err != nil {
		t.Fatal(err)
	}
	n.wantStatus(t, "^fairlead: not healthy: connect6: not attached\n$", nil, `^hooks +7 of 8 attached; connect6: not attached$`)
	n.attach(t)

	n.stop(t)
	n.wantStatus(t, "^fairlead: not healthy: no agent is running, backends are as it left them\n$", nil,
		`^hooks +8 of 8 attached$`, `^agent +not running; the last one: version v0-test`)
}

func TestStatusJSON(t *testing.T) {
	n := newNode(t)
	n.start(t)
	n.attach(t)
	n.setState(t, time.Now())
	stdout, _, code := n.run(t, "status", "-o", "json")
	var got struct {
		Healthy  bool
		Problems []string
		Hooks    []struct {
			Name     string
			Attached bool
			CgroupID uint64
		}
		Agent struct {
			Running bool
			PID     int
		}
		LastSync *time.Time
		Kernel   struct{ Release string }
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatalf("%v in\n%s", err, stdout)
	}
	if code != 0 || !got.Healthy || got.Problems == nil || len(got.Problems) > 0 || !got.Agent.Running ||
		got.Agent.PID != os.Getpid() || got.LastSync == nil || got.Kernel.Release == "" {
		t.Errorf("exit code %d for\n%s", code, stdout)
	}
	if len(got.Hooks) != len(attach.Hooks()) {
		t.Errorf("%d hooks, want %d", len(got.Hooks), len(attach.Hooks()))
	}
	for _, h := range got.Hooks {
		if !h.Attached || h.CgroupID != n.cgroup.ID {
			t.Errorf("hook %+v, want it on cgroup %d", h, n.cgroup.ID)
		}
	}
}

// The JSON of frontends is what other programs rely on, byte for byte.
const wantFrontends = `[
  {
    "service": "kube-system/kube-dns",
    "portName": "dns",
    "vip": "10.96.0.10",
    "port": 53,
    "protocol": "UDP",
    "type": "ClusterIP",
    "backends": [
      {
        "address": "10.244.0.2",
        "port": 53
      },
      {
        "address": "10.244.0.3",
        "port": 53
      }
    ]
  },
  {
    "service": "kube-system/kube-dns",
    "portName": "metrics",
    "vip": "10.96.0.10",
    "port": 9153,
    "protocol": "TCP",
    "type": "ClusterIP",
    "backends": []
  }
]
`

func TestInspectWithAndWithoutAgent(t *testing.T) {
	n := newNode(t)
	n.start(t)
	n.program(t)
	for _, agent := range []string{"running", "gone"} {
		if agent == "gone" {
			n.stop(t)
		}
		stdout, _, _ := n.run(t, "inspect", "frontends", "-o", "json")
		if diff := cmp.Diff(wantFrontends, stdout); diff != "" {
			t.Errorf("agent %s: frontends (-want +got):\n%s", agent, diff)
		}
		stdout, _, _ = n.run(t, "inspect", "services")
		const want = `SERVICE               PORT NAME  PROTOCOL  FAMILY  FRONTENDS        BACKENDS  EXTERNAL  PROBLEM
default/huge          -          -         -       -                       0         -  no room
kube-system/kube-dns  dns        UDP       IPv4    10.96.0.10:53           2         -  -
kube-system/kube-dns  metrics    TCP       IPv4    10.96.0.10:9153         0         -  -
`
		if diff := cmp.Diff(want, stdout); diff != "" {
			t.Errorf("agent %s: services (-want +got):\n%s", agent, diff)
		}
		stdout, _, _ = n.run(t, "inspect", "counters", "-o", "yaml")
		if !strings.Contains(stdout, "- name: connect_tcp_translate\n  value: ") {
			t.Errorf("agent %s: no connect_tcp_translate in counters:\n%s", agent, stdout)
		}
	}
}

func TestCleanupRemovesEverything(t *testing.T) {
	n := newNode(t)
	n.start(t)
	n.attach(t)
	_, stderr, code := n.run(t, "cleanup", "--cgroup-root="+n.cgroup.Path)
	if code != 1 || !strings.Contains(stderr, "a running fairlead agent (pid ") {
		t.Errorf("while an agent runs: exit code %d and %q", code, stderr)
	}
	n.wantAttached(t, len(attach.Hooks()))

	// What another version has left goes as well.
	other := filepath.Join(n.root, "v77", "links")
	if err := os.MkdirAll(other, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(datapath.LinkPath(n.root, "sendmsg6"), filepath.Join(other, "sendmsg6")); err != nil {
		t.Fatal(err)
	}
	n.stop(t)
	stdout, _, code := n.run(t, "cleanup", "--cgroup-root="+n.cgroup.Path)
	for _, want := range []string{
		`v\d+: detached connect4, connect6, getpeername4, getpeername6, recvmsg4, recvmsg6, sendmsg4\n`,
		`v\d+: removed maps .*frontends, .*services, `,
		`v77: detached sendmsg6\n`,
		`state\d+: removed maps .*flows, .*names, `,
	} {
		if !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("no match for %q in\n%s", want, stdout)
		}
	}
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	n.wantAttached(t, 0)
	if _, err := os.Stat(n.root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the root is still there: %v", err)
	}

	stdout, _, code = n.run(t, "cleanup", "--cgroup-root="+n.cgroup.Path)
	if code != 0 || stdout != "nothing is pinned at "+n.root+"\n" {
		t.Errorf("the second time: exit code %d and %q", code, stdout)
	}
}

func TestCleanupNamesProgramsThatAreNotPinnedHere(t *testing.T) {
	n := newNode(t)
	n.start(t)
	hooks := attach.Hooks()
	i := slices.IndexFunc(hooks, func(h attach.Hook) bool { return h.Name == "getpeername4" })
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path: n.cgroup.Path, Attach: hooks[i].Type, Program: n.agent.Program(hooks[i].Program),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n.stop(t)
	stdout, _, code := n.run(t, "cleanup", "--cgroup-root="+n.cgroup.Path)
	if code != 0 || !regexp.MustCompile(`(?m)^still attached to \S+: getpeername4, program \d+ `).MatchString(stdout) {
		t.Errorf("exit code %d and\n%s", code, stdout)
	}
	n.wantAttached(t, 1)
}

// wantAttached counts the programs on all hooks of the cgroup.
func (n *node) wantAttached(t *testing.T, want int) {
	t.Helper()
	dir, err := os.Open(n.cgroup.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	got := 0
	for _, hook := range attach.Hooks() {
		programs, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook.Type})
		if err != nil {
			t.Fatal(err)
		}
		got += len(programs.Programs)
	}
	if got != want {
		t.Errorf("%d programs are attached, want %d", got, want)
	}
}
