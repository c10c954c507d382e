// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fairlead-lb/fairlead/internal/inspect"
)

func newInspectCommand() *cobra.Command {
	complete := completeFirst(
		cobra.CompletionWithDesc("services", "ports of Services: frontends, number of backends, problems"),
		cobra.CompletionWithDesc("frontends", "what clients dial, and the backends they reach"),
		cobra.CompletionWithDesc("backends", "where connections go, and for which services"),
		cobra.CompletionWithDesc("affinity", "which backend each client keeps"),
		cobra.CompletionWithDesc("flows", "what clients have on the packet path"),
		cobra.CompletionWithDesc("devices", "which devices the packet path knows"),
		cobra.CompletionWithDesc("addresses", "where NodePorts are reached, and the ranges of Services"),
		cobra.CompletionWithDesc("counters", "outcomes since the maps were made"),
	)
	cmd := &cobra.Command{
		Use:   "inspect " + strings.Join(inspect.Kinds(), "|"),
		Short: "Show what the kernel's tables hold",
		Long: `Reads the pinned maps, also when no agent is running. Needs root.

  services   a line for each port of a Service and family, with the number of
             backends that clients get, and for each Service that could not be
             programmed; PROBLEM says why
  frontends  a line for each address, port and protocol that clients dial
  backends   a line for each address and port that connections are sent to
  affinity   a line for each client that keeps its backend of a Service
  flows      a line for each connection on the packet path, of clients whose
             sockets cannot be seen: other machines, pods in VMs, SCTP
  devices    a line for each network device that packets of clients or backends
             come by; fairlead status tells on how many the packet path is
  addresses  where NodePorts are reached, from which ranges Services have their
             addresses, and which count as inside the cluster
  counters   how often each outcome came about since the maps were made

BACKENDS are what pods and processes of this node get, EXTERNAL what clients
elsewhere would get from this node, where they may use the frontend at all. The
VIP of a NodePort is 0.0.0.0 or ::, the client "node" is all processes in the
node's own network namespace.

Of flows, --client, --vip and --backend show those with this address, or address
and port; all that are given must fit. SOURCE is what the backend sees as the
client where that is an address and port of the node. IDLE is the time since the
last packet of either.

A table that is not wide shows three items of a list at most. -o wide shows all,
the numbers services have in the kernel, why there are no backends, and what
holds for ports that are not defined. -o json prints a list, for frontends of

  {service, portName, vip, port, protocol, type, backends: [{address, port}],
   externalBackends: [{address, port}]}

sorted by vip, port and protocol; service is "namespace/name". Type is NodePort,
LoadBalancer, ExternalIP or ClusterIP, which has no externalBackends.`,
		Example: `  fairlead inspect services
  fairlead inspect frontends -o json | jq '.[] | select(.backends == [])'
  fairlead inspect flows --client=192.0.2.7 --vip=10.96.0.10:443`,
		Args:              oneOf("kind", inspect.Kinds()),
		ValidArgsFunction: complete,
	}
	output := addOutputFlag(cmd, inspect.Formats()...)
	bpfRoot := addBPFRootFlag(cmd)
	ends := addFlowFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		filter, err := ends.filter(args[0])
		if err != nil {
			return err
		}
		if args[0] == kindFlows {
			return inspect.PrintFlows(cmd.OutOrStdout(), *bpfRoot, output.value, filter)
		}
		return inspect.Print(cmd.OutOrStdout(), *bpfRoot, args[0], output.value)
	}
	return cmd
}

// kindFlows is the one of inspect.Kinds that can be filtered.
const kindFlows = "flows"

// flowFlags are the ends that flows are shown of, by flag; empty for all.
type flowFlags struct{ client, vip, backend string }

func addFlowFlags(cmd *cobra.Command) *flowFlags {
	var f flowFlags
	fs := cmd.Flags()
	fs.StringVar(&f.client, "client", "", "flows of the client `ADDRESS[:PORT]`")
	fs.StringVar(&f.vip, "vip", "", "flows to what clients dial, `ADDRESS[:PORT]`")
	fs.StringVar(&f.backend, "backend", "", "flows to the backend `ADDRESS[:PORT]`")
	return &f
}

// filter reads the flags. They are refused for another kind than flows.
func (f *flowFlags) filter(kind string) (inspect.FlowFilter, error) {
	var filter inspect.FlowFilter
	for _, end := range []struct {
		flag, text string
		into       *inspect.End
	}{{"client", f.client, &filter.Client}, {"vip", f.vip, &filter.VIP}, {"backend", f.backend, &filter.Backend}} {
		if end.text == "" {
			continue
		}
		if kind != kindFlows {
			return filter, fmt.Errorf("--%s is for inspect %s, not for %s", end.flag, kindFlows, kind)
		}
		var err error
		if *end.into, err = inspect.ParseEnd(end.text); err != nil {
			return filter, fmt.Errorf("--%s: %w", end.flag, err)
		}
	}
	return filter, nil
}
