// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package sockets ends connected UDP sockets that a change of the tables has
// left behind, in every network namespace of the node, so that their owners
// connect anew: sockets whose backend has gone, and sockets that connected to a
// service address before anything was behind it.
//
// A TCP connection learns from its peer that a backend has gone; a UDP socket
// would send into the void for ever. The client sees ECONNABORTED from a blocked
// or the next receive and errors from sends until it connects again.
package sockets
