// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

var update = flag.Bool("update", false, "write the golden files")

// TestGolden runs the steps of each file in testdata and compares what they
// print with what stands after them. A file is pairs of sections: "NAME" has
// commands, one a line, and "NAME: out" what they print. The commands are:
//
//	service NAME IP[,IP] [FIELD=VALUE]... [PORTNAME:NUMBER/PROTOCOL[:NODEPORT]]...
//	    fields: created (a number), lb and external (addresses), sources,
//	    affinity (seconds), internal and external-policy (local), foreign (yes)
//	slice NAME SERVICE FAMILY PORTNAME:NUMBER/PROTOCOL[,...] [ADDR[=CONDITIONS]]...
//	    CONDITIONS are letters: r ready, s serving, t terminating, e elsewhere;
//	    "rs" if none. All others are on this node
//	gone service|slice NAME
//	addresses [ADDR]...   of the node
//	loopback on|off       for NodePorts
//	cidrs [CIDR]...       of services
//	fail OPERATION   every call of it from now on
//	lose FRONTEND    from the kernel, behind the reconciler's back
//	heal             nothing fails any more
//	apply, apply-all, retry, tables
//	restart          a new reconciler that adopts the kernel's tables
//	free             the IDs that sockets do not remember; none is remembered
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) { runGolden(t, file) })
	}
}

func runGolden(t *testing.T, file string) {
	archive, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	outputs := map[string]string{}
	for _, f := range archive.Files {
		if strings.HasSuffix(f.Name, ": out") {
			outputs[f.Name] = string(f.Data)
		}
	}
	s := &script{world: newWorld(t, 0)}
	s.kernel.log = func(line string) { fmt.Fprintln(&s.out, line) }
	written := &txtar.Archive{Comment: archive.Comment}
	for _, f := range archive.Files {
		if strings.HasSuffix(f.Name, ": out") {
			continue
		}
		s.out.Reset()
		for line := range strings.Lines(string(f.Data)) {
			if err := s.run(strings.Fields(line)); err != nil {
				t.Fatalf("%s: %s: %q: %v", file, f.Name, strings.TrimSpace(line), err)
			}
		}
		name := f.Name + ": out"
		written.Files = append(written.Files, f, txtar.File{Name: name, Data: []byte(s.out.String())})
		if diff := cmp.Diff(outputs[name], s.out.String()); diff != "" && !*update {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		delete(outputs, name)
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(written), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for name := range outputs {
		t.Errorf("nothing makes section %q", name)
	}
}

// script is a world that commands work on.
type script struct {
	*world
	out strings.Builder
}

func (s *script) run(words []string) error {
	if len(words) == 0 {
		return nil
	}
	args := words[1:]
	switch words[0] {
	case "service":
		return s.setService(args)
	case "slice":
		return s.setSlice(args)
	case "gone":
		if args[0] == "service" {
			s.store.DeleteService(nsName(args[1]))
		} else {
			s.store.DeleteSlice(nsName(args[1]))
		}
	case "addresses":
		return s.setAddresses(args)
	case "loopback":
		s.store.SetNodePorts(lb.NodePorts{Loopback: args[0] == "on"})
	case "cidrs":
		return s.setCIDRs(args)
	case "fail":
		s.kernel.fails = func(op string, _ int) bool { return op == args[0] }
	case "heal":
		s.kernel.fails = func(string, int) bool { return false }
	case "lose":
		maps.DeleteFunc(s.kernel.frontends, func(key lb.FrontendKey, _ lb.Frontend) bool { return key.String() == args[0] })
		s.kernel.damage()
	case "apply":
		s.print(s.apply())
	case "apply-all":
		s.print(s.applyAll())
	case "retry":
		s.print(s.noteResult(s.rec.Retry()))
	case "tables":
		s.out.WriteString(s.kernel.load().String())
	case "restart":
		s.restart()
	case "free":
		clear(s.kernel.remembered)
		s.rec.FreeIDs(s.kernel.remember)
	default:
		return fmt.Errorf("unknown command")
	}
	return nil
}

func (s *script) print(res reconciler.Result) {
	fmt.Fprintf(&s.out, "=> %d writes, %d deletes", res.Writes, res.Deletes)
	if res.Stranded {
		fmt.Fprint(&s.out, ", stranded")
	}
	if res.Unremembered {
		fmt.Fprint(&s.out, ", unremembered")
	}
	if len(res.Answered) > 0 {
		fmt.Fprintf(&s.out, ", answered %v", res.Answered)
	}
	if s.rec.Pending() {
		fmt.Fprint(&s.out, ", pending")
	}
	fmt.Fprintln(&s.out)
	for _, name := range slices.SortedFunc(maps.Keys(res.Failed), lb.Name.Compare) {
		fmt.Fprintf(&s.out, "   %v: %v\n", name, res.Failed[name])
	}
}

func (s *script) setAddresses(args []string) error {
	addrs, err := parseAll(args, netip.ParseAddr)
	s.store.SetLocalAddresses(addrs)
	return err
}

func (s *script) setCIDRs(args []string) error {
	cidrs, err := parseAll(args, netip.ParsePrefix)
	s.store.SetServiceCIDRs(cidrs)
	return err
}

func parseAll[T any](texts []string, parse func(string) (T, error)) ([]T, error) {
	var out []T
	for _, text := range texts {
		x, err := parse(text)
		if err != nil {
			return nil, err
		}
		out = append(out, x)
	}
	return out, nil
}

func (s *script) setService(args []string) error {
	svc := lb.Service{Name: nsName(args[0])}
	var err error
	if svc.ClusterIPs, err = parseAll(strings.Split(args[1], ","), netip.ParseAddr); err != nil {
		return err
	}
	for _, arg := range args[2:] {
		if field, value, ok := strings.Cut(arg, "="); ok {
			if err := setField(&svc, field, value); err != nil {
				return err
			}
			continue
		}
		text, nodePort := arg, "0"
		if strings.Count(arg, ":") == 2 {
			i := strings.LastIndex(arg, ":")
			text, nodePort = arg[:i], arg[i+1:]
		}
		port, err := strconv.ParseUint(nodePort, 10, 16)
		if err != nil {
			return err
		}
		name, protocol, number, err := parsePort(text)
		if err != nil {
			return err
		}
		svc.Ports = append(svc.Ports, lb.Port{Name: name, Protocol: protocol, Number: number, NodePort: uint16(port)})
	}
	s.store.SetService(svc)
	return nil
}

func setField(svc *lb.Service, field, value string) (err error) {
	number, notNumber := strconv.ParseUint(value, 10, 32)
	list := strings.Split(value, ",")
	switch field {
	case "created":
		svc.Created, err = time.Unix(int64(number), 0), notNumber
	case "affinity":
		svc.Affinity, err = uint32(number), notNumber
	case "lb":
		svc.LoadBalancerIPs, err = parseAll(list, netip.ParseAddr)
	case "external":
		svc.ExternalIPs, err = parseAll(list, netip.ParseAddr)
	case "sources":
		svc.Sources, err = parseAll(list, netip.ParsePrefix)
	case "internal":
		svc.InternalLocal = value == "local"
	case "external-policy":
		svc.ExternalLocal = value == "local"
	case "foreign":
		svc.Foreign = value == "yes"
	default:
		err = fmt.Errorf("unknown field %q", field)
	}
	return err
}

func (s *script) setSlice(args []string) error {
	slice := lb.Slice{Name: nsName(args[0]), Service: args[1], Family: lb.IPv4}
	if args[2] == "IPv6" {
		slice.Family = lb.IPv6
	}
	for arg := range strings.SplitSeq(args[3], ",") {
		name, protocol, number, err := parsePort(arg)
		if err != nil {
			return err
		}
		slice.Ports = append(slice.Ports, lb.SlicePort{Name: name, Protocol: protocol, Number: number})
	}
	for _, arg := range args[4:] {
		addr, conditions, ok := strings.Cut(arg, "=")
		if !ok {
			conditions = "rs"
		}
		e := lb.Endpoint{
			Addr:        netip.MustParseAddr(addr),
			Ready:       strings.Contains(conditions, "r"),
			Serving:     strings.Contains(conditions, "s"),
			Terminating: strings.Contains(conditions, "t"),
			Node:        storeConfig.NodeName,
		}
		if strings.Contains(conditions, "e") {
			e.Node = "elsewhere"
		}
		slice.Endpoints = append(slice.Endpoints, e)
	}
	s.store.SetSlice(slice)
	return nil
}

// parsePort reads NAME:NUMBER/PROTOCOL.
func parsePort(text string) (name string, protocol lb.Protocol, number uint16, err error) {
	name, rest, _ := strings.Cut(text, ":")
	digits, kind, _ := strings.Cut(rest, "/")
	n, err := strconv.ParseUint(digits, 10, 16)
	protocol, ok := lb.ParseProtocol(kind)
	if err != nil || !ok {
		return "", 0, 0, fmt.Errorf("bad port %q", text)
	}
	return name, protocol, uint16(n), nil
}
