// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package packets tests the packet path packet by packet: what comes out of a
// program for what goes in, down to the last byte, with every checksum summed up
// anew.
//
//	world_test.go     a node with devices of all kinds, its tables and programs
//	run_test.go       one packet through one program
//	wire_test.go      packets through devices with the programs on them
//	*_test.go         the cases, by what they are about
//	fuzz_test.go      packets that nobody has thought of
//
// Nothing here needs a file or another program, so that the tests also run in the
// virtual machines of tests/vm.
package packets
