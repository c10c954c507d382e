// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

var compareAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// here is the node on which all stores of these tests are.
const here = "here"

func newStore() *lb.Store { return lb.NewStore(lb.Config{NodeName: here}) }

func name(s string) lb.Name { return lb.Name{Namespace: "ns", Name: s} }

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func backends(list ...string) []lb.Backend {
	var out []lb.Backend
	for _, s := range list {
		ap := netip.MustParseAddrPort(s)
		out = append(out, lb.Backend{Addr: ap.Addr(), Port: ap.Port()})
	}
	return out
}

// endpoint returns an endpoint whose conditions are those letters: r ready,
// s serving, t terminating.
func endpoint(addr, conditions string, more ...func(*lb.Endpoint)) lb.Endpoint {
	e := lb.Endpoint{
		Addr:        netip.MustParseAddr(addr),
		Ready:       strings.Contains(conditions, "r"),
		Serving:     strings.Contains(conditions, "s"),
		Terminating: strings.Contains(conditions, "t"),
	}
	for _, set := range more {
		set(&e)
	}
	return e
}

func on(node string) func(*lb.Endpoint) { return func(e *lb.Endpoint) { e.Node = node } }

func forNodes(nodes ...string) func(*lb.Endpoint) {
	return func(e *lb.Endpoint) { e.NodeHints = nodes }
}

func forZones(zones ...string) func(*lb.Endpoint) {
	return func(e *lb.Endpoint) { e.ZoneHints = zones }
}

// webSlice is a slice of the Service web with port http.
func webSlice(slice string, number uint16, endpoints ...lb.Endpoint) lb.Slice {
	return lb.Slice{
		Name:      name(slice),
		Service:   "web",
		Family:    lb.IPv4,
		Ports:     []lb.SlicePort{{Name: "http", Protocol: lb.TCP, Number: number}},
		Endpoints: endpoints,
	}
}

// ofIPv6 makes a slice one of IPv6.
func ofIPv6(s lb.Slice) lb.Slice {
	s.Family = lb.IPv6
	return s
}

func webService(more ...func(*lb.Service)) lb.Service {
	svc := lb.Service{
		Name:       name("web"),
		ClusterIPs: addrs("10.96.0.1"),
		Ports:      []lb.Port{{Name: "http", Protocol: lb.TCP, Number: 80}},
	}
	for _, set := range more {
		set(&svc)
	}
	return svc
}

func internalLocal(s *lb.Service) { s.InternalLocal = true }
func externalLocal(s *lb.Service) { s.ExternalLocal = true }

func dualStack(s *lb.Service) { s.ClusterIPs = addrs("10.96.0.1", "fd00::1") }

var (
	webPort  = lb.ServicePort{Service: name("web"), Port: "http", Protocol: lb.TCP, Family: lb.IPv4}
	webPort6 = lb.ServicePort{Service: name("web"), Port: "http", Protocol: lb.TCP, Family: lb.IPv6}
)

// set prints what a client gets: the addresses of backends, "refused" when
// there is nothing, "dropped" when there is something elsewhere.
func set(s lb.Set) string {
	switch {
	case len(s.Backends) > 0:
		var out []string
		for _, b := range s.Backends {
			out = append(out, b.Addr.String())
		}
		return strings.Join(out, " ")
	case s.Elsewhere:
		return "dropped"
	default:
		return "refused"
	}
}

// sides prints the set of each side.
func sides(b *lb.Backends) [lb.Sides]string {
	var out [lb.Sides]string
	for i, s := range b.Sides {
		out[i] = set(s)
	}
	return out
}

// text prints a delta for comparing, one line a row, sorted.
func text(d lb.Delta) string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for sp, b := range d.Services {
		if b == nil {
			add("service %v gone", sp)
		} else {
			add("service %v %s", sp, backendsText(b))
		}
	}
	for key, owner := range d.Frontends {
		if owner.Exists() {
			add("frontend %v %v %v", key, owner.Kind, owner.Service)
		} else {
			add("frontend %v gone", key)
		}
	}
	for a, kind := range d.NodeAddresses {
		if kind == 0 {
			add("node address %v gone", a)
		} else {
			add("node address %v %v", a, kind)
		}
	}
	for p, exists := range d.ServiceCIDRs {
		add("service CIDR %v %v", p, exists)
	}
	for sf, h := range d.Health {
		add("health %v/%v %+v", sf.Service, sf.Family, h)
	}
	for name, p := range d.Problems {
		add("problem %v: %s", name, p)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// backendsText prints the sets, the three of them only if they are not equal,
// and after them what else there is.
func backendsText(b *lb.Backends) string {
	var out strings.Builder
	one := func(s lb.Set) string {
		if s.Elsewhere {
			return fmt.Sprint(s.Backends, " elsewhere")
		}
		return fmt.Sprint(s.Backends)
	}
	out.WriteString(one(b.Sides[lb.SideClusterIP]))
	if sides := [lb.Sides]string{one(b.Sides[0]), one(b.Sides[1]), one(b.Sides[2])}; sides[1] != sides[0] || sides[2] != sides[0] {
		fmt.Fprintf(&out, " inside %s outside %s", sides[lb.SideInside], sides[lb.SideOutside])
	}
	fmt.Fprintf(&out, " serving %v", b.Serving)
	if b.Affinity > 0 {
		fmt.Fprintf(&out, " affinity %d", b.Affinity)
	}
	if b.Restricted || b.NodeAllowed || b.Sources != nil {
		fmt.Fprintf(&out, " restricted %v to %v node %v", b.Restricted, b.Sources, b.NodeAllowed)
	}
	if b.OutsideLocal {
		out.WriteString(" outside local")
	}
	return out.String()
}

func expect(t *testing.T, what string, got lb.Delta, want ...string) {
	t.Helper()
	slices.Sort(want)
	if diff := cmp.Diff(strings.Join(want, "\n"), text(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
	if got.Empty() != (len(want) == 0) {
		t.Errorf("%s: Empty() is %v", what, got.Empty())
	}
}

func reversed[T any](s []T) []T {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}
