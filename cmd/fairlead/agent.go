// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"os/signal"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/config"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/privileges"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// agentFlags are the flags of fairlead agent.
type agentFlags struct {
	kubeconfig, apiServer, source, nodeName string
	serviceProxyName                        string
	config, nodePorts                       string
	cgroupRoot, bpfRoot, socket             string
	healthz, metrics                        string
	packetPath, devices, snatPorts          string
	clusterCIDR                             string
	logLevel, logFormat                     string
	repairEvery                             time.Duration
	limits                                  limitFlags
	sizes                                   datapath.Sizes
}

func newAgentCommand() *cobra.Command {
	var f agentFlags
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Serve this node: watch Services and keep the kernel's tables",
		Long: `Serve this node: watch Services and EndpointSlices and keep the kernel's tables.

The agent stays in the foreground and is ready when /healthz says 200. When it
stops, however it stops, connections and new connections go on being served with
what the kernel holds; "fairlead cleanup" removes that.`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return runAgent(cmd, f) },
	}
	fs := cmd.Flags()
	fs.StringVar(&f.kubeconfig, "kubeconfig", "", "kubeconfig `FILE` (default: the pod's own credentials)")
	fs.StringVar(&f.apiServer, "api-server", "", "`URL` of the API server, in place of the one the kubeconfig or the pod's environment names")
	fs.StringVar(&f.source, "source", sourceKubernetes, "where Services come from: kubernetes, or file:`DIR` with YAML manifests")
	fs.StringVar(&f.nodeName, "node-name", "", "name of this node (default: $NODE_NAME, then the host name)")
	fs.StringVar(&f.serviceProxyName, "service-proxy-name", "", "serve Services labelled service.kubernetes.io/service-proxy-name=`NAME`, too")
	fs.StringVar(&f.config, "config", "", "kube-proxy's configuration `FILE` (KubeProxyConfiguration, or the ConfigMap that holds it); flags given here come first")
	fs.StringVar(&f.nodePorts, "nodeport-addresses", primary, "where NodePorts are reached: primary for the Node's own addresses, or `CIDR,…` for the local addresses in these")
	f.limits.add(fs, "")
	fs.StringVar(&f.packetPath, "packet-path", packetsOn, "on to serve also clients whose sockets cannot be seen, by their packets: other machines, pods in VMs; or off")
	fs.StringVar(&f.devices, "devices", "auto", "devices whose packets are looked at: auto for all that lead to other machines or to pods, or names, `NAME,GLOB,…`")
	fs.StringVar(&f.snatPorts, "snat-ports", "61000-65535", "source ports, `FIRST-LAST`, for packets that go on to another node with an address of this one")
	fs.StringVar(&f.clusterCIDR, "cluster-cidr", "", "`CIDR,…` whose packets come from inside the cluster wherever they arrive, beside those of this node's pods")
	fs.StringVar(&f.cgroupRoot, "cgroup-root", "", "cgroup2 `DIR` whose processes are served (default: the node's root)")
	fs.StringVar(&f.bpfRoot, "bpf-root", agent.DefaultBPFRoot, "`DIR` on a BPF file system to pin maps and links below")
	fs.StringVar(&f.healthz, "healthz-bind-address", "0.0.0.0:10256", "`ADDRESS` of /healthz and /livez; empty for none")
	fs.StringVar(&f.metrics, "metrics-bind-address", "127.0.0.1:10249", "`ADDRESS` of /metrics, /proxyMode and /configz; empty for none")
	fs.StringVar(&f.socket, "socket", "", "Unix socket `FILE` that fairlead explain asks (default: in /run/fairlead, by --bpf-root)")
	fs.DurationVar(&f.repairEvery, "repair-interval", time.Minute, "time between two comparisons of the kernel with what is wanted")
	fs.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&f.logFormat, "log-format", "json", "json or console")
	fs.Uint32Var(&f.sizes.Frontends, "max-frontends", 131072, "most rows for addresses and ports, and one for each ClusterIP")
	fs.Uint32Var(&f.sizes.Services, "max-services", 65536, "most rows for service ports, IPv4 and IPv6 apart")
	fs.Uint32Var(&f.sizes.Slots, "max-slots", 524288, "most rows for the backends of all services; a change needs room for a second copy")
	fs.Uint32Var(&f.sizes.Members, "max-members", 262144, "most rows for the backends of UDP services, and three each for those of services with an affinity")
	fs.Uint32Var(&f.sizes.Affinity, "max-affinity", 65536, "clients times services with an affinity; the oldest make room")
	fs.Uint32Var(&f.sizes.Flows, "max-flows", 262144, "rows for what clients have on the packet path, two for each connection; those that were silent longest make room")
	fs.Uint32Var(&f.sizes.SourceRanges, "max-source-ranges", 65536, "most rows for loadBalancerSourceRanges, for each service port")
	fs.Uint32Var(&f.sizes.Peers, "max-peers", 65536, "TCP sockets that getpeername answers for, a power of two")
	// Fails only for a flag that does not exist.
	_ = cmd.RegisterFlagCompletionFunc("packet-path",
		cobra.FixedCompletions([]cobra.Completion{packetsOn, packetsOff}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// runAgent serves until it is told to end. When the configuration file changes it
// begins anew with what the file says then; the datapath goes on working meanwhile.
func runAgent(cmd *cobra.Command, f agentFlags) error {
	if err := f.check(); err != nil {
		return err
	}
	if err := f.dropPrivileges(cmd.Flags().Changed); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	for {
		again, err := runConfigured(ctx, cmd.Flags().Changed, f)
		if !again {
			return explainDenied(err)
		}
	}
}

// runConfigured runs an agent with the configuration as it is now; given tells
// which flags were given. again tells that it ended because the configuration has
// changed.
func runConfigured(ctx context.Context, given func(flag string) bool, f agentFlags) (again bool, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var changed <-chan struct{} // nil without a file
	if f.config != "" {
		if changed, err = config.Watch(ctx, f.config); err != nil {
			return false, err
		}
	}
	s, err := f.settings(given)
	if err != nil {
		return false, err
	}
	if s.agent.Lacks, err = privileges.Missing(); err != nil {
		return false, err
	}
	log, err := newLogger(s.logLevel, s.logFormat)
	if err != nil {
		return false, err
	}
	defer func() { _ = log.Sync() }() // never fails
	redirectKlog.Do(func() { reflector.RedirectKlog(log.Named("client-go")) })
	log = log.With(logfield.Node(s.agent.NodeName))
	for _, w := range s.warnings {
		log.Warn("configuration", logfield.File(f.config), logfield.Reason(w))
	}
	if err := setOOMScore(s.oomScore); err != nil {
		log.Warn("the agent's oom_score_adj cannot be set; it may be killed when memory is short", logfield.Error(err))
	}
	if err := f.connect(&s, log.Named("reflector")); err != nil {
		return false, err
	}
	if f.config != "" {
		go f.awaitConfig(ctx, changed, given, func() { stop(errConfigChanged) }, log)
	}
	err = agent.Run(ctx, s.agent, log.Named("agent"))
	return err == nil && errors.Is(context.Cause(ctx), errConfigChanged), err
}

// errConfigChanged is why an agent ends that is to begin anew.
var errConfigChanged = errors.New("the configuration has changed")

// redirectKlog is for the first agent of the process: goroutines of client-go may
// still be logging when the next one begins.
var redirectKlog sync.Once

// awaitConfig calls begin when the configuration has changed to another that can
// be used. Until then the agent goes on with the one it has: a mistake reaches
// every node within a minute.
func (f agentFlags) awaitConfig(ctx context.Context, changed <-chan struct{}, given func(flag string) bool, begin func(), log *zap.Logger) {
	log = log.With(logfield.File(f.config))
	for {
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		again, err := config.Watch(ctx, f.config)
		if err == nil {
			_, err = f.settings(given)
		}
		if err == nil {
			log.Info("the configuration has changed; starting anew")
			begin()
			return
		}
		log.Warn("the configuration has changed and cannot be used; going on with the one before", logfield.Error(err))
		if changed = again; changed == nil {
			// It went again just now, and nobody watches it. It is looked for.
			changed = after(configRetry)
		}
	}
}

// configRetry is the pause before a file that was gone is looked for again.
const configRetry = 5 * time.Second

// after returns a channel that is closed after a pause.
func after(pause time.Duration) <-chan struct{} {
	done := make(chan struct{})
	time.AfterFunc(pause, func() { close(done) })
	return done
}

// check refuses what no kernel would take.
func (f agentFlags) check() error {
	if f.source != sourceKubernetes && (f.kubeconfig != "" || f.apiServer != "") {
		return fmt.Errorf("--kubeconfig and --api-server are for --source=kubernetes, not for %s", f.source)
	}
	if f.repairEvery <= 0 {
		return fmt.Errorf("--repair-interval %v is not above zero", f.repairEvery)
	}
	for flag, address := range map[string]string{"healthz": f.healthz, "metrics": f.metrics} {
		if err := checkAddress(address); err != nil {
			return fmt.Errorf("--%s-bind-address %q: %w", flag, address, err)
		}
	}
	if bits.OnesCount32(f.sizes.Peers) != 1 {
		return fmt.Errorf("--max-peers %d is not a power of two", f.sizes.Peers)
	}
	for _, limit := range []struct {
		flag       string
		value, max uint32
	}{
		{"frontends", f.sizes.Frontends, 1 << 24},
		{"services", f.sizes.Services, 1 << 24},
		{"slots", f.sizes.Slots, 1 << 24},
		{"members", f.sizes.Members, 1 << 24},
		{"affinity", f.sizes.Affinity, 1 << 24},
		{"flows", f.sizes.Flows, 1 << 24},
		{"source-ranges", f.sizes.SourceRanges, 1 << 24},
		{"peers", f.sizes.Peers, 1 << 24},
	} {
		if limit.value < 2 || limit.value > limit.max {
			return fmt.Errorf("--max-%s %d is not between 2 and %d", limit.flag, limit.value, limit.max)
		}
	}
	return nil
}

// checkAddress refuses what nobody could listen on. Empty is for nowhere.
func checkAddress(address string) error {
	if address == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("not an address and a port, such as 127.0.0.1:10249 or [::1]:10249")
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" {
		return fmt.Errorf("%q is not an IP address", host)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("port %q is not a number from 1 to 65535", port)
	}
	return nil
}
