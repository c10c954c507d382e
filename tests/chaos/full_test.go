// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// Sizes that are enough for the world's Services and for little else.
var smallSizes = []string{
	"--max-frontends=512", "--max-services=128", "--max-slots=4096", "--max-members=1024",
	"--max-source-ranges=256", "--max-affinity=256", "--max-flows=2048", "--max-peers=64",
}

// fullMap is a way to fill a map and what becomes of it.
type fullMap struct {
	name string
	// fill makes the map full. What it returns ends that; it may be nil.
	fill func(*testing.T, *world) (undo func())
	// suffers is the Service that does not fit and says so in these words, and "" for
	// none.
	suffers, says string
	// others says what is logged when it is nobody's Service that suffers.
	others string
}

// Every map is filled to the brim while clients use the world's Services: what does
// not fit suffers and says so, and nothing else does.
func TestAFullMapHurtsOnlyWhatDoesNotFit(t *testing.T) {
	w := newWorld(t)
	w.start(smallSizes...)
	w.startLoad()
	for _, m := range fullMaps {
		t.Run(m.name, func(t *testing.T) {
			w.parent, w.t = w.t, t
			defer func() { w.t = w.parent }()
			begin := len(w.agent.Logs())
			undo := m.fill(t, w)
			if m.suffers != "" {
				w.suffers(t, m.suffers, m.says)
			}
			if m.others != "" {
				testutil.Eventually(t, 30*time.Second, fmt.Sprintf("%q in the log", m.others), func() error {
					if !strings.Contains(w.agent.Logs()[begin:], m.others) {
						return errNotYet
					}
					return nil
				})
			}
			// The neighbours change as before.
			w.change(rolled, w.backends[:1+begin%3]...)
			if undo != nil {
				undo()
			}
			testutil.Eventually(t, 90*time.Second, "nothing fails any more", func() error {
				if n, err := w.agent.Metric("fairlead_services_failed"); err != nil || n != 0 {
					return errors.Join(err, fmt.Errorf("fairlead_services_failed is %v", n))
				}
				return nil
			})
			c := w.load.take(t)
			if c.Failed > 0 {
				t.Errorf("%d of %d connections and exchanges of others failed, such as:\n\t%s",
					c.Failed, c.Tried, strings.Join(c.Errors, "\n\t"))
			}
			t.Logf("%d connections and exchanges of others, %d failed", c.Tried, c.Failed)
		})
	}
}

// suffers waits until a Service, and no other, is said to have a problem.
func (w *world) suffers(t *testing.T, service, words string) {
	t.Helper()
	testutil.Eventually(t, 30*time.Second, service+" suffers", func() error {
		if n, err := w.agent.Metric("fairlead_services_failed"); err != nil || n != 1 {
			return errors.Join(err, fmt.Errorf("fairlead_services_failed is %v, want 1", n))
		}
		for line := range strings.Lines(w.agent.Logs()) {
			if strings.Contains(line, "service cannot be programmed") && strings.Contains(line, "test/"+service) &&
				strings.Contains(line, words) {
				return nil
			}
		}
		return fmt.Errorf("the log does not say %q of it", words)
	})
}

// tooLarge returns a fill that adds a Service, and takes it away again.
func tooLarge(s service, more func() (spec, slices string)) func(*testing.T, *world) func() {
	return func(_ *testing.T, w *world) func() {
		spec, slices := more()
		w.write(s.name+".yaml", fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: test}
spec: {clusterIP: 10.96.9.%d, %s}
---
%s`, s.name, s.number, spec, slices))
		return func() { w.write(s.name+".yaml", "") }
	}
}

const webPort = "ports: [{name: web, port: 80}]"

// list joins n texts made from a number.
func list(n int, format func(i int) string) string {
	words := make([]string, n)
	for i := range words {
		words[i] = format(i)
	}
	return strings.Join(words, ", ")
}

// crowdSlice is a slice with many endpoints.
func crowdSlice(service, protocol string, endpoints int) string {
	return fmt.Sprintf(`apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, namespace: test, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: web, port: 9000, protocol: %[2]s}]
endpoints: [%[3]s]
`, service, protocol, list(endpoints, func(i int) string { return fmt.Sprintf("{addresses: [%s]}", stormAddr(0, i)) }))
}

// fullMaps are all maps that can be full. The others are arrays, whose rows are all
// there from the beginning: of these peers is far too small here, all the time.
var fullMaps = []fullMap{
	{
		name: "frontends", suffers: "wide", says: "raise --max-frontends",
		fill: tooLarge(service{name: "wide", number: 1}, func() (string, string) {
			return webPort + ", externalIPs: [" + list(600, func(i int) string {
				return fmt.Sprintf("198.18.%d.%d", i>>8, i&255)
			}) + "]", ""
		}),
	},
	{
		name: "services and names", suffers: "long", says: "--max-services",
		fill: tooLarge(service{name: "long", number: 2}, func() (string, string) {
			return "ports: [" + list(140, func(i int) string { return fmt.Sprintf("{name: p%d, port: %[1]d}", 1000+i) }) + "]", ""
		}),
	},
	{
		name: "slots", suffers: "crowded", says: "--max-slots",
		fill: tooLarge(service{name: "crowded", number: 3}, func() (string, string) {
			return webPort, crowdSlice("crowded", "TCP", 5000)
		}),
	},
	{
		name: "members", suffers: "remembered", says: "raise --max-members",
		fill: tooLarge(service{name: "remembered", number: 4}, func() (string, string) {
			return "ports: [{name: web, port: 80, protocol: UDP}]", crowdSlice("remembered", "UDP", 1200)
		}),
	},
	{
		name: "source_ranges", suffers: "guarded", says: "raise --max-source-ranges",
		fill: tooLarge(service{name: "guarded", number: 5}, func() (string, string) {
			return webPort + ", type: LoadBalancer, loadBalancerSourceRanges: [" + list(300, func(i int) string {
				return fmt.Sprintf("198.19.%d.%d/32", i>>8, i&255)
			}) + "]}\nstatus: {loadBalancer: {ingress: [{ip: 203.0.113.200}]}", ""
		}),
	},
	{
		name: "problems", suffers: "unheard", says: "raise --max-frontends",
		fill: func(t *testing.T, w *world) func() {
			w.brim(t, "problems")
			return tooLarge(service{name: "unheard", number: 6}, func() (string, string) {
				return webPort + ", externalIPs: [" + list(600, func(i int) string {
					return fmt.Sprintf("198.18.%d.%d", i>>8, i&255)
				}) + "]", ""
			})(t, w)
		},
	},
	{
		name: "service_cidrs", others: "rows that belong to no Service cannot be written",
		fill: func(_ *testing.T, w *world) func() {
			var b strings.Builder
			for i := range 1100 {
				fmt.Fprintf(&b, "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: c%d}\nspec: {cidrs: [172.%d.%d.0/24]}\n---\n",
					i, 16+i>>8, i&255)
			}
			w.write("cidrs.yaml", b.String())
			return func() { w.write("cidrs.yaml", "") }
		},
	},
	{
		name: "node_addresses", others: "rows that belong to no Service cannot be written",
		fill: func(t *testing.T, w *world) func() {
			w.brim(t, "node_addresses")
			w.configure(w.node.Namespace(), "addr add 198.51.100.77/32 dev up0")
			return func() {
				w.empty(t, "node_addresses")
				w.configure(w.node.Namespace(), "addr del 198.51.100.77/32 dev up0")
			}
		},
	},
	{
		name: "cluster_cidrs", fill: func(t *testing.T, w *world) func() {
			w.agent.End(t, syscall.SIGTERM)
			options := w.options(slices.Concat(smallSizes, []string{"--cluster-cidr=" + strings.ReplaceAll(
				list(300, func(i int) string { return fmt.Sprintf("172.%d.%d.0/24", 16+i>>8, i&255) }), " ", "")})...)
			options.Unready = true
			refused := testutil.StartAgent(w.parent, options)
			if err := refused.Wait(); err == nil || !strings.Contains(refused.Logs(), "the map is full") {
				t.Errorf("an agent with more CIDRs than it has room for ended with %v\n%s", err, refused.Logs())
			}
			w.agent = testutil.StartAgent(w.parent, w.options(smallSizes...))
			return nil
		},
	},
	{name: "devices", fill: brimAndPod("devices")},
	{name: "answered", fill: func(t *testing.T, w *world) func() {
		w.brim(t, "answered")
		s := service{name: "answer", number: 50, endpoints: w.backends[:1]}
		w.apply(s)
		return func() { w.write(s.name+".yaml", "") }
	}},
	{name: "affinity, which makes room", fill: overBrim("affinity")},
	{name: "flows, which make room", fill: overBrim("flows")},
	{name: "fragments, which make room", fill: overBrim("fragments")},
	{name: "origins_overflow, which makes room", fill: overBrim("origins_overflow")},
	{name: "pods, which make room", fill: overBrim("pods")},
}

// brimAndPod fills a map and adds a pod, whose connections are served.
func brimAndPod(name string) func(*testing.T, *world) func() {
	return func(t *testing.T, w *world) func() {
		w.brim(t, name)
		pod := w.pod("last", podAddrs(200))
		testutil.Eventually(t, 30*time.Second, "the pod is served", func() error {
			_, err := pod.Dial(t.Context(), "tcp", netip.AddrPortFrom(w.services[sticky].loadBalancerIP()[ipv4], tcpPort).String())
			return err
		})
		return func() {
			if err := w.node.RemovePod(pod); err != nil {
				t.Error(err)
			}
		}
	}
}

// overBrim puts more rows into a map than it has room for.
func overBrim(name string) func(*testing.T, *world) func() {
	return func(t *testing.T, w *world) func() {
		m := w.pinnedMap(t, name)
		for range 2 * m.MaxEntries() {
			if err := putAny(m); err != nil {
				t.Fatal(err)
			}
		}
		return nil
	}
}

// brim puts rows into a map until it takes no more.
func (w *world) brim(t *testing.T, name string) {
	t.Helper()
	m := w.pinnedMap(t, name)
	for range 2 * m.MaxEntries() {
		err := putAny(m)
		if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatalf("%s takes more than its %d rows", name, m.MaxEntries())
}

// empty takes the rows of brim away again; ours are told apart by their keys.
func (w *world) empty(t *testing.T, name string) {
	t.Helper()
	m := w.pinnedMap(t, name)
	key := make([]byte, m.KeySize())
	var ours [][]byte
	for it := m.Iterate(); it.Next(&key, &[]byte{}); {
		if key[0] == mark {
			ours = append(ours, append([]byte(nil), key...))
		}
	}
	for _, k := range ours {
		if err := m.Delete(k); err != nil {
			t.Fatal(err)
		}
	}
}

// mark begins the keys of the rows this test makes: no address begins with it.
const mark = 0xfe

// putAny inserts a row that means nothing to anybody.
func putAny(m *ebpf.Map) error {
	key := make([]byte, m.KeySize())
	_, _ = rand.Read(key) // it never fails
	key[0] = mark
	if len(key) == 4 { // a number in the machine's order, large to be nobody's
		binary.NativeEndian.PutUint32(key, binary.NativeEndian.Uint32(key)|1<<30)
	}
	return m.Put(key, make([]byte, m.ValueSize()))
}

// pinnedMap opens a map of the agent.
func (w *world) pinnedMap(t *testing.T, name string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(datapath.MapPath(w.bpfRoot, name), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}
