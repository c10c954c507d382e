// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

var (
	long     = flag.Bool("long", false, "do what is done to agents and clusters many times over")
	onlyRows = flag.String("rows", "", "do only what matches this regular expression")
)

// TestMain is also what processes of clients begin with.
func TestMain(m *testing.M) {
	be, child := map[string]func() error{"clients": beClients, "storm": beStorm}[os.Getenv(childVariable)]
	if !child {
		os.Exit(m.Run())
	}
	if err := be(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Getenv(childVariable), err)
		os.Exit(1)
	}
}

// row is a line of the table: something that is done a number of times while
// clients connect. It leaves an agent that is ready.
type row struct {
	what        string
	short, long int
	do          func(w *world, i int)
	// prepare and finish are called before and after all of it; they may be nil.
	prepare, finish func(w *world)
}

func (r row) times() int {
	if *long {
		return r.long
	}
	return r.short
}

// line is what the table says of a row.
type line struct {
	what  string
	times int
	took  time.Duration
	counts
}

func TestNothingThatHappensReachesConnections(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.startLoad()
	var table []line
	// Also when a row ends the test.
	defer func() { printTable(t, table) }()
	chosen, err := regexp.Compile(*onlyRows)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if !chosen.MatchString(r.what) {
			continue
		}
		table = append(table, line{what: r.what, times: r.times()})
		l := &table[len(table)-1]
		start := time.Now()
		func() {
			defer func() { l.counts, l.took = w.load.take(t), time.Since(start) }()
			w.run(r)
		}()
		if l.Failed > 0 {
			t.Errorf("%s: %d of %d failed, such as:\n\t%s\nthe log of the agent that runs now:\n%s",
				r.what, l.Failed, l.Tried, strings.Join(l.Errors, "\n\t"), w.agent.Logs())
			w.logCounters()
		}
		if enough := int64(l.took.Seconds() * fewest); l.Tried < enough {
			t.Errorf("%s: %d connections and exchanges are too few to mean anything", r.what, l.Tried)
		}
	}
}

// logCounters shows what the datapath has counted that is not everyday.
func (w *world) logCounters() {
	w.t.Helper()
	page, err := w.agent.Get(testutil.MetricsAddress, "/metrics")
	if err != nil {
		w.t.Log(err)
		return
	}
	unusual := regexp.MustCompile(`(?m)^fairlead_.*(drop|reply|restored|conflict|moved|lost|device|attach).* [1-9].*$`)
	w.t.Logf("metrics:\n%s", strings.Join(unusual.FindAllString(page, -1), "\n"))
}

// fewest is how many connections and exchanges a second mean something, on a machine
// that has a lot else to do.
const fewest = 40

func (w *world) run(r row) {
	if r.prepare != nil {
		r.prepare(w)
	}
	for i := range r.times() {
		r.do(w, i)
	}
	if r.finish != nil {
		r.finish(w)
	}
}

// printTable shows what was done and what became of connections.
func printTable(t *testing.T, table []line) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "%-62s %6s %9s %7s %6s %9s %7s\n", "what was done", "times", "tried", "failed", "moved", "slowest", "took")
	var sum counts
	for _, l := range table {
		fmt.Fprintf(&b, "%-62s %6d %9d %7d %6d %9s %7s\n", l.what, l.times, l.Tried, l.Failed, l.Moved,
			l.Slowest.Round(time.Millisecond), l.took.Round(100*time.Millisecond))
		sum.Tried, sum.Failed = sum.Tried+l.Tried, sum.Failed+l.Failed
	}
	fmt.Fprintf(&b, "%-62s %6s %9d %7d\n", "together", "", sum.Tried, sum.Failed)
	t.Logf("connections and exchanges, moved: UDP sockets that went on with another backend\n%s", b.String())
}

// rows are what is done, in this order.
var rows = []row{
	{what: "nothing", short: 1, long: 10, do: (*world).wait},
	{what: "agent ended by SIGTERM and started", short: 10, long: 100, do: (*world).terminate},
	{what: "agent killed and started", short: 3, long: 200, do: (*world).kill},
	{what: "agent killed 0 to 500 ms after its start", short: 50, long: 1000,
		prepare: (*world).end, do: (*world).crash, finish: (*world).revive},
	{what: "agent of another build started, and ours again", short: 1, long: 20, do: (*world).otherBuild},
	{what: "configuration changed, agent begins anew", short: 1, long: 20, do: (*world).reconfigure},
	{what: "backends replaced one by one, draining", short: 1, long: 50, do: (*world).roll},
	{what: "backends scaled up and down", short: 20, long: 500, do: (*world).scale},
	{what: "readiness flaps, one stays ready", short: 20, long: 500, do: (*world).flap},
	{what: "agent frozen while backends change", short: 1, long: 20, do: (*world).freeze},
	{what: "no file can be opened while backends change", short: 1, long: 20, do: (*world).withoutFiles},
	{what: "agent has 5 % of a processor while backends change", short: 3, long: 50,
		prepare: (*world).starve, do: (*world).scale, finish: (*world).feed},
	{what: "agent killed for want of memory, and started", short: 1, long: 20, do: (*world).withoutMemory},
	{what: "agent started on a full disk, with a log nobody reads", short: 1, long: 20, do: (*world).withoutDisk},
	{what: "1,000 endpoints changed 100 times a second, 100,000 events", short: 1, long: 3, do: (*world).storm},
	{what: "manifests unreadable, half written, gone and back", short: 1, long: 20, do: (*world).loseManifests},
}
