// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package controlplane runs a real Kubernetes control plane for a test: etcd,
// kube-apiserver and kube-controller-manager, inside a network namespace.
//
// It is a package of its own so that tests without an API server need not
// compile client-go.
package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// ServiceCIDRs are the ranges Services get their ClusterIPs from. The first
// address of the first one is that of Service default/kubernetes.
const ServiceCIDRs = "10.96.0.0/16,fd00:96::/112"

const (
	apiServerPort = 6443
	etcdURL       = "http://127.0.0.1:2379"
	etcdPeerURL   = "http://127.0.0.1:2380"
	startTimeout  = time.Minute
)

// controllers are those that bring Pods and EndpointSlices about, and those that
// clear up after a deletion. There is no scheduler and no node controller: the
// test is the kubelet.
var controllers = []string{
	"deployment-controller",
	"endpointslice-controller",
	"garbage-collector-controller",
	"namespace-controller",
	"replicaset-controller",
	"replicationcontroller-controller",
	"service-cidr-controller",
	"serviceaccount-controller",
}

// Options says where a control plane runs.
type Options struct {
	// Netns is the namespace all its processes run in. Its loopback device is up.
	Netns *sandbox.Namespace
	// Address is where the API server listens, on port 6443: an address of Netns.
	// It cannot be a loopback address, because it becomes the endpoint of Service
	// default/kubernetes.
	Address netip.Addr
	// WithoutControllers leaves out kube-controller-manager.
	WithoutControllers bool
}

// ControlPlane is a running control plane. Its methods are for one goroutine.
type ControlPlane struct {
	options   Options
	dir       string
	bin       string
	authority *authority // of clients
	serving   *authority // of the API server; the same at first
	config    *rest.Config
	etcd      *process
	apiServer *process
}

// Start runs a control plane until the test ends and returns when its API
// server is ready. The programs are those scripts/build-control-plane.sh built;
// when they are missing the test fails. When the test has failed, the ends of
// their logs are in its output.
func Start(t testing.TB, o Options) *ControlPlane {
	t.Helper()
	c := &ControlPlane{options: o, dir: t.TempDir()}
	if err := c.prepare(); err != nil {
		t.Fatalf("prepare the control plane: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			c.printLogs(t)
		}
	})
	c.mountData(t)
	if err := c.startEtcd(); err != nil {
		t.Fatal(err)
	}
	// Nothing in etcd is kept, so there is nothing to end gently.
	c.onCleanup(t, func() error { return c.etcd.stop(syscall.SIGKILL) })
	c.onCleanup(t, c.KillAPIServer)
	if err := c.StartAPIServer(); err != nil {
		t.Fatal(err)
	}
	if !o.WithoutControllers {
		c.startControllers(t)
	}
	return c
}

func (c *ControlPlane) startEtcd() error {
	var err error
	c.etcd, err = startProcess(c.options.Netns, c.path("etcd.log"), "etcd",
		"--data-dir="+c.path("etcd"),
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL,
		"--listen-peer-urls="+etcdPeerURL, "--initial-advertise-peer-urls="+etcdPeerURL,
		"--initial-cluster=default="+etcdPeerURL,
		"--logger=zap", "--log-level=warn")
	if err != nil {
		return fmt.Errorf("%w (Debian's package is etcd-server; scripts/setup.sh installs it)", err)
	}
	return nil
}

// Config returns an administrator's configuration for client-go. Its
// connections are made inside the control plane's namespace, so that the test
// can stay outside. The caller may change what it got.
func (c *ControlPlane) Config() *rest.Config { return rest.CopyConfig(c.config) }

// URL returns the API server's address as clients in its network see it.
func (c *ControlPlane) URL() string {
	return "https://" + netip.AddrPortFrom(c.options.Address, apiServerPort).String()
}

// StartAPIServer starts the API server, after StopAPIServer or KillAPIServer,
// with the data it had, and returns when it is ready.
func (c *ControlPlane) StartAPIServer() error {
	p, err := startProcess(c.options.Netns, c.path("kube-apiserver.log"),
		filepath.Join(c.bin, "kube-apiserver"), c.apiServerArgs()...)
	if err != nil {
		return err
	}
	c.apiServer = p
	client, err := rest.HTTPClientFor(c.config)
	if err != nil {
		return fmt.Errorf("make a client of the API server: %w", err)
	}
	defer client.CloseIdleConnections()
	deadline := time.Now().Add(startTimeout)
	for {
		err := probe(client, c.config.Host+"/readyz")
		switch {
		case err == nil:
			return nil
		case p.ended():
			return errors.New("kube-apiserver ended instead of becoming ready")
		case time.Now().After(deadline):
			return fmt.Errorf("kube-apiserver is not ready after %v: %w", startTimeout, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// StopAPIServer ends the API server as an upgrade does: it takes back the
// endpoint of default/kubernetes and closes its watches first.
func (c *ControlPlane) StopAPIServer() error { return c.apiServer.stop(syscall.SIGTERM) }

// KillAPIServer ends the API server as a crash does. It is safe to call twice.
func (c *ControlPlane) KillAPIServer() error {
	if c.apiServer == nil {
		return nil
	}
	return c.apiServer.stop(syscall.SIGKILL)
}

// Kubeconfig writes a kubeconfig with a client certificate for the given user
// and returns its path. The group system:masters may do everything.
func (c *ControlPlane) Kubeconfig(t testing.TB, user string, groups ...string) string {
	t.Helper()
	path, err := c.certKubeconfig(filepath.Join(t.TempDir(), "kubeconfig"), user, groups...)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TokenKubeconfig writes a kubeconfig with a bearer token and returns its path.
func (c *ControlPlane) TokenKubeconfig(t testing.TB, token string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := c.writeKubeconfig(path, clientcmdapi.AuthInfo{Token: token}); err != nil {
		t.Fatal(err)
	}
	return path
}

// prepare finds the programs and writes the certificates and keys.
func (c *ControlPlane) prepare() error {
	var err error
	if c.bin, err = binDir(); err != nil {
		return err
	}
	if c.authority, err = newAuthority(); err != nil {
		return err
	}
	c.serving = c.authority
	admin, err := c.authority.client("administrator", "system:masters")
	if err != nil {
		return err
	}
	c.config = &rest.Config{
		Host: c.URL(),
		TLSClientConfig: rest.TLSClientConfig{
			CAData: c.authority.pem, CertData: admin.cert, KeyData: admin.key,
		},
		Dial: c.options.Netns.Dial,
		// The API server is ours alone.
		QPS: -1,
	}
	signing, err := newSigningKey()
	if err != nil {
		return err
	}
	return errors.Join(
		c.reissue(),
		os.WriteFile(c.path("ca.crt"), c.authority.pem, 0o600),
		os.WriteFile(c.path("tokens.key"), signing, 0o600),
	)
}

func (c *ControlPlane) apiServerArgs() []string {
	return []string{
		"--etcd-servers=" + etcdURL,
		"--bind-address=" + c.options.Address.String(),
		fmt.Sprintf("--secure-port=%d", apiServerPort),
		"--advertise-address=" + c.options.Address.String(),
		"--cert-dir=" + c.path("apiserver"),
		"--tls-cert-file=" + c.path("apiserver.crt"),
		"--tls-private-key-file=" + c.path("apiserver.key"),
		"--client-ca-file=" + c.path("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + c.path("tokens.key"),
		"--service-account-signing-key-file=" + c.path("tokens.key"),
		"--service-cluster-ip-range=" + ServiceCIDRs,
		"--authorization-mode=RBAC",
		// Else a Pod is refused until its namespace has a default ServiceAccount.
		"--disable-admission-plugins=ServiceAccount",
		// Else StopAPIServer waits for the clients to end their watches.
		"--shutdown-send-retry-after=true",
		"--shutdown-watch-termination-grace-period=1s",
		"--allow-privileged=true",
		"--profiling=false",
	}
}

// mountData keeps etcd's data in memory: nothing of it outlives the test, and
// waiting for the disk is most of what etcd does.
func (c *ControlPlane) mountData(t testing.TB) {
	t.Helper()
	dir := c.path("etcd")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size=1g"); err != nil {
		t.Fatalf("mount a tmpfs on %s: %v", dir, err)
	}
	c.onCleanup(t, func() error { return unix.Unmount(dir, unix.MNT_DETACH) })
}

func (c *ControlPlane) startControllers(t testing.TB) {
	t.Helper()
	kubeconfig, err := c.certKubeconfig(c.path("controllers.kubeconfig"),
		"system:kube-controller-manager", "system:masters")
	if err != nil {
		t.Fatal(err)
	}
	p, err := startProcess(c.options.Netns, c.path("kube-controller-manager.log"),
		filepath.Join(c.bin, "kube-controller-manager"),
		"--kubeconfig="+kubeconfig,
		"--controllers="+strings.Join(controllers, ","),
		"--service-account-private-key-file="+c.path("tokens.key"),
		"--leader-elect=false",
		"--secure-port=0",
		"--kube-api-qps=500", "--kube-api-burst=1000")
	if err != nil {
		t.Fatal(err)
	}
	c.onCleanup(t, func() error { return p.stop(syscall.SIGKILL) })
}

// certKubeconfig writes a kubeconfig for a user with a certificate of its own.
func (c *ControlPlane) certKubeconfig(path, user string, groups ...string) (string, error) {
	pair, err := c.authority.client(user, groups...)
	if err != nil {
		return "", err
	}
	return path, c.writeKubeconfig(path, clientcmdapi.AuthInfo{
		ClientCertificateData: pair.cert, ClientKeyData: pair.key,
	})
}

func (c *ControlPlane) writeKubeconfig(path string, user clientcmdapi.AuthInfo) error {
	config := clientcmdapi.NewConfig()
	config.Clusters["test"] = &clientcmdapi.Cluster{
		Server: c.URL(), CertificateAuthorityData: c.serving.pem,
	}
	config.AuthInfos["user"] = &user
	config.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "user"}
	config.CurrentContext = "test"
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		return fmt.Errorf("write kubeconfig %s: %w", path, err)
	}
	return nil
}

func (c *ControlPlane) path(name string) string { return filepath.Join(c.dir, name) }

func (c *ControlPlane) onCleanup(t testing.TB, f func() error) {
	t.Cleanup(func() {
		if err := f(); err != nil {
			t.Error(err)
		}
	})
}

// printLogs logs the last lines of every program's log.
func (c *ControlPlane) printLogs(t testing.TB) {
	const tail = 20
	logs, _ := filepath.Glob(c.path("*.log"))
	for _, path := range logs {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Log(err)
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		t.Logf("end of %s:\n%s", filepath.Base(path),
			strings.Join(lines[max(0, len(lines)-tail):], "\n"))
	}
}

// probe returns nil when the URL answers 200.
func probe(client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, resp.Status)
	}
	return nil
}

// binDir returns the directory scripts/build-control-plane.sh builds into.
func binDir() (string, error) {
	cache := os.Getenv("FAIRLEAD_CACHE")
	if cache == "" {
		root, err := moduleRoot()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(root, ".cache")
	}
	bin := filepath.Join(cache, "bin")
	for _, name := range []string{"kube-apiserver", "kube-controller-manager"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return "", fmt.Errorf("%w (run scripts/build-control-plane.sh)", err)
		}
	}
	return bin, nil
}

// moduleRoot returns the directory of the go.mod that the test belongs to.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = parent
	}
}
