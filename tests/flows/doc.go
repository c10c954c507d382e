// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package flows tests the life of flows on the packet path: two nodes with an
// agent each, pods in the shapes that CNI plugins give them, clients outside, and
// the TCP, UDP, ICMP, routing, bridging and connection tracking of real kernels
// between them. All of it is namespaces without a way out.
//
// The agents' hooks are on an empty cgroup, so no socket of the tests is seen by
// them: whatever reaches a Service was translated packet by packet.
//
//	world_test.go     the network every test has, its Services and agents
//	shape_test.go     what differs: routes, bridges, overlays, uplinks, tunnels
//	server_test.go    what backends answer, and how clients ask
//	capture_test.go   what is shown when a test fails
//
// With FAIRLEAD_CAPTURE=1 all packets are kept from the start, not only those of a
// second try.
package flows
