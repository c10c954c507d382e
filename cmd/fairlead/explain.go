// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/inspect"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// explainFlags are the flags of fairlead explain.
type explainFlags struct {
	client, socket, source                string
	nodeName, serviceProxyName, nodePorts string
	limits                                limitFlags
	bpfRoot                               *string
	output                                *choice
}

// offlineFlags are those that mean something to files only.
var offlineFlags = append([]string{"node-name", "service-proxy-name", "nodeport-addresses"}, limitFlagNames...)

func newExplainCommand() *cobra.Command {
	var f explainFlags
	cmd := &cobra.Command{
		Use:   "explain SERVICE[:PORT]|VIP:PORT",
		Short: "Say which endpoints clients of a Service get from this node, and why",
		Long: `Asks the agent on this node what becomes of clients of a Service. For each port
and family it says

  - what can be dialled, and to which set of endpoints that leads: clusterIP,
    inside (NodePorts and the like, dialled by pods and processes of this node)
    or outside (dialled by everybody else, through this node)
  - which rule made each set
  - of every endpoint in the Service's slices, in which sets it is and why not
    in the others
  - where the kernel's tables differ from that, if they do

A SERVICE is NAMESPACE/NAME, or NAME for namespace default; its PORT is a name
or a number. With --client it says, too, which backend the pod with that address
keeps because of session affinity. Needs root.

With --source file:DIR it needs no agent and no root, and says what one with
these manifests would do; --bpf-root then has the result compared with the
tables that are pinned there.`,
		Example: `  fairlead explain default/web
  fairlead explain kube-system/kube-dns:dns -o json
  fairlead explain 10.96.0.10:53 --client 10.244.1.7
  fairlead explain web:80 --source file:manifests --node-name node-a`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("missing SERVICE[:PORT] or VIP:PORT")
			}
			if len(args) > 1 {
				return fmt.Errorf("unexpected argument %q", args[1])
			}
			_, err := parseQuery(args[0])
			return err
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f.output = addOutputFlag(cmd, inspect.ExplainFormats()...)
	f.bpfRoot = addBPFRootFlag(cmd)
	fs := cmd.Flags()
	fs.StringVar(&f.client, "client", "", "say which backend the pod with this `IP` keeps")
	fs.StringVar(&f.socket, "socket", "", "Unix socket `FILE` of the agent (default: in /run/fairlead, by --bpf-root)")
	fs.StringVar(&f.source, "source", "", "read the YAML manifests in file:`DIR` instead of asking the agent")
	fs.StringVar(&f.nodeName, "node-name", "", "with --source: name of this node (default: $NODE_NAME, then the host name)")
	fs.StringVar(&f.serviceProxyName, "service-proxy-name", "", "with --source: as for the agent")
	fs.StringVar(&f.nodePorts, "nodeport-addresses", primary, "with --source: as for the agent")
	f.limits.add(fs, "with --source: ")
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return runExplain(cmd, f, args[0]) }
	return cmd
}

func runExplain(cmd *cobra.Command, f explainFlags, arg string) error {
	q, err := parseQuery(arg)
	if err != nil {
		return err
	}
	client, err := f.check(cmd.Flags().Changed)
	if err != nil {
		return usageError(cmd, err)
	}
	var e lb.Explanation
	if f.source == "" {
		e, err = agent.AskExplain(cmd.Context(), cmp.Or(f.socket, agent.SocketPath(*f.bpfRoot)), q, client)
	} else {
		e, err = f.explainFiles(cmd, q, client)
	}
	if err != nil {
		return err
	}
	if err := inspect.PrintExplanation(cmd.OutOrStdout(), e, f.output.value); err != nil {
		return err
	}
	keeps := func(p lb.ExplainedPort) bool { return len(p.Affinity) > 0 }
	if client.IsValid() && f.output.value == "table" && len(e.Ports) > 0 && !slices.ContainsFunc(e.Ports, keeps) {
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "\nclient %v keeps no backend\n", client)
	}
	return err
}

// check refuses flags that do not go together. It returns the address of --client,
// invalid when there is none.
func (f explainFlags) check(given func(flag string) bool) (client netip.Addr, err error) {
	if given("client") {
		if client, err = netip.ParseAddr(f.client); err != nil || client.Zone() != "" {
			return client, fmt.Errorf("--client %q is not an IP address", f.client)
		}
		client = client.Unmap()
	}
	if f.source == "" {
		for _, flag := range offlineFlags {
			if given(flag) {
				return client, fmt.Errorf("--%s is for --source file:DIR; the agent has its own", flag)
			}
		}
		return client, nil
	}
	if dir, found := strings.CutPrefix(f.source, "file:"); !found || dir == "" {
		return client, fmt.Errorf("--source %q is not file:DIR", f.source)
	}
	if given("socket") {
		return client, errors.New("--socket is for asking the agent, --source for doing without it")
	}
	if client.IsValid() && !given("bpf-root") {
		return client, errors.New("--client is about the kernel's tables: with --source, give --bpf-root as well")
	}
	return client, nil
}

// label is what names of namespaces, Services and ports are made of.
var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// parseQuery reads [NAMESPACE/]NAME[:PORT] or VIP:PORT.
func parseQuery(arg string) (lb.Query, error) {
	host, port, hasPort := arg, "", false
	if i := strings.LastIndexByte(arg, ':'); i >= 0 {
		host, port, hasPort = arg[:i], arg[i+1:], true
	}
	if whole, err := parseAddr(arg); err == nil {
		return lb.Query{}, fmt.Errorf("%q has no port: write %s", arg, netip.AddrPortFrom(whole, 80))
	}
	number, err := strconv.ParseUint(port, 10, 16)
	isNumber := err == nil && number > 0
	if vip, err := parseAddr(host); err == nil {
		if !isNumber || vip.Zone() != "" {
			return lb.Query{}, fmt.Errorf("%q is not an address and a port, such as 10.96.0.1:80 or [fd00::1]:80", arg)
		}
		return lb.Query{VIP: vip.Unmap(), Number: uint16(number)}, nil
	}
	q := lb.Query{Service: lb.Name{Namespace: "default", Name: host}, Port: port}
	if namespace, name, found := strings.Cut(host, "/"); found {
		q.Service = lb.Name{Namespace: namespace, Name: name}
	}
	for _, name := range []string{q.Service.Namespace, q.Service.Name} {
		if !label.MatchString(name) {
			return lb.Query{}, fmt.Errorf("%q is neither [NAMESPACE/]SERVICE[:PORT] nor VIP:PORT", arg)
		}
	}
	onlyDigits := strings.Trim(port, "0123456789") == ""
	if hasPort && (!label.MatchString(port) || onlyDigits && !isNumber) {
		return lb.Query{}, fmt.Errorf("%q is neither the name of a port nor a number from 1 to 65535", port)
	}
	return q, nil
}

// parseAddr reads an address, IPv6 in brackets or not.
func parseAddr(s string) (netip.Addr, error) {
	if inner, found := strings.CutPrefix(s, "["); found && strings.HasSuffix(inner, "]") {
		s = strings.TrimSuffix(inner, "]")
	}
	return netip.ParseAddr(s)
}

// explainFiles answers from manifests what an agent that had them would.
func (f explainFlags) explainFiles(cmd *cobra.Command, q lb.Query, client netip.Addr) (lb.Explanation, error) {
	store, err := f.readFiles(cmd.Context(), func(w reflector.Warning) {
		// Standard error may be closed; there is nobody to tell.
		_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "fairlead: warning: %s: %s\n", w.Object, w.Text)
	})
	if err != nil {
		return lb.Explanation{}, err
	}
	e, err := store.Explain(q)
	if err != nil || !cmd.Flags().Changed("bpf-root") {
		return e, err
	}
	return e, compareKernel(store, *f.bpfRoot, client, e.Ports)
}

// readFiles returns a store with everything that the manifests say.
func (f explainFlags) readFiles(ctx context.Context, warn func(reflector.Warning)) (*lb.Store, error) {
	node, err := agentFlags{nodeName: f.nodeName}.node("")
	if err != nil {
		return nil, err
	}
	ports, err := parseNodePorts(strings.Split(f.nodePorts, ","))
	if err != nil {
		return nil, fmt.Errorf("--nodeport-addresses %q: %w", f.nodePorts, err)
	}
	ports.Loopback = true
	limits, err := f.limits.limits()
	if err != nil {
		return nil, err
	}
	options := reflector.Options{NodeName: node, ServiceProxyName: f.serviceProxyName}
	src, err := reflector.NewFile(strings.TrimPrefix(f.source, "file:"), options, zap.NewNop())
	if err != nil {
		return nil, err
	}
	local, err := localAddresses(ctx)
	if err != nil {
		return nil, err
	}
	store := lb.NewStore(lb.Config{NodeName: node, NodePorts: ports, Limits: limits})
	store.SetLocalAddresses(local)
	if err := agent.ReadStore(ctx, src, store, warn); err != nil {
		return nil, err
	}
	store.Changes() // has everything told, so that it can be compared
	return store, nil
}

// localAddresses returns the addresses that this machine has now.
func localAddresses(ctx context.Context) (found []netip.Addr, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	err = attach.WatchAddresses(ctx, func(addresses []netip.Addr) {
		found = addresses
		stop()
	})
	return found, err
}

// compareKernel adds to ports what the maps pinned below root hold of them. Without
// any, ports stay as they are, unless a client is asked about, whom nobody else
// knows.
func compareKernel(store *lb.Store, root string, client netip.Addr, ports []lb.ExplainedPort) error {
	view, err := datapath.OpenView(root)
	if errors.Is(err, datapath.ErrNoDatapath) && !client.IsValid() {
		return nil
	}
	if err != nil {
		return err
	}
	defer view.Close()
	var affinities []datapath.AffinityEntry
	var nodeNetns uint64
	if client.IsValid() {
		if affinities, err = view.Affinities(); err != nil {
			return err
		}
		state, err := view.AgentState()
		if err != nil {
			return err
		}
		if store.IsLocal(client) {
			nodeNetns = state.NetnsCookie
		}
	}
	tables, err := view.Load()
	if err != nil {
		return err
	}
	var keys []lb.ServicePort
	for _, p := range ports {
		keys = append(keys, p.Key())
	}
	differences := store.Compare(keys, tables)
	for i := range ports {
		p := &ports[i]
		p.Kernel = differences[p.Key()]
		p.Affinity = inspect.ClientAffinities(tables, affinities, p.Key(), client, nodeNetns)
	}
	return nil
}
