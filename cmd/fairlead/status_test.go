// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// healthyReport is of a node where all is well.
func healthyReport(now time.Time) statusReport {
	started, synced, isRoot := now.Add(-90*time.Minute), now.Add(-3*time.Second), true
	return statusReport{
		Hooks: []hookStatus{
			{Name: "connect4", Attached: true, CgroupID: 1},
			{Name: "connect6", Attached: true, CgroupID: 1},
			{Name: "sendmsg4", Attached: true, CgroupID: 1},
		},
		Cgroup:   cgroupStatus{ID: 1, Path: "/sys/fs/cgroup", NodeRoot: &isRoot},
		Agent:    agentStatus{Running: true, PID: 4711, Version: "v1.2.3", Started: &started},
		LastSync: &synced,
		Services: serviceCount{Programmed: 12},
		Packets:  packetStatus{PacketState: agent.PacketState{On: true, Devices: 3, Attached: 3}, Flows: 7},
		Kernel:   kernelStatus{Release: "6.12.0", BTF: true, SockDestroy: true},
	}
}

func TestProbeIsToldInOneLine(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := now.Add(-7 * time.Second)
	for want, state := range map[string]agent.ProbeState{
		"a connection was translated 7s ago": {Translated: &at},
		"not translated":                     {Translated: &at, Problem: "not translated"},
		"cannot be probed":                   {Unknown: "cannot be probed"},
	} {
		if got := probeLine(state, now); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestJudge(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*statusReport)
		want   []string
	}{
		{name: "all is well", change: func(*statusReport) {}, want: []string{}},
		{
			name: "an agent that is gone is a problem though connections are served",
			change: func(r *statusReport) {
				r.Agent.Running = false
			},
			want: []string{"no agent is running, backends are as it left them"},
		},
		{
			name: "an agent that waits for its first sync is one",
			change: func(r *statusReport) {
				r.LastSync = nil
			},
			want: []string{"the agent has not synced yet"},
		},
		{
			name: "hooks with the same fault are told together",
			change: func(r *statusReport) {
				r.Hooks[0] = hookStatus{Name: "connect4", Error: "not attached"}
				r.Hooks[1].CgroupID = 77
				r.Hooks[2] = hookStatus{Name: "sendmsg4", Error: "not attached"}
			},
			want: []string{"connect4, sendmsg4: not attached", "connect6: on cgroup 77 instead of 1"},
		},
		{
			name: "a fault of all hooks is told once",
			change: func(r *statusReport) {
				r.Cgroup.ID = 5
			},
			want: []string{"all hooks: on cgroup 1 instead of 5"},
		},
		{
			name: "another cgroup than the node's root is what the agent was told",
			change: func(r *statusReport) {
				isRoot := false
				r.Cgroup.NodeRoot = &isRoot
			},
			want: []string{},
		},
		{
			name: "a Service with a problem is a matter of inspect",
			change: func(r *statusReport) {
				r.Services.Problems = 1
			},
			want: []string{},
		},
		{
			name: "devices without their programs are one",
			change: func(r *statusReport) {
				r.Packets.Attached = 1
			},
			want: []string{"packet path: programs are missing on 2 of 3 devices"},
		},
		{
			name: "a packet path that the kernel does not offer is one",
			change: func(r *statusReport) {
				r.Packets.PacketState = agent.PacketState{On: true, Problem: "too old"}
			},
			want: []string{"packet path: too old"},
		},
		{
			name: "one that is off is what the agent was told",
			change: func(r *statusReport) {
				r.Packets = packetStatus{}
			},
			want: []string{},
		},
		{
			name: "connections that are not translated are one",
			change: func(r *statusReport) {
				r.Probe = &agent.ProbeState{Problem: "not translated"}
			},
			want: []string{"self-probe: not translated"},
		},
		{
			name: "not to know it is none",
			change: func(r *statusReport) {
				r.Probe = &agent.ProbeState{Unknown: "cannot be probed"}
			},
			want: []string{},
		},
		{
			name: "maps of an older version are there to go back to",
			change: func(r *statusReport) {
				r.OtherVersions = []versionStatus{{Version: "v1", Hooks: []string{}}}
			},
			want: []string{},
		},
		{
			name: "its programs may not be attached any more",
			change: func(r *statusReport) {
				r.OtherVersions = []versionStatus{{Version: "v1", Hooks: []string{"connect4", "connect6"}}}
			},
			want: []string{"programs of v1 are attached beside ours: connect4, connect6"},
		},
		{
			name: "they serve until ours take over",
			change: func(r *statusReport) {
				for i := range r.Hooks {
					r.Hooks[i] = hookStatus{Name: r.Hooks[i].Name, Error: "not attached"}
				}
				r.LastSync = nil
				r.OtherVersions = []versionStatus{{Version: "v1"}, {Version: "v2", Hooks: []string{"connect4"}}}
			},
			want: []string{"programs of v2 serve until an agent of this version has synced", "the agent has not synced yet"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			report := healthyReport(time.Now())
			test.change(&report)
			report.judge()
			if diff := cmp.Diff(test.want, report.Problems); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			if report.Healthy != (len(test.want) == 0) {
				t.Errorf("healthy is %v", report.Healthy)
			}
		})
	}
}

func TestStatusForPeople(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, test := range []struct {
		name   string
		change func(*statusReport)
		want   string
	}{
		{
			name:   "all is well",
			change: func(*statusReport) {},
			want: `hooks      3 of 3 attached
cgroup     /sys/fs/cgroup, the node's root
agent      running, version v1.2.3, pid 4711, started 1h30m0s ago
last sync  3s ago
services   12 programmed
packets    on 3 of 3 devices, 7 flows
kernel     Linux 6.12.0
           stale UDP sockets: ended with bpf_sock_destroy
`,
		},
		{
			name: "the API server is asked where it is, not where it should be",
			change: func(r *statusReport) {
				r.Source = &agent.SourceState{APIServer: "https://192.0.2.10:6443", Holding: true}
			},
			want: `hooks      3 of 3 attached
cgroup     /sys/fs/cgroup, the node's root
agent      running, version v1.2.3, pid 4711, started 1h30m0s ago
last sync  3s ago
services   12 programmed
api server https://192.0.2.10:6443, an address that it had: the configured one cannot be reached; a list that takes the last endpoints of many Services is held until it has been said again
packets    on 3 of 3 devices, 7 flows
kernel     Linux 6.12.0
           stale UDP sockets: ended with bpf_sock_destroy
`,
		},
		{
			name: "nothing is",
			change: func(r *statusReport) {
				isRoot := false
				r.Hooks[1] = hookStatus{Name: "connect6", Error: "its cgroup has been removed"}
				r.Cgroup = cgroupStatus{ID: 1, NodeRoot: &isRoot}
				r.Agent.Running, r.LastSync = false, nil
				r.Services.Problems = 2
				r.Packets = packetStatus{PacketState: agent.PacketState{
					On: true, Problem: "no room", Devices: 3, Attached: 2, Unsupported: []string{"ib0: no Ethernet", "ipv0: no link"},
				}}
				r.Kernel = kernelStatus{Release: "6.1.0", BTF: true}
				r.OtherVersions = []versionStatus{{Version: "v1"}, {Version: "v3", Hooks: []string{"connect4"}}}
			},
			want: `hooks      2 of 3 attached; connect6: its cgroup has been removed
cgroup     1, not the node's root: only what is below it is served
agent      not running; the last one: version v1.2.3, pid 4711, started 1h30m0s ago
last sync  never
services   12 programmed, 2 with a problem: see fairlead inspect services
packets    on 2 of 3 devices, 0 flows; no room
           not on ib0: no Ethernet; ipv0: no link
kernel     Linux 6.1.0
           stale UDP sockets: ended with sock_diag (no bpf_sock_destroy in this kernel)
also       v1, not attached: another version of fairlead can go on from its maps
also       v3, whose programs are attached, too: connect4
`,
		},
		{
			name: "another version serves until ours has synced",
			change: func(r *statusReport) {
				for i := range r.Hooks {
					r.Hooks[i] = hookStatus{Name: r.Hooks[i].Name, Error: "not attached"}
				}
				r.LastSync = nil
				r.OtherVersions = []versionStatus{{Version: "v3", Hooks: []string{"connect4"}}}
			},
			want: `hooks      0 of 3 attached; all hooks: not attached
cgroup     /sys/fs/cgroup, the node's root
agent      running, version v1.2.3, pid 4711, started 1h30m0s ago
last sync  never
services   12 programmed
packets    on 3 of 3 devices, 7 flows
kernel     Linux 6.12.0
           stale UDP sockets: ended with bpf_sock_destroy
also       v3, whose programs serve until an agent of this version has synced
`,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			report := healthyReport(now)
			test.change(&report)
			var out strings.Builder
			if err := report.write(&out, now); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, out.String()); diff != "" {
				t.Errorf("status (-want +got):\n%s", diff)
			}
		})
	}
}

func TestOtherVersionsAreFound(t *testing.T) {
	root := t.TempDir()
	own := "v" + strconv.Itoa(datapath.ABI)
	for _, dir := range []string{own + "/links", "v1/links", "v98/devices/3-clsact", "v99/maps", "vault", "v1x"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, pin := range []string{"v1/links/connect6", "v1/links/connect4", "v98/devices/2-ingress"} {
		if err := os.WriteFile(filepath.Join(root, pin), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readOtherVersions(root)
	if err != nil {
		t.Fatal(err)
	}
	want := []versionStatus{{"v1", []string{"connect4", "connect6"}}, {"v98", []string{"device 2-ingress"}}, {"v99", []string{}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("other versions (-want +got):\n%s", diff)
	}
}
