/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Session affinity: a client keeps its backend of a service while it comes back
 * before the service's timeout is over and the backend is in the set of its side.
 *
 * Connections of one client at once must get one backend, without a lock. When
 * there is no entry, inserting it decides: the first one's choice stands. When
 * there is one that is over, what it says decides: who replaces it takes the
 * next choice from the entry itself, so all who find it come to the same, and it
 * does not matter who is last. (Unless they have different sets: a ClusterIP and
 * a NodePort under different policies, or the two sides of a flip. Then the last
 * one's stands.)
 *
 * Elements of an LRU map may be given to another key at any moment, also under a
 * reader's hands, so a copy may be another client's or put together from two.
 * That it passes members is enough: then it is a backend that this service gives
 * to clients of this side, and the client had lost its own entry anyway.
 */
#pragma once

#include "lookup.h"

/* What a client's entry says. */
enum affinity_state {
	AFFINITY_NONE, /* there is none */
	AFFINITY_KEPT, /* go on with the backend */
	AFFINITY_OVER, /* no more; the next one follows from it */
};

/* Is the backend one to go on with? Signed: another core's clock may have been
 * read a moment later than ours.
 */
static __always_inline bool affinity_good(const struct choice *kept, __u32 last_sec,
					  const struct target *target, __u32 now)
{
	__s64 age = (__s32)(now - last_sec);

	if (age > target_affinity(target))
		return false;
	return lb_is_member(target->service_id, &kept->addr, kept->port,
			    USE_SIDE + target->side);
}

/* The finalizer of SplitMix64: every bit of w changes half of the result's. */
static __always_inline __u64 mix(__u64 hash, __u64 w)
{
	hash = (hash ^ w) + 0x9e3779b97f4a7c15;
	hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
	hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
	return hash ^ (hash >> 31);
}

/* A place in the target's block, each equally likely, that is the same for all
 * who ask about the same entry.
 */
static __always_inline __u32 affinity_next(const struct affinity_key *key,
					   const struct choice *kept, __u32 last_sec,
					   const struct target *target)
{
	const __u64 *w = (const __u64 *)kept->addr.b;
	__u64 hash;

	hash = mix(0, key->netns);
	hash = mix(hash, (__u64)key->service_id << 32 | last_sec);
	hash = mix(hash, w[0]);
	hash = mix(hash, w[1] ^ (__u64)kept->port << 48);
	return ((hash >> 32) * target->count) >> 32;
}

/*
 * Looks up the client's entry and puts into choice the backend that it has or, if
 * that is over, gets next. In the first case the generation becomes unknown:
 * between a flip and the deletion of the members row the backend is not in the
 * set that the generation stands for.
 */
static __always_inline enum affinity_state affinity_recall(const struct affinity_key *key,
							   struct target *target, __u32 now,
							   struct choice *choice)
{
	struct choice kept = {};
	struct affinity *entry;
	__u32 last_sec;

	entry = bpf_map_lookup_elem(&affinity, key);
	if (!entry)
		return AFFINITY_NONE;
	kept.addr = *(volatile struct addr *)&entry->backend;
	kept.port = *(volatile __be16 *)&entry->port;
	last_sec = *(volatile __u32 *)&entry->last_sec;
	if (!affinity_good(&kept, last_sec, target, now)) {
		__u32 place = affinity_next(key, &kept, last_sec, target);

		return lb_backend(target, place, choice) ? AFFINITY_OVER : AFFINITY_NONE;
	}
	/* Not into an element that has become another's since. */
	if (last_sec != now)
		__sync_val_compare_and_swap(&entry->last_sec, last_sec, now);
	*choice = kept;
	target->generation = RANGE_UNKNOWN;
	count(COUNTER_AFFINITY_HIT);
	return AFFINITY_KEPT;
}

/* Somebody else's entry may go between our two looks, but hardly twice. */
#define AFFINITY_TRIES 3

/*
 * Gives a client a backend to keep. state and choice are what affinity_recall has
 * left, address is for people.
 */
static __always_inline bool affinity_settle(const struct affinity_key *key,
					    enum affinity_state state,
					    const struct addr *address, struct target *target,
					    __u32 now, struct choice *choice)
{
	struct affinity fresh = {};
	__u64 flags;
	int i;

	if (state == AFFINITY_NONE && !lb_backend(target, lb_pick(target), choice))
		return false;
	fresh.client = *address;
	fresh.last_sec = now;
#pragma clang loop unroll(disable)
	for (i = 0; i < AFFINITY_TRIES; i++) {
		fresh.backend = choice->addr;
		fresh.port = choice->port;
		flags = state == AFFINITY_OVER ? BPF_ANY : BPF_NOEXIST;
		if (!bpf_map_update_elem(&affinity, key, &fresh, flags)) {
			count(COUNTER_AFFINITY_NEW);
			return true;
		}
		state = affinity_recall(key, target, now, choice);
		if (state == AFFINITY_KEPT)
			return true;
	}
	count(COUNTER_AFFINITY_LOST);
	return true;
}
