// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package parity compares what Fairlead makes of Services, EndpointSlices and
// the node's labels with what kube-proxy makes of them.
//
//	Generate   a random history: API objects that come, change and go
//	upstream   kube-proxy's own change trackers and CategorizeEndpoints, used as
//	           its nftables proxier uses them
//	ours       internal/reflector's conversion and internal/lb
//	Answer     what either side says: frontends, backends, verdicts, health checks
//	Compare    one history through both sides
//	Shrink     a history that differs, made as small as possible
//
// Histories hold only what kube-proxy defines the outcome of. What it leaves
// open is not generated, or not compared while it lasts: two Services that claim
// one frontend, and contradictory copies of one address in the slices of a
// Service.
package parity
