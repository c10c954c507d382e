/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From an address that a client dials to a backend. Nothing here knows a hook's
 * context, so a test can call it from a tc program.
 */
#pragma once

#include <linux/in.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>

#include "maps.h"
#include "types.h"

/* What a client asks for. */
struct request {
	struct addr addr;
	__be16 port;
	__u8 proto; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 pad;
};

/* The service a request leads to, with the range as one load has read it. */
struct target {
	__u32 service_id;
	__u32 base;
	__u32 count;
	__u32 generation;
};

/* A backend for the request. */
struct choice {
	struct addr addr;
	__be16 port;
	__u16 pad;
};

/*
 * 0 when the addresses are the same. One number instead of up to four
 * comparisons: every branch in a loop multiplies the paths that the verifier
 * has to follow.
 */
static __always_inline __u64 addr_diff(const struct addr *a, const struct addr *b)
{
	const __u64 *x = (const __u64 *)a->b;
	const __u64 *y = (const __u64 *)b->b;

	return (x[0] ^ y[0]) | (x[1] ^ y[1]);
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
	       "words of 64 bits are put together from smaller ones below");

static __always_inline struct addr addr_from_words(__u32 a, __u32 b, __u32 c, __u32 d)
{
	struct addr addr;
	__u64 *w = (__u64 *)addr.b;

	w[0] = (__u64)b << 32 | a;
	w[1] = (__u64)d << 32 | c;
	return addr;
}

static __always_inline struct addr addr_from_v4(__be32 v4)
{
	return addr_from_words(0, 0, bpf_htonl(0xffff), v4);
}

static __always_inline void frontend_key_fill(struct frontend_key *key, const struct addr *vip,
					      __be16 port, __u8 proto)
{
	key->vip = *vip;
	*(__u64 *)&key->port = (__u64)proto << 16 | port;
}

static __always_inline void target_set(struct target *t, __u32 id, __u64 range)
{
	t->service_id = id;
	t->base = range & ((1U << RANGE_BASE_BITS) - 1);
	t->count = (range >> RANGE_BASE_BITS) & ((1U << RANGE_COUNT_BITS) - 1);
	t->generation = range >> (RANGE_BASE_BITS + RANGE_COUNT_BITS);
}

/*
 * Tells whose the request is. On VERDICT_TRANSLATE and VERDICT_NO_BACKEND the
 * target is filled in; its count is above 0 for VERDICT_TRANSLATE alone.
 */
static __always_inline enum verdict lb_find(const struct request *req, struct target *target)
{
	struct frontend *frontend;
	struct frontend_key key;
	struct service *service;
	__u32 id;

	frontend_key_fill(&key, &req->addr, req->port, req->proto);
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (!frontend) {
		frontend_key_fill(&key, &req->addr, 0, 0);
		if (bpf_map_lookup_elem(&frontends, &key))
			return VERDICT_NO_PORT;
		return VERDICT_PASS;
	}

	id = frontend->service_id;
	service = bpf_map_lookup_elem(&services, &id);
	if (!service)
		return VERDICT_NO_BACKEND;
	target_set(target, id, *(volatile __u64 *)&service->range);
	return target->count ? VERDICT_TRANSLATE : VERDICT_NO_BACKEND;
}

/*
 * A place in the target's block, each equally likely: the high half of a 32-bit
 * random number times the count needs no division and its bias is below
 * count / 2^32.
 */
static __always_inline __u32 lb_pick(const struct target *target)
{
	return ((__u64)bpf_get_prandom_u32() * target->count) >> 32;
}

/* Reads the backend at a place of the block. False when the place is outside
 * the map, which only a damaged range can cause.
 */
static __always_inline bool lb_backend(const struct target *target, __u32 place,
				       struct choice *choice)
{
	__u32 index = target->base + place;
	struct slot *slot;

	slot = bpf_map_lookup_elem(&slots, &index);
	if (!slot)
		return false;
	choice->addr = slot->backend;
	choice->port = slot->port;
	return true;
}

/* Is the backend still serving for this service? */
static __always_inline bool lb_is_member(__u32 service_id, const struct addr *backend,
					 __be16 port)
{
	struct member_key key = {};

	key.service_id = service_id;
	key.backend = *backend;
	key.port = port;
	return bpf_map_lookup_elem(&members, &key) != NULL;
}
