// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// The demo's Service.
var (
	//go:embed demo_simpleservice.yaml
	demoService []byte
	demoVIP     = "10.96.0.80"
	demoPort    = 9876

	demoPods = map[string]netip.Addr{
		"pod-1": netip.MustParseAddr("10.244.0.11"),
		"pod-2": netip.MustParseAddr("10.244.0.12"),
		"pod-3": netip.MustParseAddr("10.244.0.13"),
	}
	demoClient = netip.MustParseAddr("10.244.0.100")
)

// How long the demo waits for its agent.
const (
	demoReadyTimeout  = 30 * time.Second
	demoChangeTimeout = 10 * time.Second
	demoStopTimeout   = 5 * time.Second
)

// demoHealthz is where the agent says whether it is ready, on the node.
const demoHealthz = "127.0.0.1:10256"

// demoCluster is the node with its pods and its agent. The zero value is ready
// to be built; it must be closed even when that fails.
type demoCluster struct {
	program string // our own executable
	bpfRoot string // where the agent pins what it loads
	source  string // directory with the Service and its EndpointSlice
	node    *sandbox.Node
	pods    map[string]*sandbox.Namespace
	http    http.Client // its requests come from the client pod
	agent   *demoAgent

	closers []func() error // in the order in which things were made
}

// demoAgent is the running agent.
type demoAgent struct {
	cmd  *sandbox.Cmd
	log  string        // file
	done chan struct{} // closed when it has ended
}

// build makes everything and waits until the agent has loaded the Service with
// the named pods.
func (c *demoCluster) build(ctx context.Context, pods []string) error {
	var err error
	if c.program, err = os.Executable(); err != nil {
		return fmt.Errorf("find own executable: %w", err)
	}
	cgroup, err := c.enterCgroup()
	if err != nil {
		return err
	}
	if err := c.makeDirs(); err != nil {
		return err
	}
	if err := c.makeNode(); err != nil {
		return err
	}
	if err := c.write("service.yaml", demoService); err != nil {
		return err
	}
	if err := c.write("endpoints.yaml", demoSlice(pods)); err != nil {
		return err
	}
	return c.startAgent(ctx, cgroup)
}

// enterCgroup moves this process into a cgroup of its own, so that the agent's
// programs see the demo's sockets and nobody else's.
func (c *demoCluster) enterCgroup() (path string, err error) {
	cgroup, err := sandbox.NewCgroup(demoPrefix)
	if err != nil {
		return "", err
	}
	c.closers = append(c.closers, cgroup.Close)
	leave, err := cgroup.Enter()
	if err != nil {
		return "", err
	}
	c.closers = append(c.closers, leave)
	return cgroup.Path(), nil
}

// makeDirs makes the directory of manifests and mounts a BPF filesystem.
func (c *demoCluster) makeDirs() error {
	dir, err := sandbox.TempDir(demoPrefix)
	if err != nil {
		return err
	}
	c.closers = append(c.closers, func() error { return os.RemoveAll(dir) })
	c.source = filepath.Join(dir, "manifests")
	if err := os.Mkdir(c.source, 0o700); err != nil {
		return err
	}
	bpffs := filepath.Join(dir, "bpf")
	unmount, err := sandbox.MountBPFFS(bpffs)
	if err != nil {
		return err
	}
	c.closers = append(c.closers, unmount)
	c.bpfRoot = filepath.Join(bpffs, "fairlead")
	return nil
}

// makeNode makes the node, its pods with an HTTP server in each, and the client.
func (c *demoCluster) makeNode() error {
	node, err := sandbox.NewNode(demoPrefix)
	if err != nil {
		return err
	}
	c.node = node
	c.closers = append(c.closers, node.Close)
	c.pods = map[string]*sandbox.Namespace{}
	for name, addr := range demoPods {
		pod, err := node.AddPod(name, addr)
		if err != nil {
			return err
		}
		server, err := sandbox.ServeHTTP(pod, fmt.Sprintf("%s:%d", addr, demoPort), name)
		if err != nil {
			return err
		}
		c.closers = append(c.closers, server.Close)
		c.pods[name] = pod
	}
	client, err := node.AddPod("client", demoClient)
	if err != nil {
		return err
	}
	c.http = http.Client{
		// A backend is chosen for each connection.
		Transport: &http.Transport{DialContext: client.Dial, DisableKeepAlives: true},
		Timeout:   2 * time.Second,
	}
	return nil
}

// write puts a manifest into the agent's directory, whole or not at all.
func (c *demoCluster) write(name string, data []byte) error {
	draft := filepath.Join(c.source, name+".draft")
	if err := os.WriteFile(draft, data, 0o600); err != nil {
		return err
	}
	return os.Rename(draft, filepath.Join(c.source, name))
}

// demoSlice returns the manifest of the Service's EndpointSlice.
func demoSlice(pods []string) []byte {
	out := fmt.Appendf(nil, `apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: simpleservice-demo
  namespace: default
  labels: {kubernetes.io/service-name: simpleservice}
addressType: IPv4
ports: [{name: "", port: %d, protocol: TCP}]
endpoints:
`, demoPort)
	for _, pod := range pods {
		out = fmt.Appendf(out, "- {addresses: [%s]}\n", demoPods[pod])
	}
	return out
}

// startAgent starts the agent on the node and waits until it is ready.
func (c *demoCluster) startAgent(ctx context.Context, cgroup string) error {
	logFile := filepath.Join(filepath.Dir(c.source), "agent.log")
	output, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer output.Close()
	// Not ctx: the agent is ended by close, after the requests.
	cmd := c.node.Namespace().Command(context.Background(), c.program, "agent",
		"--source=file:"+c.source, "--node-name=demo",
		"--cgroup-root="+cgroup, "--bpf-root="+c.bpfRoot,
		"--healthz-bind-address="+demoHealthz, "--metrics-bind-address=127.0.0.1:10249",
		"--log-level=info", "--log-format=console")
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr.Setpgid = true // Ctrl-C is for us alone
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	c.agent = &demoAgent{cmd: cmd, log: logFile, done: make(chan struct{})}
	c.closers = append(c.closers, c.agent.stop)
	go func() {
		defer close(c.agent.done)
		_ = cmd.Wait() // what it has logged says more
	}()
	return c.agent.waitReady(ctx, c.node.Namespace())
}

// waitReady waits until the agent says that the Service is in the kernel.
func (a *demoAgent) waitReady(ctx context.Context, node *sandbox.Namespace) error {
	ctx, cancel := context.WithTimeout(ctx, demoReadyTimeout)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DialContext: node.Dial, DisableKeepAlives: true}}
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+demoHealthz+"/healthz", http.NoBody)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err == nil {
			_, _ = io.Copy(io.Discard, response.Body)
			_ = response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-a.done:
			return fmt.Errorf("the agent could not start: %s", a.lastWords())
		case <-ctx.Done():
			return fmt.Errorf("the agent is not ready after %s: %s", demoReadyTimeout, a.lastWords())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// lastWords returns the last line the agent has logged.
func (a *demoAgent) lastWords() string {
	data, err := os.ReadFile(a.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.TrimPrefix(lines[len(lines)-1], "fairlead: ")
}

// stop ends the agent. What it has put into the kernel goes with the cgroup and
// the BPF filesystem.
func (a *demoAgent) stop() error {
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop agent: %w", err)
	}
	select {
	case <-a.done:
		return nil
	case <-time.After(demoStopTimeout):
	}
	_ = a.cmd.Process.Kill()
	<-a.done
	return fmt.Errorf("the agent had to be killed, %s after SIGTERM", demoStopTimeout)
}

// close removes everything build has made, last things first.
func (c *demoCluster) close() error {
	var errs []error
	for _, closer := range slices.Backward(c.closers) {
		errs = append(errs, closer())
	}
	return errors.Join(errs...)
}
