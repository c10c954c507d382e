// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"net/netip"
	"testing"
)

func TestLosses(t *testing.T) {
	port := func(service, port string) ServicePort {
		return ServicePort{Service: Name{"ns", service}, Port: port, Protocol: TCP, Family: IPv4}
	}
	// In the tables a has two ports with a backend, b has one port with and one
	// without, c has none.
	tables := NewTables()
	full := ServiceRow{Sides: [Sides]Range{SideOutside: {Count: 1}}}
	for id, sp := range map[ServiceID]ServicePort{
		1: port("a", "http"), 2: port("a", "admin"), 3: port("b", "http"), 4: port("b", "admin"), 5: port("c", "http"),
	} {
		tables.Names[id], tables.Services[id] = sp, full
	}
	tables.Services[4], tables.Services[5] = ServiceRow{}, ServiceRow{}

	set := func(s *Store, service string, ports ...string) {
		svc := Service{Name: Name{"ns", service}, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}}
		for i, p := range []string{"http", "admin"} {
			svc.Ports = append(svc.Ports, Port{Name: p, Protocol: TCP, Number: uint16(80 + i)})
		}
		s.SetService(svc)
		slice := Slice{Name: svc.Name, Service: service, Family: IPv4,
			Endpoints: []Endpoint{{Addr: netip.MustParseAddr("10.244.0.1"), Ready: true}}}
		for _, p := range ports {
			slice.Ports = append(slice.Ports, SlicePort{Name: p, Protocol: TCP, Number: 8080})
		}
		s.SetSlice(slice)
	}
	for _, tt := range []struct {
		name string
		fill func(*Store)
		lost int
	}{
		{"nothing is lost when all is as it was", func(s *Store) { set(s, "a", "http", "admin"); set(s, "b", "http") }, 0},
		{"a Service that keeps a port is not lost", func(s *Store) { set(s, "a", "admin"); set(s, "b", "http") }, 0},
		{"one without endpoints is", func(s *Store) { set(s, "a"); set(s, "b", "http") }, 1},
		{"one that does not exist any more is", func(s *Store) { set(s, "b", "http") }, 1},
		{"one that leads nowhere cannot be lost", func(s *Store) { set(s, "c") }, 2},
		{"an empty store loses all", func(*Store) {}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewStore(Config{})
			tt.fill(s)
			lost, have := s.Losses(tables)
			if lost != tt.lost || have != 2 {
				t.Errorf("%d of %d lost, want %d of 2", lost, have, tt.lost)
			}
		})
	}
}
