// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package chaos proves that nothing which happens to an agent reaches the
// connections of those it serves. Under a steady load of TCP connections and UDP
// exchanges, from pods through their sockets and from outside packet by packet,
// agents are ended, killed, replaced, starved and lied to. The test prints a table:
// what was done, how often, how many connections were tried meanwhile and how many
// failed, which must be none.
//
//	chaos_test.go      the rows of the table, and the table
//	agent_test.go      what is done to the agent
//	cluster_test.go    what is done to the cluster it serves
//	shortage_test.go   what an agent is made to do without
//	storm_test.go      more changes than anybody can follow
//	full_test.go       maps without room
//	world_test.go      the network with its Services
//	load_test.go       the clients, in processes of their own
//	backend_test.go    what backends answer
//
// The short form is part of `make test`, the long one is `make chaos`. With
// -rows=REGEXP only some rows are done, and with FAIRLEAD_CHAOS_OTHER=FILE the other
// build is that program.
package chaos
