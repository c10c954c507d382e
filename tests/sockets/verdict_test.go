// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// TestVerdicts is the table "Verdicts" of bpf/README.md, as system calls.
func TestVerdicts(t *testing.T) {
	w := newWorld(t)
	tcp, udp := w.service(t, lb.TCP, "a:8080"), w.service(t, lb.UDP, "a:8080")
	tcpEmpty, udpEmpty := w.service(t, lb.TCP), w.service(t, lb.UDP)
	undefined := func(s *service, k kind) netip.AddrPort { return netip.AddrPortFrom(s.vips[k.family], 81) }

	eachKind(t, func(t *testing.T, k kind) {
		direct := backendAddr("b:8081", k.family)
		for _, tc := range []struct {
			name    string
			to      netip.AddrPort
			err     error
			backend string
			count   string
		}{
			{"a backend", tcp.dial(k), nil, "a:8080", "connect_tcp_translate"},
			{"nobody's address", direct, nil, "b:8081", "connect_tcp_pass"},
			{"no backend", tcpEmpty.dial(k), unix.ECONNREFUSED, "", "connect_tcp_no_backend"},
			{"undefined port", undefined(tcp, k), unix.ECONNREFUSED, "", "connect_tcp_no_port"},
			{"the port of another protocol", udp.dial(k), unix.ECONNREFUSED, "", "connect_tcp_no_port"},
		} {
			t.Run("TCP connect/"+tc.name, func(t *testing.T) {
				s := openTCP(t, w.client, k)
				counted := w.counters(t, func() {
					if err := s.connect(tc.to); !errors.Is(err, tc.err) {
						t.Fatalf("error is %v, want %v", err, tc.err)
					}
				})
				wantCounted(t, counted, tc.count)
				if tc.err != nil {
					return
				}
				if got, _, err := s.receive(); err != nil || got != tc.backend {
					t.Errorf("connected to %q, %v; want %s", got, err, tc.backend)
				}
				wantAddr(t, "getpeername", s.peer(), tc.to)
			})
		}

		for _, tc := range []struct {
			name    string
			to      netip.AddrPort
			backend string // "" when the socket stays connected to the VIP itself
			count   string
		}{
			{"a backend", udp.dial(k), "a:8080", "connect_udp_translate"},
			{"nobody's address", direct, "b:8081", "connect_udp_pass"},
			{"no backend", udpEmpty.dial(k), "", "connect_udp_no_backend"},
			{"undefined port", undefined(udp, k), "", "connect_udp_no_port"},
		} {
			t.Run("UDP connect/"+tc.name, func(t *testing.T) {
				s := openUDP(t, w.client, k)
				wantCounted(t, w.counters(t, func() { must(t, s.connect(tc.to)) }), tc.count)
				wantAddr(t, "getpeername", s.peer(), tc.to)
				if local := s.local().Addr(); local != clientAddr[k.family] {
					t.Errorf("getsockname is %v, want %v", local, clientAddr[k.family])
				}
				if tc.backend == "" {
					return
				}
				got, from := s.askPeer()
				if got != tc.backend {
					t.Errorf("connected to %s, want %s", got, tc.backend)
				}
				wantAddr(t, "the answer's address", from, tc.to)
			})
		}

		for _, tc := range []struct {
			name    string
			to      netip.AddrPort
			err     error
			backend string
			count   string
		}{
			{"a backend", udp.dial(k), nil, "a:8080", "send_udp_translate"},
			{"nobody's address", direct, nil, "b:8081", "send_udp_pass"},
			{"no backend", udpEmpty.dial(k), unix.ECONNREFUSED, "", "send_udp_no_backend"},
			{"undefined port", undefined(udp, k), unix.ECONNREFUSED, "", "send_udp_no_port"},
			{"the port of another protocol", tcp.dial(k), unix.ECONNREFUSED, "", "send_udp_no_port"},
		} {
			t.Run("UDP sendto/"+tc.name, func(t *testing.T) {
				s := openUDP(t, w.client, k)
				counted := w.counters(t, func() {
					if err := s.sendTo(tc.to); !errors.Is(err, tc.err) {
						t.Fatalf("error is %v, want %v", err, tc.err)
					}
				})
				wantCounted(t, counted, tc.count)
				if tc.err != nil {
					return
				}
				got, from, err := s.receive()
				if err != nil || got != tc.backend {
					t.Errorf("sent to %q, %v; want %s", got, err, tc.backend)
				}
				wantAddr(t, "the answer's address", from, tc.to)
			})
		}
	})

	t.Run("a Service that is deleted is nobody's address", func(t *testing.T) {
		tcp.remove(t)
		udp.remove(t)
		eachKind(t, func(t *testing.T, k kind) {
			s := openUDP(t, w.client, k)
			wantCounted(t, w.counters(t, func() { must(t, s.sendTo(udp.dial(k))) }), "send_udp_pass")
		})
	})
}

func wantCounted(t *testing.T, got map[string]uint64, name string) {
	t.Helper()
	if diff := cmp.Diff(map[string]uint64{name: 1}, got); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
}

// TestOutsideOfOurCgroup compares with the kernel without us: what a resolver learns about
// source addresses must be the same (RFC 6724), and who is in another cgroup is
// left alone.
func TestOutsideOfOurCgroup(t *testing.T) {
	w := newWorld(t)
	full, empty := w.service(t, lb.UDP, "a:8080"), w.service(t, lb.UDP)
	probe := func(t *testing.T, s *service, k kind) netip.Addr {
		t.Helper()
		c := openUDP(t, w.client, k)
		must(t, c.connect(s.dial(k)))
		return c.local().Addr()
	}
	eachKind(t, func(t *testing.T, k kind) {
		for _, s := range []*service{full, empty} {
			inside := probe(t, s, k)
			var outside netip.Addr
			counted := w.counters(t, func() { w.outside(t, func() { outside = probe(t, s, k) }) })
			if inside != outside {
				t.Errorf("the source address for %v is %v with us and %v without", s.dial(k), inside, outside)
			}
			if len(counted) > 0 {
				t.Errorf("a process outside was counted: %v", counted)
			}
		}
	})
}

// outside runs f while this process is in another cgroup.
func (w *world) outside(t *testing.T, f func()) {
	t.Helper()
	other, err := sandbox.NewCgroup("fairlead-test-other")
	must(t, err)
	defer func() { must(t, other.Close()) }()
	leave, err := other.Enter()
	must(t, err)
	defer func() { must(t, leave()) }()
	f()
}

func TestConnectionsAreSpreadEvenly(t *testing.T) {
	w := newWorld(t)
	backends := []string{"a:8080", "b:8080", "c:8080", "a:8081", "b:8082"}
	tcp, udp := w.service(t, lb.TCP, backends...), w.service(t, lb.UDP, backends...)
	const each = 100
	eachKind(t, func(t *testing.T, k kind) {
		for name, one := range map[string]func(*testing.T) string{
			"TCP connect": func(t *testing.T) string {
				s := openTCP(t, w.client, k)
				defer unix.Shutdown(s.fd, unix.SHUT_RDWR)
				must(t, s.connect(tcp.dial(k)))
				backend, _, err := s.receive()
				must(t, err)
				return backend
			},
			"UDP connect": func(t *testing.T) string {
				s := openUDP(t, w.client, k)
				must(t, s.connect(udp.dial(k)))
				backend, _ := s.askPeer()
				return backend
			},
			"UDP sendto": func(t *testing.T) string {
				backend, _ := openUDP(t, w.client, k).ask(udp.dial(k))
				return backend
			},
		} {
			t.Run(name, func(t *testing.T) {
				seen := map[string]int{}
				for _, b := range backends {
					seen[b] = 0
				}
				for range each * len(backends) {
					seen[one(t)]++
				}
				if len(seen) != len(backends) {
					t.Errorf("reached %v, want %v alone", seen, backends)
				}
				// One in a million uniform samples is above (chi-squared, 4 degrees of freedom).
				const limit = 33.4
				if chi2 := chiSquared(seen); chi2 > limit || math.IsNaN(chi2) {
					t.Errorf("chi-squared is %.1f, more than %.1f: %v", chi2, limit, seen)
				}
			})
		}
	})
}

// chiSquared compares counts with a uniform distribution.
func chiSquared(counts map[string]int) float64 {
	total := 0
	for n := range maps.Values(counts) {
		total += n
	}
	mean, sum := float64(total)/float64(len(counts)), 0.0
	for n := range maps.Values(counts) {
		sum += (float64(n) - mean) * (float64(n) - mean) / mean
	}
	return sum
}

// TestMPTCP shows that an MPTCP socket is served like a TCP socket. Its
// getpeername shows the backend: see bpf/README.md.
func TestMPTCP(t *testing.T) {
	w := newWorld(t)
	s, empty := w.expose(t, nil, "a:8080"), w.expose(t, nil)
	eachKind(t, func(t *testing.T, k kind) {
		mptcp := func(c client) *socket {
			s, err := open(t, c.ns, k, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
			if err != nil {
				t.Skipf("this kernel has no MPTCP (CONFIG_MPTCP, CONFIG_MPTCP_IPV6): %v", err)
			}
			return s
		}
		wantReach := func(c client, to netip.AddrPort) {
			t.Helper()
			socket := mptcp(c)
			must(t, socket.connect(to))
			if got, _, err := socket.receive(); err != nil || got != "a:8080" {
				t.Errorf("%s connected to %v is answered by %q, %v; want a:8080", c.name, to, got, err)
			}
		}
		for _, f := range frontendKinds {
			wantReach(w.pod(), f.at(s, k))
			wantErr(t, "no backend at the "+f.name, mptcp(w.pod()).connect(f.at(empty, k)), unix.ECONNREFUSED)
		}
		wantReach(w.process(), s.atNode(k))
		wantReach(w.process(), s.atLoopback(k))
	})
}

// TestOtherProtocolsAreUntouched: a frontend means nothing to sockets that are
// neither TCP nor UDP, whatever protocol number a raw socket carries.
func TestOtherProtocolsAreUntouched(t *testing.T) {
	w := newWorld(t)
	s := w.expose(t, nil, "a:8080")
	must(t, w.client.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0)
	}))
	const udpLite = 136
	for _, tc := range []struct {
		name          string
		typ, protocol [2]int // by family
	}{
		{"raw ICMP", [2]int{unix.SOCK_RAW, unix.SOCK_RAW}, [2]int{unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6}},
		{"raw UDP", [2]int{unix.SOCK_RAW, unix.SOCK_RAW}, [2]int{unix.IPPROTO_UDP, unix.IPPROTO_UDP}},
		{"raw TCP", [2]int{unix.SOCK_RAW, unix.SOCK_RAW}, [2]int{unix.IPPROTO_TCP, unix.IPPROTO_TCP}},
		{"ping", [2]int{unix.SOCK_DGRAM, unix.SOCK_DGRAM}, [2]int{unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6}},
		{"UDP-Lite", [2]int{unix.SOCK_DGRAM, unix.SOCK_DGRAM}, [2]int{udpLite, udpLite}},
		{"SCTP", [2]int{unix.SOCK_SEQPACKET, unix.SOCK_SEQPACKET}, [2]int{unix.IPPROTO_SCTP, unix.IPPROTO_SCTP}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, k := range kinds[:2] {
				for _, f := range frontendKinds {
					to := f.at(s, k)
					c, err := open(t, w.client, k, tc.typ[k.family], tc.protocol[k.family])
					if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) {
						t.Skipf("this kernel has no %s: %v", tc.name, err)
					}
					must(t, err)
					counted := w.counters(t, func() {
						if tc.name == "SCTP" {
							connectNonblocking(t, c, to)
						} else {
							// A ping socket's datagrams must be echo requests.
							wantUntouched(t, c, to, tc.typ[0] == unix.SOCK_RAW, tc.name != "ping")
						}
					})
					if len(counted) > 0 {
						t.Errorf("%s to the %s was counted: %v", k.name, f.name, counted)
					}
				}
			}
		})
	}
}

// wantUntouched connects a socket and, if it can send, sends on it; a raw socket's
// port is its protocol.
func wantUntouched(t *testing.T, c *socket, to netip.AddrPort, raw, sends bool) {
	t.Helper()
	must(t, c.connect(to))
	if raw {
		wantAddr(t, "getpeername", netip.AddrPortFrom(c.peer().Addr(), 0), netip.AddrPortFrom(to.Addr(), 0))
		to = netip.AddrPortFrom(to.Addr(), 0) // a raw IPv6 socket takes no other
	} else {
		wantAddr(t, "getpeername", c.peer(), to)
	}
	must(t, c.disconnect())
	if sends {
		if err := c.sendTo(to); err != nil {
			t.Errorf("sendto %v: %v", to, err)
		}
	}
}

// connectNonblocking begins to connect to somebody who will never answer.
func connectNonblocking(t *testing.T, c *socket, to netip.AddrPort) {
	t.Helper()
	must(t, unix.SetNonblock(c.fd, true))
	if err := c.connect(to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		t.Errorf("connect %s: %v", fmt.Sprint(to), err)
	}
}
