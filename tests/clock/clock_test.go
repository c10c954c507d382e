// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package clock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reflector"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// What an agent in a process of its own is given.
const (
	manifestsVariable = "FAIRLEAD_CLOCK_MANIFESTS"
	cgroupVariable    = "FAIRLEAD_CLOCK_CGROUP"
	rootVariable      = "FAIRLEAD_CLOCK_BPF_ROOT"
)

// TestMain is also what an agent begins with: these machines cannot build the program.
func TestMain(m *testing.M) {
	if os.Getenv(manifestsVariable) == "" {
		os.Exit(m.Run())
	}
	if err := beAgent(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func beAgent() error {
	log, err := zap.NewDevelopment()
	if err != nil {
		return err
	}
	files, err := reflector.NewFile(os.Getenv(manifestsVariable), reflector.Options{NodeName: "node"}, log)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	return agent.Run(ctx, agent.Config{
		Source: files, NodeName: "node", NodeOptional: true, NodePorts: lb.NodePorts{Primary: true},
		Recorder: reflector.NoRecorder(), CgroupRoot: os.Getenv(cgroupVariable), BPFRoot: os.Getenv(rootVariable),
		HealthzAddress: testutil.HealthzAddress, MetricsAddress: testutil.MetricsAddress,
		RepairEvery: time.Second,
	}, log)
}

const (
	keptVIP    = "10.96.0.1" // with an affinity
	changedVIP = "10.96.0.2"
)

// manifests are a Service at each VIP; that at changedVIP has one of two backends.
func manifests(backend int) string {
	var b strings.Builder
	for _, s := range []struct{ name, vip, spec, endpoints string }{
		{"kept", keptVIP, "sessionAffinity: ClientIP", "{addresses: [10.244.0.11]}, {addresses: [10.244.0.12]}"},
		{"changed", changedVIP, "sessionAffinity: None", fmt.Sprintf("{addresses: [10.244.0.%d]}", backend)},
	} {
		fmt.Fprintf(&b, `apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: test}
spec: {clusterIP: %[2]s, %[3]s, ports: [{name: web, port: 80}, {name: dns, port: 53, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, namespace: test, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: web, port: 9000}, {name: dns, port: 9000, protocol: UDP}]
endpoints: [%[4]s]
---
`, s.name, s.vip, s.spec, s.endpoints)
	}
	return b.String()
}

// world is a node with an agent, a client and two backends.
type world struct {
	t      *testing.T
	node   *sandbox.Node
	client *sandbox.Namespace
	dir    string
}

// The clock jumps a year ahead, two back, and to where it belongs. Connections,
// sockets and affinities go on, changes are applied, and nobody takes the node for
// one that is stuck.
func TestClockJumpsChangeNothing(t *testing.T) {
	if os.Getenv("FAIRLEAD_VM_KERNEL") != "6.1" {
		t.Skip("sets the clock, and so runs in a virtual machine of tests/vm only; one kernel stands for all")
	}
	w := newWorld(t)
	kept := w.keepClients()
	began, now := time.Now(), time.Now().UTC().Round(0)
	defer func() { setClock(t, now.Add(time.Since(began))) }()
	const year = 365 * 24 * time.Hour
	for i, jump := range []time.Duration{year, -year, 0} {
		setClock(t, now.Add(jump).Add(time.Since(began)))
		kept(fmt.Sprintf("after a jump of %v", jump))
		w.write(11 + i%2)
		testutil.Eventually(t, 30*time.Second, "a change is applied", func() error {
			return w.answered(changedVIP, fmt.Sprintf("backend-%d", 11+i%2))
		})
		kept("after that and a change")
		testutil.Eventually(t, 30*time.Second, "the node is healthy", w.healthy)
	}
}

func setClock(t *testing.T, to time.Time) {
	t.Helper()
	tv := unix.NsecToTimeval(to.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		t.Fatal(err)
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	cgroup := testutil.Cgroup(t)
	w := &world{t: t, node: testutil.Node(t), dir: t.TempDir()}
	w.client = w.pod("client", 2)
	for _, last := range []int{11, 12} {
		name := fmt.Sprintf("backend-%d", last)
		pod, at := w.pod(name, last), fmt.Sprintf("10.244.0.%d:9000", last)
		for _, serve := range []func(*sandbox.Namespace, string, string) (*sandbox.Server, error){sandbox.ServeHTTP, sandbox.ServeUDPEcho} {
			server, err := serve(pod, at, name)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = server.Close() })
		}
	}
	w.write(12)
	w.startAgent(cgroup.Path(), testutil.BPFRoot(t))
	return w
}

func (w *world) pod(name string, last int) *sandbox.Namespace {
	w.t.Helper()
	pod, err := w.node.AddPod(name, netip.AddrFrom4([4]byte{10, 244, 0, byte(last)}))
	if err != nil {
		w.t.Fatal(err)
	}
	return pod
}

func (w *world) write(backend int) {
	w.t.Helper()
	testutil.WriteFile(w.t, filepath.Join(w.dir, "services.yaml"), manifests(backend))
}

// startAgent starts an agent and waits until it serves.
func (w *world) startAgent(cgroup, root string) {
	w.t.Helper()
	path, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	var log testutil.LogBuffer
	cmd := w.node.Namespace().Command(context.Background(), path)
	cmd.Env = append(os.Environ(), manifestsVariable+"="+w.dir, cgroupVariable+"="+cgroup, rootVariable+"="+root)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			w.t.Errorf("agent: %v", err)
		}
		if w.t.Failed() {
			w.t.Logf("the agent's log:\n%s", log.String())
		}
	})
	testutil.Eventually(w.t, 2*time.Minute, "the agent is ready", w.healthy)
}

func (w *world) healthy() error {
	client := http.Client{Transport: &http.Transport{DialContext: w.node.Namespace().Dial, DisableKeepAlives: true}}
	response, err := client.Get("http://" + testutil.HealthzAddress + "/healthz")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// get asks a Service by HTTP and returns who has answered.
func get(client *http.Client, vip string) (string, error) {
	response, err := client.Get("http://" + vip + "/")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	name, _, _ := strings.Cut(string(body), " ")
	return name, err
}

// answered tells whether a backend answers new connections to a VIP.
func (w *world) answered(vip, by string) error {
	client := &http.Client{Transport: &http.Transport{DialContext: w.client.Dial, DisableKeepAlives: true}}
	got, err := get(client, vip)
	if err == nil && got != by {
		err = fmt.Errorf("%s is answered by %s, want %s", vip, got, by)
	}
	return err
}

// keepClients begins a connection and a UDP socket and finds the backend of an
// affinity. The function it returns finds all of them as they were.
func (w *world) keepClients() (check func(when string)) {
	w.t.Helper()
	var dials atomic.Int32
	one := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials.Add(1)
			return w.client.Dial(ctx, network, addr)
		},
	}}
	socket, err := w.client.Dial(context.Background(), "udp", keptVIP+":53")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = socket.Close() })
	byTCP, err := get(one, keptVIP)
	if err != nil {
		w.t.Fatal(err)
	}
	byUDP, err := exchange(socket)
	if err != nil {
		w.t.Fatal(err)
	}
	return func(when string) {
		w.t.Helper()
		if got, err := get(one, keptVIP); err != nil || got != byTCP || dials.Load() != 1 {
			w.t.Errorf("%s a connection is answered by %q, %v, after %d dials; want %s", when, got, err, dials.Load(), byTCP)
		}
		if got, err := exchange(socket); err != nil || got != byUDP {
			w.t.Errorf("%s a UDP socket is answered by %q, %v; want %s", when, got, err, byUDP)
		}
		for range 8 {
			if err := w.answered(keptVIP, byTCP); err != nil {
				w.t.Errorf("%s an affinity: %v", when, err)
			}
		}
	}
}

// exchange sends a datagram and returns who has answered.
func exchange(conn net.Conn) (string, error) {
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte("?")); err != nil {
		return "", err
	}
	buf := make([]byte, 256)
	n, err := conn.Read(buf)
	name, _, _ := strings.Cut(string(buf[:n]), " ")
	return name, err
}
