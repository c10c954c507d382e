// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"fmt"
	"maps"
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
	section(&b, "services", t.Services, cmp.Compare, func(id ServiceID, r Range) string {
		return fmt.Sprintf("%d base=%d count=%d generation=%d", id, r.Base, r.Count, r.Generation)
	})
	section(&b, "slots", t.Slots, cmp.Compare, func(i uint32, backend Backend) string {
		return fmt.Sprintf("%d %v", i, backend)
	})
	section(&b, "members", t.Members, Member.Compare, func(m Member, _ struct{}) string {
		return fmt.Sprintf("%d %v", m.Service, m.Backend)
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
