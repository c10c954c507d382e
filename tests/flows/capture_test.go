// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// captureLimit is how many packets a capture keeps, the last ones.
const captureLimit = 400

// capture keeps what goes through the links of namespaces.
type capture struct {
	stop    chan struct{}
	readers sync.WaitGroup

	mu      sync.Mutex
	packets []captured
}

// captured is a packet at one link.
type captured struct {
	at   time.Duration // since the epoch
	text string
}

// record begins to keep the packets of namespaces. The caller must call end.
func record(t *testing.T, hosts ...*host) *capture {
	t.Helper()
	c := &capture{stop: make(chan struct{})}
	for _, h := range hosts {
		fd, links, err := openTap(h.ns)
		if err != nil {
			t.Logf("capture in %s: %v", h.name, err)
			continue
		}
		c.readers.Go(func() { c.read(h.name, fd, links) })
	}
	return c
}

// openTap returns a socket that gets all packets of a namespace, and the names of
// its links.
func openTap(ns *sandbox.Namespace) (fd int, links map[int]string, err error) {
	links = map[int]string{}
	err = ns.Do(func() error {
		list, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, l := range list {
			links[l.Index] = l.Name
		}
		// Without the link header, which not all links have.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(swap16(unix.ETH_P_ALL)))
		return err
	})
	if err != nil {
		return 0, nil, err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20)
	pause := unix.NsecToTimeval(int64(50 * time.Millisecond))
	return fd, links, errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &pause),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1))
}

func swap16(v uint16) uint16 { return v<<8 | v>>8 }

// read keeps packets until the capture ends and nothing is left.
func (c *capture) read(name string, fd int, links map[int]string) {
	defer unix.Close(fd)
	buf, control := make([]byte, 1<<16), make([]byte, 64)
	for {
		n, controls, _, from, err := unix.Recvmsg(fd, buf, control, 0)
		if errors.Is(err, unix.EAGAIN) {
			select {
			case <-c.stop:
				return
			default:
				continue
			}
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if err != nil || !ok || links[link.Ifindex] == "lo" {
			continue
		}
		text := describe(buf[:n])
		if text == "" {
			continue
		}
		direction := "<-"
		if link.Pkttype == unix.PACKET_OUTGOING {
			direction = "->"
		}
		text = fmt.Sprintf("%-10s %-9s %s %s", name, links[link.Ifindex], direction, text)
		c.keep(captured{timestamp(control[:controls]), text})
	}
}

// timestamp returns when the kernel saw a packet.
func timestamp(control []byte) time.Duration {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) == 0 || len(messages[0].Data) < 16 {
		return 0
	}
	data := messages[0].Data
	seconds, ns := binary.NativeEndian.Uint64(data), binary.NativeEndian.Uint64(data[8:])
	return time.Duration(seconds)*time.Second + time.Duration(ns)
}

func (c *capture) keep(p captured) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.packets) == captureLimit {
		c.packets = slices.Delete(c.packets, 0, captureLimit/4)
	}
	c.packets = append(c.packets, p)
}

// end ends the capture and returns all of it.
func (c *capture) end() string {
	close(c.stop)
	c.readers.Wait()
	return c.text()
}

// text returns what was captured so far, one packet in each line.
func (c *capture) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	slices.SortStableFunc(c.packets, func(p, q captured) int { return cmp.Compare(p.at, q.at) })
	var b strings.Builder
	for _, p := range c.packets {
		fmt.Fprintf(&b, "%9.3fms %s\n", float64((p.at-c.packets[0].at).Microseconds())/1000, p.text)
	}
	return b.String()
}

// describe returns what a packet is in a line, nothing for what is no IP packet or
// only IPv6's housekeeping.
func describe(p []byte) string {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		length := int(p[0]&15) * 4
		if len(p) < length {
			return "truncated IPv4 header"
		}
		src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		more := fmt.Sprintf("ttl %d len %d", p[8], binary.BigEndian.Uint16(p[2:]))
		offset := binary.BigEndian.Uint16(p[6:])
		if offset&0x1fff != 0 {
			return fmt.Sprintf("%s > %s proto %d fragment at %d %s", src, dst, p[9], offset&0x1fff*8, more)
		}
		if offset&0x2000 != 0 {
			more += " first fragment"
		}
		return transport(src, dst, p[9], p[length:]) + " " + more
	case len(p) >= 40 && p[0]>>4 == 6:
		src, dst := netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
		more := fmt.Sprintf("hops %d len %d", p[7], 40+binary.BigEndian.Uint16(p[4:]))
		next, rest := p[6], p[40:]
		if next == unix.IPPROTO_FRAGMENT && len(rest) >= 8 {
			offset := binary.BigEndian.Uint16(rest[2:])
			if offset&0xfff8 != 0 {
				return fmt.Sprintf("%s > %s proto %d fragment at %d %s", src, dst, rest[0], offset&0xfff8, more)
			}
			more += " first fragment"
			next, rest = rest[0], rest[8:]
		}
		if next == unix.IPPROTO_ICMPV6 && len(rest) > 0 && rest[0] > 129 || next == 0 {
			return ""
		}
		return transport(src, dst, next, rest) + " " + more
	}
	return ""
}

// transport describes what follows an IP header.
func transport(src, dst netip.Addr, proto byte, p []byte) string {
	ports := ""
	if len(p) >= 4 {
		at := func(a netip.Addr, p []byte) netip.AddrPort { return netip.AddrPortFrom(a, binary.BigEndian.Uint16(p)) }
		ports = fmt.Sprintf("%s > %s", at(src, p), at(dst, p[2:]))
	}
	switch {
	case proto == unix.IPPROTO_TCP && len(p) >= 20:
		flags := ""
		for i, f := range "FSRPAU" {
			if p[13]&(1<<i) != 0 {
				flags += string(f)
			}
		}
		return fmt.Sprintf("%s TCP %s seq %d ack %d payload %d", ports, flags,
			binary.BigEndian.Uint32(p[4:]), binary.BigEndian.Uint32(p[8:]), len(p)-int(p[12]>>4)*4)
	case proto == unix.IPPROTO_UDP && len(p) >= 8:
		return ports + " UDP"
	case (proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6) && len(p) >= 8:
		text := fmt.Sprintf("%s > %s ICMP type %d code %d (%d)", src, dst, p[0], p[1], binary.BigEndian.Uint32(p[4:]))
		if proto == unix.IPPROTO_ICMP && p[0] != 0 && p[0] != 8 || proto == unix.IPPROTO_ICMPV6 && p[0] < 128 {
			text += " [" + describe(p[8:]) + "]"
		}
		return text
	}
	return fmt.Sprintf("%s > %s proto %d", src, dst, proto)
}

// hosts are all namespaces of a world.
func (w *world) hosts() []*host {
	return []*host{
		w.client, w.stranger, {name: "router", ns: w.router}, &w.a.host, &w.b.host, w.a1, w.a2, w.a3, w.b1,
	}
}

// retried runs f. When that fails it runs f again and says in the error what was
// captured meanwhile; it fails even if the second try does not.
func (w *world) retried(t *testing.T, f func() error) error {
	t.Helper()
	captureAll := os.Getenv("FAIRLEAD_CAPTURE") == "1"
	var c *capture
	if captureAll {
		c = record(t, w.hosts()...)
	}
	err := f()
	if err == nil {
		if c != nil {
			c.end()
		}
		return nil
	}
	if c == nil {
		before := w.counters(t, w.a)
		c = record(t, w.hosts()...)
		if again := f(); again == nil {
			t.Log("it worked when it was tried again, as follows")
		}
		t.Logf("counters of node a that grew: %s", grown(before, w.counters(t, w.a)))
	}
	return fmt.Errorf("%w; captured:\n%s", err, shorten(c.end(), 80))
}

// explain shows, when a test has failed, what the agents and nodes hold. The test's
// own context has ended by then.
func (w *world) explain(t *testing.T) {
	if !t.Failed() {
		return
	}
	for _, n := range []*node{w.a, w.b} {
		for _, what := range []string{"flows", "counters"} {
			out, err := n.fairlead(t, "inspect", what)
			t.Logf("node %s: inspect %s: %v\n%s", n.name, what, err, shorten(out, 60))
		}
		out, err := n.ns.Command(context.Background(), "nft", "list", "ruleset").CombinedOutput()
		t.Logf("node %s: nft: %v\n%s", n.name, err, out)
	}
}

// shorten returns the first lines of a text.
func shorten(text string, lines int) string {
	all := strings.SplitAfter(text, "\n")
	if len(all) <= lines {
		return text
	}
	return strings.Join(all[:lines], "") + fmt.Sprintf("and %d more lines\n", len(all)-lines)
}

// counters returns what a node's programs have counted, nil when that cannot be
// read.
func (w *world) counters(t *testing.T, n *node) map[string]uint64 {
	t.Helper()
	out, err := n.fairlead(t, "inspect", "counters", "-o", "json")
	if err != nil {
		t.Logf("inspect counters: %v: %s", err, out)
		return nil
	}
	var rows []struct {
		Name  string
		Value uint64
	}
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		t.Logf("inspect counters: %v in %s", err, out)
		return nil
	}
	counters := map[string]uint64{}
	for _, r := range rows {
		counters[r.Name] = r.Value
	}
	return counters
}

// grown tells which counters are higher than before, and by how much.
func grown(before, after map[string]uint64) string {
	var out []string
	for name, n := range after {
		if n != before[name] {
			out = append(out, fmt.Sprintf("%s +%d", name, n-before[name]))
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}
