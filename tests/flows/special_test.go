// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// Strict reverse-path filtering, as RHEL sets it, drops what arrives from where no
// route leads back to.
func TestStrictReversePathFilter(t *testing.T) {
	t.Parallel()
	s := routed
	s.sysctls = "ipv4/conf/all/rp_filter 1\n"
	w := newWorld(t, s)
	w.start(t)
	t.Run("outside clients", func(t *testing.T) { outsideClients(t, w) })
	t.Run("pods", func(t *testing.T) { podClients(t, w) })
	t.Run("processes of the node", func(t *testing.T) { nodeProcesses(t, w) })
}

func TestManyFlowsThroughOneNodePort(t *testing.T) {
	t.Parallel()
	n := 10000
	if testing.Short() {
		n = 1000
	}
	w := newWorld(t, routed)
	w.start(t, "--snat-ports=20000-60000")
	for _, name := range []string{"local", "remote"} {
		t.Run(name, func(t *testing.T) {
			to := w.services[name].nodePort(ipv4, w.a)
			start := time.Now()
			// Half of them are datagrams': a connection takes two files of this process.
			sockets := dialMany(t, w, to, n/2)
			conns := openMany(t, w, to, n/2)
			opened := time.Now()
			inParallel(n/2, func(i int) {
				if err := conns[i].echo(30 * time.Second); err != nil {
					t.Errorf("connection %d: %v", i, err)
				}
				if _, err := exchange(sockets[i], 16, 30*time.Second); err != nil {
					t.Errorf("socket %d: %v", i, err)
				}
			})
			t.Logf("%d flows begun in %s, all used in %s", n, opened.Sub(start), time.Since(opened))
		})
	}
}

// dialMany returns UDP sockets that have been answered, until the test ends.
func dialMany(t *testing.T, w *world, to netip.AddrPort, n int) []net.Conn {
	t.Helper()
	sockets := make([]net.Conn, n)
	t.Cleanup(func() {
		for _, s := range sockets {
			if s != nil {
				_ = s.Close()
			}
		}
	})
	inParallel(n, func(i int) {
		var err error
		if sockets[i], err = dialUDP(w.client.ns, to); err == nil {
			_, err = exchange(sockets[i], 16, 30*time.Second)
		}
		if err != nil {
			t.Errorf("socket %d: %v", i, err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	return sockets
}

// openMany opens connections that last until the test ends.
func openMany(t *testing.T, w *world, to netip.AddrPort, n int) []*conn {
	t.Helper()
	conns := make([]*conn, n)
	t.Cleanup(func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
	})
	inParallel(n, func(i int) {
		c, err := open(w.client.ns, to, "echo", 30*time.Second)
		if err != nil {
			t.Errorf("connection %d: %v", i, err)
			return
		}
		conns[i] = c
	})
	if t.Failed() {
		t.FailNow()
	}
	return conns
}

// inParallel calls f with the numbers from 0 to n-1, some at a time.
func inParallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	turns := make(chan int)
	for range min(n, 100) {
		wg.Go(func() {
			for i := range turns {
				f(i)
			}
		})
	}
	for i := range n {
		turns <- i
	}
	close(turns)
	wg.Wait()
}

// With as many flows as there are source ports, one backend takes no more of them;
// others do, also with the same ports.
func TestSourcePortsRunOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t, overlay)
	w.start(t, "--snat-ports=61000-61003")
	to := w.services["remote"].nodePort(ipv4, w.a)
	kept := openMany(t, w, to, 4)
	for _, c := range kept {
		if p := c.client.Port(); p < 61000 || p > 61003 {
			t.Errorf("the backend sees source port %d", p)
		}
	}
	before := w.counters(t, w.a)
	if got, err := ask(w.client.ns, "tcp", to, silence); !isTimeout(err) {
		t.Errorf("a fifth flow is answered by %q, %v", got.name, err)
	}
	if after := w.counters(t, w.a); after["drop_snat_exhausted"] == before["drop_snat_exhausted"] {
		t.Errorf("nobody counts it; counters that grew: %s", grown(before, after))
	}
	w.reaches(t, w.client, "tcp", w.services["remote-host"].nodePort(ipv4, w.a), "b", w.a.addrs[ipv4])
	w.reaches(t, w.client, "tcp", w.services["local"].nodePort(ipv4, w.a), w.a1.name, w.client.addrs[ipv4])
	for _, c := range kept {
		if err := c.echo(patience); err != nil {
			t.Errorf("a flow that was there before: %v", err)
		}
	}
}

// Segments outside of the window are INVALID for connection tracking, which leaves
// their addresses alone. Ours are translated like all others of the flow.
func TestSegmentsOutsideOfTheWindowAreTranslated(t *testing.T) {
	t.Parallel()
	s := routed
	s.noFirewall = true
	w := newWorld(t, s)
	w.start(t)
	for name, backend := range map[string]*host{"local": w.a1, "remote": w.b1} {
		for _, f := range families {
			t.Run(fmt.Sprintf("%s by %s", name, f), func(t *testing.T) {
				vip := w.services[name].nodePort(f, w.a)
				c, err := open(w.client.ns, vip, "echo", patience)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				client := netip.MustParseAddrPort(c.LocalAddr().String())
				server := netip.AddrPortFrom(backend.addrs[f], backendPort)

				w.strays(t, w.client, backend, client, vip, fmt.Sprintf("%s > %s", c.client, server))
				w.strays(t, backend, w.client, server, c.client, fmt.Sprintf("%s > %s", vip, client))
				if err := c.echo(patience); err != nil {
					t.Errorf("the connection after that: %v", err)
				}
			})
		}
	}
}

// strays sends a segment that belongs to no window from one host and waits until it
// has arrived at the other, between the ends that it should have there.
func (w *world) strays(t *testing.T, from, to *host, src, dst netip.AddrPort, want string) {
	t.Helper()
	c := record(t, from, to)
	const seq = 0x12345678
	segment := packet.Packet{
		Src: src.Addr(), Dst: dst.Addr(), SrcPort: src.Port(), DstPort: dst.Port(),
		Proto: packet.TCP, TTL: 64, Flags: packet.ACK, Seq: seq, Ack: 0x23456789, Window: 1000, Payload: "stray",
	}
	if err := sendRaw(from, segment); err != nil {
		t.Fatal(err)
	}
	// The two hosts have no link in common: what one of them receives is what the
	// nodes have made of it.
	arrived := fmt.Sprintf("<- %s TCP A seq %d", want, seq)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if strings.Contains(c.text(), arrived) {
			c.end()
			return
		}
	}
	t.Errorf("no %q at %s; captured:\n%s", arrived, to.name, c.end())
}

// sendRaw sends an IP packet as it is.
func sendRaw(from *host, p packet.Packet) error {
	domain, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: p.Dst.As16()})
	if !p.Is6() {
		domain, to = unix.AF_INET, &unix.SockaddrInet4{Addr: p.Dst.As4()}
	}
	return from.ns.Do(func() error {
		fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, p.Marshal(), 0, to)
	})
}

// counting is somebody else's program that counts packets and lets them pass on.
type counting struct {
	count *ebpf.Map
	name  string
}

// attachCounting puts a program on a link of a namespace.
func attachCounting(t *testing.T, h *host, device, name string, where ebpf.AttachType, anchor link.Anchor) *counting {
	t.Helper()
	count, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = count.Close() })
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "others", Type: ebpf.SchedCLS, AttachType: where, License: "GPL",
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4),
			asm.LoadMapPtr(asm.R1, count.FD()),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.Mov.Imm(asm.R1, 1),
			asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
			asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), // TCX_NEXT
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	var l link.Link
	err = h.ns.Do(func() error {
		index, err := unix.NewIfreq(device)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, index); err != nil {
			return err
		}
		l, err = link.AttachTCX(link.TCXOptions{
			Interface: int(index.Uint32()), Program: program, Attach: where, Anchor: anchor,
		})
		return err
	})
	if err != nil {
		t.Fatalf("attach to %s of %s: %v", device, h.name, err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return &counting{count: count, name: name}
}

func (c *counting) packets(t *testing.T) uint64 {
	t.Helper()
	var n uint64
	if err := c.count.Lookup(uint32(0), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestOtherPeoplesProgramsSeePackets(t *testing.T) {
	t.Parallel()
	w := newWorld(t, routed)
	var theirs []*counting
	attach := func(when string, anchor link.Anchor) {
		for where, name := range map[ebpf.AttachType]string{ebpf.AttachTCXIngress: "ingress", ebpf.AttachTCXEgress: "egress"} {
			for _, device := range []string{"eth0", w.a1.link} {
				theirs = append(theirs, attachCounting(t, &w.a.host, device, when+" "+name+" of "+device, where, anchor))
			}
		}
	}
	attach("there before us,", nil)
	w.start(t)
	attach("first,", link.Head())
	attach("last,", link.Tail())
	before := make([]uint64, len(theirs))
	for i, c := range theirs {
		before[i] = c.packets(t)
	}
	eachWay(func(f family, network string) {
		w.reaches(t, w.client, network, w.services["local"].nodePort(f, w.a), w.a1.name, w.client.addrs[f])
	})
	for i, c := range theirs {
		if c.packets(t) == before[i] {
			t.Errorf("%s: no packet was counted", c.name)
		}
	}
}
