// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/inspect"
)

func newStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell whether this node is served",
		Long: `Tells whether the programs are attached, and to which cgroup; whether an agent
is running, when it last brought the kernel's tables up to date and what its own
connections show; on how many devices the packet path is; and what this kernel
offers. Needs root.

The exit code is 0 only if all hooks are attached to the agent's cgroup (to that
of --cgroup-root, if given), an agent is running, it has synced, its own
connections are translated where that can be probed, and the packet path is off
or on all its devices. Otherwise it is 1 and standard error says why. While no
agent is running, connections go on being served with the backends the kernel
knows.

A cgroup that is not the node's root is told but no failure, since an agent
attaches to one only when --cgroup-root says so. Services with a problem are
counted but no failure: see fairlead inspect services. Capabilities that the
agent does without are told but no failure. Maps that another version
of Fairlead has left are told but no failure, unless its programs are attached.`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	output := addOutputFlag(cmd, "table", "json")
	bpfRoot := addBPFRootFlag(cmd)
	cgroupRoot := addCgroupRootFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		report, err := readStatus(cmd.Context(), *bpfRoot, *cgroupRoot)
		if err != nil {
			return err
		}
		if output.value == "json" {
			err = inspect.WriteJSON(cmd.OutOrStdout(), report)
		} else {
			err = report.write(cmd.OutOrStdout(), time.Now())
		}
		if err != nil {
			return err
		}
		if !report.Healthy {
			return errors.New("not healthy: " + strings.Join(report.Problems, "; "))
		}
		return nil
	}
	return cmd
}

// statusReport is what `fairlead status` tells. Other programs read its JSON.
type statusReport struct {
	Healthy  bool         `json:"healthy"`
	Problems []string     `json:"problems"` // why it is not healthy, never null
	Hooks    []hookStatus `json:"hooks"`
	Cgroup   cgroupStatus `json:"cgroup"`
	Agent    agentStatus  `json:"agent"`
	// LastSync is when the agent last brought the tables up to date; null before
	// the first time.
	LastSync *time.Time   `json:"lastSync"`
	Services serviceCount `json:"services"`
	// Source is where the agent hears of Services; null when none answers.
	Source  *agent.SourceState `json:"source"`
	Packets packetStatus       `json:"packetPath"`
	// Probe is what the agent's own connections have shown; null when no agent says.
	Probe *agent.ProbeState `json:"selfProbe"`
	// Lacks are the capabilities that the running agent could use and does not
	// have; null when it does not say.
	Lacks  []agent.Lack `json:"lacks"`
	Kernel kernelStatus `json:"kernel"`
	// OtherVersions have left something below the same root; never null.
	OtherVersions []versionStatus `json:"otherVersions"`
}

// versionStatus is about an older or newer version of the maps' layout.
type versionStatus struct {
	Version string   `json:"version"` // as its directory is called, "v1"
	Hooks   []string `json:"hooks"`   // that have its programs, never null
}

type hookStatus struct {
	Name     string `json:"name"`
	Attached bool   `json:"attached"`
	CgroupID uint64 `json:"cgroupID"`        // 0 when not attached
	Error    string `json:"error,omitempty"` // why it is not attached
}

// cgroupStatus is about the cgroup that the hooks should be on.
type cgroupStatus struct {
	ID   uint64 `json:"id"`
	Path string `json:"path"` // "" when not known
	// NodeRoot tells whether everything on the node is below it; null when the
	// node's root cannot be found, which needs the node's PID namespace.
	NodeRoot *bool `json:"nodeRoot"`
}

// agentStatus is about the agent that is running, or else the last one.
type agentStatus struct {
	Running bool       `json:"running"`
	PID     int        `json:"pid"` // in the agent's PID namespace
	Version string     `json:"version"`
	Started *time.Time `json:"started"`
}

type serviceCount struct {
	Programmed int `json:"programmed"` // service ports in one family
	Problems   int `json:"problems"`   // Services that are not programmed as they should be
}

// readStatus collects the report. cgroupRoot may be empty.
func readStatus(ctx context.Context, bpfRoot, cgroupRoot string) (statusReport, error) {
	var report statusReport
	view, err := datapath.OpenView(bpfRoot)
	if err != nil {
		return report, err
	}
	defer view.Close()
	state, err := view.AgentState()
	if err != nil {
		return report, err
	}
	tables, err := view.Load()
	if err != nil {
		return report, err
	}
	running, err := datapath.Locked(bpfRoot)
	if err != nil {
		return report, err
	}
	if running {
		if source, err := agent.AskSource(ctx, agent.SocketPath(bpfRoot)); err == nil {
			report.Source = &source
		}
	}
	report.Services = serviceCount{len(tables.Names), len(tables.Problems)}
	report.Agent = agentStatus{running, state.PID, state.Version, timeOrNull(state.Started)}
	report.LastSync = timeOrNull(state.Synced)
	if report.Packets, err = readPackets(ctx, view, bpfRoot, running); err != nil {
		return report, err
	}
	report.Lacks = readLacks(ctx, bpfRoot, running)
	if running {
		if probed, err := agent.AskProbe(ctx, agent.SocketPath(bpfRoot)); err == nil {
			report.Probe = &probed
		}
	}
	for _, s := range attach.Check(func(hook string) string { return datapath.LinkPath(bpfRoot, hook) }) {
		hook := hookStatus{Name: s.Hook, Attached: s.Err == nil, CgroupID: s.CgroupID}
		if s.Err != nil {
			hook.Error = s.Err.Error()
		}
		report.Hooks = append(report.Hooks, hook)
	}
	if report.Cgroup, err = wantedCgroup(cgroupRoot, state.CgroupID); err != nil {
		return report, err
	}
	report.Kernel = readKernel()
	if report.OtherVersions, err = readOtherVersions(bpfRoot); err != nil {
		return report, err
	}
	report.judge()
	return report, nil
}

// readOtherVersions looks for what versions but ours have pinned below root.
func readOtherVersions(root string) ([]versionStatus, error) {
	names, err := dirNames(root)
	if err != nil {
		return nil, fmt.Errorf("list what is pinned: %w", err)
	}
	out := []versionStatus{}
	for _, name := range names {
		if !versionDir.MatchString(name) || name == "v"+strconv.Itoa(datapath.ABI) {
			continue
		}
		hooks, err := pinNames(filepath.Join(root, name, "links"))
		if err != nil {
			return nil, fmt.Errorf("list pins: %w", err)
		}
		devices, err := pinNames(filepath.Join(root, name, devicesDir))
		if err != nil {
			return nil, fmt.Errorf("list pins: %w", err)
		}
		for _, device := range devices {
			hooks = append(hooks, "device "+device)
		}
		slices.Sort(hooks)
		out = append(out, versionStatus{name, hooks})
	}
	return out, nil
}

// wantedCgroup returns the cgroup the hooks should be on: that of the flag if
// given, else the one that the agent was told to use.
func wantedCgroup(flag string, agents uint64) (cgroupStatus, error) {
	c := cgroupStatus{ID: agents}
	if flag != "" {
		cgroup, err := attach.OpenCgroup(flag)
		if err != nil {
			return c, err
		}
		c.ID, c.Path = cgroup.ID, cgroup.Path
	}
	if host, err := attach.HostCgroup(); err == nil {
		isRoot := host.ID == c.ID
		c.NodeRoot = &isRoot
		if isRoot {
			c.Path = host.Path
		}
	}
	return c, nil
}

// elsewhere returns the other version whose programs have the hooks while none of
// ours does; nil when there is none.
func (r *statusReport) elsewhere() *versionStatus {
	if slices.ContainsFunc(r.Hooks, func(h hookStatus) bool { return h.Attached }) {
		return nil
	}
	for i, v := range r.OtherVersions {
		if len(v.Hooks) > 0 {
			return &r.OtherVersions[i]
		}
	}
	return nil
}

// judge fills in Problems and Healthy from the rest.
func (r *statusReport) judge() {
	r.Problems = []string{}
	other := r.elsewhere()
	if other != nil {
		r.Problems = append(r.Problems, "programs of "+other.Version+" serve until an agent of this version has synced")
	} else {
		r.Problems = append(r.Problems, r.hookProblems()...)
	}
	if !r.Agent.Running {
		r.Problems = append(r.Problems, "no agent is running, backends are as it left them")
	}
	if r.LastSync == nil {
		r.Problems = append(r.Problems, "the agent has not synced yet")
	}
	if r.Probe != nil && r.Probe.Problem != "" {
		r.Problems = append(r.Problems, "self-probe: "+r.Probe.Problem)
	}
	if problem := r.Packets.problem(); problem != "" {
		r.Problems = append(r.Problems, "packet path: "+problem)
	}
	for _, v := range r.OtherVersions {
		if other == nil && len(v.Hooks) > 0 {
			r.Problems = append(r.Problems, "programs of "+v.Version+" are attached beside ours: "+strings.Join(v.Hooks, ", "))
		}
	}
	r.Healthy = len(r.Problems) == 0
}

// hookProblems says which hooks are not as they should be: hooks with the same
// fault share a line.
func (r *statusReport) hookProblems() []string {
	var faults []string // in the order of the hooks
	hooks := map[string][]string{}
	for _, h := range r.Hooks {
		fault := h.Error
		if h.Attached {
			if h.CgroupID == r.Cgroup.ID {
				continue
			}
			fault = fmt.Sprintf("on cgroup %d instead of %d", h.CgroupID, r.Cgroup.ID)
		}
		if hooks[fault] == nil {
			faults = append(faults, fault)
		}
		hooks[fault] = append(hooks[fault], h.Name)
	}
	for i, fault := range faults {
		names := strings.Join(hooks[fault], ", ")
		if len(hooks[fault]) == len(r.Hooks) {
			names = "all hooks"
		}
		faults[i] = names + ": " + fault
	}
	return faults
}

// write writes the report for people, with ages as of now.
func (r *statusReport) write(w io.Writer, now time.Time) error {
	attached := 0
	for _, h := range r.Hooks {
		if h.Attached {
			attached++
		}
	}
	hooks := fmt.Sprintf("%d of %d attached", attached, len(r.Hooks))
	if problems := r.hookProblems(); len(problems) > 0 {
		hooks += "; " + strings.Join(problems, "; ")
	}
	served := fmt.Sprintf("version %s, pid %d, started %s", r.Agent.Version, r.Agent.PID, ago(r.Agent.Started, now))
	if r.Agent.Running {
		served = "running, " + served
	} else {
		served = "not running; the last one: " + served
	}
	services := fmt.Sprintf("%d programmed", r.Services.Programmed)
	if r.Services.Problems > 0 {
		services += fmt.Sprintf(", %d with a problem: see fairlead inspect services", r.Services.Problems)
	}
	lines := [][2]string{
		{"hooks", hooks},
		{"cgroup", r.Cgroup.String()},
		{"agent", served},
		{"last sync", ago(r.LastSync, now)},
		{"services", services},
	}
	if text := sourceText(r.Source); text != "" {
		lines = append(lines, [2]string{"api server", text})
	}
	if r.Probe != nil {
		lines = append(lines, [2]string{"self-probe", probeLine(*r.Probe, now)})
	}
	for i, text := range r.Packets.lines() {
		lines = append(lines, [2]string{[]string{"packets", ""}[min(i, 1)], text})
	}
	lines = append(lines, [][2]string{
		{"kernel", "Linux " + r.Kernel.Release},
		{"", "stale UDP sockets: " + r.endsSockets()},
	}...)
	for _, l := range r.Lacks {
		lines = append(lines, [2]string{"without", l.Capability + ": " + l.Without})
	}
	other := r.elsewhere()
	for i, v := range r.OtherVersions {
		text := v.String()
		if other == &r.OtherVersions[i] {
			text = v.Version + ", whose programs serve until an agent of this version has synced"
		}
		lines = append(lines, [2]string{"also", text})
	}
	for _, line := range lines {
		if _, err := fmt.Fprintf(w, "%-10s %s\n", line[0], line[1]); err != nil {
			return err
		}
	}
	return nil
}

// sourceText says which API server the agent asks, "" when there is nothing to say.
func sourceText(s *agent.SourceState) string {
	if s == nil || s.APIServer == "" {
		return ""
	}
	text := s.APIServer
	if !s.Configured {
		text += ", an address that it had: the configured one cannot be reached"
	}
	if s.Holding {
		text += "; a list that takes the last endpoints of many Services is held until it has been said again"
	}
	return text
}

// probeLine says what an agent's own connections have shown.
func probeLine(s agent.ProbeState, now time.Time) string {
	switch {
	case s.Problem != "":
		return s.Problem
	case s.Unknown != "":
		return s.Unknown
	default:
		return "a connection was translated " + ago(s.Translated, now)
	}
}

// String says what there is of the version and what that means.
func (v versionStatus) String() string {
	if len(v.Hooks) > 0 {
		return v.Version + ", whose programs are attached, too: " + strings.Join(v.Hooks, ", ")
	}
	return v.Version + ", not attached: another version of fairlead can go on from its maps"
}

// String says which cgroup it is and what that means.
func (c cgroupStatus) String() string {
	s := fmt.Sprintf("%d", c.ID)
	if c.Path != "" {
		s = c.Path
	}
	switch {
	case c.NodeRoot == nil:
		return s + " (whether it is the node's root cannot be told from here)"
	case *c.NodeRoot:
		return s + ", the node's root"
	default:
		return s + ", not the node's root: only what is below it is served"
	}
}

func timeOrNull(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func ago(t *time.Time, now time.Time) string {
	if t == nil {
		return "never"
	}
	return now.Sub(*t).Truncate(time.Second).String() + " ago"
}
