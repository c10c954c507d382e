// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"github.com/spf13/cobra"

	"github.com/fairlead-lb/fairlead/internal/inspect"
)

func newInspectCommand() *cobra.Command {
	complete := completeFirst(
		cobra.CompletionWithDesc("services", "ports of Services: frontends, number of backends, problems"),
		cobra.CompletionWithDesc("frontends", "what clients dial, and the backends they reach"),
		cobra.CompletionWithDesc("backends", "where connections go, and for which services"),
		cobra.CompletionWithDesc("affinity", "which backend each client keeps"),
		cobra.CompletionWithDesc("addresses", "where NodePorts are reached, and the ranges of Services"),
		cobra.CompletionWithDesc("counters", "outcomes since the maps were made"),
	)
	cmd := &cobra.Command{
		Use:   "inspect services|frontends|backends|affinity|addresses|counters",
		Short: "Show what the kernel's tables hold",
		Long: `Reads the pinned maps, also when no agent is running. Needs root.

  services   a line for each port of a Service and family, with the number of
             backends that clients get, and for each Service that could not be
             programmed; PROBLEM says why
  frontends  a line for each address, port and protocol that clients dial
  backends   a line for each address and port that connections are sent to
  affinity   a line for each client that keeps its backend of a Service
  addresses  where NodePorts are reached, and from which ranges Services have
             their addresses
  counters   how often each outcome came about since the maps were made

BACKENDS are what pods and processes of this node get, EXTERNAL what clients
elsewhere would get from this node, where they may use the frontend at all. The
VIP of a NodePort is 0.0.0.0 or ::, the client "node" is all processes in the
node's own network namespace.

A table that is not wide shows three items of a list at most. -o wide shows all,
the numbers services have in the kernel, why there are no backends, and what
holds for ports that are not defined. -o json prints a list, for frontends of

  {service, portName, vip, port, protocol, type, backends: [{address, port}],
   externalBackends: [{address, port}]}

sorted by vip, port and protocol; service is "namespace/name". Type is NodePort,
LoadBalancer, ExternalIP or ClusterIP, which has no externalBackends.`,
		Example: `  fairlead inspect services
  fairlead inspect frontends -o json | jq '.[] | select(.backends == [])'`,
		Args:              oneOf("kind", inspect.Kinds()),
		ValidArgsFunction: complete,
	}
	output := addOutputFlag(cmd, inspect.Formats()...)
	bpfRoot := addBPFRootFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return inspect.Print(cmd.OutOrStdout(), *bpfRoot, args[0], output.value)
	}
	return cmd
}
