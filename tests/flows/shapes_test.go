// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long an answer may take: longer than TCP's first repetition, so
// that a machine under load fails no test, but no loss goes unnoticed as each
// exchange is one of many.
const patience = 3 * time.Second

// silence is how long nothing must come back from who drops.
const silence = 400 * time.Millisecond

// What must hold in every shape.
var everywhere = []struct {
	name string
	run  func(*testing.T, *world)
}{
	{"outside clients reach every kind of backend", outsideClients},
	{"pods reach every kind of backend", podClients},
	{"processes of the node reach every kind of backend", nodeProcesses},
	{"policy Local keeps to the node", policyLocal},
	{"without backends clients are refused", refused},
	{"what nobody may reach is dropped", dropped},
	{"a client keeps its backend", affinity},
	{"two VIPs lead to one backend from one port", twoVIPs},
	{"large transfers arrive as they were sent", largeTransfers},
	{"datagrams in fragments arrive", fragments},
	{"time exceeded reaches who sent", timeExceeded},
	{"UDP moves and TCP stays when a backend goes", backendGoes},
	{"transfers go on when the path becomes narrower", narrowPath}, // and stays so: last
}

func TestShapes(t *testing.T) {
	for _, s := range []shape{routed, bridged, filteredBridge, overlay, severalUplinks, tunnels} {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, s)
			w.start(t)
			for _, scenario := range everywhere {
				t.Run(scenario.name, func(t *testing.T) { scenario.run(t, w) })
			}
		})
	}
}

// networks are the protocols of every Service.
var networks = []string{"tcp", "udp"}

// eachWay calls f for both families and protocols.
func eachWay(f func(f family, network string)) {
	for _, fam := range families {
		for _, network := range networks {
			f(fam, network)
		}
	}
}

// reaches fails the test unless a client gets an answer from the named host, which
// sees one of the given addresses as the client's.
func (w *world) reaches(t *testing.T, from *host, network string, to netip.AddrPort, name string, seen ...netip.Addr) {
	t.Helper()
	var got reply
	err := w.retried(t, func() (err error) {
		got, err = ask(from.ns, network, to, patience)
		return err
	})
	what := fmt.Sprintf("%s by %s to %s", from.name, network, to)
	switch {
	case err != nil:
		t.Errorf("%s: %v", what, err)
	case got.name != name:
		t.Errorf("%s: answered by %s, want %s", what, got.name, name)
	case !slices.Contains(seen, got.client.Addr().Unmap()):
		t.Errorf("%s: %s sees %s as the client, want one of %v", what, name, got.client, seen)
	}
}

// allAddrs returns every address of a namespace's links.
func allAddrs(t *testing.T, h *host) []netip.Addr {
	t.Helper()
	var all []netip.Addr
	err := h.ns.Do(func() error {
		list, err := net.InterfaceAddrs()
		for _, a := range list {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil {
				all = append(all, prefix.Addr())
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// sourceTo returns node a's address on the way to a host of node b.
func (w *world) sourceTo(h *host, f family) netip.Addr {
	if h == w.b1 && w.shape.sources[f].IsValid() {
		return w.shape.sources[f]
	}
	return w.a.addrs[f]
}

// placements are the Services with one backend, and that.
func (w *world) placements() map[string]*host {
	return map[string]*host{"local": w.a1, "remote": w.b1, "host": &w.a.host, "remote-host": &w.b.host}
}

func outsideClients(t *testing.T, w *world) {
	for name, backend := range w.placements() {
		s := w.services[name]
		for _, e := range entries {
			eachWay(func(f family, network string) {
				seen := w.client.addrs[f] // kept
				if backend == w.b1 || backend == &w.b.host {
					seen = w.sourceTo(backend, f)
				}
				w.reaches(t, w.client, network, e.vip(s, f, network, w.a), backend.name, seen)
			})
		}
	}
	if w.shape.name != severalUplinks.name {
		return
	}
	for _, f := range families {
		at := netip.AddrPortFrom(secondUplink[f], w.services["local"].nodePortNumber())
		w.reaches(t, w.client, "tcp", at, w.a1.name, w.client.addrs[f])
		at = netip.AddrPortFrom(secondUplink[f], w.services["remote"].nodePortNumber())
		w.reaches(t, w.client, "udp", at, w.b1.name, w.sourceTo(w.b1, f))
	}
}

func podClients(t *testing.T, w *world) {
	ours := allAddrs(t, &w.a.host)
	for name, backend := range w.placements() {
		s := w.services[name]
		for _, from := range []*host{w.a1, w.a2, w.a3} {
			for _, e := range entries {
				eachWay(func(f family, network string) {
					seen := []netip.Addr{from.addrs[f]}
					if from == backend {
						seen = ours
					} else if backend == &w.b.host && w.shape.masquerade {
						seen = []netip.Addr{w.a.addrs[f]}
					}
					w.reaches(t, from, network, e.vip(s, f, network, w.a), backend.name, seen...)
				})
			}
		}
	}
	// The other node's NodePort is that node's affair.
	eachWay(func(f family, network string) {
		at := w.services["remote"].nodePort(f, w.b)
		w.reaches(t, w.a2, network, at, w.b1.name, w.a2.addrs[f], w.a.addrs[f])
	})
}

func nodeProcesses(t *testing.T, w *world) {
	ours := allAddrs(t, &w.a.host)
	for name, backend := range w.placements() {
		if backend == &w.a.host {
			continue // a packet does not get back into the stack it has left
		}
		s := w.services[name]
		for _, e := range entries[1:] { // its own NodePorts are behind lo
			eachWay(func(f family, network string) {
				w.reaches(t, &w.a.host, network, e.vip(s, f, network, w.a), backend.name, ours...)
			})
		}
	}
	eachWay(func(f family, network string) {
		w.reaches(t, &w.a.host, network, w.services["remote"].nodePort(f, w.b), w.b1.name, ours...)
		w.reaches(t, &w.b.host, network, w.services["remote"].nodePort(f, w.a), w.b1.name, w.sourceTo(w.b1, f))
	})
}

func policyLocal(t *testing.T, w *world) {
	for range 5 { // or chance has it
		for _, e := range entries[:3] {
			eachWay(func(f family, network string) {
				at := e.vip(w.services["policy-local"], f, network, w.a)
				w.reaches(t, w.client, network, at, w.a1.name, w.client.addrs[f])
			})
		}
	}
	// Whoever is inside, or knows the ClusterIP, is not concerned.
	eachWay(func(f family, network string) {
		s := w.services["elsewhere"]
		w.reaches(t, w.a2, network, s.nodePort(f, w.a), w.b1.name, w.a2.addrs[f])
		at := clusterIPEntry.vip(s, f, network, w.a)
		w.reaches(t, w.client, network, at, w.b1.name, w.sourceTo(w.b1, f))
	})
}

func refused(t *testing.T, w *world) {
	for _, from := range []*host{w.client, w.a2, &w.a.host} {
		eachWay(func(f family, network string) {
			undefined := netip.AddrPortFrom(w.services["local"].clusterIP()[f], 81)
			w.isRefused(t, from, network, undefined)
			for _, e := range entries {
				if e.name == "NodePort" && from == &w.a.host {
					continue // behind lo
				}
				w.isRefused(t, from, network, e.vip(w.services["empty"], f, network, w.a))
			}
		})
	}
}

// isRefused fails the test unless a client is told at once that nobody is there.
func (w *world) isRefused(t *testing.T, from *host, network string, to netip.AddrPort) {
	t.Helper()
	err := w.retried(t, func() error {
		got, err := ask(from.ns, network, to, patience)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		return fmt.Errorf("answered by %q, %w", got.name, errors.Join(err))
	})
	if err != nil {
		t.Errorf("%s by %s to %s is not refused: %v", from.name, network, to, err)
	}
}

// dropped waits for all that is dropped at the same time.
func dropped(t *testing.T, w *world) {
	var waiting sync.WaitGroup
	before := w.counters(t, w.a)
	isDropped := func(from *host, network string, to netip.AddrPort) {
		waiting.Go(func() {
			if got, err := ask(from.ns, network, to, silence); !isTimeout(err) {
				t.Errorf("%s by %s to %s: answered by %q, %v; want nothing to come back", from.name, network, to, got.name, err)
			}
		})
	}
	nobody := both("10.96.99.99", "fd00:96::9999")
	eachWay(func(f family, network string) {
		for _, from := range []*host{w.client, w.a2, &w.a.host} {
			isDropped(from, network, netip.AddrPortFrom(nobody[f], port(network)))
		}
		for _, e := range entries[:3] {
			isDropped(w.client, network, e.vip(w.services["elsewhere"], f, network, w.a))
		}
		isDropped(w.stranger, network, entries[1].vip(w.services["restricted"], f, network, w.a))
	})
	waiting.Wait()
	after := w.counters(t, w.a)
	for _, name := range []string{"packet_no_service", "packet_no_local", "packet_denied"} {
		if after[name] == before[name] {
			t.Errorf("counter %s has not grown", name)
		}
	}
	eachWay(func(f family, network string) {
		at := entries[1].vip(w.services["restricted"], f, network, w.a)
		w.reaches(t, w.client, network, at, w.a1.name, w.client.addrs[f])
	})
}

func affinity(t *testing.T, w *world) {
	chosen := map[string]bool{}
	for _, from := range []*host{w.client, w.stranger, w.a1, w.a2, w.a3} {
		eachWay(func(f family, network string) {
			var first string
			for i := range 8 {
				e := entries[i%len(entries)]
				to := e.vip(w.services["sticky"], f, network, w.a)
				var got reply
				err := w.retried(t, func() (err error) {
					got, err = ask(from.ns, network, to, patience)
					return err
				})
				if err != nil {
					t.Fatalf("%s by %s to %s: %v", from.name, network, to, err)
				}
				if i == 0 {
					first = got.name
				}
				if got.name != first {
					t.Errorf("%s by %s to %s: answered by %s after %s", from.name, network, to, got.name, first)
				}
				chosen[got.name] = true
			}
		})
	}
	if len(chosen) < 2 {
		t.Errorf("20 choices were all for %v", chosen)
	}
}
