// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Command bench measures what a connection through a Service costs, as a
// multiple of what the same connection costs straight to the pod, and what
// programming ten thousand Services takes. README.md says what each figure
// means. It needs root and sends packets only inside namespaces of its own.
//
//	main.go      flags, the run as a whole
//	cluster.go   the namespaces, cgroups, maps and programs that are measured
//	program.go   Services into the maps, and how long that takes
//	measure.go   which side is measured when
//	hooks.go     run time of the BPF programs
//	machine.go   where the figures come from
//	report.go    statistics, tables, JSON
//	child.go     the processes in the pods: starting them, talking to them
//	client.go    the client: the loops with the clock
//	server.go    the server
//	socket.go    system calls without the Go scheduler
package main
