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
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

var update = flag.Bool("update", false, "write the golden files")

// fixture is a small cluster: a Service of two families, one with two ports of
// one number, one without backends, one with more than a narrow table shows, one
// that is reached from outside, one whose policies leave nothing here, one with a
// problem and one that has nothing but a problem; and what a reader can meet while
// the agent writes: a frontend and a range without a name, an ID that nobody has.
func fixture() lb.Tables {
	f := tables{Tables: lb.NewTables()}
	f.add(1, port("default", "simpleservice", "", lb.TCP, lb.IPv4), 3, "10.96.0.80:80", "10.244.0.11:9876", "10.244.0.13:9876")
	f.add(2, port("default", "simpleservice", "", lb.TCP, lb.IPv6), 1, "[fd00:96::50]:80", "[fd00:244::b]:9876")
	f.add(3, port("kube-system", "kube-dns", "dns", lb.UDP, lb.IPv4), 7, "10.96.0.10:53", "10.244.0.3:53", "10.244.0.2:53")
	f.add(4, port("kube-system", "kube-dns", "dns-tcp", lb.TCP, lb.IPv4), 7, "10.96.0.10:53", "10.244.0.3:53", "10.244.0.2:53")
	f.add(5, port("default", "empty", "http", lb.TCP, lb.IPv4), 12, "10.96.0.9:8080")
	f.add(6, port("default", "large", "", lb.TCP, lb.IPv4), 2, "10.96.0.100:443",
		"10.244.1.1:443", "10.244.1.2:443", "10.244.1.3:443", "10.244.1.4:443", "10.244.1.5:443")
	// Both lead to a backend of another Service.
	f.add(7, port("default-two", "alias", "", lb.TCP, lb.IPv4), 1, "10.96.0.81:80", "10.244.0.11:9876")

	f.add(8, port("web", "shop", "https", lb.TCP, lb.IPv4), 4, "10.96.0.20:443", "10.244.0.21:8443", "10.244.2.22:8443")
	f.set(8, lb.SideOutside, 5, "10.244.0.21:8443")
	f.lead(8, lb.KindNodePort, "0.0.0.0:30443")
	f.lead(8, lb.KindLoadBalancer, "203.0.113.20:443")
	f.lead(8, lb.KindExternalIP, "198.51.100.20:443")
	f.option(8, lb.ServiceRow{Affinity: 10800, Restricted: true, NodeAllowed: true, OutsideLocal: true})
	for _, prefix := range []string{"192.0.2.0/24", "203.0.113.20/32"} {
		f.Sources[lb.Source{Service: 8, Prefix: netip.MustParsePrefix(prefix)}] = struct{}{}
	}
	f.add(9, port("web", "shop", "https", lb.TCP, lb.IPv6), 1, "[fd00:96::20]:443", "[fd00:244::21]:8443")
	f.lead(9, lb.KindNodePort, "[::]:30443")
	f.add(10, port("web", "elsewhere", "", lb.UDP, lb.IPv4), 2, "10.96.0.21:53", "10.244.2.23:53")
	f.set(10, lb.SideOutside, 3)
	f.lead(10, lb.KindNodePort, "0.0.0.0:30053")
	f.Frontends[lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.77")}] = lb.Frontend{Kind: lb.KindForeign}

	f.lead(17, lb.KindClusterIP, "10.96.0.200:80")
	f.Services[18] = row(lb.Range{Base: 0, Count: 1, Generation: 4})
	f.Services[19] = row(lb.Range{Generation: 9})
	f.Problems[lb.Name{Namespace: "default", Name: "large"}] = "10.96.0.80:80/TCP belongs to Service default/simpleservice"
	f.Problems[lb.Name{Namespace: "default", Name: "toomuch"}] = "update slots: no 70000 free slots in a row (raise --max-slots)"

	for a, kind := range map[string]lb.NodeAddress{
		"192.0.2.1": lb.NodeAddressOpen, "2001:db8::1": lb.NodeAddressOpen,
		"127.0.0.1": lb.NodeAddressLoopback, "::1": lb.NodeAddressLoopback,
		"10.96.0.200": lb.NodeAddressLocal, // leads nobody anywhere
	} {
		f.NodeAddresses[netip.MustParseAddr(a)] = kind
	}
	f.ServiceCIDRs[netip.MustParsePrefix("10.96.0.0/16")] = struct{}{}
	f.ServiceCIDRs[netip.MustParsePrefix("fd00:96::/112")] = struct{}{}
	return f.Tables
}

// tables are filled slot by slot.
type tables struct {
	lb.Tables
	next uint32
}

func port(ns, name, port string, protocol lb.Protocol, family lb.Family) lb.ServicePort {
	return lb.ServicePort{Service: lb.Name{Namespace: ns, Name: name}, Port: port, Protocol: protocol, Family: family}
}

// row is that of a service whose clients all get the same.
func row(r lb.Range) lb.ServiceRow { return lb.ServiceRow{Sides: [lb.Sides]lb.Range{r, r, r}} }

// add enters a service whose clients all get the same backends.
func (f *tables) add(id lb.ServiceID, name lb.ServicePort, generation uint32, vip string, backends ...string) {
	f.Names[id] = name
	f.Services[id] = row(f.block(generation, backends))
	f.lead(id, lb.KindClusterIP, vip)
	f.Frontends[lb.FrontendKey{VIP: netip.MustParseAddrPort(vip).Addr()}] = lb.Frontend{Kind: lb.KindClusterIP}
}

func (f *tables) block(generation uint32, backends []string) lb.Range {
	r := lb.Range{Base: f.next, Count: uint16(len(backends)), Generation: generation}
	for _, b := range backends {
		f.Slots[f.next] = backend(b)
		f.next++
	}
	return r
}

// set gives the clients of one side others; none means that a policy Local
// leaves none.
func (f *tables) set(id lb.ServiceID, side lb.Side, generation uint32, backends ...string) {
	r := f.block(generation, backends)
	if len(backends) == 0 {
		r = lb.Range{Generation: generation - 1}.NextEmpty(true)
	}
	service := f.Services[id]
	service.Sides[side] = r
	f.Services[id] = service
}

func (f *tables) option(id lb.ServiceID, options lb.ServiceRow) {
	options.Sides = f.Services[id].Sides
	f.Services[id] = options
}

func (f *tables) lead(id lb.ServiceID, kind lb.FrontendKind, to string) {
	ap := netip.MustParseAddrPort(to)
	key := lb.FrontendKey{VIP: ap.Addr(), Port: ap.Port(), Protocol: lb.TCP}
	if name, named := f.Names[id]; named {
		key.Protocol = name.Protocol
	}
	f.Frontends[key] = lb.Frontend{Service: id, Kind: kind}
}

func backend(s string) lb.Backend {
	ap := netip.MustParseAddrPort(s)
	return lb.Backend{Addr: ap.Addr(), Port: ap.Port()}
}

// nodeNetns is the cookie of the node's network namespace in tests.
const nodeNetns = 1

// affinities are those of clients that keep a backend of web/shop, and some that
// mean nothing any more. The tables get the members.
func affinities(t lb.Tables) []datapath.AffinityEntry {
	for _, m := range []lb.Member{
		{Service: 8, Backend: backend("10.244.0.21:8443"), Use: lb.UseOn(lb.SideClusterIP)},
		{Service: 8, Backend: backend("10.244.2.22:8443"), Use: lb.UseOn(lb.SideInside)},
		{Service: 8, Backend: backend("10.244.9.9:8443"), Use: lb.UseServing},
		{Service: 5, Backend: backend("10.244.0.21:8443"), Use: lb.UseOn(lb.SideClusterIP)},
	} {
		t.Members[m] = struct{}{}
	}
	entry := func(netns uint64, client string, id lb.ServiceID, b string, age time.Duration) datapath.AffinityEntry {
		e := datapath.AffinityEntry{Netns: netns, Service: id, Backend: backend(b), Age: age}
		if client != "" {
			e.Client = netip.MustParseAddr(client)
		}
		return e
	}
	return []datapath.AffinityEntry{
		entry(4711, "10.244.0.33", 8, "10.244.2.22:8443", 10800*time.Second), // the last moment
		entry(4712, "10.244.0.4", 8, "10.244.0.21:8443", 12*time.Second),
		entry(nodeNetns, "192.0.2.1", 8, "10.244.0.21:8443", 0),
		entry(4713, "", 8, "10.244.0.21:8443", time.Minute),
		entry(0, "198.51.100.7", 8, "10.244.0.21:8443", time.Hour),

		entry(4714, "10.244.0.5", 8, "10.244.0.21:8443", 10801*time.Second), // too old
		entry(4715, "10.244.0.6", 8, "10.244.9.9:8443", time.Second),        // its backend has left
		entry(4716, "10.244.0.7", 5, "10.244.0.21:8443", time.Second),       // affinity was switched off
		entry(4717, "10.244.0.8", 77, "10.244.0.21:8443", time.Second),      // its service has gone
	}
}

func TestPrintGolden(t *testing.T) {
	c := contents{
		tables: fixture(), nodeNetns: nodeNetns,
		counters: []datapath.Counter{{Name: "connect_tcp_pass", Value: 7}, {Name: "connect_tcp_translate", Value: 12345678901}},
		flows:    flows(), devices: devices(),
		// Not of the device that has just come.
		deviceNames:  map[uint32]string{2: "eth0", 5: "cni0", 7: "veth1"},
		clusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")},
	}
	c.affinities = affinities(c.tables)
	for _, kind := range Kinds() {
		t.Run(kind, func(t *testing.T) {
			var out strings.Builder
			for _, format := range Formats() {
				fmt.Fprintf(&out, "== %s\n", format)
				if err := c.print(&out, kind, format); err != nil {
					t.Fatal(err)
				}
			}
			golden(t, kind, out.String())
		})
	}
}

func TestPrintNothing(t *testing.T) {
	for _, kind := range Kinds() {
		for format, want := range map[string]string{"json": "[]\n", "yaml": "[]\n"} {
			var out strings.Builder
			if err := (contents{tables: lb.NewTables()}).print(&out, kind, format); err != nil {
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
	if err := (contents{tables: fixture()}).print(&out, "pods", "table"); err == nil {
		t.Error("kind pods: no error")
	}
	if err := (contents{tables: fixture()}).print(&out, "services", "xml"); err == nil {
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

func TestClientAffinities(t *testing.T) {
	tables := fixture()
	entries := affinities(tables)
	shop := port("web", "shop", "https", lb.TCP, lb.IPv4)
	for _, test := range []struct {
		name, client string
		port         lb.ServicePort
		node         uint64
		want         []lb.ExplainedAffinity
	}{
		{
			name: "a pod is known by its address", client: "10.244.0.4", port: shop,
			want: []lb.ExplainedAffinity{{Client: "10.244.0.4", Backend: "10.244.0.21:8443", AgeSeconds: 12}},
		},
		{name: "of another service port it keeps nothing", client: "10.244.0.4", port: port("web", "shop", "https", lb.TCP, lb.IPv6)},
		{name: "nor when its entry is too old", client: "10.244.0.5", port: shop},
		{name: "nor when its backend has left", client: "10.244.0.6", port: shop},
		{
			name: "processes on the node are known by any of its addresses", client: "192.0.2.99", port: shop, node: nodeNetns,
			want: []lb.ExplainedAffinity{{Client: "192.0.2.99", Backend: "10.244.0.21:8443"}},
		},
		{name: "a pod is not a process on the node", client: "10.244.0.99", port: shop},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := ClientAffinities(tables, entries, test.port, netip.MustParseAddr(test.client), test.node)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("affinities (-want +got):\n%s", diff)
			}
		})
	}
}
