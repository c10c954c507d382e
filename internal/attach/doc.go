// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package attach puts programs on their hooks and keeps them there: today the
// cgroup hooks of the socket path. It finds the cgroup that every pod and
// process of the node is below, and pins the links so that they outlive us. It
// also follows the node's addresses.
package attach
