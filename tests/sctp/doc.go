// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package sctp tests SCTP, which has no socket hook and so goes the packet path
// alone: the checksum's arithmetic on any kernel, associations through Services on
// those that have the protocol, as the machines of tests/vm do.
package sctp
