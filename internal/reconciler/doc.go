// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package reconciler makes the kernel's tables say what is wanted, with the
// fewest writes and in an order in which no reader ever finds a row missing,
// half written or meant for somebody else.
//
// Programs read frontends → services → slots, and members for a backend that
// they remember. Every call of Apply, ApplyAll and Retry goes through the same
// phases, each of which leaves tables that a reader may meet, and that the
// agent may die with:
//
//  1. For each service that changed: its name if the ID is new, members that
//     join, the backends into a block of slots that nobody reads, and then the
//     range. Storing the range is the flip: at once all frontends of the
//     service lead to the new backends.
//  2. Frontends: new keys, then keys that change their owner, then deletes.
//  3. A grace period, if anything was retired so far.
//  4. What nobody can be reading any more: members that left, the range,
//     members and name of services that are gone, their blocks, the blocks
//     that flips left behind. Service IDs are put to rest.
//
// Two quirks of the kernel stand behind the details. An element of a hash table
// that is replaced or deleted is recycled at once, even while a program holds
// it, and the next insert may make it another key's row. So in frontends
// nothing is written after a replacement or a delete before a grace period has
// passed. And a socket that remembers a backend, and the generation it was
// chosen from, asks members only when the range has another generation. So a
// backend leaves members only after the flip that took it out of the slots, and
// after a grace period, for until then it could still be chosen.
//
// A write that fails stops what depends on it: a service port that is not as it
// should be gets no new frontends. As long as something of a Service fails,
// none of that Service's frontends are deleted. Everything else goes on, and
// pruning does too: if one failure stopped all of it, a table that is full
// could never be emptied. Retry prunes first, the failing Service's own rows
// as well, so that what is to go makes room for what is to come.
package reconciler
