// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package packet is for tests that look at packets: it builds them with checksums
// that are right by construction, and reads them back with every checksum summed
// up anew.
//
//	Packet    one packet in words: comparable, readable, to be changed field by field
//	Marshal   its bytes
//	Parse     the words of bytes, or what is wrong with them
//	Split     the fragments of a packet; Join puts them together
package packet
