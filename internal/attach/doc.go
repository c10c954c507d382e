// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package attach puts programs on their hooks and keeps them there: the cgroup
// hooks of the socket path and the tc hooks of the packet path. It finds the
// cgroup that every pod and process of the node is below and the devices that
// packets of clients come by, and pins links so that they outlive us. It also
// follows the node's addresses.
//
//	cgroup.go, links.go   the cgroup and its hooks
//	addresses.go          the node's addresses
//	devices.go            which devices there are, topology.go what they are for
//	tc.go                 programs on devices, by tcx.go or, before Linux 6.6, clsact.go
package attach
