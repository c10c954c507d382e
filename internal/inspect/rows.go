// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Service is a port of a Service in one family, as the kernel's tables have it.
type Service struct {
	Service  string `json:"service"` // "namespace/name"
	PortName string `json:"portName"`
	Protocol string `json:"protocol"`
	Family   string `json:"family"`
	// ID is the service's number in the tables. It is 0, and the fields from
	// portName to frontends are empty, for a Service that is known for its
	// problem alone.
	ID lb.ServiceID `json:"id"`
	// Backends and Generation are those of the ClusterIP.
	Backends   int    `json:"backends"`
	Generation uint32 `json:"generation"`
	Sides      []Side `json:"sides"` // of all clients, in the order of lb.Side, never null
	// AffinitySeconds is 0 when every connection is chosen anew.
	AffinitySeconds uint32 `json:"affinitySeconds"`
	// Restricted tells that load-balancer IPs are for clients in SourceRanges
	// alone, NodeAllowed that processes on the node are among these.
	Restricted   bool           `json:"restricted"`
	NodeAllowed  bool           `json:"nodeAllowed"`
	SourceRanges []netip.Prefix `json:"sourceRanges"` // sorted, never null
	// OutsideLocal tells that outside clients get backends of this node only and
	// keep their address.
	OutsideLocal bool     `json:"outsideLocal"`
	Frontends    []string `json:"frontends"` // "vip:port", never null
	// Problem says what could not be done for the whole Service; "" when all
	// could.
	Problem string `json:"problem"`

	outside bool // has a frontend that outside clients may use
}

// Side is what the clients of one side get of a service.
type Side struct {
	Side       string `json:"side"`    // "clusterIP", "inside" or "outside"
	Verdict    string `json:"verdict"` // "translate", "no_backend" (refused) or "drop"
	Backends   int    `json:"backends"`
	Generation uint32 `json:"generation"`
}

// Frontend is an address, port and protocol that clients dial, with the backends
// they reach. Other programs read its JSON.
type Frontend struct {
	Service  string     `json:"service"` // "namespace/name"
	PortName string     `json:"portName"`
	VIP      netip.Addr `json:"vip"` // of a NodePort the unspecified address
	Port     uint16     `json:"port"`
	Protocol string     `json:"protocol"`
	Type     string     `json:"type"`
	Backends []Endpoint `json:"backends"` // what inside clients get; sorted, never null
	// ExternalBackends is what outside clients would get from this node. Null for
	// a ClusterIP, which is for inside clients alone, and only then.
	ExternalBackends []Endpoint `json:"externalBackends,omitzero"`

	row     lb.ServiceRow
	kind    lb.FrontendKind
	sources []netip.Prefix // who may use it, where not everybody may
}

// Endpoint is the address and port of a backend.
type Endpoint struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port"`
}

// String returns "address:port", IPv6 in brackets.
func (e Endpoint) String() string { return netip.AddrPortFrom(e.Address, e.Port).String() }

// Backend is an address and port that connections are sent to, with the services
// that send there.
type Backend struct {
	Address  netip.Addr   `json:"address"`
	Port     uint16       `json:"port"`
	Services []ServiceRef `json:"services"` // sorted
}

// ServiceRef names a port of a Service.
type ServiceRef struct {
	Service  string `json:"service"` // "namespace/name"
	PortName string `json:"portName"`
	Protocol string `json:"protocol"`
}

// Address is an address or range in which more than single frontends mean
// something.
type Address struct {
	Address string `json:"address"` // "192.0.2.1" or "10.96.0.0/12"
	Use     string `json:"use"`     // one of the Use constants
}

// The uses of an Address.
const (
	UseNodePorts         = "nodePorts"         // leads everybody to NodePorts
	UseLoopbackNodePorts = "loopbackNodePorts" // leads processes on the node there
	UseServiceCIDR       = "serviceCIDR"       // holds the addresses of Services alone
	UseClusterCIDR       = "clusterCIDR"       // clients in it are inside ones wherever their packets arrive
)

// Counter is an outcome and how often it came about.
type Counter struct {
	Name  string `json:"name"`
	Value uint64 `json:"value"`
}

// Services returns a row for each service that has a name or backends, and one
// for each Service with a problem that has none of those. Sorted by namespace,
// name, port name, protocol, family.
func Services(t lb.Tables) []Service {
	dialled := map[lb.ServiceID][]lb.FrontendKey{}
	for key, frontend := range t.Frontends {
		if !key.IsWildcard() {
			dialled[frontend.Service] = append(dialled[frontend.Service], key)
		}
	}
	type entry struct {
		port lb.ServicePort
		row  Service
	}
	var entries []entry
	shown := map[lb.Name]bool{}
	sources := sourcesOf(t)
	for id, r := range t.Services {
		port, named := t.Names[id]
		if !named && !hasBackends(r) {
			continue // an ID that nobody has at present
		}
		shown[port.Service] = true
		row := service(t, id)
		row.SourceRanges = append(row.SourceRanges, sources[id]...)
		slices.SortFunc(dialled[id], lb.FrontendKey.Compare)
		for _, key := range dialled[id] {
			row.Frontends = append(row.Frontends, netip.AddrPortFrom(key.VIP, key.Port).String())
			row.outside = row.outside || forOutside(t.Frontends[key].Kind)
		}
		entries = append(entries, entry{port, row})
	}
	for name, problem := range t.Problems {
		if !shown[name] {
			row := Service{
				Service: name.String(), Sides: []Side{}, SourceRanges: []netip.Prefix{}, Frontends: []string{},
				Problem: string(problem),
			}
			entries = append(entries, entry{lb.ServicePort{Service: name}, row})
		}
	}
	slices.SortFunc(entries, func(a, b entry) int {
		return cmp.Or(a.port.Compare(b.port), cmp.Compare(a.row.ID, b.row.ID))
	})
	rows := make([]Service, 0, len(entries))
	for _, e := range entries {
		rows = append(rows, e.row)
	}
	return rows
}

// service returns a service's row without what other tables hold of it.
func service(t lb.Tables, id lb.ServiceID) Service {
	r := t.Services[id]
	port, named := t.Names[id]
	cluster := r.Sides[lb.SideClusterIP]
	row := Service{
		Service: serviceName(t, id), PortName: port.Port, ID: id, Backends: int(cluster.Count),
		Generation: cluster.Generation, AffinitySeconds: r.Affinity, Restricted: r.Restricted, NodeAllowed: r.NodeAllowed,
		OutsideLocal: r.OutsideLocal,
		SourceRanges: []netip.Prefix{}, Frontends: []string{}, Problem: string(t.Problems[port.Service]),
	}
	if named {
		row.Protocol, row.Family = port.Protocol.String(), port.Family.String()
	}
	for side, set := range r.Sides {
		row.Sides = append(row.Sides, Side{lb.Side(side).String(), verdict(set), int(set.Count), set.Generation})
	}
	return row
}

// verdict says what becomes of clients that get a backend from r, in the words of
// lb.ExplainedRule.
func verdict(r lb.Range) string {
	switch {
	case r.Count > 0:
		return "translate"
	case r.Elsewhere():
		return "drop"
	default:
		return "no_backend"
	}
}

func hasBackends(r lb.ServiceRow) bool {
	return slices.ContainsFunc(r.Sides[:], func(side lb.Range) bool { return side.Count > 0 })
}

// forOutside tells whether outside clients may use frontends of a kind.
func forOutside(k lb.FrontendKind) bool {
	return k == lb.KindNodePort || k == lb.KindLoadBalancer || k == lb.KindExternalIP
}

// sourcesOf returns the ranges of each service that has some, sorted.
func sourcesOf(t lb.Tables) map[lb.ServiceID][]netip.Prefix {
	out := map[lb.ServiceID][]netip.Prefix{}
	for _, src := range slices.SortedFunc(maps.Keys(t.Sources), lb.Source.Compare) {
		out[src.Service] = append(out[src.Service], src.Prefix)
	}
	return out
}

// Frontends returns a row for each frontend that leads to a service, sorted by
// VIP (IPv4 first), port, protocol name. Wildcards lead to none: see wildcards.
func Frontends(t lb.Tables) []Frontend {
	rows := make([]Frontend, 0, len(t.Frontends))
	sources := sourcesOf(t)
	for key, frontend := range t.Frontends {
		if key.IsWildcard() {
			continue
		}
		kind := frontend.Kind
		row := Frontend{
			Service:  serviceName(t, frontend.Service),
			PortName: t.Names[frontend.Service].Port,
			VIP:      key.VIP,
			Port:     key.Port,
			Protocol: key.Protocol.String(),
			Type:     kind.String(),
			row:      t.Services[frontend.Service],
			kind:     kind,
		}
		row.Backends = endpoints(t, row.row.Sides[kind.Inside()])
		if forOutside(kind) {
			row.ExternalBackends = endpoints(t, row.row.Sides[kind.Outside()])
		}
		if kind == lb.KindLoadBalancer && row.row.Restricted {
			row.sources = sources[frontend.Service]
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b Frontend) int {
		return cmp.Or(a.VIP.Compare(b.VIP), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	return rows
}

// endpoints returns the backends in a range, sorted, never nil.
func endpoints(t lb.Tables, r lb.Range) []Endpoint {
	backends := t.Backends(r)
	slices.SortFunc(backends, lb.Backend.Compare)
	out := make([]Endpoint, 0, len(backends))
	for _, b := range backends {
		out = append(out, Endpoint{b.Addr, b.Port})
	}
	return out
}

// wildcard is an address and what holds for its ports that have no frontend.
type wildcard struct {
	vip  netip.Addr
	kind lb.FrontendKind
}

// wildcards returns those of all VIPs, sorted.
func wildcards(t lb.Tables) []wildcard {
	var out []wildcard
	for key, frontend := range t.Frontends {
		if key.IsWildcard() {
			out = append(out, wildcard{key.VIP, frontend.Kind})
		}
	}
	slices.SortFunc(out, func(a, b wildcard) int { return a.vip.Compare(b.vip) })
	return out
}

// Backends returns a row for each backend that some service sends clients of any
// side to, sorted by address (IPv4 first), port.
func Backends(t lb.Tables) []Backend {
	users := map[lb.Backend]map[ServiceRef]struct{}{}
	for id, r := range t.Services {
		ref := serviceRef(t, id)
		for _, side := range r.Sides {
			for _, b := range t.Backends(side) {
				if users[b] == nil {
					users[b] = map[ServiceRef]struct{}{}
				}
				users[b][ref] = struct{}{}
			}
		}
	}
	rows := make([]Backend, 0, len(users))
	for _, b := range slices.SortedFunc(maps.Keys(users), lb.Backend.Compare) {
		services := slices.SortedFunc(maps.Keys(users[b]), ServiceRef.compare)
		rows = append(rows, Backend{b.Addr, b.Port, services})
	}
	return rows
}

// Addresses returns a row for each address of the node that leads to NodePorts,
// then one for each range that Services' addresses are taken from, and one for each
// of clusterCIDRs.
func Addresses(t lb.Tables, clusterCIDRs []netip.Prefix) []Address {
	rows := make([]Address, 0, len(t.NodeAddresses)+len(t.ServiceCIDRs)+len(clusterCIDRs))
	for _, a := range slices.SortedFunc(maps.Keys(t.NodeAddresses), netip.Addr.Compare) {
		switch t.NodeAddresses[a] {
		case lb.NodeAddressOpen:
			rows = append(rows, Address{a.String(), UseNodePorts})
		case lb.NodeAddressLoopback:
			rows = append(rows, Address{a.String(), UseLoopbackNodePorts})
		}
	}
	for _, p := range slices.SortedFunc(maps.Keys(t.ServiceCIDRs), netip.Prefix.Compare) {
		rows = append(rows, Address{p.String(), UseServiceCIDR})
	}
	for _, p := range clusterCIDRs {
		rows = append(rows, Address{p.String(), UseClusterCIDR})
	}
	return rows
}

func serviceRef(t lb.Tables, id lb.ServiceID) ServiceRef {
	ref := ServiceRef{Service: serviceName(t, id)}
	if port, named := t.Names[id]; named {
		ref.PortName, ref.Protocol = port.Port, port.Protocol.String()
	}
	return ref
}

func (r ServiceRef) compare(o ServiceRef) int {
	return cmp.Or(cmp.Compare(r.Service, o.Service), cmp.Compare(r.PortName, o.PortName),
		cmp.Compare(r.Protocol, o.Protocol))
}

// String returns "namespace/name:port/PROTOCOL", as lb.ServicePort does but
// without the family, which the backend's address shows.
func (r ServiceRef) String() string {
	s := r.Service
	if r.PortName != "" {
		s += ":" + r.PortName
	}
	if r.Protocol != "" {
		s += "/" + r.Protocol
	}
	return s
}

// serviceName returns "namespace/name", or "(id N)", which no Service is called,
// where the name is missing: the tables are not read at one instant, so the
// Service may have gone in between.
func serviceName(t lb.Tables, id lb.ServiceID) string {
	if port, named := t.Names[id]; named {
		return port.Service.String()
	}
	return fmt.Sprintf("(id %d)", id)
}
