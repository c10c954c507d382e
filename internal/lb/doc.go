// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package lb holds what a Kubernetes Service means, and nothing else: which
// frontends a Service has, which endpoints they lead to, and which numbers
// (service IDs, slots) they get in the kernel's tables.
//
// The package is pure. It does no I/O, reads no clock, draws no random number
// and imports nothing of ours, so every rule in it can be tested as a table.
//
//	Store   collects Services and EndpointSlices and says what a batch changed
//	Delta   what a batch changed: frontends and their backends, by name
//	Tables  the rows as the kernel holds them, by number
//	IDs, Blocks  hand out the numbers
//
// Addresses and ports are in host order and IPv4 addresses are 4 bytes long
// (never ::ffff:a.b.c.d) everywhere in this package; only the codec in
// internal/datapath knows the kernel's layout.
package lb
