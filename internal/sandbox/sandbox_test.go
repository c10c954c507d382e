// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const prefix = "fairlead-sandbox-test"

// requireRoot is testutil.RequireRoot, which cannot be had here since testutil
// imports this package.
func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" || os.Getenv("FAIRLEAD_TEST_STRICT") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func newTestNode(t *testing.T) *Node {
	t.Helper()
	requireRoot(t)
	n, err := NewNode(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func addTestPod(t *testing.T, n *Node, name string, addrs ...string) *Namespace {
	t.Helper()
	var parsed []netip.Addr
	for _, addr := range addrs {
		parsed = append(parsed, netip.MustParseAddr(addr))
	}
	pod, err := n.AddPod(name, parsed...)
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// ask opens a connection, sends a request that both servers understand and
// returns what comes back.
func ask(t *testing.T, ns *Namespace, network, addr string) (answer string, local string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := ns.Dial(ctx, network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	var body []byte
	if network == "udp" {
		body = make([]byte, 1500)
		n, err := c.Read(body)
		if err != nil {
			t.Fatal(err)
		}
		body = body[:n]
	} else if body, err = io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(body)), "\n")
	return lines[len(lines)-1], c.LocalAddr().String()
}

func TestPodsReachEachOther(t *testing.T) {
	n := newTestNode(t)
	server := addTestPod(t, n, "server", "10.244.0.2", "fd00:244::2")
	clients := map[string]*Namespace{
		"another pod": addTestPod(t, n, "client", "10.244.0.3", "fd00:244::3"),
		"the node":    n.Namespace(),
		"itself":      server,
	}
	http, err := ServeHTTP(server, ":8080", "web")
	if err != nil {
		t.Fatal(err)
	}
	defer http.Close()
	udp, err := ServeUDPEcho(server, ":8080", "echo")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()

	for who, client := range clients {
		for network, name := range map[string]string{"tcp": "web", "udp": "echo"} {
			for _, addr := range []string{"10.244.0.2:8080", "[fd00:244::2]:8080"} {
				t.Run(fmt.Sprintf("%s by %s to %s", who, network, addr), func(t *testing.T) {
					answer, local := ask(t, client, network, addr)
					if want := name + " " + local; answer != want {
						t.Errorf("answer %q, want %q", answer, want)
					}
				})
			}
		}
	}
}

func TestNoWayOut(t *testing.T) {
	n := newTestNode(t)
	pod := addTestPod(t, n, "client", "10.244.0.3", "fd00:244::3")
	for _, ns := range []*Namespace{n.Namespace(), pod} {
		for _, addr := range []string{"192.0.2.1:80", "10.96.0.80:80", "[2001:db8::1]:80"} {
			t.Run(ns.Name()+" to "+addr, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				c, err := ns.Dial(ctx, "tcp", addr)
				if err == nil {
					c.Close()
				}
				if !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
					t.Errorf("dial %s: %v, want network unreachable", addr, err)
				}
			})
		}
	}
}

func TestPodWithOneFamilyHasNoRouteForTheOther(t *testing.T) {
	n := newTestNode(t)
	pod := addTestPod(t, n, "v4", "10.244.0.3")
	_, err := pod.Dial(t.Context(), "udp", "[fd00:244::1]:53")
	if !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("dial: %v, want network unreachable", err)
	}
}

func TestRemovedPodIsOffTheNetwork(t *testing.T) {
	n := newTestNode(t)
	pod := addTestPod(t, n, "server", "10.244.0.2")
	server, err := ServeHTTP(pod, ":8080", "web")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := n.RemovePod(pod); err != nil {
		t.Fatal(err)
	}
	if err := n.RemovePod(pod); err != nil {
		t.Errorf("second removal: %v, want nothing to happen", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if c, err := n.Namespace().Dial(ctx, "tcp", "10.244.0.2:8080"); err == nil {
		c.Close()
		t.Error("the pod still answers")
	}
	// Its address is free for another pod.
	addTestPod(t, n, "server", "10.244.0.2")
}

func TestAddAddr(t *testing.T) {
	n := newTestNode(t)
	pod := addTestPod(t, n, "server", "10.244.0.2")
	for _, second := range []netip.Prefix{
		netip.MustParsePrefix("10.244.0.9/24"), netip.MustParsePrefix("fd00:244::9/64"),
	} {
		if err := pod.AddAddr("eth0", second); err != nil {
			t.Fatal(err)
		}
		addr := netip.AddrPortFrom(second.Addr(), 8080).String()
		server, err := ServeHTTP(pod, addr, "second")
		if err != nil {
			t.Fatalf("the address is not usable at once: %v", err)
		}
		defer server.Close()
		if answer, _ := ask(t, n.Namespace(), "tcp", addr); !strings.HasPrefix(answer, "second ") {
			t.Errorf("answer %q, want one of second", answer)
		}
		if err := pod.RemoveAddr("eth0", second); err != nil {
			t.Fatal(err)
		}
		if l, err := pod.Listen("tcp", netip.AddrPortFrom(second.Addr(), 8081).String()); err == nil {
			l.Close()
			t.Errorf("%s can still be bound after its removal", second)
		}
	}
}

func TestAddPodRefusesForeignAddress(t *testing.T) {
	n := newTestNode(t)
	if _, err := n.AddPod("lost", netip.MustParseAddr("192.0.2.7")); err == nil {
		t.Error("a pod whose address the node cannot route was added")
	}
	if pods, _ := filepath.Glob(n.Namespace().Path() + "-lost"); pods != nil {
		t.Errorf("left behind: %v", pods)
	}
}

// Sockets must be made in the namespace whatever other goroutines do, and a
// thread that was in a namespace must not run anybody else's code.
func TestSocketsAndThreadsStayApart(t *testing.T) {
	n := newTestNode(t)
	home := netnsOf(t)
	pod := addTestPod(t, n, "client", "10.244.0.3", "fd00:244::3")
	want := ""
	if err := pod.Do(func() error { want = netnsOf(t); return nil }); err != nil {
		t.Fatal(err)
	}
	if want == home {
		t.Fatal("the pod is in the namespace of the test")
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if err := pod.Do(func() error {
					runtime.Gosched()
					if got := netnsOf(t); got != want {
						return fmt.Errorf("in %s, want %s", got, want)
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				if got := netnsOf(t); got != home {
					t.Errorf("outside of Do in %s, want %s", got, home)
				}
				for _, addr := range []string{"10.244.0.3:0", "[fd00:244::3]:0"} {
					l, err := pod.Listen("tcp", addr)
					if err != nil {
						t.Error(err)
						continue
					}
					c, err := pod.Dial(t.Context(), "tcp", l.Addr().String())
					if err != nil {
						t.Error(err)
					} else {
						c.Close()
					}
					l.Close()
				}
			}
		})
	}
	wg.Wait()
}

func netnsOf(t *testing.T) string {
	t.Helper()
	name, err := os.Readlink(threadNetns)
	if err != nil {
		t.Error(err)
	}
	return name
}

func TestDoSurvivesFunctionThatDoesNotReturn(t *testing.T) {
	n := newTestNode(t)
	err := n.Namespace().Do(func() error { runtime.Goexit(); return nil })
	if err == nil {
		t.Error("no error for a function that did not return")
	}
}

func TestNamesAreRefused(t *testing.T) {
	n := newTestNode(t)
	if _, err := n.Namespace().Dial(t.Context(), "tcp", "localhost:80"); err == nil ||
		!strings.Contains(err.Error(), "not an IP address") {
		t.Errorf("dial by name: %v, want a refusal", err)
	}
	if _, err := n.Namespace().Listen("tcp", "localhost:0"); err == nil {
		t.Error("listening on a name succeeded")
	}
}

func TestCommandRunsInNamespace(t *testing.T) {
	n := newTestNode(t)
	pod := addTestPod(t, n, "client", "10.244.0.3")
	out, err := pod.Command(t.Context(), "readlink", "/proc/self/ns/net").Output()
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	if err := pod.Do(func() error { want = netnsOf(t); return nil }); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(out)); got != want {
		t.Errorf("command ran in %s, want %s", got, want)
	}
	if out, err = pod.Command(t.Context(), "sh", "-c", "echo out; echo err >&2; exit 3").CombinedOutput(); err == nil {
		t.Error("no error for exit code 3")
	}
	if !bytes.Equal(out, []byte("out\nerr\n")) {
		t.Errorf("output %q", out)
	}
	if err := pod.Command(t.Context(), "/no/such/program").Run(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing program: %v", err)
	}
}

func TestCommandCanBeKilled(t *testing.T) {
	n := newTestNode(t)
	cmd := n.Namespace().Command(t.Context(), "sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Threads come and go; the process must not go with the one it came from.
	for range 20 {
		if err := n.Namespace().Do(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Process.Signal(unix.Signal(0)); err != nil {
		t.Fatalf("process is gone: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("no error from a killed process")
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	requireRoot(t)
	n, err := NewNode(prefix)
	if err != nil {
		t.Fatal(err)
	}
	pod := addTestPod(t, n, "client", "10.244.0.3")
	for _, ns := range []*Namespace{n.Namespace(), pod} {
		if !strings.HasPrefix(ns.Name(), prefix+"-") {
			t.Errorf("name %q is without the prefix", ns.Name())
		}
		if _, err := os.Stat(ns.Path()); err != nil {
			t.Error(err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	assertNothingLeft(t, n.base)
	if err := pod.Do(func() error { return nil }); err == nil {
		t.Error("a closed namespace can be entered")
	}
}

func assertNothingLeft(t *testing.T, base string) {
	t.Helper()
	for _, dir := range []string{netnsDir, os.TempDir()} {
		if left, _ := filepath.Glob(filepath.Join(dir, base+"*")); left != nil {
			t.Errorf("left behind: %v", left)
		}
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(table, []byte(base)) {
		t.Errorf("a mount of %s is left behind", base)
	}
}

func TestUDPServerEndsOnClose(t *testing.T) {
	n := newTestNode(t)
	server, err := ServeUDPEcho(n.Namespace(), "127.0.0.1:0", "echo")
	if err != nil {
		t.Fatal(err)
	}
	if !server.Addr().IsValid() || server.Addr().Port() == 0 {
		t.Errorf("address %s", server.Addr())
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if err := server.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
}
