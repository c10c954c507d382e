// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// String returns the tables as text, the same for equal tables: a section for
// each table that has rows, a line for each row, rows in the order of their
// keys.
func (t Tables) String() string {
	var b strings.Builder
	section(&b, "frontends", t.Frontends, FrontendKey.Compare, func(k FrontendKey, f Frontend) string {
		if f.Service == NoService {
			return fmt.Sprintf("%v %v -> none", k, f.Kind)
		}
		return fmt.Sprintf("%v %v -> %d", k, f.Kind, f.Service)
	})
	section(&b, "names", t.Names, cmp.Compare, func(id ServiceID, name ServicePort) string {
		return fmt.Sprintf("%d %v", id, name)
	})
	section(&b, "services", t.Services, cmp.Compare, func(id ServiceID, r ServiceRow) string { return r.line(id) })
	section(&b, "slots", t.Slots, cmp.Compare, func(i uint32, backend Backend) string {
		return fmt.Sprintf("%d %v", i, backend)
	})
	section(&b, "members", t.Members, Member.Compare, func(m Member, _ struct{}) string {
		return fmt.Sprintf("%d %v %v", m.Service, m.Use, m.Backend)
	})
	section(&b, "sources", t.Sources, Source.Compare, func(src Source, _ struct{}) string {
		return fmt.Sprintf("%d %v", src.Service, src.Prefix)
	})
	section(&b, "node addresses", t.NodeAddresses, netip.Addr.Compare, func(a netip.Addr, kind NodeAddress) string {
		return fmt.Sprintf("%v %v", a, kind)
	})
	section(&b, "service CIDRs", t.ServiceCIDRs, netip.Prefix.Compare, func(p netip.Prefix, _ struct{}) string {
		return p.String()
	})
	section(&b, "problems", t.Problems, Name.Compare, func(name Name, p Problem) string {
		return fmt.Sprintf("%v: %s", name, p)
	})
	return b.String()
}

func section[K comparable, V any](b *strings.Builder, title string, rows map[K]V,
	compare func(K, K) int, line func(K, V) string) {
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(b, "%s:\n", title)
	for _, key := range slices.SortedFunc(maps.Keys(rows), compare) {
		fmt.Fprintf(b, "  %s\n", line(key, rows[key]))
	}
}

// line says what the row of a service holds. Sides that agree share a line's part.
func (r ServiceRow) line(id ServiceID) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d", id)
	if r.Sides[SideInside] == r.Sides[SideClusterIP] && r.Sides[SideOutside] == r.Sides[SideClusterIP] {
		fmt.Fprintf(&b, " %v", r.Sides[SideClusterIP])
	} else {
		for i, rng := range r.Sides {
			fmt.Fprintf(&b, " %v{%v}", Side(i), rng)
		}
	}
	if r.Affinity > 0 {
		fmt.Fprintf(&b, " affinity=%ds", r.Affinity)
	}
	if r.Restricted {
		fmt.Fprintf(&b, " restricted node=%v", r.NodeAllowed)
	}
	if r.OutsideLocal {
		b.WriteString(" outside-local")
	}
	return b.String()
}

// String returns "base=… count=… generation=…", for an empty range that has
// backends elsewhere "elsewhere generation=…".
func (r Range) String() string {
	if r.Elsewhere() {
		return fmt.Sprintf("elsewhere generation=%d", r.Generation)
	}
	return fmt.Sprintf("base=%d count=%d generation=%d", r.Base, r.Count, r.Generation)
}
