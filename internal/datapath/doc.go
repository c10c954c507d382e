// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package datapath is the agent's side of bpf/: it loads the programs, creates
// or re-opens the pinned maps, and turns rows of package lb into the bytes the
// kernel holds and back.
//
//	Open    maps and programs for the agent, which alone writes
//	View    the same maps, read-only, for inspect and status
//
// Everything is pinned below <bpf-root>/v<ABI>/: maps in maps/, links of hooks in
// links/, those of network devices in devices/.
// See bpf/README.md for the maps and the order in which they are written.
package datapath
