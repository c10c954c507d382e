// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Answer is what one side makes of the objects so far, in terms that do not
// depend on the side.
type Answer struct {
	// Frontends holds who owns each frontend, wildcards of ClusterIPs included.
	// An address that is both a load-balancer and an external IP counts as the
	// former, whose source ranges apply.
	Frontends map[lb.FrontendKey]lb.Owner
	Ports     map[lb.ServicePort]Port
	// Health holds the Services with a health check node port in the families
	// that it is served in.
	Health map[lb.ServiceFamily]lb.Health
}

// Port is what happens to clients of one service port.
type Port struct {
	// Sets holds what each side gets. The inside and outside of a service port
	// that has no frontend but its ClusterIP are empty.
	Sets [lb.Sides]Set
	// Serving is every endpoint that may keep the clients it has.
	Serving []lb.Backend
	// Affinity is the timeout in seconds, 0 without affinity.
	Affinity uint32
	// Sources are the clients its load-balancer IPs are for, nil when they are
	// for everybody or there are no such IPs: sorted, none within another.
	Sources []netip.Prefix
	// NodeAllowed tells whether this node's address is in Sources.
	NodeAllowed bool

	// unready holds endpoints that are ready and do not serve. kube-proxy sends
	// them new clients and forgets the ones they have; nobody else need do so.
	unready []lb.Backend
}

// Set is what a client gets: one of the backends, or a verdict when there is
// none.
type Set struct {
	Backends []lb.Backend
	Verdict  Verdict
}

// Verdict says what becomes of a client for whom there is no backend.
type Verdict string

// The verdicts.
const (
	VerdictNone   Verdict = "" // there is a backend, or no such frontend
	VerdictRefuse Verdict = "refuse"
	VerdictDrop   Verdict = "drop"
)

// doubts names the service ports about which kube-proxy leaves something open at
// the moment.
type doubts map[lb.ServiceFamily]bool

// without removes from the answer what is in doubt.
func (a Answer) without(d doubts) {
	if len(d) == 0 {
		return
	}
	maps.DeleteFunc(a.Ports, func(sp lb.ServicePort, _ Port) bool {
		return d[lb.ServiceFamily{Service: sp.Service, Family: sp.Family}]
	})
	maps.DeleteFunc(a.Health, func(sf lb.ServiceFamily, _ lb.Health) bool { return d[sf] })
}

// equal compares kube-proxy's answer with another.
func (a Answer) equal(o Answer) bool {
	return maps.Equal(a.Frontends, o.Frontends) && maps.Equal(a.Health, o.Health) &&
		maps.EqualFunc(a.Ports, o.Ports, Port.equal)
}

func (p Port) equal(o Port) bool {
	for i := range p.Sets {
		if p.Sets[i].Verdict != o.Sets[i].Verdict || !slices.Equal(p.Sets[i].Backends, o.Sets[i].Backends) {
			return false
		}
	}
	return p.Affinity == o.Affinity && p.NodeAllowed == o.NodeAllowed && slices.Equal(p.Sources, o.Sources) &&
		slices.Equal(without(p.Serving, p.unready), without(o.Serving, p.unready))
}

func without(list, unwanted []lb.Backend) []lb.Backend {
	if len(unwanted) == 0 {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), func(b lb.Backend) bool { return slices.Contains(unwanted, b) })
}

// diff returns the facts of both answers, those that only kube-proxy's has marked
// "-", those that only Fairlead's has marked "+". It changes the answers.
func (a Answer) diff(o Answer) string {
	// What may differ is not shown as a difference.
	for sp, port := range o.Ports {
		port.Serving = without(port.Serving, a.Ports[sp].unready)
		o.Ports[sp] = port
	}
	for sp, port := range a.Ports {
		port.Serving = without(port.Serving, port.unready)
		a.Ports[sp] = port
	}
	return "- kube-proxy\n+ Fairlead\n" + strings.Join(merge(a.lines(), o.lines()), "\n")
}

// merge returns the lines of two sorted lists, each marked by where it is from.
func merge(a, b []string) []string {
	var out []string
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || (len(a) > 0 && a[0] < b[0]):
			out, a = append(out, "- "+a[0]), a[1:]
		case len(a) == 0 || b[0] < a[0]:
			out, b = append(out, "+ "+b[0]), b[1:]
		default:
			out, a, b = append(out, "  "+a[0]), a[1:], b[1:]
		}
	}
	return out
}

// lines returns the facts of the answer, sorted.
func (a Answer) lines() []string {
	var out []string
	for key, owner := range a.Frontends {
		out = append(out, fmt.Sprintf("frontend %v: %v %v", key, owner.Kind, owner.Service))
	}
	for sf, health := range a.Health {
		out = append(out, fmt.Sprintf("health check of %v/%v: port %d, %d local", sf.Service, sf.Family, health.Port, health.Local))
	}
	for sp, port := range a.Ports {
		for _, fact := range port.lines() {
			out = append(out, fmt.Sprintf("service %v: %s", sp, fact))
		}
	}
	slices.Sort(out)
	return out
}

func (p Port) lines() []string {
	var out []string
	for side, set := range p.Sets {
		if set.Verdict != VerdictNone || len(set.Backends) > 0 {
			out = append(out, fmt.Sprintf("%v: %v", lb.Side(side), set))
		}
	}
	if len(p.Serving) > 0 {
		out = append(out, fmt.Sprintf("serving %v", p.Serving))
	}
	if p.Affinity != 0 {
		out = append(out, fmt.Sprintf("affinity %ds", p.Affinity))
	}
	if p.Sources != nil {
		out = append(out, fmt.Sprintf("sources %v, node among them: %v", p.Sources, p.NodeAllowed))
	}
	return out
}

// String returns the backends or, when there is none, the verdict.
func (s Set) String() string {
	if s.Verdict != VerdictNone {
		return string(s.Verdict)
	}
	return fmt.Sprint(s.Backends)
}

// outermost returns the prefixes that are not within another one, sorted.
func outermost(prefixes []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	sorted := slices.SortedFunc(slices.Values(prefixes), func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
	})
	for _, p := range sorted {
		if !slices.ContainsFunc(out, p.Overlaps) {
			out = append(out, p)
		}
	}
	return out
}
