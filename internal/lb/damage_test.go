// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDamagesNameTablesAndRows(t *testing.T) {
	web := ServicePort{Service: Name{Namespace: "default", Name: "web"}, Port: "http", Protocol: TCP, Family: IPv4}
	key := func(last byte) FrontendKey {
		return FrontendKey{VIP: netip.AddrFrom4([4]byte{10, 96, 0, last}), Port: 80, Protocol: TCP}
	}
	backend := Backend{Addr: netip.MustParseAddr("10.244.0.7"), Port: 8080}
	sound := func() Tables {
		tables := NewTables()
		tables.Names[3] = web
		tables.Services[3] = ServiceRow{}
		tables.Slots[5] = backend
		tables.Frontends[key(1)] = Frontend{Service: 3, Kind: KindClusterIP}
		tables.Members[Member{Service: 3, Backend: backend}] = struct{}{}
		tables.Sources[Source{Service: 3, Prefix: netip.MustParsePrefix("192.0.2.0/24")}] = struct{}{}
		tables.NodeAddresses[backend.Addr] = NodeAddressOpen
		tables.ServiceCIDRs[netip.MustParsePrefix("10.96.0.0/16")] = struct{}{}
		tables.Problems[web.Service] = "too many"
		return tables
	}
	for _, tt := range []struct {
		name   string
		damage func(Tables)
		want   []Damage
	}{
		{"no damage", func(Tables) {}, nil},
		{"a frontend is gone", func(t Tables) { clear(t.Frontends) },
			[]Damage{{"frontends", 1, []string{"10.96.0.1:80/TCP of default/web:http/TCP/IPv4"}}}},
		{"a frontend nobody knows has come", func(t Tables) { t.Frontends[key(2)] = Frontend{Service: 9, Kind: KindNodePort} },
			[]Damage{{"frontends", 1, []string{"10.96.0.2:80/TCP of service ID 9"}}}},
		{"a wildcard belongs to no service", func(t Tables) { t.Frontends[FrontendKey{VIP: key(1).VIP}] = Frontend{Kind: KindClusterIP} },
			[]Damage{{"frontends", 1, []string{"10.96.0.1:*"}}}},
		{"a row has changed", func(t Tables) { t.Services[3] = ServiceRow{Affinity: 1} },
			[]Damage{{"services", 1, []string{"default/web:http/TCP/IPv4"}}}},
		{"one row in every table", func(t Tables) {
			clear(t.Members)
			clear(t.Slots)
			clear(t.Sources)
			clear(t.Services)
			clear(t.Names)
			clear(t.Frontends)
			clear(t.NodeAddresses)
			clear(t.ServiceCIDRs)
			clear(t.Problems)
		}, []Damage{
			{"members", 1, []string{"10.244.0.7:8080 of default/web:http/TCP/IPv4"}},
			{"slots", 1, []string{"5 for 10.244.0.7:8080"}},
			{"source_ranges", 1, []string{"192.0.2.0/24 of default/web:http/TCP/IPv4"}},
			{"services", 1, []string{"default/web:http/TCP/IPv4"}},
			{"names", 1, []string{"default/web:http/TCP/IPv4"}},
			{"frontends", 1, []string{"10.96.0.1:80/TCP of default/web:http/TCP/IPv4"}},
			{"node_addresses", 1, []string{"10.244.0.7"}},
			{"service_cidrs", 1, []string{"10.96.0.0/16"}},
			{"problems", 1, []string{"default/web"}},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			held := sound()
			tt.damage(held)
			got := held.Damages(sound())
			if diff := cmp.Diff(tt.want, got, cmp.Transformer("none", func(d []Damage) []Damage {
				if len(d) == 0 {
					return nil
				}
				return d
			})); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			rows := 0
			for _, d := range got {
				rows += d.Rows
			}
			if n := held.Differences(sound()); n != rows {
				t.Errorf("%d rows are named, %d differ", rows, n)
			}
		})
	}
	t.Run("of many rows some are named", func(t *testing.T) {
		held := sound()
		for i := range 100 {
			held.Problems[Name{Namespace: "default", Name: fmt.Sprint(i)}] = "strange"
		}
		if got := held.Damages(sound()); len(got) != 1 || got[0].Rows != 100 || len(got[0].Examples) != damageExamples {
			t.Errorf("%+v", got)
		}
	})
}
