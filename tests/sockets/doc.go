// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package sockets tests the socket path as clients see it: real sockets of pods
// and of processes on the node dial service addresses, and backend pods answer.
// Node and pods are namespaces without a way out; the hooks are on a cgroup of the
// test's own.
//
// The tests run in the virtual machines of tests/vm, too, so they need no other
// program and no file.
package sockets
