// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package probe proves that connections to a service address are translated, by
// making one. No packet of it leaves: the connection is made in a network namespace
// of its own in which every address is local, so whoever the address is translated
// to, it is we who answer, and see at which address.
//
// Which programs translate depends on the cgroup of the process that makes the
// socket, not on its network namespace: a Prober proves it for its own process,
// Child for any cgroup.
package probe
