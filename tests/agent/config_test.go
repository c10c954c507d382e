// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	program "github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// kubeadm is the ConfigMap of kube-proxy as kubeadm writes it.
const kubeadm = "../../internal/config/testdata/kubeadm-configmap.yaml"

// configured is an agent without the flags that testutil's agents have, so that
// what its file says counts.
type configured struct {
	cmd  *sandbox.Cmd
	done chan error
	log  testutil.LogBuffer
}

// logs returns what the agent has written so far.
func (a *configured) logs() string { return a.log.String() }

// startConfigured starts an agent with a configuration file. It is ended with the
// test.
func (c *cluster) startConfigured(file string, args ...string) *configured {
	c.t.Helper()
	a := &configured{done: make(chan error, 1)}
	a.cmd = c.node.Namespace().Command(context.Background(), testutil.BuildBinary(c.t), append([]string{
		"agent", "--config=" + file, "--source=file:" + c.dir, "--cgroup-root=" + c.cgroup.Path(), "--bpf-root=" + c.bpfRoot,
	}, args...)...)
	// What the test's own node is called is not our business.
	a.cmd.Env = append(os.Environ(), "NODE_NAME=this-node")
	a.cmd.Stdout, a.cmd.Stderr = &a.log, &a.log
	if err := a.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	go func() { a.done <- a.cmd.Wait() }()
	c.t.Cleanup(func() {
		if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			c.t.Error(err)
		}
		select {
		case <-a.done:
		case <-time.After(15 * time.Second):
			c.t.Error("the agent still runs long after SIGTERM")
			_ = a.cmd.Process.Kill()
		}
		if c.t.Failed() {
			c.t.Logf("the agent's log:\n%s", a.logs())
		}
	})
	return a
}

// ends waits for an agent that is to fail, and returns its last line.
func (a *configured) ends(t *testing.T) string {
	t.Helper()
	select {
	case err := <-a.done:
		a.done <- err // for the cleanup
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("the agent ended with %v, want exit code 1", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the agent goes on")
	}
	lines := strings.Split(strings.TrimSpace(a.logs()), "\n")
	return lines[len(lines)-1]
}

// ready waits until a health server is content.
func (c *cluster) ready(addr string) {
	c.t.Helper()
	testutil.Eventually(c.t, 20*time.Second, "healthy at "+addr, func() error {
		got, err := fetch(c.node.Namespace(), addr+"/healthz")
		if err == nil && got.code != http.StatusOK {
			err = fmt.Errorf("%d: %s", got.code, got.body)
		}
		return err
	})
}

// configFile writes kubeadm's ConfigMap with replacements, in one step.
func configFile(t *testing.T, path string, replacements ...string) {
	t.Helper()
	text, err := os.ReadFile(kubeadm)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.NewReplacer(replacements...).Replace(string(text))
	if err := errors.Join(os.WriteFile(path+".new", []byte(changed), 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

func namedNode(name string) string {
	return strings.Replace(thisNode("a", "10.244.0.1"), "name: node", "name: "+name, 1)
}

func TestKubeadmsConfigMapConfiguresTheAgentAndItsChangesDoNotHurt(t *testing.T) {
	c := nodePortCluster(t)
	c.manifests("nodes.yaml", namedNode("this-node"), namedNode("renamed"))
	file := filepath.Join(t.TempDir(), "config.yaml")
	configFile(t, file)
	agent := c.startConfigured(file)
	c.ready("10.244.0.1:10256")
	// kube-proxy's default mode has NodePorts at all addresses, whatever the Node says.
	c.answers("192.0.2.1:30080", 11)
	c.answers("10.244.0.1:30080", 11)
	if got, err := fetch(c.node.Namespace(), "127.0.0.1:10249/metrics"); err != nil || got.code != http.StatusOK {
		t.Errorf("metrics at the default address: %d, %v", got.code, err)
	}
	if n := strings.Count(agent.logs(), "no effect in Fairlead"); n != 0 {
		t.Errorf("a file that sets nothing brings warnings:\n%s", agent.logs())
	}
	c.tracksConnections()

	stop := load(func() error { _, err := c.get(vip(10, 80)); return err })
	configFile(t, file,
		`hostnameOverride: ""`, `hostnameOverride: " Renamed "`,
		`healthzBindAddress: ""`, `healthzBindAddress: 0.0.0.0:20256`,
		`metricsBindAddress: ""`, `metricsBindAddress: 127.0.0.1:20249`,
		`nodePortAddresses: null`, `nodePortAddresses: [10.244.0.0/24]`)
	c.ready("10.244.0.1:20256")
	c.fails(c.client, "192.0.2.1:30080", syscall.ECONNREFUSED)
	n, failed := stop()
	if len(failed) > 0 || n < 100 {
		t.Errorf("%d connections while the agent began anew, %d failed: %v", n, len(failed), errors.Join(failed...))
	}
	c.answers("10.244.0.1:30080", 11)
	c.closed("10.244.0.1:10256")
	if got, err := fetch(c.node.Namespace(), "127.0.0.1:20249/configz"); err != nil || !strings.Contains(got.body, `"10.244.0.0/24"`) {
		t.Errorf("/configz: %s, %v", got.body, err)
	}
	if got := c.explainJSON("test/web").Node; got != "renamed" {
		t.Errorf("the node is called %q, want renamed", got)
	}
}

// tracksConnections wants kube-proxy's defaults in the node's namespace, where it
// has the settings.
func (c *cluster) tracksConnections() {
	c.t.Helper()
	for name, want := range map[string]string{"tcp_timeout_established": "86400", "tcp_timeout_close_wait": "3600"} {
		testutil.Eventually(c.t, 10*time.Second, "nf_conntrack_"+name, func() error {
			var got []byte
			err := c.node.Namespace().Do(func() (err error) {
				got, err = os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_" + name)
				return err
			})
			if errors.Is(err, os.ErrNotExist) {
				c.t.Logf("this kernel tracks no connections: %v", err)
				return nil
			}
			if err == nil && strings.TrimSpace(string(got)) != want {
				err = fmt.Errorf("%s, want %s", got, want)
			}
			return err
		})
	}
}

func TestFlagsBeatTheConfigurationFile(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.manifests("web.yaml", service("web", 10, nodePorts))
	file := filepath.Join(t.TempDir(), "config.yaml")
	configFile(t, file,
		`hostnameOverride: ""`, `hostnameOverride: file`,
		`healthzBindAddress: ""`, `healthzBindAddress: 127.0.0.1:20256`,
		`metricsBindAddress: ""`, `metricsBindAddress: 127.0.0.1:20249`,
		`nodePortAddresses: null`, `nodePortAddresses: [192.0.2.0/24]`,
		`  enableProfiling: false`, `  enableProfiling: true`,
		`strictARP: false`, `strictARP: true`,
		`    portRange: ""`, "    portRange: 1-2\n    fromTheFuture: {a: 1, b: 2}")
	agent := c.startConfigured(file, "--node-name=flag", "--healthz-bind-address=127.0.0.1:30256", "--nodeport-addresses=10.244.0.0/24")
	c.ready("127.0.0.1:30256")
	for addr, open := range map[string]bool{"127.0.0.1:20256": false, "127.0.0.1:20249": true, "127.0.0.1:10249": false} {
		if _, err := fetch(c.node.Namespace(), addr+"/healthz"); (err == nil) != open {
			t.Errorf("%s: %v", addr, err)
		}
	}
	if got := c.explainJSON("test/web").Node; got != "flag" {
		t.Errorf("the node is called %q, want flag", got)
	}
	addresses, err := c.fairlead("inspect", "addresses", "--bpf-root", c.bpfRoot)
	if err != nil || !strings.Contains(addresses, "10.244.0.1") {
		t.Errorf("NodePorts are at\n%s, %v; want the flag's", addresses, err)
	}
	if got, err := fetch(c.node.Namespace(), "127.0.0.1:20249/debug/pprof/"); err != nil || got.code != http.StatusOK {
		t.Errorf("profiles with enableProfiling: %d, %v", got.code, err)
	}
	for _, field := range []string{"ipvs.strictARP", "portRange", "fromTheFuture"} {
		saysOnce(t, agent.logs, field)
	}
}

func TestConfigurationThatCannotBeUsedIsRefusedInOneLine(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	dir := t.TempDir()
	for name, tt := range map[string]struct{ text, want string }{
		"no such file":           {"", "no such file"},
		"no YAML":                {"a: b: c", "yaml"},
		"another kind of object": {"apiVersion: v1\nkind: Pod\n", "KubeProxyConfiguration"},
		"an empty file":          {" ", "apiVersion and kind are missing"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(dir, "config.yaml")
			_ = os.Remove(file)
			if tt.text != "" {
				if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			a := c.startConfigured(file)
			line := a.ends(t)
			if log := a.logs(); strings.Count(log, "\n") != 1 || !strings.Contains(strings.ToLower(line), strings.ToLower(tt.want)) {
				t.Errorf("%q, want one line that says %q", log, tt.want)
			}
		})
	}
}

func TestBindAddressHardFailEndsTheAgent(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	l, err := c.node.Namespace().Listen("tcp", testutil.MetricsAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file := filepath.Join(t.TempDir(), "config.yaml")
	configFile(t, file, "bindAddressHardFail: false", "bindAddressHardFail: true")
	a := c.startConfigured(file)
	if line := a.ends(t); !strings.HasPrefix(line, "fairlead: ") || !strings.Contains(line, "bindAddressHardFail") {
		t.Errorf("the last line is %q", line)
	}
}

// Whoever asks while the agent begins anew gets an answer or an error, and the
// agent goes on.
func TestQuestionsWhileTheAgentBeginsAnewDoNoHarm(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.fillTables()
	file := filepath.Join(t.TempDir(), "config.yaml")
	configFile(t, file)
	agent := c.startConfigured(file)
	c.ready("127.0.0.1:10256")
	query := lb.Query{Service: lb.Name{Namespace: "test", Name: "lb"}}
	stop := load(func() error {
		_, err := program.AskExplain(t.Context(), program.SocketPath(c.bpfRoot), query, netip.Addr{})
		return err
	})
	for i := range 3 {
		configFile(t, file, `healthzBindAddress: ""`, fmt.Sprintf("healthzBindAddress: 127.0.0.1:%d", 20001+i))
		c.ready(fmt.Sprintf("127.0.0.1:%d", 20001+i))
	}
	if n, failed := stop(); int(n) == len(failed) {
		t.Errorf("all %d questions failed: %v", n, failed[0])
	}
	if n := strings.Count(agent.logs(), "panic") + strings.Count(agent.logs(), "fatal error"); n != 0 {
		t.Error("a question met tables that were being closed")
	}
}

// A mistake in the file reaches every node within a minute, and none may stop
// serving for it.
func TestAChangedConfigurationThatCannotBeUsedIsPassedOver(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	file := filepath.Join(t.TempDir(), "config.yaml")
	configFile(t, file)
	agent := c.startConfigured(file)
	c.ready("127.0.0.1:10256")
	if err := os.WriteFile(file, []byte("kind: ["), 0o600); err != nil {
		t.Fatal(err)
	}
	saysOnce(t, agent.logs, "the configuration has changed and cannot be used")
	c.ready("127.0.0.1:10256")
	if strings.Contains(agent.logs(), "starting anew") {
		t.Error("the agent began anew with a file that cannot be used")
	}
	configFile(t, file, `healthzBindAddress: ""`, "healthzBindAddress: 127.0.0.1:20256")
	c.ready("127.0.0.1:20256")
}
