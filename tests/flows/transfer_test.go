// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// transferSize is what large transfers move in a shape.
func (w *world) transferSize() int64 {
	switch {
	case testing.Short():
		return 4 << 20
	case w.shape.slow:
		return 16 << 20
	}
	return 64 << 20
}

// directions are the commands that move content, as a client sees it.
var directions = map[string]string{"download": "send", "upload": "take"}

func largeTransfers(t *testing.T, w *world) {
	for _, name := range []string{"local", "remote"} {
		for _, f := range families {
			for direction, command := range directions {
				start := time.Now()
				to := w.services[name].nodePort(f, w.a)
				got, err := transfer(w.client.ns, to, command, w.transferSize(), nil)
				if err != nil {
					t.Errorf("%s from %s by %s: %v", direction, name, f, err)
					continue
				}
				t.Logf("%s from %s by %s as %s: %.0f MB/s", direction, name, f, got.client,
					float64(w.transferSize())/1e6/time.Since(start).Seconds())
			}
		}
	}
	// Pods and the node take other ways.
	for _, from := range []*host{w.a1, w.a2, w.a3, &w.a.host} {
		for name, backend := range w.placements() {
			if from == backend && from == &w.a.host {
				continue
			}
			for _, f := range families {
				to := clusterIPEntry.vip(w.services[name], f, "tcp", w.a)
				for direction, command := range directions {
					if _, err := transfer(from.ns, to, command, 2<<20, nil); err != nil {
						t.Errorf("%s by %s from %s to %s: %v", direction, from.name, backend.name, to, err)
					}
				}
			}
		}
	}
}

func fragments(t *testing.T, w *world) {
	for name, backend := range w.placements() {
		for _, from := range []*host{w.client, w.a1, w.a2, w.a3, &w.a.host} {
			if from == backend && from == &w.a.host {
				continue
			}
			for _, f := range families {
				to := clusterIPEntry.vip(w.services[name], f, "udp", w.a)
				testutil.Eventually(t, 10*time.Second, fmt.Sprintf("%s knows the path's MTU to %s", from.name, to), func() error {
					_, err := ask8k(from, to)
					return err
				})
				err := w.retried(t, func() error {
					c, err := dialUDP(from.ns, to)
					if err != nil {
						return err
					}
					defer c.Close()
					for range 5 {
						if _, err := exchange(c, 8000, patience); err != nil {
							return err
						}
					}
					return nil
				})
				if err != nil {
					t.Errorf("%s to %s on %s: %v", from.name, to, backend.name, err)
				}
			}
		}
	}
}

// narrowMTU is the least that IPv6 takes, and less than any shape's.
const narrowMTU = 1280

// narrowPath makes links narrower while content is on its way over them.
func narrowPath(t *testing.T, w *world) {
	size := min(w.transferSize(), 16<<20)
	for _, tt := range []struct {
		what, service, command string
		narrow                 func()
	}{
		{"an upload to a narrow pod of this node", "local", "take", func() { w.narrowPod(t, w.a, w.a1) }},
		{"an upload to a narrow pod of the other node", "remote", "take", func() { w.narrowPod(t, w.b, w.b1) }},
		{"a download for a narrow client from this node", "local", "send", func() { w.narrowClients(t) }},
		{"a download for a narrow client from the other node", "remote", "send", func() {}},
	} {
		for _, f := range families {
			to := w.services[tt.service].nodePort(f, w.a)
			before := w.counters(t, w.a)
			_, err := transfer(w.client.ns, to, tt.command, size, func(done int64) {
				if done == size/2 && f == ipv4 { // for IPv6 it is narrow from the start
					tt.narrow()
				}
			})
			if err != nil {
				t.Errorf("%s by %s: %v; counters: %s", tt.what, f, err, grown(before, w.counters(t, w.a)))
			}
		}
	}
	// Datagrams that would not fit are lost until the sender knows the path.
	for _, name := range []string{"local", "remote"} {
		for _, f := range families {
			at := w.services[name].nodePort(f, w.a)
			testutil.Eventually(t, 10*time.Second, fmt.Sprintf("datagrams of 8 kB arrive at %s", at), func() error {
				_, err := ask8k(w.client, at)
				return err
			})
		}
	}
}

func ask8k(from *host, to netip.AddrPort) (reply, error) {
	c, err := dialUDP(from.ns, to)
	if err != nil {
		return reply{}, err
	}
	defer c.Close()
	return exchange(c, 8000, time.Second)
}

// narrowPod gives both ends of a pod's link, and the bridge they are on, less room.
func (w *world) narrowPod(t *testing.T, n *node, h *host) {
	t.Helper()
	configure(t, h.ns, "link set eth0 mtu %d", narrowMTU)
	configure(t, n.ns, "link set %s mtu %d", h.link, narrowMTU)
	if h.bridge != "" {
		configure(t, n.ns, "link set %s mtu %d", h.bridge, narrowMTU)
	}
}

// narrowClients lets the router send less at once to clients.
func (w *world) narrowClients(t *testing.T) {
	t.Helper()
	configure(t, w.router, "link set clients mtu %d", narrowMTU)
}

// twoVIPs uses one source port for two VIPs that lead to one backend: at the
// backend both flows have the same ends unless somebody sees to it.
func twoVIPs(t *testing.T, w *world) {
	for _, name := range []string{"local", "remote", "host"} {
		for _, f := range families {
			for _, from := range []*host{w.client, w.a2} {
				s := w.services[name]
				vips := []netip.AddrPort{s.nodePort(f, w.a)}
				for _, e := range entries[1:] {
					vips = append(vips, e.vip(s, f, "tcp", w.a))
				}
				if err := w.retried(t, func() error { return connectAll(from, vips) }); err != nil {
					t.Errorf("TCP from %s to %s by %s: %v", from.name, name, f, err)
				}
				vips = vips[:1]
				for _, e := range entries[1:] {
					vips = append(vips, e.vip(s, f, "udp", w.a))
				}
				if err := w.retried(t, func() error { return sendAll(from, vips) }); err != nil {
					t.Errorf("UDP from %s to %s by %s: %v", from.name, name, f, err)
				}
			}
		}
	}
}

// connectAll connects to all addresses from one port and uses the connections.
func connectAll(from *host, to []netip.AddrPort) (err error) {
	var local net.Addr
	var conns []*conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for _, vip := range to {
		c, err := dialFrom(from, local, vip)
		if err != nil {
			return fmt.Errorf("connect to %s from %v: %w", vip, local, err)
		}
		opened, err := begin(c, "echo", patience)
		if err != nil {
			return errors.Join(fmt.Errorf("connection to %s from %v: %w", vip, local, err), c.Close())
		}
		conns = append(conns, opened)
		local = c.LocalAddr()
	}
	for _, c := range conns {
		if err := c.echo(patience); err != nil {
			return fmt.Errorf("connection to %s from %v: %w", c.RemoteAddr(), local, err)
		}
	}
	return nil
}

// sendAll sends to all addresses from one socket. Answers have to come from where
// the datagram was sent to.
func sendAll(from *host, to []netip.AddrPort) error {
	network := "udp4"
	if to[0].Addr().Is6() {
		network = "udp6"
	}
	pc, err := from.ns.ListenPacket(network, ":0")
	if err != nil {
		return err
	}
	defer pc.Close()
	c := pc.(*net.UDPConn)
	buf := make([]byte, 2048)
	for range 3 {
		for _, vip := range to {
			if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
				return err
			}
			if _, err := c.WriteToUDPAddrPort([]byte("?"), vip); err != nil {
				return err
			}
			_, at, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return fmt.Errorf("datagram to %s: %w", vip, err)
			}
			if at != vip {
				return fmt.Errorf("datagram to %s answered from %s", vip, at)
			}
		}
	}
	return nil
}
