// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package upgrade replaces agents by those of a build whose tables have another
// layout, and back again, while clients in pods and outside use Services: nothing
// they do may fail. The other build is this tree with testdata/layout.patch and the
// next ABI number.
//
//	upgrade_test.go   the test
//	build_test.go     the other build
//	world_test.go     node, pods, a client outside, Services, agents
//	client_test.go    what clients do; outside ones are a process of their own, so that
//	                  no hook sees their sockets
//
// It has no code but tests.
package upgrade
