// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

var update = flag.Bool("update", false, "write the golden files")

// fixture is a small cluster: a Service of two families, one with two ports of
// one number, one without backends, one with more than a narrow table shows,
// one with a problem and one that has nothing but a problem; and what a reader
// can meet while the agent writes: a frontend and a range without a name, an ID
// that nobody has.
func fixture() lb.Tables {
	t := lb.NewTables()
	base := uint32(0)
	add := func(id lb.ServiceID, name lb.ServicePort, generation uint32, vip string, backends ...string) {
		t.Names[id] = name
		t.Services[id] = lb.Range{Base: base, Count: uint16(len(backends)), Generation: generation}
		for _, b := range backends {
			ap := netip.MustParseAddrPort(b)
			t.Slots[base] = lb.Backend{Addr: ap.Addr(), Port: ap.Port()}
			base++
		}
		ap := netip.MustParseAddrPort(vip)
		key := lb.FrontendKey{VIP: ap.Addr(), Port: ap.Port(), Protocol: name.Protocol}
		t.Frontends[key] = lb.Frontend{Service: id, Kind: lb.KindClusterIP}
		t.Frontends[lb.FrontendKey{VIP: ap.Addr()}] = lb.Frontend{Kind: lb.KindClusterIP}
	}
	port := func(ns, name, port string, protocol lb.Protocol, family lb.Family) lb.ServicePort {
		return lb.ServicePort{Service: lb.Name{Namespace: ns, Name: name}, Port: port, Protocol: protocol, Family: family}
	}
	add(1, port("default", "simpleservice", "", lb.TCP, lb.IPv4), 3, "10.96.0.80:80", "10.244.0.11:9876", "10.244.0.13:9876")
	add(2, port("default", "simpleservice", "", lb.TCP, lb.IPv6), 1, "[fd00:96::50]:80", "[fd00:244::b]:9876")
	add(3, port("kube-system", "kube-dns", "dns", lb.UDP, lb.IPv4), 7, "10.96.0.10:53", "10.244.0.3:53", "10.244.0.2:53")
	add(4, port("kube-system", "kube-dns", "dns-tcp", lb.TCP, lb.IPv4), 7, "10.96.0.10:53", "10.244.0.3:53", "10.244.0.2:53")
	add(5, port("default", "empty", "http", lb.TCP, lb.IPv4), 12, "10.96.0.9:8080")
	add(6, port("default", "large", "", lb.TCP, lb.IPv4), 2, "10.96.0.100:443",
		"10.244.1.1:443", "10.244.1.2:443", "10.244.1.3:443", "10.244.1.4:443", "10.244.1.5:443")
	// Both lead to a backend of another Service.
	add(7, port("default-two", "alias", "", lb.TCP, lb.IPv4), 1, "10.96.0.81:80", "10.244.0.11:9876")

	gone := lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.200"), Port: 80, Protocol: lb.TCP}
	t.Frontends[gone] = lb.Frontend{Service: 17, Kind: lb.KindClusterIP}
	t.Services[18] = lb.Range{Base: 0, Count: 1, Generation: 4}
	t.Services[19] = lb.Range{Generation: 9}
	t.Problems[lb.Name{Namespace: "default", Name: "large"}] = "10.96.0.80:80/TCP belongs to Service default/simpleservice"
	t.Problems[lb.Name{Namespace: "default", Name: "toomuch"}] = "update slots: no 70000 free slots in a row (raise --max-slots)"
	return t
}

func TestPrintGolden(t *testing.T) {
	tables := fixture()
	counters := []datapath.Counter{{Name: "connect_tcp_pass", Value: 7}, {Name: "connect_tcp_translate", Value: 12345678901}}
	for _, kind := range Kinds() {
		t.Run(kind, func(t *testing.T) {
			var out strings.Builder
			for _, format := range Formats() {
				fmt.Fprintf(&out, "== %s\n", format)
				var err error
				if kind == "counters" {
					err = printCounters(&out, counters, format)
				} else {
					err = printTables(&out, tables, kind, format)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			golden(t, kind, out.String())
		})
	}
}

func TestPrintNothing(t *testing.T) {
	for _, kind := range []string{"services", "frontends", "backends"} {
		for format, want := range map[string]string{"json": "[]\n", "yaml": "[]\n"} {
			var out strings.Builder
			if err := printTables(&out, lb.NewTables(), kind, format); err != nil {
				t.Fatal(err)
			}
			if out.String() != want {
				t.Errorf("%s as %s: got %q, want %q", kind, format, out.String(), want)
			}
		}
	}
}

func TestUnknownKindAndFormatAreErrors(t *testing.T) {
	var out strings.Builder
	if err := printTables(&out, fixture(), "pods", "table"); err == nil {
		t.Error("kind pods: no error")
	}
	if err := printTables(&out, fixture(), "services", "xml"); err == nil {
		t.Error("format xml: no error")
	}
	if out.Len() > 0 {
		t.Errorf("wrote %q", out.String())
	}
}

func TestLoadReadsAgainWhenAServiceGoesMeanwhile(t *testing.T) {
	torn := fixture()
	whole := fixture()
	for key, frontend := range torn.Frontends {
		if frontend.Service == 17 {
			delete(whole.Frontends, key)
		}
	}
	for _, test := range []struct {
		name  string
		reads []lb.Tables // the last one again and again
		want  int
	}{
		{name: "whole at once", reads: []lb.Tables{whole}, want: 1},
		{name: "whole the second time", reads: []lb.Tables{torn, whole}, want: 2},
		{name: "never whole", reads: []lb.Tables{torn}, want: loadTries},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := 0
			got, err := load(func() (lb.Tables, error) {
				n++
				return test.reads[min(n, len(test.reads))-1], nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if n != test.want {
				t.Errorf("read %d times, want %d", n, test.want)
			}
			if diff := cmp.Diff(test.reads[len(test.reads)-1].String(), got.String()); diff != "" {
				t.Errorf("tables (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNoDatapathIsToldApart(t *testing.T) {
	err := Print(&strings.Builder{}, filepath.Join(t.TempDir(), "nowhere"), "services", "table")
	if !errors.Is(err, datapath.ErrNoDatapath) {
		t.Errorf("got %v, want ErrNoDatapath", err)
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got), run with -update to accept:\n%s", file, diff)
	}
}
