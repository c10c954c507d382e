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

#include "config.h"
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
	const __u64 *client = (const __u64 *)key->client.b;
	const __u64 *backend = (const __u64 *)kept->addr.b;
	__u64 hash;

	hash = mix(0, key->netns);
	hash = mix(hash, client[0]);
	hash = mix(hash, client[1]);
	hash = mix(hash, (__u64)key->service_id << 32 | last_sec);
	hash = mix(hash, backend[0]);
	hash = mix(hash, backend[1] ^ (__u64)kept->port << 48);
	return ((hash >> 32) * target->count) >> 32;
}

/*
 * What reads and writes entries is in global functions, each of which the verifier
 * looks at alone and once, and whose stacks are not all there at once. They copy the
 * key, since before Linux 6.2 that must be on a function's own stack.
 */

/*
 * Looks up the client's entry and puts into choice the backend that it has or, if
 * that is over, gets next. In the first case the generation becomes unknown:
 * between a flip and the deletion of the members row the backend is not in the
 * set that the generation stands for.
 */
__noinline enum affinity_state affinity_recall(const struct affinity_key *client,
					       struct target *target, __u32 now,
					       struct choice *choice)
{
	struct affinity_key key;
	struct choice kept = {};
	struct affinity *entry;
	__u32 last_sec;

	if (!client || !target || !choice)
		return AFFINITY_NONE;
	key = *client;
	entry = bpf_map_lookup_elem(&affinity, &key);
	if (!entry)
		return AFFINITY_NONE;
	kept.addr = *(volatile struct addr *)&entry->backend;
	kept.port = *(volatile __be16 *)&entry->port;
	last_sec = *(volatile __u32 *)&entry->last_sec;
	if (!affinity_good(&kept, last_sec, target, now)) {
		__u32 place = affinity_next(&key, &kept, last_sec, target);

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

/* Gives the client an entry with the backend of its choice. With BPF_NOEXIST false
 * when it has one.
 */
__noinline bool affinity_put(const struct affinity_key *client, const struct addr *address,
			     const struct choice *choice, __u32 now, __u64 flags)
{
	struct affinity entry = {};
	struct affinity_key key;

	if (!client || !address || !choice)
		return false;
	key = *client;
	entry.backend = choice->addr;
	entry.port = choice->port;
	entry.client = *address;
	entry.last_sec = now;
	return !bpf_map_update_elem(&affinity, &key, &entry, flags);
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
	__u64 flags;
	int i;

	if (state == AFFINITY_NONE && !lb_backend(target, lb_pick(target), choice))
		return false;
#pragma clang loop unroll(disable)
	for (i = 0; i < AFFINITY_TRIES; i++) {
		flags = state == AFFINITY_OVER ? BPF_ANY : BPF_NOEXIST;
		if (affinity_put(key, address, choice, now, flags)) {
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

/*
 * A client that sockets show as a namespace may be no more than an address on the
 * packet path, and has to get one backend on both. So the first socket of a pod that
 * gets an entry tells which address the pod has, and from then on that address stands
 * for the namespace (affinity_of_packet). What the address has got before, the
 * namespace goes on with (affinity_from_address), each service for itself.
 */

/* The namespace has no entry: is there a good one for its address? key comes back as
 * it was.
 */
static __always_inline bool affinity_from_address(struct affinity_key *key,
						  const struct addr *address,
						  struct target *target, __u32 now,
						  struct choice *choice)
{
	__u64 netns = key->netns;
	enum affinity_state state;

	key->netns = 0;
	key->client = *address;
	state = affinity_recall(key, target, now, choice);
	key->netns = netns;
	__builtin_memset(&key->client, 0, sizeof(key->client));
	return state == AFFINITY_KEPT;
}

/* The key of a packet's client: of its namespace if that is known. local: a process
 * on the node has sent it.
 */
static __always_inline void affinity_key_of(const struct addr *client, bool local,
					    __u32 service_id, struct affinity_key *key)
{
	__u64 *netns;

	key->service_id = service_id;
	if (local) {
		key->netns = host_netns_cookie;
		return;
	}
	netns = bpf_map_lookup_elem(&pods, client);
	key->netns = netns ? *(volatile __u64 *)netns : 0;
	if (!key->netns)
		key->client = *client;
}

/*
 * The backend of a packet's client, for a service with an affinity. False when there
 * is none, which only a damaged range can cause.
 */
__noinline bool affinity_of_packet(const struct addr *client, bool local, struct target *target,
				   __u32 now, struct choice *choice)
{
	struct affinity_key key = {};
	enum affinity_state state;
	struct addr address;

	if (!client || !target || !choice)
		return false;
	address = *client;
	affinity_key_of(&address, local, target->service_id, &key);
	state = affinity_recall(&key, target, now, choice);
	if (state == AFFINITY_KEPT)
		return true;
	if (state == AFFINITY_NONE && key.netns && !local &&
	    affinity_from_address(&key, &address, target, now, choice))
		return true;
	return affinity_settle(&key, state, &address, target, now, choice);
}
