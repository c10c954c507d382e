// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// notices keeps what a Recorder is told of Services.
type notices []string

func (n *notices) Node(reflector.Notice) {}
func (n *notices) Service(name lb.Name, notice reflector.Notice) {
	*n = append(*n, fmt.Sprintf("%v %s (warning %v): %s", name, notice.Reason, notice.Warning, notice.Note))
}
func (n *notices) Run(context.Context) {}

// refusing is an agent that allows no externalIPs; said returns what it has told
// since said was last called.
func refusing() (a *agent, said func() []string, logs *observer.ObservedLogs) {
	a = idle()
	core, logs := observer.New(zap.WarnLevel)
	told := &notices{}
	a.log, a.recorder, a.refused = zap.New(core), told, map[lb.Name]string{}
	a.store = lb.NewStore(lb.Config{Limits: lb.Limits{ExternalIPs: lb.Allowed{Limited: true}}})
	return a, func() []string {
		a.sayRefused(a.store.Changes().Problems)
		out := *told
		*told = nil
		return out
	}, logs
}

func greedy(name string, addresses ...string) lb.Service {
	svc := lb.Service{
		Name:       lb.Name{Namespace: "ns", Name: name},
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
		Ports:      []lb.Port{{Protocol: lb.TCP, Number: 80}},
	}
	for _, a := range addresses {
		svc.ExternalIPs = append(svc.ExternalIPs, netip.MustParseAddr(a))
	}
	return svc
}

func TestWhatNobodyGetsIsSaidOnceInLogAndEvent(t *testing.T) {
	a, said, logs := refusing()
	expect := func(when string, want ...string) {
		t.Helper()
		if got := said(); !slices.Equal(got, want) {
			t.Errorf("%s: events %q, want %q", when, got, want)
		}
		if got := logs.FilterMessageSnippet("asks for what no Service gets").Len(); got != len(want) {
			t.Errorf("%s: %d lines, want %d", when, got, len(want))
		}
		logs.TakeAll()
	}
	const first = "ns/a FrontendRefused (warning true): 203.0.113.1:80/TCP is outside --external-ip-cidrs"
	a.store.SetService(greedy("a", "203.0.113.1"))
	expect("a Service asks", first)
	svc := greedy("a", "203.0.113.1")
	svc.InternalLocal = true
	a.store.SetService(svc)
	expect("something else about it changes")
	a.store.SetService(greedy("a", "203.0.113.1", "203.0.113.2"))
	expect("it asks for more", first+"; 203.0.113.2:80/TCP is outside --external-ip-cidrs")
	a.store.SetService(greedy("a"))
	expect("it asks no more")
	a.store.SetService(greedy("a", "203.0.113.1"))
	expect("it asks again", first)
	a.store.DeleteService(svc.Name)
	expect("it is gone")
	if len(a.refused) > 0 {
		t.Errorf("%v is kept of Services that are gone", a.refused)
	}
}

func TestManyRefusalsDoNotFloodTheLog(t *testing.T) {
	a, said, logs := refusing()
	for i := range 3 * logAtOnce {
		a.store.SetService(greedy(fmt.Sprintf("s%03d", i), "203.0.113.1"))
	}
	if got := len(said()); got != 3*logAtOnce {
		t.Errorf("%d events, want one for each Service", got)
	}
	if got := logs.Len(); got != logAtOnce+1 {
		t.Errorf("%d lines, want %d and one for the rest", got, logAtOnce)
	}
}
