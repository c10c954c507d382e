// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Command bench measures what a connection through a Service costs, as a
// multiple of what the same connection costs straight to the pod, what
// programming ten thousand Services takes, and how the packet path compares with
// kube-proxy and with no proxy. README.md says what each figure means. It needs
// root and sends packets only inside namespaces of its own.
//
//	main.go      flags, the run as a whole
//	cluster.go   the namespaces, cgroups, maps and programs that are measured
//	program.go   Services into the maps, and how long that takes
//	measure.go   which side is measured when
//	hooks.go     run time of the BPF programs
//	packets.go   what is measured of the packet path, and in which ways
//	lane.go      a node between clients outside and pods
//	path.go      the packet path on the devices of a node, and off again
//	wire.go      a device that receives packets as fast as the node can work
//	kubeproxy.go a node with kube-proxy's rules
//	apiserver.go what kube-proxy takes for its API server
//	machine.go   where the figures come from
//	report.go    statistics, tables, JSON
//	child.go     the processes in the pods: starting them, talking to them
//	client.go    the client: the loops with the clock
//	server.go    the server
//	socket.go    system calls without the Go scheduler
package main
