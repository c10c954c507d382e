// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Query says what Explain is asked about: a Service and perhaps one of its
// ports, or an address and port that a client dials.
type Query struct {
	Service Name
	Port    string // name or number of a port of the Service, "" for all
	// VIP and Number are what is dialled; VIP is invalid when the Service is
	// asked about.
	VIP    netip.Addr
	Number uint16
}

// Explanation is the answer to a Query. Its JSON is read by other programs.
type Explanation struct {
	Node string `json:"node"`
	Zone string `json:"zone"`
	// Verdict says what becomes of a client when no service port is concerned:
	// the address is nobody's, say. It is "" when there are Ports.
	Verdict string `json:"verdict,omitempty"`
	// Problem is what the Services suffer from, "" for nothing.
	Problem string          `json:"problem,omitempty"`
	Ports   []ExplainedPort `json:"ports"` // sorted by port name, protocol, family; never null
}

// ExplainedPort is one service port: who can dial what, which endpoints each of
// them gets from this node, and why.
type ExplainedPort struct {
	Service               string              `json:"service"` // "namespace/name"
	PortName              string              `json:"portName"`
	Protocol              string              `json:"protocol"`
	Family                string              `json:"family"`
	InternalTrafficPolicy string              `json:"internalTrafficPolicy"`
	ExternalTrafficPolicy string              `json:"externalTrafficPolicy"`
	AffinitySeconds       uint32              `json:"affinitySeconds"`
	SourceRanges          []string            `json:"sourceRanges"` // never null; empty for everybody
	Hints                 string              `json:"hints"`        // whether and why topology hints count
	Frontends             []ExplainedFrontend `json:"frontends"`
	Rules                 []ExplainedRule     `json:"rules"` // one for each side
	Endpoints             []ExplainedEndpoint `json:"endpoints"`
	// Kernel lists where the kernel's tables differ from all this. Null when they
	// were not looked at, empty when they agree.
	Kernel []string `json:"kernel"`
	// Affinity holds the backend that the client asked about keeps, if any.
	Affinity []ExplainedAffinity `json:"affinity,omitempty"`

	port ServicePort
}

// ExplainedFrontend is an address and port that leads to the service port, or
// would.
type ExplainedFrontend struct {
	VIP     netip.Addr `json:"vip"`
	Port    uint16     `json:"port"`
	Type    string     `json:"type"`
	Inside  string     `json:"inside"`  // name of the rule for clients on this node
	Outside string     `json:"outside"` // name of the rule for clients elsewhere
	// At holds the node's addresses at which a NodePort is reached, sorted; null
	// for other frontends. Loopback ones are for processes on the node.
	At []netip.Addr `json:"at,omitempty"`
	// Lost names the Service that has this frontend instead, "" for none.
	Lost string `json:"lost,omitempty"`
	// Refused says why no Service can have this frontend as this one asks for it,
	// "" when one can.
	Refused string `json:"refused,omitempty"`
}

// ExplainedRule says which rule decided for a side, and what came of it.
type ExplainedRule struct {
	Side     string `json:"side"`
	Rule     string `json:"rule"`
	Verdict  string `json:"verdict"` // "translate", "no_backend" (refused) or "drop"
	Backends int    `json:"backends"`
}

// ExplainedEndpoint is one address and port in a slice, or what is in its place.
type ExplainedEndpoint struct {
	Address     string `json:"address"` // as in the slice when it is invalid
	Port        uint16 `json:"port"`    // 0 when the slice has no such port
	Slice       string `json:"slice"`
	Node        string `json:"node"`
	Ready       bool   `json:"ready"`
	Serving     bool   `json:"serving"`
	Terminating bool   `json:"terminating"`
	// ForNodes and ForZones are its hints.
	ForNodes []string `json:"forNodes,omitempty"`
	ForZones []string `json:"forZones,omitempty"`
	// In names the sides that get it, Out says for each of the others why not.
	In  []string          `json:"in"`
	Out map[string]string `json:"out,omitempty"`
}

// ExplainedAffinity is the entry of one client.
type ExplainedAffinity struct {
	Client     string `json:"client"`
	Backend    string `json:"backend"`
	AgeSeconds int64  `json:"ageSeconds"`
}

// Key returns the service port that p is about.
func (p ExplainedPort) Key() ServicePort { return p.port }

// Explain says what becomes of clients that dial what q names, and why. The error
// says in one line that there is no such thing. Changes says afterwards what it
// would have said before.
func (s *Store) Explain(q Query) (Explanation, error) {
	s.reserve()
	e := Explanation{Node: s.config.NodeName, Zone: s.node.Zone, Ports: []ExplainedPort{}}
	ports, err := s.asked(q, &e)
	if err != nil {
		return e, err
	}
	slices.SortFunc(ports, ServicePort.Compare)
	var problems []string
	for _, sp := range ports {
		e.Ports = append(e.Ports, s.explainPort(sp))
		if p := string(s.problem(sp.Service)); p != "" && !slices.Contains(problems, p) {
			problems = append(problems, p)
		}
	}
	e.Problem = strings.Join(problems, "; ")
	return e, nil
}

// asked returns the service ports that q is about. When there is none it says in
// e what becomes of clients.
func (s *Store) asked(q Query, e *Explanation) ([]ServicePort, error) {
	if q.VIP.IsValid() {
		return s.askedVIP(q, e), nil
	}
	svc, ok := s.services[q.Service]
	switch {
	case !ok:
		return nil, fmt.Errorf("no Service %v is served here (it does not exist, is headless or of type ExternalName)", q.Service)
	case svc.Foreign:
		e.Verdict = "another proxy serves it (label service.kubernetes.io/service-proxy-name): connections pass untouched"
		return nil, nil
	}
	var found []ServicePort
	for _, port := range svc.Ports {
		if q.Port == "" || q.Port == port.Name || q.Port == strconv.Itoa(int(port.Number)) {
			for _, vip := range svc.ClusterIPs {
				found = append(found, svc.servicePort(port, FamilyOf(vip)))
			}
		}
	}
	if len(found) == 0 && q.Port != "" {
		return nil, fmt.Errorf("Service %v has no port %q", q.Service, q.Port)
	}
	if len(found) == 0 {
		e.Verdict = "the Service has no ports"
	}
	return found, nil
}

func (s *Store) askedVIP(q Query, e *Explanation) []ServicePort {
	var found []ServicePort
	refused := ""
	kind := s.nodeAddresses()[q.VIP]
	for _, protocol := range []Protocol{TCP, UDP, SCTP} {
		key := FrontendKey{q.VIP, q.Number, protocol}
		owner, why := s.owner(key), s.nobodyGets(key)
		if !owner.Exists() && kind.NodePorts() {
			key.VIP = Unspecified(FamilyOf(q.VIP))
			owner, why = s.owner(key), cmp.Or(why, s.nobodyGets(key))
		}
		if owner.Exists() {
			found = append(found, owner.Service)
		}
		refused = cmp.Or(refused, why)
	}
	if len(found) > 0 {
		return found
	}
	switch owner := s.owner(FrontendKey{VIP: q.VIP}); {
	case owner.Kind == KindForeign:
		e.Verdict = fmt.Sprintf("pass: the ClusterIP of Service %v, which another proxy serves", owner.Service.Service)
	case owner.Exists():
		e.Verdict = fmt.Sprintf("no_port: the ClusterIP of Service %v, which does not define port %d: refused", owner.Service.Service, q.Number)
	case refused != "":
		e.Verdict = "pass: " + refused
	case kind == NodeAddressLocal:
		e.Verdict = "pass: an address of this node, at which NodePorts are not reached"
	case kind != 0:
		e.Verdict = fmt.Sprintf("pass: an address of this node, but no Service has NodePort %d", q.Number)
	case slices.ContainsFunc(s.cidrs, func(p netip.Prefix) bool { return p.Contains(q.VIP) }):
		e.Verdict = "drop: in a ServiceCIDR, but no Service has this address as its ClusterIP"
	default:
		e.Verdict = "pass: no Service has this address"
		if other := s.hasAddress(q.VIP); other.Exists() {
			e.Verdict = fmt.Sprintf("pass: Service %v has this address, but not port %d; only a ClusterIP's undefined ports are refused",
				other.Service.Service, q.Number)
		}
	}
	return nil
}

// hasAddress returns an owner of some port of an address, the zero Owner when there
// is none.
func (s *Store) hasAddress(vip netip.Addr) Owner {
	for key := range s.claims {
		if key.VIP != vip {
			continue
		}
		if owner := s.owner(key); owner.Exists() {
			return owner
		}
	}
	return Owner{}
}

// nobodyGets says who asks for a frontend that nobody can have, and why; "" when
// nobody asks, or somebody has it.
func (s *Store) nobodyGets(key FrontendKey) string {
	if claims := s.claims[key]; len(claims) > 0 && !s.owner(key).Exists() {
		return fmt.Sprintf("%v, for which Service %v asks, is %s", key, claims[0].Service.Service, s.refusal(key, claims[0]))
	}
	return ""
}

// explainer is what is known about one service port.
type explainer struct {
	*Store
	port     ServicePort
	service  Service
	found    []candidate // each backend once, sorted
	backends *Backends
	local    [Sides]bool // whose traffic policy is Local
	topology topology
	why      string // why hints do not count
}

func (s *Store) explainPort(sp ServicePort) ExplainedPort {
	svc := s.services[sp.Service]
	x := explainer{
		Store: s, port: sp, service: svc, backends: s.backends(sp), found: slices.Clone(s.candidates(sp)),
		local: [Sides]bool{SideClusterIP: svc.InternalLocal, SideOutside: svc.ExternalLocal},
	}
	x.topology, x.why = s.topology(x.found)
	p := ExplainedPort{
		Service: sp.Service.String(), PortName: sp.Port, Protocol: sp.Protocol.String(), Family: sp.Family.String(),
		InternalTrafficPolicy: policy(svc.InternalLocal), ExternalTrafficPolicy: policy(svc.ExternalLocal),
		AffinitySeconds: svc.Affinity, SourceRanges: []string{}, Hints: x.hints(),
		Frontends: x.frontends(), Endpoints: x.endpoints(), port: sp,
	}
	for _, prefix := range x.backends.Sources {
		p.SourceRanges = append(p.SourceRanges, prefix.String())
	}
	for side := range Side(Sides) {
		p.Rules = append(p.Rules, x.rule(side))
	}
	return p
}

func policy(local bool) string {
	if local {
		return "Local"
	}
	return "Cluster"
}

func (x explainer) hints() string {
	switch {
	case x.topology == topologyNode:
		return "every ready endpoint has node hints and one names node " + x.config.NodeName + ": those that do are used"
	case x.topology == topologyZone:
		return "every ready endpoint has zone hints and one names zone " + x.node.Zone + ": those that do are used"
	case x.why != "":
		return "ignored because " + x.why
	default:
		return "none"
	}
}

func (x explainer) frontends() []ExplainedFrontend {
	out := []ExplainedFrontend{}
	for key, owner := range x.service.frontends {
		if owner.Service != x.port {
			continue
		}
		f := ExplainedFrontend{
			VIP: key.VIP, Port: key.Port, Type: owner.Kind.String(),
			Inside: owner.Kind.Inside().String(), Outside: owner.Kind.Outside().String(),
		}
		if owner.Kind == KindNodePort {
			f.At = []netip.Addr{}
			for addr, kind := range x.nodeAddresses() {
				if kind.NodePorts() && FamilyOf(addr) == x.port.Family {
					f.At = append(f.At, addr)
				}
			}
			slices.SortFunc(f.At, netip.Addr.Compare)
		}
		if winner := x.owner(key); winner.Service != owner.Service {
			if f.Refused = x.refusal(key, owner); f.Refused == "" {
				f.Lost = winner.Service.Service.String()
			}
		}
		out = append(out, f)
	}
	return out
}

func (x explainer) rule(side Side) ExplainedRule {
	set, local := x.backends.Sides[side], x.local[side]
	r := ExplainedRule{Side: side.String(), Verdict: "translate", Backends: len(set.Backends)}
	ready := slices.ContainsFunc(x.found, func(c candidate) bool { return c.Ready && (!local || c.local) })
	switch {
	case set.Elsewhere:
		r.Rule, r.Verdict = "policy Local: no usable endpoint on this node, but elsewhere", "drop"
	case len(set.Backends) == 0:
		r.Rule, r.Verdict = "no endpoint is ready, or serves while it terminates", "no_backend"
	case local && ready:
		r.Rule = "policy Local: the ready endpoints on this node"
	case local:
		r.Rule = "policy Local: none on this node is ready, so those that serve while they terminate"
	case !ready:
		r.Rule = "policy Cluster: none is ready anywhere, so those that serve while they terminate"
	case x.topology == topologyNode:
		r.Rule = "policy Cluster: the ready endpoints with a hint for this node"
	case x.topology == topologyZone:
		r.Rule = "policy Cluster: the ready endpoints with a hint for this zone"
	default:
		r.Rule = "policy Cluster: all ready endpoints"
	}
	return r
}

// endpoints returns every endpoint in the Service's slices, also those that do
// not count, sorted by address, port, slice.
func (x explainer) endpoints() []ExplainedEndpoint {
	out := []ExplainedEndpoint{}
	all := x.Store.endpoints[x.port.Service]
	for i := range all {
		slice := &all[i]
		for _, bad := range slice.Invalid {
			out = append(out, ExplainedEndpoint{
				Address: bad.Address, Slice: slice.Name.Name, In: []string{}, Out: everySide("invalid: " + bad.Reason),
			})
		}
		copies := slice.collect(nil, x.port, x.config.NodeName)
		if len(copies) == 0 {
			for j := range slice.Endpoints {
				copies = append(copies, candidate{Backend: Backend{Addr: slice.Endpoints[j].Addr}, Endpoint: &slice.Endpoints[j]})
			}
		}
		for _, c := range copies {
			e := ExplainedEndpoint{
				Address: c.Backend.Addr.String(), Port: c.Port, Slice: slice.Name.Name, Node: c.Node,
				Ready: c.Ready, Serving: c.Serving, Terminating: c.Terminating,
				ForNodes: c.NodeHints, ForZones: c.ZoneHints,
			}
			e.In, e.Out = x.places(c, slice.Family)
			out = append(out, e)
		}
	}
	slices.SortStableFunc(out, func(a, b ExplainedEndpoint) int {
		first, _ := netip.ParseAddr(a.Address)
		second, _ := netip.ParseAddr(b.Address)
		return cmp.Or(first.Compare(second), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Slice, b.Slice))
	})
	return out
}

func everySide(reason string) map[string]string {
	out := make(map[string]string, Sides)
	for side := range Side(Sides) {
		out[side.String()] = reason
	}
	return out
}

// places says on which sides a copy of a backend is used, and why not on the
// others.
func (x explainer) places(c candidate, family Family) (in []string, out map[string]string) {
	i, found := slices.BinarySearchFunc(x.found, c.Backend, func(f candidate, b Backend) int { return f.Backend.Compare(b) })
	switch {
	case family != x.port.Family:
		return []string{}, everySide(fmt.Sprintf("wrong family: the slice is %v", family))
	case c.Port == 0:
		return []string{}, everySide(fmt.Sprintf("its slice has no port %q with protocol %v", x.port.Port, x.port.Protocol))
	case found && x.found[i].Endpoint != c.Endpoint:
		return []string{}, everySide("another copy of the same address and port counts")
	}
	in, out = []string{}, map[string]string{}
	for side := range Side(Sides) {
		_, used := slices.BinarySearchFunc(x.backends.Sides[side].Backends, c.Backend, Backend.Compare)
		if used {
			in = append(in, side.String())
		} else {
			out[side.String()] = x.reason(c, x.local[side])
		}
	}
	return in, out
}

// reason says why c is not in the set of a traffic policy.
func (x explainer) reason(c candidate, local bool) string {
	switch {
	case local && !c.local && c.Node == "":
		return "policy Local, and the slice does not say which node it is on"
	case local && !c.local:
		return "on another node (" + c.Node + "), and the policy is Local"
	case !c.Ready && c.usable():
		return "terminating, and others are ready"
	case !c.Ready && c.Terminating:
		return "terminating and not serving any more"
	case !c.Ready:
		return "not ready"
	case x.topology == topologyNode && !local:
		return "its hints are for other nodes (" + strings.Join(c.NodeHints, ", ") + ")"
	case x.topology == topologyZone && !local:
		return "its hints are for other zones (" + strings.Join(c.ZoneHints, ", ") + ")"
	default:
		return fmt.Sprintf("beyond the %d backends that a service port can have", MaxBackends)
	}
}

// Compare returns where tables differ from what Changes or All has told about each
// of these service ports, in words; empty, not nil, when they agree.
func (s *Store) Compare(ports []ServicePort, t Tables) map[ServicePort][]string {
	out := make(map[ServicePort][]string, len(ports))
	held := heldRows(ports, t)
	for _, sp := range ports {
		h, want := held[sp], s.told.Services[sp]
		if want == nil || len(h.ids) != 1 {
			out[sp] = []string{fmt.Sprintf("%v has %d service IDs", sp, len(h.ids))}
			continue
		}
		out[sp] = append(compareService(h, want, t), s.compareFrontends(sp, h, t)...)
	}
	return out
}

// held is what tables have of one service port.
type held struct {
	port      ServicePort
	ids       []ServiceID
	sources   []Source
	members   []Member
	frontends []FrontendKey
}

// heldRows goes through the tables once for all ports.
func heldRows(ports []ServicePort, t Tables) map[ServicePort]*held {
	out := make(map[ServicePort]*held, len(ports))
	for _, sp := range ports {
		out[sp] = &held{port: sp}
	}
	byID := map[ServiceID]*held{}
	for id, name := range t.Names {
		if h := out[name]; h != nil {
			h.ids = append(h.ids, id)
			byID[id] = h
		}
	}
	for src := range t.Sources {
		if h := byID[src.Service]; h != nil {
			h.sources = append(h.sources, src)
		}
	}
	for m := range t.Members {
		if h := byID[m.Service]; h != nil {
			h.members = append(h.members, m)
		}
	}
	for key, f := range t.Frontends {
		if h := byID[f.Service]; h != nil && !key.IsWildcard() {
			h.frontends = append(h.frontends, key)
		}
	}
	return out
}

func compareService(h *held, want *Backends, t Tables) []string {
	out := []string{}
	id := h.ids[0]
	row := t.Services[id]
	for side := range Side(Sides) {
		have, set := t.Backends(row.Sides[side]), want.Sides[side]
		slices.SortFunc(have, Backend.Compare)
		if !slices.Equal(have, set.Backends) || row.Sides[side].Elsewhere() != set.Elsewhere {
			out = append(out, fmt.Sprintf("%v: the kernel has %s, wanted is %s", side,
				describe(have, row.Sides[side].Elsewhere()), describe(set.Backends, set.Elsewhere)))
		}
	}
	if row.Affinity != want.Affinity || row.Restricted != want.Restricted || row.NodeAllowed != want.NodeAllowed {
		out = append(out, fmt.Sprintf("affinity %ds, restricted %v, node allowed %v; wanted is %ds, %v, %v", row.Affinity,
			row.Restricted, row.NodeAllowed, want.Affinity, want.Restricted, want.NodeAllowed))
	}
	if row.OutsideLocal != want.OutsideLocal {
		out = append(out, fmt.Sprintf("outside local %v; wanted is %v", row.OutsideLocal, want.OutsideLocal))
	}
	out = append(out, compareRows("source range", h.sources, want.SourceRows(id), Source.Compare,
		func(src Source) string { return src.Prefix.String() })...)
	return append(out, compareRows("member", h.members, want.MemberRows(id, h.port.Protocol), Member.Compare,
		func(m Member) string { return m.Backend.String() + " (" + m.Use.String() + ")" })...)
}

// describe says what clients of a set get.
func describe(backends []Backend, elsewhere bool) string {
	switch {
	case elsewhere:
		return "none (dropped)"
	case len(backends) == 0:
		return "none (refused)"
	default:
		return fmt.Sprint(backends)
	}
}

// compareRows says which rows are missing and which are too many.
func compareRows[R comparable](what string, have, want []R, compare func(R, R) int, text func(R) string) []string {
	var out []string
	slices.SortFunc(have, compare)
	slices.SortFunc(want, compare)
	for _, r := range want {
		if _, found := slices.BinarySearchFunc(have, r, compare); !found {
			out = append(out, what+" "+text(r)+" is missing")
		}
	}
	for _, r := range have {
		if _, found := slices.BinarySearchFunc(want, r, compare); !found {
			out = append(out, what+" "+text(r)+" is not wanted")
		}
	}
	return out
}

// compareFrontends looks at what leads to a service port, the wildcards of its
// ClusterIP and, for a NodePort, the addresses it is reached at.
func (s *Store) compareFrontends(sp ServicePort, h *held, t Tables) []string {
	var out []string
	differ := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	keys := map[FrontendKey]struct{}{}
	for _, key := range h.frontends {
		keys[key] = struct{}{}
	}
	for key, owner := range s.services[sp.Service].frontends {
		if owner.Service.Family == sp.Family && (owner.Service == sp || key.IsWildcard()) {
			keys[key] = struct{}{}
		}
	}
	nodePort := false
	for _, key := range slices.SortedFunc(maps.Keys(keys), FrontendKey.Compare) {
		owner, have := s.told.Frontends[key], t.Frontends[key]
		switch {
		case key.IsWildcard():
			if have != (Frontend{NoService, owner.Kind}) {
				differ("undefined ports of %v are not refused", key.VIP)
			}
		case owner.Service == sp && have != (Frontend{h.ids[0], owner.Kind}):
			differ("frontend %v does not lead here", key)
		case owner.Service != sp && have.Service == h.ids[0]:
			differ("frontend %v leads here and should not", key)
		}
		nodePort = nodePort || owner.Service == sp && owner.Kind == KindNodePort
	}
	if nodePort {
		out = append(out, s.compareNodeAddresses(sp.Family, t)...)
	}
	return out
}

func (s *Store) compareNodeAddresses(family Family, t Tables) []string {
	var out []string
	addresses := maps.Clone(s.told.NodeAddresses)
	for addr := range t.NodeAddresses {
		addresses[addr] = s.told.NodeAddresses[addr]
	}
	for _, addr := range slices.SortedFunc(maps.Keys(addresses), netip.Addr.Compare) {
		if have, want := t.NodeAddresses[addr], addresses[addr]; have != want && FamilyOf(addr) == family {
			out = append(out, fmt.Sprintf("node address %v: the kernel has %v, wanted is %v", addr, have, want))
		}
	}
	return out
}
