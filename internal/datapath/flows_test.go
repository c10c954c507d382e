// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"cmp"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func addFlow(t testing.TB, d *Datapath, f Flow) {
	t.Helper()
	fatal(t, d.AddFlow(f))
}

// hour makes idle times equal although the clock moves on.
func hour(flows []Flow) []Flow {
	for i := range flows {
		flows[i].Idle = flows[i].Idle.Truncate(time.Hour)
	}
	slices.SortFunc(flows, func(a, b Flow) int {
		return cmp.Or(a.Client.Compare(b.Client), a.VIP.Compare(b.VIP), a.Backend.Compare(b.Backend))
	})
	return flows
}

func wantFlows(t *testing.T, d *Datapath, want ...Flow) {
	t.Helper()
	got, err := d.Flows()
	fatal(t, err)
	if diff := gocmp.Diff(hour(want), hour(got), cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("other flows than were made (-want +got):\n%s", diff)
	}
}

func eraseFlows(t *testing.T, d *Datapath) {
	t.Helper()
	flows, err := d.Flows()
	fatal(t, err)
	for _, f := range flows {
		_, err := d.DeleteFlow(f, func(Flow) bool { return true })
		fatal(t, err)
	}
	wantFlows(t, d)
}

func end(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// tcpFlow is a flow of an outside client.
func tcpFlow() Flow {
	return Flow{
		Protocol: lb.TCP, Client: end("198.51.100.7:40000"), VIP: end("192.0.2.1:30080"),
		Backend: end("10.244.1.3:8080"), Source: end("192.0.2.1:61000"), Service: 4, Device: 2,
		Redirect: true, SNAT: true, Outside: true, State: FlowAnswered | FlowEstablished,
		Idle: 2 * time.Hour, Requests: true, Answers: true,
	}
}

func testFlows(t *testing.T, d *Datapath) {
	wantFlows(t, d)
	whole := tcpFlow()
	v6 := Flow{
		Protocol: lb.UDP, Client: end("[2001:db8::7]:5353"), VIP: end("[fd00:96::a]:53"), Backend: end("[fd00:244::3]:53"),
		Source: end("[2001:db8::7]:5353"), Service: 5, Device: 3, Requests: true, Answers: true,
	}
	node := Flow{
		Protocol: lb.SCTP, Client: end("192.0.2.1:33333"), VIP: end("10.96.0.7:9"), Backend: end("10.244.1.3:9"),
		Source: end("192.0.2.1:33333"), Service: 6, Node: true, Redirect: true, State: FlowAnswered | FlowReset,
		Requests: true, Answers: true,
	}
	// The same client and frontend, but another backend: its other half is gone.
	answers := whole
	answers.Backend, answers.Source, answers.Requests = end("10.244.1.4:8080"), end("192.0.2.1:61001"), false
	requests := whole
	requests.Client, requests.Source, requests.Answers = end("198.51.100.7:40001"), end("198.51.100.7:40001"), false
	for _, f := range []Flow{whole, v6, node, answers, requests} {
		addFlow(t, d, f)
	}
	wantFlows(t, d, whole, v6, node, answers, requests)

	t.Run("what one entry lacks the other one has", func(t *testing.T) {
		late := whole
		late.Answers, late.Idle, late.State = false, time.Hour, late.State|FlowClientClosed
		addFlow(t, d, late)
		late.Answers = true
		wantFlows(t, d, late, v6, node, answers, requests)
	})

	t.Run("more than a slice holds", func(t *testing.T) {
		eraseFlows(t, d)
		var want []Flow
		for i := range 3000 {
			f := v6
			f.Client = netip.AddrPortFrom(f.Client.Addr(), uint16(i+1))
			f.Source = f.Client
			addFlow(t, d, f)
			want = append(want, f)
		}
		wantFlows(t, d, want...)
	})
	eraseFlows(t, d)
}

func testDeleteFlow(t *testing.T, d *Datapath) {
	flow := tcpFlow()
	flow.Idle = 0
	other := flow
	other.Client, other.Source = end("198.51.100.8:40000"), end("192.0.2.1:61001")
	del := func(t *testing.T, want Deletion, over func(Flow) bool) {
		t.Helper()
		got, err := d.DeleteFlow(flow, over)
		fatal(t, err)
		if got != want {
			t.Errorf("outcome %d, want %d", got, want)
		}
	}
	yes := func(Flow) bool { return true }
	for _, tc := range []struct {
		name  string
		there Flow
		over  func(calls int) bool // the answer to the n-th question
		calls int                  // how many questions there are
		want  Deletion
	}{
		{"both entries go", flow, func(int) bool { return true }, 4, FlowDeleted},
		{"it stays when its answers' entry is not over", flow, func(n int) bool { return n != 1 }, 1, FlowKept},
		{"it stays when its requests' entry is not over", flow, func(n int) bool { return n != 2 }, 2, FlowKept},
		{"it is back after an answer that came at the last moment", flow, func(n int) bool { return n != 3 }, 3, FlowKept},
		{"it is back after a request that came at the last moment", flow, func(n int) bool { return n != 4 }, 4, FlowKept},
		{"the requests' entry goes alone", half(flow, true), func(int) bool { return true }, 2, FlowDeleted},
		{"the answers' entry goes alone", half(flow, false), func(int) bool { return true }, 2, FlowDeleted},
		{"half a flow is back as well", half(flow, true), func(n int) bool { return n != 2 }, 2, FlowKept},
	} {
		t.Run(tc.name, func(t *testing.T) {
			addFlow(t, d, tc.there)
			addFlow(t, d, other)
			calls := 0
			del(t, tc.want, func(Flow) bool { calls++; return tc.over(calls) })
			if calls != tc.calls {
				t.Errorf("asked %d times, want %d", calls, tc.calls)
			}
			if tc.want == FlowKept {
				wantFlows(t, d, tc.there, other)
			} else {
				wantFlows(t, d, other)
			}
			eraseFlows(t, d)
		})
	}

	t.Run("what is not there is not deleted", func(t *testing.T) { del(t, FlowAbsent, yes) })

	t.Run("what another flow has taken stays", func(t *testing.T) {
		moved := flow
		moved.Backend = end("10.244.1.9:8080")
		addFlow(t, d, flow)
		addFlow(t, d, moved) // has the same requests' entry
		del(t, FlowDeleted, yes)
		wantFlows(t, d, moved)
		eraseFlows(t, d)
	})

	t.Run("what has come meanwhile is newer", func(t *testing.T) {
		addFlow(t, d, flow)
		calls := 0
		del(t, FlowKept, func(Flow) bool {
			if calls++; calls < 4 {
				return true
			}
			// A program has made the flow anew before it could be put back.
			again := flow
			again.State = FlowAnswered
			addFlow(t, d, again)
			return false
		})
		flow := flow
		flow.State = FlowAnswered
		wantFlows(t, d, flow)
		eraseFlows(t, d)
	})
}

// half returns a flow that has one entry.
func half(f Flow, requests bool) Flow {
	f.Requests, f.Answers = requests, !requests
	return f
}

// testFlowRace has packets come while a flow is deleted. A packet finds the requests'
// entry and notes itself there, then in the other one. If it did the flow must stay.
func testFlowRace(t *testing.T, d *Datapath) {
	m := d.maps[bpfMapFlows]
	flow := tcpFlow()
	over := func(f Flow) bool { return f.Idle > time.Minute }
	key, _ := encodeFlowKeys(&flow)
	var outcomes [3]int
	rounds := 4000
	if testing.Short() {
		rounds = 200
	}
	for range rounds {
		flow.Idle = time.Hour
		addFlow(t, d, flow)
		came := make(chan bool)
		go func() {
			flow := flow
			flow.Idle = 0
			now, _ := programClock()
			_, answers := encodeFlowKeys(&flow)
			value := encodeFlow(&flow, answers, now)
			noted := m.Update(&key, &value, ebpf.UpdateExist) == nil
			if noted {
				flow.Requests = false
				noted = d.AddFlow(flow) == nil
			}
			came <- noted
		}()
		outcome, err := d.DeleteFlow(flow, over)
		noted := <-came
		fatal(t, err)
		outcomes[outcome]++
		flows, err := d.Flows()
		fatal(t, err)
		switch {
		case !noted && len(flows) > 0:
			t.Fatalf("no packet came, yet there is %+v (outcome %d)", flows, outcome)
		case noted && (len(flows) != 1 || !flows[0].Requests || !flows[0].Answers || flows[0].Idle > time.Minute):
			t.Fatalf("a packet came, and there is %+v (outcome %d)", flows, outcome)
		}
		eraseFlows(t, d)
	}
	t.Logf("kept %d times, deleted %d times", outcomes[FlowKept], outcomes[FlowDeleted])
}
