// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open returns a datapath of which the test has the maps; no packet meets it.
func open(t testing.TB) *datapath.Datapath {
	t.Helper()
	d, err := datapath.Open(datapath.Config{
		Root:  testutil.BPFRoot(t),
		Sizes: datapath.Sizes{Frontends: 64, Services: 64, Slots: 64, Members: 64, Flows: 65536, Peers: 64},
	})
	fatal(t, err)
	t.Cleanup(func() { fatal(t, d.Close()) })
	return d
}

const (
	answered    = datapath.FlowAnswered
	established = datapath.FlowAnswered | datapath.FlowEstablished
)

// flow returns the flow of client n with service 1.
func flow(p lb.Protocol, n uint16, state datapath.FlowState, idle time.Duration) datapath.Flow {
	client := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.7"), n)
	return datapath.Flow{
		Protocol: p, Client: client, Source: client, VIP: netip.MustParseAddrPort("192.0.2.1:30080"),
		Backend: netip.MustParseAddrPort("10.244.1.3:8080"), Service: 1, State: state, Idle: idle,
		Requests: true, Answers: true,
	}
}

// serve makes the backend of a flow one that serves its service.
func serve(t testing.TB, d *datapath.Datapath, f datapath.Flow) {
	t.Helper()
	fatal(t, d.SetMember(member(&f)))
}

// left returns the clients of the flows there are by their port, sorted.
func left(t testing.TB, d *datapath.Datapath) []uint16 {
	t.Helper()
	flows, err := d.Flows()
	fatal(t, err)
	ports := []uint16{}
	for _, f := range flows {
		ports = append(ports, f.Client.Port())
	}
	slices.Sort(ports)
	return ports
}

// sweepNow does a pass and returns its report.
func sweepNow(t testing.TB, s *Sweeper) Report {
	t.Helper()
	r, done := s.pass(t.Context(), false)
	if !done {
		t.Fatal("the pass has not come to its end")
	}
	return r.Report
}

func TestTimeouts(t *testing.T) {
	const (
		client  = datapath.FlowClientClosed
		backend = datapath.FlowBackendClosed
		reset   = datapath.FlowReset
	)
	timeouts := Timeouts{TCPEstablished: 2 * time.Hour}.withDefaults()
	for _, tc := range []struct {
		name  string
		proto lb.Protocol
		state datapath.FlowState
		want  time.Duration
	}{
		{"TCP: a SYN", lb.TCP, 0, time.Minute},
		{"TCP: a SYN and its answer", lb.TCP, answered, time.Minute},
		{"TCP: established, as configured", lb.TCP, established, 2 * time.Hour},
		{"TCP: closed by the client", lb.TCP, established | client, time.Hour},
		{"TCP: closed by the backend", lb.TCP, established | backend, time.Hour},
		{"TCP: closed by both", lb.TCP, established | client | backend, 30 * time.Second},
		{"TCP: closed by one before it was established", lb.TCP, answered | backend, time.Minute},
		{"TCP: reset", lb.TCP, established | reset, 10 * time.Second},
		{"TCP: refused", lb.TCP, answered | reset, 10 * time.Second},
		{"TCP: closed, then reset", lb.TCP, established | client | backend | reset, 10 * time.Second},
		{"UDP: no answer", lb.UDP, 0, 30 * time.Second},
		{"UDP: an answer", lb.UDP, answered, 2 * time.Minute},
		{"UDP: an exchange", lb.UDP, established, 2 * time.Minute},
		{"SCTP: an INIT", lb.SCTP, 0, time.Minute},
		{"SCTP: established", lb.SCTP, established, 5 * time.Minute},
		{"SCTP: closing", lb.SCTP, established | client, 10 * time.Second},
		{"SCTP: aborted", lb.SCTP, answered | reset, 10 * time.Second},
	} {
		if got := timeouts.of(tc.proto, tc.state); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestSweeper shares one datapath, since the verifier takes its time. Each test
// leaves no flows and no members.
func TestSweeper(t *testing.T) {
	d := open(t)
	for _, tc := range []struct {
		name string
		test func(*testing.T, *datapath.Datapath)
	}{
		{"what is silent for too long ends", testExpired},
		{"half a flow is judged by itself", testHalves},
		{"UDP flows whose backend has gone end", testForgotten},
		{"a pass tells what there is", testReport},
		{"a pass goes through all slices", testSlices},
		{"passes come at their times", testRun},
		{"who asks does not wait for a leisurely pass", testHurry},
		{"flows that packets come for stay", testRace},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, d) })
		flows, err := d.Flows()
		fatal(t, err)
		for _, f := range flows {
			_, err := d.DeleteFlow(f, func(datapath.Flow) bool { return true })
			fatal(t, err)
			fatal(t, d.DeleteMember(member(&f)))
		}
	}
}

func testExpired(t *testing.T, d *datapath.Datapath) {
	const grace = 5 * time.Second // the clock goes on while the test runs
	s := NewSweeper(d.Tables, Timeouts{}, nil)
	var want []uint16
	port := uint16(0)
	for _, p := range []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP} {
		for state := range datapath.FlowState(32) {
			timeout := s.timeouts.of(p, state)
			for _, f := range []datapath.Flow{
				flow(p, port+1, state, timeout-grace),
				flow(p, port+2, state, timeout+time.Second),
			} {
				fatal(t, d.AddFlow(f))
				serve(t, d, f)
			}
			want = append(want, port+1)
			port += 2
		}
	}
	r := sweepNow(t, s)
	if diff := cmp.Diff(want, left(t, d)); diff != "" {
		t.Errorf("clients with a flow (-want +got):\n%s", diff)
	}
	if r.Expired != len(want) || r.Forgotten != 0 || r.Err != nil {
		t.Errorf("expired are %d, forgotten %d, error %v; want %d, 0 and none", r.Expired, r.Forgotten, r.Err, len(want))
	}
}

func testHalves(t *testing.T, d *datapath.Datapath) {
	requests, answers := flow(lb.TCP, 1, established, time.Hour), flow(lb.TCP, 2, established, time.Hour)
	requests.Answers, answers.Requests = false, false
	lateRequests, lateAnswers := flow(lb.TCP, 3, established, 25*time.Hour), flow(lb.TCP, 4, established, 25*time.Hour)
	lateRequests.Answers, lateAnswers.Requests = false, false
	// Its entries do not agree: a packet has been noted in one of them so far.
	torn := flow(lb.TCP, 5, established, 25*time.Hour)
	fatal(t, d.AddFlow(torn))
	torn.Requests, torn.Idle = false, 0
	for _, f := range []datapath.Flow{requests, answers, lateRequests, lateAnswers, torn} {
		fatal(t, d.AddFlow(f))
	}
	r := sweepNow(t, NewSweeper(d.Tables, Timeouts{}, nil))
	if diff := cmp.Diff([]uint16{1, 2, 5}, left(t, d)); diff != "" {
		t.Errorf("clients with a flow (-want +got):\n%s", diff)
	}
	if r.Expired != 2 || r.Err != nil {
		t.Errorf("expired are %d, error %v; want 2 and none", r.Expired, r.Err)
	}
}

func testForgotten(t *testing.T, d *datapath.Datapath) {
	serving := flow(lb.UDP, 1, answered, 0)
	gone := flow(lb.UDP, 2, answered, 0)
	gone.Backend = netip.MustParseAddrPort("10.244.1.4:8080")
	// A backend is one of a service.
	others := flow(lb.UDP, 3, 0, 0)
	others.Service = 2
	tcp, sctp := flow(lb.TCP, 4, established, 0), flow(lb.SCTP, 5, established, 0)
	tcp.Backend, sctp.Backend = gone.Backend, gone.Backend
	for _, f := range []datapath.Flow{serving, gone, others, tcp, sctp} {
		fatal(t, d.AddFlow(f))
	}
	serve(t, d, serving)
	s := NewSweeper(d.Tables, Timeouts{}, nil)
	want := func(forgotten int, clients ...uint16) {
		t.Helper()
		r := sweepNow(t, s)
		if diff := cmp.Diff(clients, left(t, d)); diff != "" {
			t.Errorf("clients with a flow (-want +got):\n%s", diff)
		}
		if r.Forgotten != forgotten || r.Expired != 0 || r.Err != nil {
			t.Errorf("forgotten are %d, expired %d, error %v; want %d, 0 and none", r.Forgotten, r.Expired, r.Err, forgotten)
		}
	}
	want(2, 1, 4, 5)
	fatal(t, d.DeleteMember(member(&serving))) // the last one: no endpoints, or no Service
	want(1, 4, 5)
}

func testReport(t *testing.T, d *datapath.Datapath) {
	s := NewSweeper(d.Tables, Timeouts{}, nil)
	want := Report{InUse: map[lb.ServiceID]bool{}, Flows: map[lb.Protocol]int{lb.TCP: 0, lb.UDP: 0, lb.SCTP: 0}}
	if diff := cmp.Diff(want, sweepNow(t, s)); diff != "" {
		t.Errorf("without a flow (-want +got):\n%s", diff)
	}
	snat := flow(lb.TCP, 1, established, 0)
	snat.SNAT, snat.Source, snat.Service = true, netip.MustParseAddrPort("192.0.2.1:61000"), 7
	udp, sctp := flow(lb.UDP, 2, 0, 0), flow(lb.SCTP, 3, 0, 0)
	evicted := flow(lb.TCP, 4, 0, 0)
	evicted.Answers = false
	over := flow(lb.TCP, 5, datapath.FlowReset, time.Hour)
	over.Service = 8
	for _, f := range []datapath.Flow{snat, udp, sctp, evicted, over} {
		fatal(t, d.AddFlow(f))
	}
	serve(t, d, udp)
	want = Report{
		InUse: map[lb.ServiceID]bool{1: true, 7: true}, Expired: 1,
		Flows: map[lb.Protocol]int{lb.TCP: 2, lb.UDP: 1, lb.SCTP: 1}, SNAT: 1,
	}
	if diff := cmp.Diff(want, sweepNow(t, s)); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
}

func testSlices(t *testing.T, d *datapath.Datapath) {
	const n = 5000 // ten slices
	serve(t, d, flow(lb.UDP, 1, answered, 0))
	for i := range uint16(n) {
		fatal(t, d.AddFlow(flow(lb.UDP, i+1, answered, time.Duration(i%2)*time.Hour)))
	}
	r := sweepNow(t, NewSweeper(d.Tables, Timeouts{}, nil))
	if r.Expired != n/2 || r.Flows[lb.UDP] != n/2 || len(left(t, d)) != n/2 {
		t.Errorf("expired are %d, %d go on, %d are left; want %d of each", r.Expired, r.Flows[lb.UDP], len(left(t, d)), n/2)
	}
}

// run starts Run in a bubble; stop ends it. Reports come with the bubble's time.
func run(t *testing.T, d *datapath.Datapath) (s *Sweeper, reports chan Report, stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	reports = make(chan Report, 100)
	s = NewSweeper(d.Tables, Timeouts{}, func(r Report) { reports <- r })
	var wg sync.WaitGroup
	wg.Go(func() { s.Run(ctx) })
	return s, reports, func() { cancel(); wg.Wait() }
}

func testRun(t *testing.T, d *datapath.Datapath) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		s, reports, stop := run(t, d)
		defer stop()
		want := func(ticket uint64, atMost time.Duration) {
			t.Helper()
			r := <-reports
			if took := time.Since(start); r.Ticket != ticket || took > atMost {
				t.Errorf("ticket %d after %v, want %d within %v", r.Ticket, took, ticket, atMost)
			}
			start = time.Now()
		}
		want(0, time.Second) // at once, with the pauses between slices
		want(0, every+time.Second)
		time.Sleep(time.Second)
		s.Ask(8)
		start = time.Now()
		want(8, 0)
		want(8, every+time.Second)
		if len(reports) > 0 {
			t.Errorf("%d passes too many", len(reports))
		}
	})
}

func testHurry(t *testing.T, d *datapath.Datapath) {
	for i := range uint16(5000) {
		fatal(t, d.AddFlow(flow(lb.TCP, i+1, established, 0)))
	}
	synctest.Test(t, func(t *testing.T) {
		s, reports, stop := run(t, d)
		defer stop()
		synctest.Wait() // in the first pause of the first pass
		start := time.Now()
		s.Ask(1)
		if r := <-reports; r.Ticket != 1 || r.Flows[lb.TCP] != 5000 || time.Since(start) > 0 {
			t.Errorf("ticket %d, %d flows after %v; want 1, 5000 at once", r.Ticket, r.Flows[lb.TCP], time.Since(start))
		}
	})
}

// testRace keeps flows alive that are about to be over, while passes follow each
// other.
func testRace(t *testing.T, d *datapath.Datapath) {
	const flows = 50
	at := func(i int, idle time.Duration) datapath.Flow {
		return flow(lb.TCP, uint16(i+1), datapath.FlowReset, idle)
	}
	for i := range flows {
		fatal(t, d.AddFlow(at(i, 0)))
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		// Each round lets all of them come to the last second that they have.
		for round := 0; !stop.Load(); round++ {
			for i := range flows {
				if err := d.AddFlow(at(i, time.Duration(round%2*9)*time.Second)); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	s := NewSweeper(d.Tables, Timeouts{}, nil)
	expired := 0
	for range 300 {
		expired += sweepNow(t, s).Expired
	}
	stop.Store(true)
	wg.Wait()
	if n := len(left(t, d)); expired > 0 || n != flows {
		t.Errorf("%d flows have ended, %d are left of %d", expired, n, flows)
	}
}
