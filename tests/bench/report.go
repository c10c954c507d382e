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
}

// comparison is one workload from all sides.
type comparison struct {
	Workload workload
	Goal     float64
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
	// Ratio is p50 against p50 of the same round, Added the difference.
	Ratio, Added spread
	// Goal tells whether Ratio has the workload's goal to meet.
	Goal bool
}

// spread describes a figure over all rounds by its quartiles.
type spread struct{ Q1, Median, Q3 float64 }

// compares are the lines of a workload in the order of the report: a side and
// what it is compared with. FEW and MANY stand for numbers. What a client gains
// or loses by dialling a Service instead of a pod has the goal to meet; what
// all of it costs against a node without Fairlead is told, too.
var compares = []struct {
	side, base, title string
	goal              bool
}{
	{sideFew, sideNotOurs, "a Service, FEW in the maps, against direct", true},
	{sideMany, sideNotOurs, "a Service, MANY in the maps, against direct", true},
	{sideMany, sideFew, "MANY in the maps against FEW", false},
	{sideSpread, sideNotOurs, "each of MANY Services in turn, against direct", false},
	{sideNotOurs, sideDirect, "direct, against no Fairlead", false},
	{sideMany, sideDirect, "a Service, MANY in the maps, against no Fairlead", false},
	{sideAgain, sideDirect, "no Fairlead, against itself: noise", false},
}

// summarize turns the samples of a workload into what the report shows.
func summarize(g goal, got samples) comparison {
	c := comparison{Workload: g.workload, Goal: g.ratio, Direct: distributionOf(got[sideDirect])}
	for _, t := range compares {
		if len(got[t.side]) == 0 || len(got[t.base]) == 0 {
			continue
		}
		var ratios, added []float64
		for i := range got[t.side] {
			a, b := p50(got[t.side][i]), p50(got[t.base][i])
			ratios, added = append(ratios, a/b), append(added, a-b)
		}
		c.Sides = append(c.Sides, compared{
			Side:  t.side,
			Base:  t.base,
			Title: t.title,
			Time:  distributionOf(got[t.side]),
			Ratio: spreadOf(ratios),
			Added: spreadOf(added),
			Goal:  t.goal,
		})
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
	numbers := strings.NewReplacer("FEW", strconv.Itoa(r.Few), "MANY", strconv.Itoa(r.Many))
	for _, c := range r.Workloads {
		p("\n%s: %s without Fairlead\tratio\tquartiles\tadded\tgoal\n", c.Workload, micros(c.Direct.P50))
		for _, s := range c.Sides {
			p("  %s\t%.3f\t%.3f – %.3f\t%+.0f ns\t%s\n", numbers.Replace(s.Title),
				s.Ratio.Median, s.Ratio.Q1, s.Ratio.Q3, s.Added.Median, c.verdict(s))
		}
	}
	writeHooks(r.Hooks, p)
	p("\nProgramming\trows\tbuilt\twritten\tflipped after\tgrace period\n")
	for _, of := range r.Programming {
		of.write(p)
	}
	return w.Flush()
}

func writeHooks(hooks []hook, line func(string, ...any)) {
	line("\nBPF programs\tinstructions verified\tmachine code\tone Service\tin turn\tnot ours\n")
	for _, h := range hooks {
		line("  %s\t%d\t%d bytes", h.Name, h.Verified, h.Size)
		for _, side := range []string{sideMany, sideSpread, sideNotOurs} {
			if ns, ran := h.Nanoseconds[side]; ran {
				line("\t%.0f ns", ns)
			} else {
				line("\t–")
			}
		}
		line("\n")
	}
}

// verdict says whether a side meets the goal, nothing where there is none.
func (c comparison) verdict(s compared) string {
	switch {
	case !s.Goal:
		return ""
	case s.Ratio.Median <= c.Goal:
		return fmt.Sprintf("≤ %.2f met", c.Goal)
	default:
		return fmt.Sprintf("≤ %.2f missed", c.Goal)
	}
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
