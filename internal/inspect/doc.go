// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package inspect shows people and programs what the kernel's tables hold, and
// what the store says of a Service.
//
//	lb.Tables, entries, flows ─▶ rows (pure) ─▶ table, JSON or YAML
//	           lb.Explanation ─▶ page, JSON or YAML
//
// Print reads the pinned maps, so it needs no agent, and an agent may write while
// it reads: rows are then from before or after the write.
package inspect
