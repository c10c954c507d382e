// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package sandbox builds a cluster node in miniature: a network namespace for
// the node, one for each pod and client, and a bridge between them. Nothing in
// it has a way out: there is no link to the machine's own network and the node
// has no default route. The demo and every test that sends a packet use it.
//
//	Node       the node's namespace with its bridge; adds and removes pods
//	Network    namespaces for topologies of several nodes, connected by hand
//	Namespace  one network namespace; sockets and processes are made in it
//	Cgroup     a cgroup of our own for this process, so that programs attached
//	           there see nobody else's sockets
//
// Everything needs root. Whatever is made carries a prefix, the process ID of
// its maker and a random part in its name, so that CleanLeftovers can tell what
// a killed run has left behind.
package sandbox
