// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// report is everything a run has found out, as JSON too. Times are nanoseconds.
type report struct {
	Machine     machine
	Few, Many   int // Services in the maps
	Rounds      int
	Samples     int // operations on each side in each round
	Workloads   []comparison
	Hooks       []hook
	Programming []programming
	Packets     packetReport
}

// packetReport is what was found out about the packet path.
type packetReport struct {
	Missing string // why there is nothing of kube-proxy; "" when there is
	// Nftables is how many Services kube-proxy had, and Sync how long it took to
	// make its rules, from its start.
	Nftables int
	Sync     time.Duration

	Rounds    int
	Workloads []comparison
	Hooks     []hook
}

// comparison is one workload from all sides.
type comparison struct {
	Workload workload
	// Rate tells that it is done as often as possible: ratios are those of rates.
	Rate bool
	// Direct is what the operation takes straight to the pod.
	Direct distribution
	Sides  []compared
}

// distribution describes the operations of one side: the medians of what each
// round says.
type distribution struct{ P50, P90, P99 float64 }

// compared is one side against another.
type compared struct {
	Side  string
	Base  string // the side it is compared with
	Title string // with FEW and MANY
	Time  distribution
	// Ratio is p50 against p50 of the same round, Added the difference, of times
	// in any case. Tail is the median ratio of p99.
	Ratio, Added spread
	Tail         float64
	// Verdict is the goal that Ratio has to meet and whether it does; "" when there
	// is none.
	Verdict string
}

// spread describes a figure over all rounds by its quartiles.
type spread struct{ Q1, Median, Q3 float64 }

// line is a line of a workload in the report: a side and what it is compared with.
// FEW, MANY and NFT in its title stand for numbers.
type line struct {
	side, base, title string
	goal              verdict // nil for none
}

// verdict judges a ratio.
type verdict func(ratio float64) string

func atMost(limit float64) verdict {
	return func(ratio float64) string { return fmt.Sprintf("≤ %.2f %s", limit, met(ratio <= limit)) }
}

func atLeast(limit float64) verdict {
	return func(ratio float64) string { return fmt.Sprintf("≥ %.2f %s", limit, met(ratio >= limit)) }
}

func met(ok bool) string {
	if ok {
		return "met"
	}
	return "missed"
}

// socketLines are the lines of a workload of the socket path. What a client gains or
// loses by dialling a Service instead of a pod has the goal to meet; what all of it
// costs against a node without Fairlead is told, too.
func socketLines(g goal) []line {
	return []line{
		{sideFew, sideNotOurs, "a Service, FEW in the maps, against direct", atMost(g.ratio)},
		{sideMany, sideNotOurs, "a Service, MANY in the maps, against direct", atMost(g.ratio)},
		{sideMany, sideFew, "MANY in the maps against FEW", nil},
		{sideSpread, sideNotOurs, "each of MANY Services in turn, against direct", nil},
		{sideNotOurs, sideDirect, "direct, against no Fairlead", nil},
		{sideMany, sideDirect, "a Service, MANY in the maps, against no Fairlead", nil},
		{sideAgain, sideDirect, "no Fairlead, against itself: noise", nil},
	}
}

// summarize turns the samples of a workload into what the report shows, with the
// lines whose sides were measured. Of a rate it compares how many fit into a time.
func summarize(w workload, rate bool, lines []line, got samples) comparison {
	c := comparison{Workload: w, Rate: rate, Direct: distributionOf(got[sideDirect])}
	for _, l := range lines {
		if len(got[l.side]) == 0 || len(got[l.base]) == 0 {
			continue
		}
		var ratios, added, tails []float64
		for i := range got[l.side] {
			a, b := p50(got[l.side][i]), p50(got[l.base][i])
			tails = append(tails, p99(got[l.side][i])/p99(got[l.base][i]))
			ratio := a / b
			if rate {
				ratio = b / a
			}
			ratios, added = append(ratios, ratio), append(added, a-b)
		}
		s := compared{
			Side: l.side, Base: l.base, Title: l.title,
			Time: distributionOf(got[l.side]), Ratio: spreadOf(ratios), Added: spreadOf(added), Tail: quantile(tails, 0.5),
		}
		if l.goal != nil {
			s.Verdict = l.goal(s.Ratio.Median)
		}
		c.Sides = append(c.Sides, s)
	}
	return c
}

func distributionOf(rounds [][]int64) distribution {
	at := func(q float64) float64 {
		var of []float64
		for _, round := range rounds {
			of = append(of, quantile(floats(round), q))
		}
		return quantile(of, 0.5)
	}
	return distribution{P50: at(0.5), P90: at(0.9), P99: at(0.99)}
}

func spreadOf(values []float64) spread {
	return spread{quantile(values, 0.25), quantile(values, 0.5), quantile(values, 0.75)}
}

func p50(times []int64) float64 { return quantile(floats(times), 0.5) }

func p99(times []int64) float64 { return quantile(floats(times), 0.99) }

func floats(of []int64) []float64 {
	out := make([]float64, len(of))
	for i, v := range of {
		out[i] = float64(v)
	}
	return out
}

// quantile interpolates between the two values next to the place of q; of must
// not be empty.
func quantile(of []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// write prints the report for people.
func (r report) write(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	p := func(format string, args ...any) { fmt.Fprintf(w, format, args...) }
	p("%s\n\n", r.Machine)
	p("p50 of %d operations on each side, compared in each of %d rounds: median and quartiles of these.\n",
		r.Samples, r.Rounds)
	numbers := strings.NewReplacer("FEW", strconv.Itoa(r.Few), "MANY", strconv.Itoa(r.Many), "NFT", strconv.Itoa(r.Packets.Nftables))
	for _, c := range r.Workloads {
		p("\n%s: %s without Fairlead\tratio\tquartiles\tadded\tgoal\n", c.Workload, micros(c.Direct.P50))
		for _, s := range c.Sides {
			p("  %s\t%.3f\t%.3f – %.3f\t%+.0f ns\t%s\n", numbers.Replace(s.Title),
				s.Ratio.Median, s.Ratio.Q1, s.Ratio.Q3, s.Added.Median, s.Verdict)
		}
	}
	writeHooks("BPF programs, sockets", r.Hooks, [][2]string{
		{sideMany, "one Service"}, {sideSpread, "in turn"}, {sideNotOurs, "not ours"},
	}, p)
	r.Packets.write(numbers, p)
	p("\nProgramming\trows\tbuilt\twritten\tflipped after\tgrace period\n")
	for _, of := range r.Programming {
		of.write(p)
	}
	return w.Flush()
}

// writeHooks prints a table whose last columns are run times, by name and title.
func writeHooks(title string, hooks []hook, columns [][2]string, line func(string, ...any)) {
	line("\n%s\tinstructions verified\tmachine code", title)
	for _, c := range columns {
		line("\t%s", c[1])
	}
	line("\n")
	for _, h := range hooks {
		line("  %s\t%d\t%d bytes", h.Name, h.Verified, h.Size)
		for _, c := range columns {
			if ns, ran := h.Nanoseconds[c[0]]; ran {
				line("\t%.0f ns", ns)
			} else {
				line("\t–")
			}
		}
		line("\n")
	}
}

// write prints what there is about the packet path.
func (r packetReport) write(numbers *strings.Replacer, line func(string, ...any)) {
	line("\nPacket path, %d rounds", r.Rounds)
	if r.Missing == "" {
		line("; kube-proxy took %s to make rules for %d Services", short(r.Sync), r.Nftables)
	} else {
		line("; %s", r.Missing)
	}
	line("\n")
	for _, c := range r.Workloads {
		direct := micros(c.Direct.P50)
		if c.Rate {
			direct += " for each"
		}
		line("\n%s: %s without a proxy\tratio\tquartiles\tadded\tp99\tgoal\n", c.Workload, direct)
		for _, s := range c.Sides {
			tail := "–"
			if !c.Rate {
				tail = fmt.Sprintf("%.3f", s.Tail)
			}
			line("  %s\t%.3f\t%.3f – %.3f\t%+.0f ns\t%s\t%s\n", numbers.Replace(s.Title),
				s.Ratio.Median, s.Ratio.Q1, s.Ratio.Q3, s.Added.Median, tail, s.Verdict)
		}
	}
	writeHooks("BPF programs, packets", r.Hooks, [][2]string{
		{"request", "request"}, {"answer", "answer"}, {"at the pod", "at the pod"}, {"not ours", "not ours"},
	}, line)
}

func (p programming) write(line func(string, ...any)) {
	for _, s := range []struct {
		title string
		step
	}{{"all at once", p.All}, {"all once more", p.Again}, {"one endpoint less or more", p.One}} {
		flip := "–"
		if s.Flip > 0 {
			flip = short(s.Flip)
		}
		line("  %d Services × %d endpoints: %s\t%d\t%s\t%s\t%s\t%s\n", p.Services, p.Endpoints, s.title,
			s.Rows, short(s.Build), short(s.Apply), flip, short(s.Grace))
	}
}

func micros(ns float64) string { return fmt.Sprintf("%.2f µs", ns/1e3) }

func short(d time.Duration) string {
	if d < time.Millisecond {
		return fmt.Sprintf("%.1f µs", float64(d)/1e3)
	}
	return fmt.Sprintf("%.1f ms", float64(d)/1e6)
}
