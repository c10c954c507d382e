// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// syncTimeout is how long kube-proxy may take to make its rules.
const syncTimeout = 5 * time.Minute

// kubeProxyConfig has kube-proxy read from apiServer and change nothing that is not
// its namespace's.
const kubeProxyConfig = `
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: ` + kubeNode + `
clusterCIDR: 10.244.0.0/16
clientConnection: {kubeconfig: %q, contentType: application/json, acceptContentTypes: application/json}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
oomScoreAdj: 0
`

const kubeconfig = `
apiVersion: v1
kind: Config
clusters: [{name: bench, cluster: {server: "http://` + apiAddress + `"}}]
contexts: [{name: bench, context: {cluster: bench, user: bench}}]
current-context: bench
users: [{name: bench, user: {}}]
`

// programNftables has a kube-proxy make its rules in the lane's node and ends it once
// they are there: they work without it. It says how long that took.
func (c *cluster) programNftables(ctx context.Context, l *lane, program string, services int) (took time.Duration, err error) {
	stop, err := serveAPI(l.node, services)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	config := filepath.Join(c.dir, "kube-proxy.yaml")
	if err := errors.Join(
		os.WriteFile(filepath.Join(c.dir, "kubeconfig"), []byte(kubeconfig), 0o600),
		os.WriteFile(config, fmt.Appendf(nil, kubeProxyConfig, filepath.Join(c.dir, "kubeconfig")), 0o600),
	); err != nil {
		return 0, fmt.Errorf("configure kube-proxy: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	cmd := l.node.Command(ctx, program, "--config="+config)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start kube-proxy: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err = l.waitForServices(ctx, services, ended)
	took = time.Since(start)
	_ = cmd.Process.Kill() // it may have ended
	if waited := <-ended; err != nil {
		return 0, fmt.Errorf("%w (%v)\n%s", err, waited, log.Bytes())
	}
	return took, nil
}

// waitForServices waits until the first and the last Service are reached by their
// NodePorts. Before that connections are refused.
func (l *lane) waitForServices(ctx context.Context, services int, ended chan error) error {
	for _, service := range []int{0, services - 1} {
		for {
			err := l.dial(ctx, netip.AddrPortFrom(nodeAddr, nodePort(service)))
			if err == nil {
				break
			}
			select {
			case err := <-ended:
				ended <- err
				return errors.New("kube-proxy ended")
			case <-ctx.Done():
				return fmt.Errorf("kube-proxy has no rules for Service %d: %w", service, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// dial makes a connection from outside and resets it.
func (l *lane) dial(ctx context.Context, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := l.outside.Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	return conn.Close()
}

// findKubeProxy returns the kube-proxy that scripts/build-control-plane.sh has built
// or, where it has not, what to do about it.
func findKubeProxy() (program, missing string) {
	cache := os.Getenv("FAIRLEAD_CACHE")
	if cache == "" {
		cache = ".cache"
	}
	program, err := filepath.Abs(filepath.Join(cache, "bin", "kube-proxy"))
	if err == nil {
		err = unix.Access(program, unix.X_OK)
	}
	if err != nil {
		return "", "no kube-proxy to compare with: build it with scripts/build-control-plane.sh kube-proxy"
	}
	return program, ""
}
