// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package agent wires everything together and owns the state: one goroutine
// takes the events of the source, keeps the store, has the reconciler write
// what changed and decides when. Others only send it events.
//
//	source ─ events ─▶ agent: lb.Store ─ lb.Delta ─▶ reconciler ─▶ datapath
//	                     ▲                                            │
//	                     └── reports ── sockets.Ender, flows.Sweeper ◀┘
//
// What somebody else does to the kernel's part is undone by the same goroutine: the
// guardian looks after hooks and pins, repair after rows. A goroutine of its own makes
// connections to prove that all of that has an effect.
//
// The devices of the packet path have a goroutine of their own, which attaches
// programs and keeps them there: that takes time on a node with many pods.
package agent
