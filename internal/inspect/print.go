// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Kinds returns what Print can show.
func Kinds() []string { return []string{"services", "frontends", "backends", "counters"} }

// Formats returns how Print can show it.
func Formats() []string { return []string{"table", "wide", "json", "yaml"} }

// Print writes one of Kinds, as the maps pinned below root have it, in one of
// Formats. The error wraps datapath.ErrNoDatapath when nothing is pinned there.
func Print(w io.Writer, root, kind, format string) error {
	view, err := datapath.OpenView(root)
	if err != nil {
		return err
	}
	defer view.Close()
	if kind == "counters" {
		counters, err := view.Counters()
		if err != nil {
			return err
		}
		return printCounters(w, counters, format)
	}
	tables, err := load(view.Load)
	if err != nil {
		return err
	}
	return printTables(w, tables, kind, format)
}

// loadTries is how often load reads the tables before it takes what it gets.
const loadTries = 3

// load reads the tables again when a Service has visibly gone while they were
// read: a frontend then leads to a service without a name.
func load(read func() (lb.Tables, error)) (lb.Tables, error) {
	for try := 1; ; try++ {
		t, err := read()
		if err != nil || try == loadTries || complete(t) {
			return t, err
		}
	}
}

func complete(t lb.Tables) bool {
	for key, frontend := range t.Frontends {
		if _, named := t.Names[frontend.Service]; !named && !key.IsWildcard() {
			return false
		}
	}
	return true
}

func printTables(w io.Writer, t lb.Tables, kind, format string) error {
	wide := format == "wide"
	switch kind {
	case "services":
		rows := Services(t)
		return render(w, format, rows, func() *table { return servicesTable(rows, wide) })
	case "frontends":
		rows := Frontends(t)
		return render(w, format, rows, func() *table { return frontendsTable(rows, Refused(t), wide) })
	case "backends":
		rows := Backends(t)
		return render(w, format, rows, func() *table { return backendsTable(rows, wide) })
	default:
		return fmt.Errorf("inspect %q: want one of %s", kind, strings.Join(Kinds(), ", "))
	}
}

func printCounters(w io.Writer, counters []datapath.Counter, format string) error {
	rows := make([]Counter, 0, len(counters))
	for _, c := range counters {
		rows = append(rows, Counter{c.Name, c.Value})
	}
	return render(w, format, rows, func() *table {
		t := &table{columns: []column{{title: "COUNTER"}, {title: "VALUE", number: true}}}
		for _, c := range rows {
			t.add(c.Name, strconv.FormatUint(c.Value, 10))
		}
		return t
	})
}

// render writes rows in the given format.
func render(w io.Writer, format string, rows any, tabular func() *table) error {
	switch format {
	case "table", "wide":
		return tabular().write(w)
	case "json":
		return WriteJSON(w, rows)
	case "yaml":
		out, err := yaml.Marshal(rows)
		if err != nil {
			return fmt.Errorf("encode YAML: %w", err)
		}
		_, err = w.Write(out)
		return err
	default:
		return fmt.Errorf("output format %q: want one of %s", format, strings.Join(Formats(), ", "))
	}
}

// WriteJSON writes v indented and with a newline at its end.
func WriteJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(v); err != nil {
		return fmt.Errorf("write JSON: %w", err)
	}
	return nil
}

func servicesTable(rows []Service, wide bool) *table {
	t := &table{columns: []column{
		{title: "SERVICE"}, {title: "PORT NAME"}, {title: "PROTOCOL"}, {title: "FAMILY"},
		{title: "FRONTENDS"}, {title: "BACKENDS", number: true},
	}}
	if wide {
		t.columns = append(t.columns, column{title: "ID", number: true}, column{title: "GENERATION", number: true})
	}
	t.columns = append(t.columns, column{title: "PROBLEM"})
	for _, s := range rows {
		cells := []string{s.Service, s.PortName, s.Protocol, s.Family, list(s.Frontends, wide), strconv.Itoa(s.Backends)}
		if wide {
			cells = append(cells, strconv.FormatUint(uint64(s.ID), 10), strconv.FormatUint(uint64(s.Generation), 10))
		}
		t.add(append(cells, s.Problem)...)
	}
	return t
}

// frontendsTable adds, when it is wide, a row for each VIP that refuses its
// undefined ports.
func frontendsTable(rows []Frontend, refused []netip.Addr, wide bool) *table {
	t := &table{columns: []column{
		{title: "VIP"}, {title: "PORT", number: true}, {title: "PROTOCOL"}, {title: "TYPE"},
		{title: "SERVICE"}, {title: "PORT NAME"}, {title: "BACKENDS"},
	}}
	for _, f := range rows {
		backends := make([]string, 0, len(f.Backends))
		for _, b := range f.Backends {
			backends = append(backends, netip.AddrPortFrom(b.Address, b.Port).String())
		}
		if len(backends) == 0 {
			backends = append(backends, "(none)")
		}
		t.add(f.VIP.String(), strconv.Itoa(int(f.Port)), f.Protocol, f.Type, f.Service, f.PortName, list(backends, wide))
	}
	if wide {
		for _, vip := range refused {
			t.add(vip.String(), "*", "*", lb.KindClusterIP.String(), "", "", "(undefined ports are refused)")
		}
	}
	return t
}

func backendsTable(rows []Backend, wide bool) *table {
	t := &table{columns: []column{{title: "ADDRESS"}, {title: "PORT", number: true}, {title: "SERVICES"}}}
	for _, b := range rows {
		services := make([]string, 0, len(b.Services))
		for _, s := range b.Services {
			services = append(services, s.String())
		}
		t.add(b.Address.String(), strconv.Itoa(int(b.Port)), list(services, wide))
	}
	return t
}

// narrowList is how many items of a list a table shows that is not wide.
const narrowList = 3

func list(items []string, wide bool) string {
	if len(items) <= narrowList || wide {
		return strings.Join(items, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(items[:narrowList], ", "), len(items)-narrowList)
}
