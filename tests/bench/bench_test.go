// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

func TestMain(m *testing.M) {
	if status, child := runChild(); child {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

// TestBenchMeasuresEverything says nothing about how long anything takes. That
// the Services are what is measured bench checks itself, with getpeername and
// the sender of each datagram.
func TestBenchMeasuresEverything(t *testing.T) {
	testutil.RequireRoot(t)
	e := effort{
		few: 2, many: 50, rounds: 2, block: 10, hookRuns: 10,
		packetRounds: 2, flood: 1000, neighbour: time.Millisecond,
	}
	r, err := bench(t.Context(), e, t.Output())
	if err != nil {
		t.Fatal(err)
	}

	for i, c := range r.Workloads {
		sides := 6
		if goals[i].dials {
			sides = 7
		}
		if c.Direct.P50 <= 0 || len(c.Sides) != sides {
			t.Errorf("%s: direct %v, compared with %d sides, want %d", c.Workload, c.Direct, len(c.Sides), sides)
		}
		for _, s := range c.Sides {
			if s.Time.P50 <= 0 || s.Ratio.Median <= 0 || s.Ratio.Q1 > s.Ratio.Q3 {
				t.Errorf("%s, %s: %+v", c.Workload, s.Side, s)
			}
		}
	}
	ran := map[string]int{}
	for _, h := range r.Hooks {
		if h.Verified == 0 {
			t.Errorf("%s: number of instructions is not known", h.Name)
		}
		ran[h.Name] = len(h.Nanoseconds)
	}
	want := map[string]int{
		"connect4": 3, "getpeername4": 3, "sendmsg4": 2, "recvmsg4": 2,
		"connect6": 0, "getpeername6": 0, "sendmsg6": 0, "recvmsg6": 0,
	}
	if diff := cmp.Diff(want, ran); diff != "" {
		t.Errorf("with how many kinds of targets each program ran (-want +got):\n%s", diff)
	}
	// A Service has its name, its row, the range of each side and three frontends, a
	// port, a NodePort and all other ports, beside ten slots. The first one has two more
	// ports, with members. The node has an address.
	if got, want := r.Programming[1].All.Rows, 50*17+2*(1+3+2+10+10)+1; got != want {
		t.Errorf("50 Services took %d rows, want %d", got, want)
	}
	testPackets(t, r.Packets)
	testReport(t, r)
}

// testPackets wants every load measured without kube-proxy, and each program in the
// places where it does something.
func testPackets(t *testing.T, r packetReport) {
	t.Helper()
	if r.Missing == "" {
		t.Error("there was a kube-proxy to compare with, where nobody has built one")
	}
	lines := map[string]int{}
	for _, c := range r.Workloads {
		lines[string(c.Workload)] = len(c.Sides)
		for _, s := range c.Sides {
			if s.Time.P50 <= 0 || s.Ratio.Median <= 0 || s.Tail <= 0 {
				t.Errorf("%s, %s: %+v", c.Workload, s.Title, s)
			}
		}
	}
	if diff := cmp.Diff(map[string]int{
		"UDP packets to a NodePort": 4, "TCP connections to a NodePort, closed at once": 5,
		"UDP sendto, recvfrom with a NodePort": 4, "TCP byte there and back with a NodePort": 4,
		"UDP datagrams from pod to pod": 4,
	}, lines); diff != "" {
		t.Errorf("lines of each load (-want +got):\n%s", diff)
	}
	ran := map[string]int{}
	for _, h := range r.Hooks {
		ran[h.Name] = len(h.Nanoseconds)
	}
	if diff := cmp.Diff(map[string]int{"tc_ingress": 2, "tc_egress": 3, "tc_ingress_l3": 0, "tc_egress_l3": 0}, ran); diff != "" {
		t.Errorf("in how many places each program ran (-want +got):\n%s", diff)
	}
}

// testReport checks that a report can be printed, saved and read again.
func testReport(t *testing.T, r report) {
	var text strings.Builder
	if err := r.write(&text); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", text.String())
	dir := t.TempDir()
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	saved, err := os.ReadFile(filepath.Join(dir, r.Machine.Kernel+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var again report
	decoder := json.NewDecoder(bytes.NewReader(saved))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, again); diff != "" {
		t.Errorf("what was saved differs (-made +read):\n%s", diff)
	}
}

func TestSummaryPairsTheRoundsOfTwoSides(t *testing.T) {
	// The machine gets twice as slow, the ratio stays.
	got := summarize(tcpConnect, false, socketLines(goals[0]), samples{
		sideDirect:  {{80, 80, 80}, {160, 160, 160}, {320, 320, 320}},
		sideNotOurs: {{100, 110, 90}, {200, 190, 210}, {400, 410, 390}},
		sideFew:     {{110, 500, 90}, {220, 10, 230}, {440, 440, 440}},
		sideMany:    {{220, 220, 220}, {440, 440, 440}, {880, 880, 880}},
	})
	ratios := map[string]float64{}
	for _, s := range got.Sides {
		ratios[s.Side+" against "+s.Base] = s.Ratio.Median
		if s.Ratio.Q1 != s.Ratio.Q3 {
			t.Errorf("%s: ratio %+v, want the same in all rounds", s.Side, s.Ratio)
		}
	}
	if diff := cmp.Diff(map[string]float64{
		"few against not ours": 1.1, "many against not ours": 2.2, "many against few": 2,
		"not ours against direct": 1.25, "many against direct": 2.75,
	}, ratios); diff != "" {
		t.Errorf("ratios (-want +got):\n%s", diff)
	}
}

func TestQuantileInterpolates(t *testing.T) {
	values := []float64{40, 10, 30, 20}
	for q, want := range map[float64]float64{0: 10, 0.25: 17.5, 0.5: 25, 1: 40} {
		if got := quantile(values, q); got != want {
			t.Errorf("quantile %v of %v is %v, want %v", q, values, got, want)
		}
	}
}

func TestGoalIsTheLowerOfTwoRates(t *testing.T) {
	got := goalTimes(samples{
		sideDirect:   {{950}, {950}},
		sideNftables: {{1800}, {1200}}, // 1.5 times that rate is less, and more
	})
	if diff := cmp.Diff([][]int64{{1200}, {1000}}, got); diff != "" {
		t.Errorf("nanoseconds a packet may take in each round (-want +got):\n%s", diff)
	}
}

func TestCounterIsFoundByItsName(t *testing.T) {
	const snmp = "Ip: Forwarding RcvbufErrors\nIp: 1 7\nUdp: InDatagrams RcvbufErrors\nUdp: 3 4\n"
	if n, err := counter([]byte(snmp), "Udp", "RcvbufErrors"); n != 4 || err != nil {
		t.Errorf("got %d, %v; want 4", n, err)
	}
	if n, err := counter([]byte(snmp), "Udp", "NoPorts"); err == nil {
		t.Errorf("got %d for a counter that is not there", n)
	}
}
