// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package cli tests the program as a user meets it at a shell: what it prints,
// on which stream, and its exit code. testdata holds scripts that need no
// kernel; the tests in Go make a datapath for the commands to look at.
package cli
