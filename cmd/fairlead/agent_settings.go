// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/config"
	"github.com/fairlead-lb/fairlead/internal/conntrack"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// settings are what flags and configuration file say together.
type settings struct {
	agent               agent.Config
	logLevel, logFormat string
	kubeconfig          string
	client              config.Client
	noExternalIPs       bool
	oomScore            int
	warnings            []string
}

// primary is the word for the Node's own addresses.
const primary = "primary"

// settings puts flags and configuration file together: a flag that was given wins,
// then what the file says, then our own defaults.
func (f agentFlags) settings(given func(flag string) bool) (settings, error) {
	c := config.Default()
	var warnings []config.Warning
	var err error
	if f.config != "" {
		if c, warnings, err = config.Load(f.config); err != nil {
			return settings{}, err
		}
	}
	s := settings{
		logLevel: f.logLevel, logFormat: f.logFormat, kubeconfig: f.kubeconfig,
		client: c.Client, noExternalIPs: !c.AllowExternalIPs, oomScore: c.OOMScoreAdj,
		agent: agent.Config{
			NodeOptional: f.source != sourceKubernetes,
			CgroupRoot:   f.cgroupRoot, BPFRoot: filepath.Clean(f.bpfRoot), Sizes: f.sizes,
			Socket:         cmp.Or(f.socket, agent.SocketPath(f.bpfRoot)),
			HealthzAddress: f.healthz, MetricsAddress: f.metrics,
			ListenOrFail: c.BindAddressHardFail, Profiling: c.EnableProfiling,
			Conntrack: conntrackSettings(c.Conntrack), StuckAfter: 2 * c.SyncPeriod,
			RepairEvery: f.repairEvery, Version: buildVersion(),
		},
	}
	for _, w := range warnings {
		s.warnings = append(s.warnings, string(w))
	}
	if f.config != "" {
		f.fromFile(&s, c, given)
	}
	if s.agent.NodeName, err = f.node(c.HostnameOverride); err != nil {
		return s, err
	}
	if s.agent.Packets, err = f.packets(c, given); err != nil {
		return s, err
	}
	if s.agent.Limits, err = f.limits.limits(); err != nil {
		return s, err
	}
	reserveListeners(&s.agent.Limits, s.agent.HealthzAddress, s.agent.MetricsAddress)
	s.agent.NodePorts, err = f.nodePortAddresses(c, given)
	s.agent.Configz = s.inEffect(c)
	return s, err
}

// inEffect returns what is served at /configz: the file with the flags in it.
func (s settings) inEffect(c config.Config) any {
	c.HostnameOverride = s.agent.NodeName
	c.HealthzBindAddress, c.MetricsBindAddress = s.agent.HealthzAddress, s.agent.MetricsAddress
	c.Client.Kubeconfig, c.LogFormat = s.kubeconfig, s.logFormat
	c.NodePortAddresses = nil
	if s.agent.NodePorts.Primary {
		c.NodePortAddresses = []string{primary}
	}
	for _, p := range s.agent.NodePorts.CIDRs {
		c.NodePortAddresses = append(c.NodePortAddresses, p.String())
	}
	if inside := s.agent.Packets.ClusterCIDRs; len(inside) > 0 {
		c.DetectLocal.Mode, c.DetectLocal.ClusterCIDRs = config.LocalModeClusterCIDR, inside
	}
	return c.Encode()
}

// fromFile takes over what no flag was given for.
func (f agentFlags) fromFile(s *settings, c config.Config, given func(flag string) bool) {
	if !given("healthz-bind-address") {
		s.agent.HealthzAddress = c.HealthzBindAddress
	}
	if !given("metrics-bind-address") {
		s.agent.MetricsAddress = c.MetricsBindAddress
	}
	if !given("log-level") && c.LogLevel != "" {
		s.logLevel = c.LogLevel
	}
	if !given("log-format") && c.LogFormat != "" {
		s.logFormat = c.LogFormat
	}
	if !c.BindAddress.IsUnspecified() {
		s.agent.NodeAddress = c.BindAddress
	}
	if !given("kubeconfig") && f.source == sourceKubernetes && c.Client.Kubeconfig != "" {
		s.kubeconfig = c.Client.Kubeconfig
		// kubeadm's file names one that is in the same ConfigMap. Mounted without
		// it, our own credentials serve as well.
		if _, err := os.Stat(s.kubeconfig); errors.Is(err, fs.ErrNotExist) {
			s.warnings = append(s.warnings, fmt.Sprintf(
				"clientConnection.kubeconfig %s does not exist: the pod's own credentials are used", s.kubeconfig))
			s.kubeconfig = ""
		}
	}
}

func conntrackSettings(c config.Conntrack) conntrack.Settings {
	return conntrack.Settings{
		MaxPerCore: int32(c.MaxPerCore), Min: int32(c.Min),
		TCPEstablishedTimeout: c.TCPEstablishedTimeout, TCPCloseWaitTimeout: c.TCPCloseWaitTimeout,
		UDPTimeout: c.UDPTimeout, UDPStreamTimeout: c.UDPStreamTimeout, TCPBeLiberal: c.TCPBeLiberal,
	}
}

// node returns the name this node has in the API, as kube-proxy finds it.
func (f agentFlags) node(override string) (string, error) {
	name := cmp.Or(f.nodeName, override, os.Getenv("NODE_NAME"))
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return "", fmt.Errorf("find the host name: %w (give --node-name)", err)
		}
	}
	if name = strings.ToLower(strings.TrimSpace(name)); name == "" {
		return "", errors.New("the node name is empty (give --node-name)")
	}
	return name, nil
}

// nodePortAddresses says where NodePorts are reached.
func (f agentFlags) nodePortAddresses(c config.Config, given func(flag string) bool) (lb.NodePorts, error) {
	if f.config == "" || given("nodeport-addresses") {
		n, err := parseNodePorts(strings.Split(f.nodePorts, ","))
		if err != nil {
			return n, fmt.Errorf("--nodeport-addresses %q: %w", f.nodePorts, err)
		}
		n.Loopback = c.LocalhostNodePorts
		return n, nil
	}
	if c.NodePortAddresses == nil {
		return lb.NodePorts{Primary: !c.NodePortAllAddresses, Loopback: c.LocalhostNodePorts}, nil
	}
	n, err := parseNodePorts(c.NodePortAddresses)
	n.Loopback = c.LocalhostNodePorts
	return n, err
}

// parseNodePorts reads the word primary, or CIDRs.
func parseNodePorts(words []string) (lb.NodePorts, error) {
	if len(words) == 1 && strings.TrimSpace(words[0]) == primary {
		return lb.NodePorts{Primary: true}, nil
	}
	var n lb.NodePorts
	for _, word := range words {
		p, err := parseCIDR(word)
		if err != nil {
			return n, fmt.Errorf("%q is neither %s, alone, nor a CIDR such as 192.0.2.0/24", word, primary)
		}
		n.CIDRs = append(n.CIDRs, p)
	}
	return n, nil
}

// sourceKubernetes is the --source that watches an API server.
const sourceKubernetes = "kubernetes"

// connect gives the agent its source of Services, and where to send Events.
func (f agentFlags) connect(s *settings, log *zap.Logger) error {
	options := reflector.Options{
		NodeName: s.agent.NodeName, ServiceProxyName: f.serviceProxyName, NoExternalIPs: s.noExternalIPs,
	}
	var err error
	if f.source == sourceKubernetes {
		o := reflector.KubernetesOptions{
			Options: options, Kubeconfig: s.kubeconfig, APIServer: f.apiServer, QPS: s.client.QPS, Burst: s.client.Burst,
			Remembered: agent.RememberedPath(s.agent.BPFRoot), Version: buildVersion(), Log: log,
		}
		if s.agent.Source, s.agent.Recorder, err = reflector.NewKubernetes(o); err != nil {
			return err
		}
		if at, ok, err := reflector.ServerAddress(o); err == nil && ok {
			s.agent.Limits.Reserved = append(s.agent.Limits.Reserved,
				lb.Reservation{Addr: at.Addr(), Port: at.Port(), Why: "the agent reaches its API server there"})
		}
		return nil
	}
	dir, found := strings.CutPrefix(f.source, "file:")
	if !found || dir == "" {
		return fmt.Errorf("--source %q is neither kubernetes nor file:DIR", f.source)
	}
	s.agent.Recorder = reflector.NoRecorder()
	s.agent.Source, err = reflector.NewFile(dir, options, log)
	return err
}
