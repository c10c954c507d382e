// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package datapath is the agent's side of bpf/: it loads the programs, creates
// or re-opens the pinned maps, and turns rows of package lb into the bytes the
// kernel holds and back.
//
//	Open    maps and programs for the agent, which alone writes
//	View    the same maps, read-only, for inspect and status
//
// Below <bpf-root> everything is pinned:
//
//	v<ABI>/maps      tables, which say what the source says: made by each ABI for itself
//	v<ABI>/links     links of hooks
//	v<ABI>/devices   links of network devices
//	state<N>/        what connections depend on, and which service ID has which name:
//	                 shared by all ABIs that know state N
//	state<N>/serving leads to the version whose tables the IDs have their meaning from
//
// See bpf/README.md for the maps and the order in which they are written.
package datapath
