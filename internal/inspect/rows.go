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
	ID         lb.ServiceID `json:"id"`
	Backends   int          `json:"backends"`
	Generation uint32       `json:"generation"`
	Frontends  []string     `json:"frontends"` // "vip:port", never null
	// Problem says what could not be done for the whole Service; "" when all
	// could.
	Problem string `json:"problem"`
}

// Frontend is an address, port and protocol that clients dial, with the backends
// they reach. Other programs read its JSON.
type Frontend struct {
	Service  string     `json:"service"` // "namespace/name"
	PortName string     `json:"portName"`
	VIP      netip.Addr `json:"vip"`
	Port     uint16     `json:"port"`
	Protocol string     `json:"protocol"`
	Type     string     `json:"type"`
	Backends []Endpoint `json:"backends"` // sorted, never null
}

// Endpoint is the address and port of a backend.
type Endpoint struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port"`
}

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
	for id, r := range t.Services {
		port, named := t.Names[id]
		if !named && r.Count == 0 {
			continue // an ID that nobody has at present
		}
		shown[port.Service] = true
		row := Service{
			Service: serviceName(t, id), PortName: port.Port, ID: id, Backends: int(r.Count),
			Generation: r.Generation, Frontends: []string{}, Problem: string(t.Problems[port.Service]),
		}
		if named {
			row.Protocol, row.Family = port.Protocol.String(), port.Family.String()
		}
		slices.SortFunc(dialled[id], lb.FrontendKey.Compare)
		for _, key := range dialled[id] {
			row.Frontends = append(row.Frontends, netip.AddrPortFrom(key.VIP, key.Port).String())
		}
		entries = append(entries, entry{port, row})
	}
	for name, problem := range t.Problems {
		if !shown[name] {
			row := Service{Service: name.String(), Frontends: []string{}, Problem: string(problem)}
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

// Frontends returns a row for each frontend that leads to a service, sorted by
// VIP (IPv4 first), port, protocol name. Wildcards lead to none: see Refused.
func Frontends(t lb.Tables) []Frontend {
	rows := make([]Frontend, 0, len(t.Frontends))
	for key, frontend := range t.Frontends {
		if key.IsWildcard() {
			continue
		}
		row := Frontend{
			Service:  serviceName(t, frontend.Service),
			PortName: t.Names[frontend.Service].Port,
			VIP:      key.VIP,
			Port:     key.Port,
			Protocol: key.Protocol.String(),
			Type:     frontend.Kind.String(),
			Backends: []Endpoint{},
		}
		backends := t.Backends(t.Services[frontend.Service])
		slices.SortFunc(backends, lb.Backend.Compare)
		for _, b := range backends {
			row.Backends = append(row.Backends, Endpoint{b.Addr, b.Port})
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b Frontend) int {
		return cmp.Or(a.VIP.Compare(b.VIP), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	return rows
}

// Refused returns the VIPs whose undefined ports are refused, sorted.
func Refused(t lb.Tables) []netip.Addr {
	var vips []netip.Addr
	for key := range t.Frontends {
		if key.IsWildcard() {
			vips = append(vips, key.VIP)
		}
	}
	slices.SortFunc(vips, netip.Addr.Compare)
	return vips
}

// Backends returns a row for each backend that some service sends to, sorted by
// address (IPv4 first), port.
func Backends(t lb.Tables) []Backend {
	users := map[lb.Backend]map[ServiceRef]struct{}{}
	for id, r := range t.Services {
		ref := ServiceRef{Service: serviceName(t, id)}
		if port, named := t.Names[id]; named {
			ref.PortName, ref.Protocol = port.Port, port.Protocol.String()
		}
		for _, b := range t.Backends(r) {
			if users[b] == nil {
				users[b] = map[ServiceRef]struct{}{}
			}
			users[b][ref] = struct{}{}
		}
	}
	rows := make([]Backend, 0, len(users))
	for _, b := range slices.SortedFunc(maps.Keys(users), lb.Backend.Compare) {
		services := slices.SortedFunc(maps.Keys(users[b]), ServiceRef.compare)
		rows = append(rows, Backend{b.Addr, b.Port, services})
	}
	return rows
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
