// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package upgrade

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// world is a node with a client and two backends in pods, and a client outside.
type world struct {
	t       *testing.T
	node    *sandbox.Node
	client  *sandbox.Namespace
	outside *outside
	cgroup  *sandbox.Cgroup
	root    string // of pins
	dir     string // of manifests
}

// outside is a process that is in no cgroup of ours.
type outside struct {
	cmd *sandbox.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// manifests are two Services, the second one with an affinity.
const manifests = `apiVersion: v1
kind: Node
metadata: {name: node}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: test}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  ports: [{name: web, port: 80, nodePort: 30080}, {name: dns, port: 53, protocol: UDP, nodePort: 30053}]
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: test}
spec:
  type: NodePort
  clusterIP: 10.96.0.11
  sessionAffinity: ClientIP
  ports: [{name: web, port: 80, nodePort: 30081}]
---
` + slice + `metadata: {name: web-1, namespace: test, labels: {kubernetes.io/service-name: web}}
---
` + slice + `metadata: {name: sticky-1, namespace: test, labels: {kubernetes.io/service-name: sticky}}
`

const slice = `apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv4
ports: [{name: web, port: 9000}, {name: dns, port: 9000, protocol: UDP}]
endpoints: [{addresses: [10.244.0.11]}, {addresses: [10.244.0.12]}]
`

var (
	inside  = targets{TCP: "10.96.0.10:80", UDP: "10.96.0.10:53", Sticky: "10.96.0.11:80", Peers: true}
	outward = targets{TCP: "192.0.2.1:30080", UDP: "192.0.2.1:30053", Sticky: "192.0.2.1:30081"}
)

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, node: testutil.Node(t), root: testutil.BPFRoot(t), dir: t.TempDir()}
	w.client = w.pod("client", 2)
	for _, last := range []byte{11, 12} {
		name := fmt.Sprint("backend-", last)
		serve(t, w.pod(name, last), fmt.Sprintf("10.244.0.%d:9000", last), name)
	}
	w.outside = w.startOutside()
	w.cgroup = testutil.Cgroup(t) // from here on hooks see the sockets of this process
	socket := agent.SocketPath(w.root)
	t.Cleanup(func() { _ = os.Remove(socket) }) // an agent that is killed leaves it
	if err := os.WriteFile(filepath.Join(w.dir, "all.yaml"), []byte(manifests), 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) pod(name string, last byte) *sandbox.Namespace {
	w.t.Helper()
	pod, err := w.node.AddPod(name, netip.AddrFrom4([4]byte{10, 244, 0, last}))
	if err != nil {
		w.t.Fatal(err)
	}
	return pod
}

// startOutside gives the node an uplink with a host behind it, and starts a process
// there.
func (w *world) startOutside() *outside {
	w.t.Helper()
	network, err := sandbox.NewNetwork("fairlead-test")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := network.Close(); err != nil {
			w.t.Error(err)
		}
	})
	host, err := network.AddNamespace("outside")
	if err == nil {
		err = w.node.Namespace().Configure("link add up0 type veth peer name eth0 netns " + host.Name() +
			"\naddr add 192.0.2.1/24 dev up0\nlink set up0 up\n")
	}
	if err == nil {
		err = host.Configure("addr add 192.0.2.2/24 dev eth0\nlink set eth0 up\nroute add default via 192.0.2.1\n")
	}
	if err != nil {
		w.t.Fatal(err)
	}
	o := &outside{cmd: host.Command(context.Background(), os.Args[0])}
	o.cmd.Env = append(os.Environ(), clientEnv+"=1")
	o.cmd.Stderr = os.Stderr
	var out io.Reader
	if o.in, err = o.cmd.StdinPipe(); err == nil {
		out, err = o.cmd.StdoutPipe()
	}
	if err == nil {
		err = o.cmd.Start()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	o.out = json.NewDecoder(out)
	w.t.Cleanup(func() {
		_ = o.in.Close()
		_ = o.cmd.Wait()
	})
	return o
}

// tell sends the process a message.
func (o *outside) tell(message any) error { return json.NewEncoder(o.in).Encode(message) }

// progress asks what the clients have done so far.
func (o *outside) progress() (t tally, err error) {
	if err := o.tell(struct{}{}); err != nil {
		return t, err
	}
	err = o.out.Decode(&t)
	return t, err
}

// stop ends the clients and returns what they have done.
func (o *outside) stop() (t tally, err error) {
	if err := o.in.Close(); err != nil {
		return t, err
	}
	err = o.out.Decode(&t)
	return t, err
}

// start starts an agent of a build and waits until it is ready.
func (w *world) start(binary string) *testutil.Agent {
	w.t.Helper()
	return w.startWith(binary, testutil.AgentOptions{Source: "file:" + w.dir})
}

// startWith starts an agent of a build with more options than where it is.
func (w *world) startWith(binary string, options testutil.AgentOptions) *testutil.Agent {
	w.t.Helper()
	w.t.Setenv("FAIRLEAD_BINARY", binary)
	options.Netns, options.CgroupRoot, options.BPFRoot = w.node.Namespace(), w.cgroup.Path(), w.root
	return testutil.StartAgent(w.t, options)
}

// fairlead runs a command of a build and returns what it printed, whatever its exit
// code says.
func (w *world) fairlead(binary string, args ...string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := w.node.Namespace().Command(ctx, binary, append(args, "--bpf-root="+w.root)...)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		w.t.Fatalf("fairlead %v: %v", args, err)
	}
	return string(out)
}

// version returns the directory of an ABI.
func (w *world) version(abi int) string { return filepath.Join(w.root, fmt.Sprint("v", abi)) }

// served waits until the version has all hooks and devices and the other one none.
func (w *world) served(by, other int) {
	w.t.Helper()
	testutil.Eventually(w.t, 60*time.Second, fmt.Sprintf("v%d serves", by), func() error {
		links, err1 := entries(filepath.Join(w.version(by), "links"))
		theirs, err2 := entries(filepath.Join(w.version(other), "links"))
		devices, err3 := entries(filepath.Join(w.version(other), "devices"))
		if err := errors.Join(err1, err2, err3); err != nil {
			return err
		}
		if links != len(attach.Hooks()) || theirs != 0 || devices != 0 {
			return fmt.Errorf("it has %d hooks, the other one %d and %d places on devices", links, theirs, devices)
		}
		return nil
	})
	if target, err := os.Readlink(filepath.Join(w.root, fmt.Sprint("state", datapath.StateABI), "serving")); err != nil || filepath.Base(target) != fmt.Sprint("v", by) {
		w.t.Errorf("serving leads to %q, %v", target, err)
	}
}

// entries counts what is in a directory; one that is missing is empty.
func entries(dir string) (int, error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return len(list), err
}

// watchHooks looks again and again at how many programs each hook has, until stop is
// called, which returns what was wrong.
func (w *world) watchHooks() (stop func() []string) {
	w.t.Helper()
	dir, err := os.Open(w.cgroup.Path())
	if err != nil {
		w.t.Fatal(err)
	}
	device := w.uplink()
	done, wrong := make(chan struct{}), []string{}
	var running sync.WaitGroup
	look := func(what string, options link.QueryOptions) {
		got, err := link.QueryPrograms(options)
		if n := len(wrong); n < 10 && (err != nil || len(got.Programs) != 1) {
			wrong = append(wrong, fmt.Sprintf("%s has %d programs, %v", what, len(got.Programs), err))
		}
	}
	running.Go(func() {
		defer dir.Close()
		_ = w.node.Namespace().Do(func() error {
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-done:
					return nil
				case <-tick.C:
				}
				for _, hook := range attach.Hooks() {
					look(hook.Name, link.QueryOptions{Target: int(dir.Fd()), Attach: hook.Type})
				}
				look("the uplink's ingress", link.QueryOptions{Target: device, Attach: ebpf.AttachTCXIngress})
				look("the uplink's egress", link.QueryOptions{Target: device, Attach: ebpf.AttachTCXEgress})
			}
		})
	})
	return func() []string {
		close(done)
		running.Wait()
		return wrong
	}
}

func (w *world) uplink() (index int) {
	w.t.Helper()
	err := w.node.Namespace().Do(func() error {
		device, err := net.InterfaceByName("up0")
		if err == nil {
			index = device.Index
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return index
}

// says waits until the agent's log holds want.
func says(t *testing.T, a *testutil.Agent, want string) {
	t.Helper()
	testutil.Eventually(t, 60*time.Second, fmt.Sprintf("%q in the log", want), func() error {
		if !strings.Contains(a.Logs(), want) {
			return errors.New("not yet")
		}
		return nil
	})
}
