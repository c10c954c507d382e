// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// ExplainFormats returns how PrintExplanation can show an explanation.
func ExplainFormats() []string { return []string{"table", "json", "yaml"} }

// PrintExplanation writes e in one of ExplainFormats: as a page for people, or as
// it is.
func PrintExplanation(w io.Writer, e lb.Explanation, format string) error {
	return render(w, format, e, func() string { return explanationPage(e) })
}

// pageWidth is where running text is broken. Tables may be wider.
const pageWidth = 100

// explanationPage says first what concerns the whole question, then has a part
// for each service port.
func explanationPage(e lb.Explanation) string {
	var b strings.Builder
	zone := e.Zone
	if zone == "" {
		zone = "unknown"
	}
	fmt.Fprintf(&b, "node %s, zone %s\n", e.Node, zone)
	if e.Verdict != "" {
		b.WriteString(wrap(e.Verdict, 0))
	}
	if e.Problem != "" {
		b.WriteString(wrap("problem: "+e.Problem, len("problem: ")))
	}
	for i := range e.Ports {
		b.WriteByte('\n')
		p := portPage{&e.Ports[i], usedSides(&e.Ports[i])}
		b.WriteString(p.String())
	}
	return b.String()
}

// portPage is the part about one service port. It speaks of the sides that some
// frontend has: without a NodePort, say, there are no outside clients.
type portPage struct {
	*lb.ExplainedPort
	sides []string // in the order of Rules
}

func usedSides(p *lb.ExplainedPort) []string {
	var used []string
	for _, f := range p.Frontends {
		used = append(used, f.Inside, f.Outside)
	}
	var sides []string
	for _, rule := range p.Rules {
		if slices.Contains(used, rule.Side) {
			sides = append(sides, rule.Side)
		}
	}
	return sides
}

func (p portPage) String() string {
	var b strings.Builder
	b.WriteString(p.Service)
	if p.PortName != "" {
		b.WriteString(" port " + p.PortName)
	}
	fmt.Fprintf(&b, " (%s, %s)\n", p.Protocol, p.Family)
	for _, fact := range p.facts() {
		b.WriteString(wrap(fmt.Sprintf("  %-16s  %s", fact[0], fact[1]), 20))
	}
	for _, t := range []*table{p.frontends(), p.rules(), p.endpoints()} {
		b.WriteByte('\n')
		if len(t.rows) == 0 {
			b.WriteString("  no endpoints: no EndpointSlice of the Service has any\n")
			continue
		}
		for line := range strings.Lines(t.String()) {
			b.WriteString("  " + line)
		}
	}
	return b.String()
}

// facts returns names and what there is to say.
func (p portPage) facts() [][2]string {
	affinity := "none"
	if p.AffinitySeconds > 0 {
		affinity = "ClientIP, until " + age(int64(p.AffinitySeconds)) + " after the client's last new connection"
	}
	facts := [][2]string{
		{"traffic policies", "internal " + p.InternalTrafficPolicy + ", external " + p.ExternalTrafficPolicy},
		{"affinity", affinity},
	}
	for _, a := range p.Affinity {
		facts = append(facts, [2]string{
			"", fmt.Sprintf("client %s keeps %s, its last new connection was %s ago", a.Client, a.Backend, age(a.AgeSeconds)),
		})
	}
	ranges := "everybody may use its load-balancer IPs"
	if len(p.SourceRanges) > 0 {
		ranges = strings.Join(p.SourceRanges, ", ")
	}
	if len(p.SourceRanges) > 0 || slices.ContainsFunc(p.Frontends, isLoadBalancer) {
		facts = append(facts, [2]string{"source ranges", ranges})
	}
	if at := p.nodeAddresses(); at != "" {
		facts = append(facts, [2]string{"NodePort", at})
	}
	facts = append(facts, [2]string{"topology hints", p.Hints})
	switch {
	case p.Kernel == nil:
		return append(facts, [2]string{"kernel", "not compared"})
	case len(p.Kernel) == 0:
		return append(facts, [2]string{"kernel", "agrees"})
	}
	facts = append(facts, [2]string{"kernel", "differs:"})
	for _, difference := range p.Kernel {
		facts = append(facts, [2]string{"", difference})
	}
	return facts
}

func isLoadBalancer(f lb.ExplainedFrontend) bool { return f.Type == lb.KindLoadBalancer.String() }

func (p portPage) frontends() *table {
	t := &table{columns: columns("FRONTEND", "TYPE", "CLIENTS INSIDE", "CLIENTS OUTSIDE")}
	for _, f := range p.Frontends {
		inside, outside := f.Inside, f.Outside
		if f.Lost != "" {
			inside, outside = "belongs to Service "+f.Lost, ""
		}
		if f.Refused != "" {
			inside, outside = "nobody: "+f.Refused, ""
		}
		t.add(netip.AddrPortFrom(f.VIP, f.Port).String(), f.Type, inside, outside)
	}
	return t
}

// nodeAddresses says where NodePorts are reached; "" when there is none.
func (p portPage) nodeAddresses() string {
	for _, f := range p.Frontends {
		if f.Type != lb.KindNodePort.String() {
			continue
		}
		if len(f.At) == 0 {
			return "reached at no address of this node"
		}
		var texts []string
		for _, addr := range f.At {
			text := addr.String()
			if addr.IsLoopback() {
				text += " (processes on the node)"
			}
			texts = append(texts, text)
		}
		return "reached at " + strings.Join(texts, ", ")
	}
	return ""
}

// rules returns a row for the sides that a rule decides for.
func (p portPage) rules() *table {
	t := &table{columns: columns("SIDE", "RULE", "NEW CLIENTS GET")}
	for _, g := range group(p.sides, func(side string) lb.ExplainedRule {
		i := slices.IndexFunc(p.Rules, func(r lb.ExplainedRule) bool { return r.Side == side })
		rule := p.Rules[i]
		rule.Side = "" // which does not make a difference
		return rule
	}) {
		t.add(strings.Join(g.sides, ", "), g.what.Rule, outcome(g.what))
	}
	return t
}

// outcome says what a rule's verdict means for a client.
func outcome(r lb.ExplainedRule) string {
	switch {
	case r.Verdict == "no_backend":
		return "nothing: refused"
	case r.Verdict == "drop":
		return "nothing: dropped"
	case r.Backends == 1:
		return "1 backend"
	default:
		return fmt.Sprintf("%d backends", r.Backends)
	}
}

// endpoints returns a row for each endpoint, and more where its sides differ.
func (p portPage) endpoints() *table {
	t := &table{columns: columns("ENDPOINT", "NODE", "CONDITIONS", "SLICE")}
	hinted := slices.ContainsFunc(p.Endpoints, func(e lb.ExplainedEndpoint) bool { return hints(e) != "" })
	if hinted {
		t.columns = append(t.columns, columns("HINTS")...)
	}
	t.columns = append(t.columns, columns("IN OR OUT")...)
	for _, e := range p.Endpoints {
		cells := []string{e.Address, e.Node, "", e.Slice}
		// Without a port it is no endpoint of this service port.
		if address, err := netip.ParseAddr(e.Address); err == nil && e.Port > 0 {
			cells[0] = netip.AddrPortFrom(address, e.Port).String()
			cells[2] = conditions(e)
		}
		if hinted {
			cells = append(cells, hints(e))
		}
		for _, g := range group(p.sides, func(side string) string { return e.Out[side] }) {
			t.add(append(slices.Clone(cells), p.place(g))...)
			cells = slices.Repeat([]string{blank}, len(cells))
		}
	}
	return t
}

// place says that an endpoint is in the set of some sides, or why it is not.
func (p portPage) place(g together[string]) string {
	place := "in"
	if g.what != "" {
		place = "out"
	}
	if len(g.sides) < len(p.sides) {
		place += " for " + strings.Join(g.sides, ", ")
	}
	if g.what != "" {
		place += ": " + g.what
	}
	return place
}

func conditions(e lb.ExplainedEndpoint) string {
	var words []string
	if e.Ready {
		words = append(words, "ready")
	}
	if e.Terminating {
		words = append(words, "terminating")
	}
	if e.Terminating && e.Serving {
		words = append(words, "serving")
	}
	if len(words) == 0 {
		words = append(words, "not ready")
	}
	return strings.Join(words, ", ")
}

func hints(e lb.ExplainedEndpoint) string {
	var words []string
	if len(e.ForNodes) > 0 {
		words = append(words, "node "+strings.Join(e.ForNodes, ", "))
	}
	if len(e.ForZones) > 0 {
		words = append(words, "zone "+strings.Join(e.ForZones, ", "))
	}
	return strings.Join(words, "; ")
}

// together is sides of which the same is true.
type together[T comparable] struct {
	what  T
	sides []string
}

// group puts sides together of which what says the same, in the order in which
// they come.
func group[T comparable](sides []string, what func(side string) T) []together[T] {
	var groups []together[T]
	for _, side := range sides {
		said := what(side)
		i := slices.IndexFunc(groups, func(g together[T]) bool { return g.what == said })
		if i < 0 {
			i = len(groups)
			groups = append(groups, together[T]{what: said})
		}
		groups[i].sides = append(groups[i].sides, side)
	}
	return groups
}

// wrap breaks a line between words where it reaches beyond pageWidth, and indents
// what follows. It leaves a line as it is from a word on that is too long itself.
func wrap(line string, indent int) string {
	var b strings.Builder
	for len(line) > pageWidth {
		end := strings.LastIndexByte(line[:pageWidth+1], ' ')
		if end <= indent {
			break
		}
		b.WriteString(line[:end] + "\n")
		line = strings.Repeat(" ", indent) + line[end+1:]
	}
	return b.String() + line + "\n"
}
