// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"net/netip"
	"slices"
)

// candidate is one copy of a backend: what one slice says about it.
type candidate struct {
	Backend
	*Endpoint
	local bool
}

// usable tells whether it may be used when nothing better is there: it serves
// while it terminates.
func (c candidate) usable() bool { return c.Serving && c.Terminating }

// compare orders candidates by backend and then by which copy counts: one
// that is not terminating, then one that is ready. Copies that are still equal
// keep their order.
func (c candidate) compare(o candidate) int {
	return cmp.Or(c.Backend.Compare(o.Backend),
		compareBool(c.Terminating, o.Terminating), compareBool(o.Ready, c.Ready))
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// backends works out the backends of sp, nil when there is no such service
// port, and notes in s.cut how many were left out.
func (s *Store) backends(sp ServicePort) *Backends {
	delete(s.cut, sp)
	svc := s.services[sp.Service]
	if !svc.has(sp) {
		return nil
	}
	b := s.categorize(svc, s.candidates(sp))
	b.Affinity, b.OutsideLocal = svc.Affinity, svc.ExternalLocal
	s.restrict(b, svc, sp.Family)
	for i := range b.Sides {
		set := &b.Sides[i]
		if n := len(set.Backends) - MaxBackends; n > 0 {
			s.cut[sp] = max(s.cut[sp], n)
			set.Backends = slices.Clip(set.Backends[:MaxBackends])
		}
	}
	return b
}

// candidates returns every backend that slices have for sp, sorted, each once
// and as the copy that counts. The result is good until the next call.
func (s *Store) candidates(sp ServicePort) []candidate {
	found := s.scratch[:0]
	for i := range s.endpoints[sp.Service] {
		slice := &s.endpoints[sp.Service][i]
		if slice.Family == sp.Family {
			found = slice.collect(found, sp, s.config.NodeName)
		}
	}
	// Slices come in the order of their names and the sort is stable, so of
	// equal copies the one in the first slice counts.
	slices.SortStableFunc(found, candidate.compare)
	found = slices.CompactFunc(found, func(a, b candidate) bool { return a.Backend == b.Backend })
	s.scratch = found[:0]
	return found
}

// has tells whether sp is one of the Service's service ports.
func (svc Service) has(sp ServicePort) bool {
	for have := range svc.servicePorts {
		if have == sp {
			return true
		}
	}
	return false
}

// collect appends the slice's endpoints for sp, once for each number that sp's
// port has here.
func (s *Slice) collect(to []candidate, sp ServicePort, node string) []candidate {
	for _, port := range s.Ports {
		if port.Name != sp.Port || port.Protocol != sp.Protocol {
			continue
		}
		for i := range s.Endpoints {
			e := &s.Endpoints[i]
			to = append(to, candidate{
				Backend:  Backend{Addr: e.Addr, Port: port.Number},
				Endpoint: e,
				local:    e.Node != "" && e.Node == node,
			})
		}
	}
	return to
}

// categorize says which backends each side may give to new clients and which may
// keep those they have. The rules are those of kube-proxy's CategorizeEndpoints
// (KEP-1669, KEP-2086, KEP-2433, KEP-4444). Sets share memory when they are
// equal, which they nearly always are.
func (s *Store) categorize(svc Service, found []candidate) *Backends {
	cluster := Set{Backends: pick(found, s.clusterRule(found))}
	local := cluster
	if svc.InternalLocal || svc.ExternalLocal {
		local = Set{Backends: pick(found, localRule(found))}
		local.Elsewhere = len(local.Backends) == 0 && len(cluster.Backends) > 0
	}
	b := &Backends{Sides: [Sides]Set{SideClusterIP: cluster, SideInside: cluster, SideOutside: cluster}}
	if svc.InternalLocal {
		b.Sides[SideClusterIP] = local
	}
	if svc.ExternalLocal {
		b.Sides[SideOutside] = local
	}
	b.Serving = cluster.Backends
	serving := func(c candidate) bool { return c.Serving || c.Ready }
	if count(found, serving) > len(cluster.Backends) {
		b.Serving = pick(found, serving)
	}
	return b
}

// clusterRule returns the condition for the traffic policy Cluster: ready and
// meant for us or, when none is ready anywhere, still serving.
func (s *Store) clusterRule(found []candidate) func(candidate) bool {
	if !slices.ContainsFunc(found, func(c candidate) bool { return c.Ready }) {
		return candidate.usable
	}
	topology, _ := s.topology(found)
	return func(c candidate) bool { return c.Ready && s.hinted(c, topology) }
}

// localRule returns the condition for the traffic policy Local: ready here or,
// when none here is, still serving here.
func localRule(found []candidate) func(candidate) bool {
	if slices.ContainsFunc(found, func(c candidate) bool { return c.Ready && c.local }) {
		return func(c candidate) bool { return c.Ready && c.local }
	}
	return func(c candidate) bool { return c.usable() && c.local }
}

// topology is by which hints endpoints are narrowed.
type topology uint8

const (
	topologyNone topology = iota
	topologyNode
	topologyZone
)

// topology decides by which hints the ready endpoints are narrowed; there must be
// one. Hints count when every ready endpoint has them and one names us: half of
// them could send everybody to the few that have none. why says in words why
// hints do not count though some endpoint has them, and is "" otherwise.
func (s *Store) topology(found []candidate) (t topology, why string) {
	var nodes, zones hintCount
	for _, c := range found {
		if c.Ready {
			nodes.add(c.NodeHints, s.config.NodeName)
			zones.add(c.ZoneHints, s.node.Zone)
		}
	}
	switch {
	case nodes.count():
		return topologyNode, ""
	case zones.count():
		return topologyZone, ""
	case zones.some && zones.missing:
		return topologyNone, "not every ready endpoint has zone hints"
	case zones.some && s.node.Zone == "":
		return topologyNone, "the node has no label topology.kubernetes.io/zone"
	case zones.some:
		return topologyNone, "none names zone " + s.node.Zone
	case nodes.some && nodes.missing:
		return topologyNone, "not every ready endpoint has node hints"
	case nodes.some:
		return topologyNone, "none names node " + s.config.NodeName
	default:
		return topologyNone, ""
	}
}

// hintCount tells whether hints of one kind count.
type hintCount struct {
	some    bool // an endpoint has hints
	missing bool // an endpoint has none
	us      bool // one names us
}

func (h *hintCount) add(hints []string, us string) {
	h.some = h.some || len(hints) > 0
	h.missing = h.missing || len(hints) == 0
	h.us = h.us || slices.Contains(hints, us)
}

func (h *hintCount) count() bool { return h.us && !h.missing }

// hinted tells whether hints let us use the endpoint.
func (s *Store) hinted(c candidate, t topology) bool {
	switch t {
	case topologyNode:
		return slices.Contains(c.NodeHints, s.config.NodeName)
	case topologyZone:
		return slices.Contains(c.ZoneHints, s.node.Zone)
	default:
		return true
	}
}

// health works out what the health check node port of a Service answers to
// clients of a family; zero when there is none.
func (s *Store) health(name Name, family Family) Health {
	svc := s.services[name]
	if svc.HealthCheckNodePort == 0 || svc.Foreign || !slices.ContainsFunc(svc.ClusterIPs, func(a netip.Addr) bool { return FamilyOf(a) == family }) {
		return Health{}
	}
	// Every port that a slice has counts, also one that the Service does not.
	ports := map[ServicePort]struct{}{}
	for _, slice := range s.endpoints[name] {
		for _, port := range slice.Ports {
			ports[ServicePort{name, port.Name, port.Protocol, family}] = struct{}{}
		}
	}
	local := map[netip.Addr]struct{}{}
	for sp := range ports {
		for _, c := range s.candidates(sp) {
			if c.Ready && c.local {
				local[c.Backend.Addr] = struct{}{}
			}
		}
	}
	return Health{Port: svc.HealthCheckNodePort, Local: len(local)}
}

// pick returns the backends for which keep holds, nil when there is none.
func pick(found []candidate, keep func(candidate) bool) []Backend {
	n := count(found, keep)
	if n == 0 {
		return nil
	}
	out := make([]Backend, 0, n)
	for _, c := range found {
		if keep(c) {
			out = append(out, c.Backend)
		}
	}
	return out
}

func count(found []candidate, keep func(candidate) bool) int {
	n := 0
	for _, c := range found {
		if keep(c) {
			n++
		}
	}
	return n
}

// equal compares what two service ports have; nil, one that does not exist,
// equals only nil.
func (b *Backends) equal(o *Backends) bool {
	if b == nil || o == nil {
		return b == o
	}
	for i := range b.Sides {
		if b.Sides[i].Elsewhere != o.Sides[i].Elsewhere || !slices.Equal(b.Sides[i].Backends, o.Sides[i].Backends) {
			return false
		}
	}
	return slices.Equal(b.Serving, o.Serving) && b.Affinity == o.Affinity && b.Restricted == o.Restricted &&
		b.NodeAllowed == o.NodeAllowed && slices.Equal(b.Sources, o.Sources) && b.OutsideLocal == o.OutsideLocal
}
