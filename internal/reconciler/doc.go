// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package reconciler makes the kernel's tables say what is wanted, with the
// fewest writes and in an order in which no reader ever finds a row missing,
// half written or meant for somebody else.
//
// Programs read frontends → services → slots, node addresses where a frontend
// is a NodePort, and service CIDRs where there is no frontend. They ask members
// about a backend that they remember, and sources about a client. Every call of
// Apply, ApplyAll and Retry goes through the same phases, each of which leaves
// tables that a reader may meet, and that the agent may die with:
//
//  1. Service CIDRs that go: the addresses in them may be somebody else's now.
//  2. For each service that changed: its name if the ID is new, sources that
//     join, the options as far as they keep somebody out, end an affinity or
//     no longer let outside clients keep their address, members that join, the
//     backends into a block of slots that nobody reads, and then the range of
//     each side whose set changed. Storing a range is the flip: at once all
//     frontends on that side lead to the new backends. Sides with equal sets
//     share a block. The rest of the options comes last: as long as they say
//     that there is an affinity, members have what is in the slots.
//  3. Node addresses and frontends: new keys, then keys whose row changes, then
//     deletes. Before the first wildcard that refuses there is a grace period,
//     if new ports came before it: whoever missed one must not find the
//     wildcard.
//  4. A grace period, if anything was retired so far.
//  5. What nobody can be reading any more: members and sources that left, the
//     row, members, sources and name of services that are gone, their blocks,
//     the blocks that flips left behind. Service IDs are put to rest. If a
//     backend was left, outside clients keep their address only from now on:
//     the answers of one elsewhere would pass by the node.
//  6. Service CIDRs that join, if all frontends are there and whoever missed
//     one has ended: an address that is somebody's must not be taken for
//     nobody's.
//
// Three quirks of the kernel stand behind the details. An element of a hash
// table that is replaced or deleted is recycled at once, even while a program
// holds it, and the next insert may make it another key's row. So in frontends
// and node addresses nothing is written after a replacement or a delete before
// a grace period has passed. A socket that remembers a backend, and the
// generation it was chosen from, asks members only when the range has another
// generation. So a backend leaves members only after the flip that took it out
// of the slots, and after a grace period, for until then it could still be
// chosen. And a program on its way down a trie may pass a new row by and then
// miss an old one. So sources leave only a grace period after others joined.
//
// A write that fails stops what depends on it: a service port that is not as it
// should be gets no new frontends, and as long as a frontend is missing no
// service CIDR is added. A restriction depends on nothing, not even on its
// sources: clients whose source does not fit are kept out. As long as something
// of a Service fails, none of that Service's frontends are deleted. Everything
// else goes on, and pruning does too: if one failure stopped all of it, a table
// that is full could never be emptied. Retry prunes first, the failing
// Service's own rows as well, so that what is to go makes room for what is to
// come.
package reconciler
