// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Kinds returns what Print can show.
func Kinds() []string {
	return []string{
		"services", "frontends", "backends", "affinity", kindFlows, "addresses", "devices", "counters",
	}
}

// kindFlows is the one kind that PrintFlows shows.
const kindFlows = "flows"

// Formats returns how Print can show it.
func Formats() []string { return []string{"table", "wide", "json", "yaml"} }

// Print writes one of Kinds, as the maps pinned below root have it, in one of
// Formats. The error wraps datapath.ErrNoDatapath when nothing is pinned there.
func Print(w io.Writer, root, kind, format string) error {
	return printKind(w, root, kind, format, FlowFilter{})
}

func printKind(w io.Writer, root, kind, format string, filter FlowFilter) error {
	view, err := datapath.OpenView(root)
	if err != nil {
		return err
	}
	defer view.Close()
	c, err := read(view, kind)
	if err != nil {
		return err
	}
	c.flows = slices.DeleteFunc(c.flows, func(f datapath.Flow) bool { return !filter.shows(&f) })
	return c.print(w, kind, format)
}

// contents is what the maps hold that a kind needs.
type contents struct {
	tables       lb.Tables
	affinities   []datapath.AffinityEntry
	nodeNetns    uint64
	flows        []datapath.Flow
	devices      []datapath.Device
	deviceNames  map[uint32]string
	clusterCIDRs []netip.Prefix
	counters     []datapath.Counter
}

func read(view *datapath.View, kind string) (c contents, err error) {
	switch kind {
	case "counters":
		c.counters, err = view.Counters()
		return c, err
	case "affinity", kindFlows, "devices":
		var state datapath.AgentState
		if state, err = view.AgentState(); err != nil {
			return c, err
		}
		c.nodeNetns = state.NetnsCookie
	}
	switch kind {
	case "devices":
		c.deviceNames = deviceNames(c.nodeNetns)
		c.devices, err = view.Devices()
		return c, err
	case "affinity":
		// Before the tables: a backend that has come since would look like one
		// that has left.
		c.affinities, err = view.Affinities()
	case kindFlows:
		c.deviceNames = deviceNames(c.nodeNetns)
		c.flows, err = view.Flows()
	case "addresses":
		c.clusterCIDRs, err = view.ClusterCIDRs()
	}
	if err != nil {
		return c, err
	}
	c.tables, err = load(view.Load)
	return c, err
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

func (c contents) print(w io.Writer, kind, format string) error {
	wide := format == "wide"
	switch kind {
	case "services":
		rows := Services(c.tables)
		return render(w, format, rows, func() string { return servicesTable(rows, wide).String() })
	case "frontends":
		rows := Frontends(c.tables)
		return render(w, format, rows, func() string { return frontendsTable(rows, wildcards(c.tables), wide).String() })
	case "backends":
		rows := Backends(c.tables)
		return render(w, format, rows, func() string { return backendsTable(rows, wide).String() })
	case "affinity":
		rows := Affinities(c.tables, c.affinities, c.nodeNetns)
		return render(w, format, rows, func() string { return affinityTable(rows, wide).String() })
	case kindFlows:
		rows := Flows(c.tables, c.flows, c.deviceNames)
		return render(w, format, rows, func() string { return flowsTable(rows, wide).String() })
	case "devices":
		rows := Devices(c.devices, c.deviceNames)
		return render(w, format, rows, func() string { return devicesTable(rows).String() })
	case "addresses":
		rows := Addresses(c.tables, c.clusterCIDRs)
		return render(w, format, rows, func() string { return addressesTable(rows).String() })
	case "counters":
		rows := make([]Counter, 0, len(c.counters))
		for _, counter := range c.counters {
			rows = append(rows, Counter{counter.Name, counter.Value})
		}
		return render(w, format, rows, func() string { return countersTable(rows).String() })
	default:
		return fmt.Errorf("inspect %q: want one of %s", kind, strings.Join(Kinds(), ", "))
	}
}

// render writes what in the given format; text returns it for people.
func render(w io.Writer, format string, what any, text func() string) error {
	switch format {
	case "table", "wide":
		_, err := io.WriteString(w, text())
		return err
	case "json":
		return WriteJSON(w, what)
	case "yaml":
		out, err := yaml.Marshal(what)
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
	t := &table{columns: columns("SERVICE", "PORT NAME", "PROTOCOL", "FAMILY", "FRONTENDS")}
	t.columns = append(t.columns, numbers("BACKENDS", "EXTERNAL")...)
	if wide {
		t.columns = append(t.columns, numbers("INSIDE", "AFFINITY")...)
		t.columns = append(t.columns, columns("LOAD-BALANCER CLIENTS")...)
		t.columns = append(t.columns, numbers("ID", "GENERATIONS")...)
	}
	t.columns = append(t.columns, columns("PROBLEM")...)
	for _, s := range rows {
		inside, external := "", ""
		if s.outside {
			inside, external = strconv.Itoa(s.Sides[lb.SideInside].Backends), strconv.Itoa(s.Sides[lb.SideOutside].Backends)
		}
		cells := []string{
			s.Service, s.PortName, s.Protocol, s.Family, list(s.Frontends, wide), strconv.Itoa(s.Backends), external,
		}
		if wide {
			cells = append(cells, inside, timeout(s.AffinitySeconds), clients(s.Restricted, s.NodeAllowed, text(s.SourceRanges)),
				strconv.FormatUint(uint64(s.ID), 10), generations(s.Sides))
		}
		t.add(append(cells, s.Problem)...)
	}
	return t
}

// timeout shows the timeout of an affinity, "" for none.
func timeout(seconds uint32) string {
	if seconds == 0 {
		return ""
	}
	return fmt.Sprintf("%ds", seconds)
}

// clients shows who may use load-balancer IPs, "" for everybody.
func clients(restricted, node bool, ranges []string) string {
	if !restricted {
		return ""
	}
	if node {
		ranges = append([]string{clientNode}, ranges...)
	}
	return list(ranges, true)
}

// generations shows those of all sides, once when they are the same.
func generations(sides []Side) string {
	var out []string
	for _, s := range sides {
		out = append(out, strconv.FormatUint(uint64(s.Generation), 10))
	}
	if once := slices.Compact(slices.Clone(out)); len(once) == 1 {
		out = once
	}
	return strings.Join(out, "/")
}

// frontendsTable adds, when it is wide, a row for what holds for all ports of a
// VIP that have none.
func frontendsTable(rows []Frontend, others []wildcard, wide bool) *table {
	t := &table{columns: columns("VIP")}
	t.columns = append(t.columns, numbers("PORT")...)
	t.columns = append(t.columns, columns("PROTOCOL", "TYPE", "SERVICE", "PORT NAME", "BACKENDS", "EXTERNAL BACKENDS")...)
	if wide {
		t.columns = append(t.columns, numbers("AFFINITY")...)
		t.columns = append(t.columns, columns("CLIENTS")...)
	}
	for _, f := range rows {
		external := ""
		switch {
		case f.ExternalBackends == nil:
		case len(f.Backends) > 0 && slices.Equal(f.Backends, f.ExternalBackends):
			external = "(the same)"
		default:
			external = f.backends(f.ExternalBackends, f.kind.Outside(), wide)
		}
		cells := []string{
			f.VIP.String(), strconv.Itoa(int(f.Port)), f.Protocol, f.Type, f.Service, f.PortName,
			f.backends(f.Backends, f.kind.Inside(), wide), external,
		}
		if wide {
			restricted := f.kind == lb.KindLoadBalancer && f.row.Restricted
			cells = append(cells, timeout(f.row.Affinity), clients(restricted, f.row.NodeAllowed, text(f.sources)))
		}
		t.add(cells...)
	}
	if wide {
		for _, other := range others {
			what := "(undefined ports are refused)"
			if other.kind == lb.KindForeign {
				what = "(left to another proxy)"
			}
			t.add(other.vip.String(), "*", "*", other.kind.String(), "", "", what, "", "", "")
		}
	}
	return t
}

// backends shows the backends of a side or that there are none, and why.
func (f Frontend) backends(of []Endpoint, side lb.Side, wide bool) string {
	switch {
	case len(of) > 0:
		return list(text(of), wide)
	case !wide:
		return "(none)"
	case f.row.Sides[side].Elsewhere():
		return "(none here: dropped)"
	default:
		return "(none: refused)"
	}
}

func backendsTable(rows []Backend, wide bool) *table {
	t := &table{columns: []column{{title: "ADDRESS"}, {title: "PORT", number: true}, {title: "SERVICES"}}}
	for _, b := range rows {
		t.add(b.Address.String(), strconv.Itoa(int(b.Port)), list(text(b.Services), wide))
	}
	return t
}

func affinityTable(rows []Affinity, wide bool) *table {
	t := &table{columns: columns("CLIENT", "SERVICE", "PORT NAME", "PROTOCOL", "BACKEND")}
	t.columns = append(t.columns, numbers("AGE")...)
	if wide {
		t.columns = append(t.columns, numbers("NETNS COOKIE")...)
	}
	for _, a := range rows {
		cells := []string{a.Client, a.Service, a.PortName, a.Protocol, a.Backend.String(), age(a.AgeSeconds)}
		if wide {
			cells = append(cells, strconv.FormatUint(a.Netns, 10))
		}
		t.add(cells...)
	}
	return t
}

func age(seconds int64) string { return (time.Duration(seconds) * time.Second).String() }

func addressesTable(rows []Address) *table {
	meanings := map[string]string{
		UseNodePorts:         "NodePorts",
		UseLoopbackNodePorts: "NodePorts, for processes on the node",
		UseServiceCIDR:       "service range: what no Service has in it is dropped",
		UseClusterCIDR:       "cluster range: clients in it count as inside ones",
	}
	t := &table{columns: columns("ADDRESS", "MEANING")}
	for _, a := range rows {
		t.add(a.Address, meanings[a.Use])
	}
	return t
}

func countersTable(rows []Counter) *table {
	t := &table{columns: []column{{title: "COUNTER"}, {title: "VALUE", number: true}}}
	for _, c := range rows {
		t.add(c.Name, strconv.FormatUint(c.Value, 10))
	}
	return t
}

// text returns items as they are shown.
func text[T fmt.Stringer](items []T) []string {
	out := make([]string, 0, len(items))
	for _, item := range items {
		out = append(out, item.String())
	}
	return out
}

// narrowList is how many items of a list a table shows that is not wide.
const narrowList = 3

func list(items []string, wide bool) string {
	if len(items) <= narrowList || wide {
		return strings.Join(items, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(items[:narrowList], ", "), len(items)-narrowList)
}
