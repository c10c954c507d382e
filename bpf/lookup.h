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
	__u8 proto;   /* IPPROTO_* */
	__u8 outside; /* 1: the client is not on this node */
};

/* The service a request leads to, each of its words as one load has read it. */
struct target {
	__u64 options;
	__u32 service_id;
	__u32 base;
	__u32 count;
	/* Of the side's range, with the side above its 24 bits: what was taken from
	 * one side's set says nothing about another's.
	 */
	__u32 generation;
	__u8 kind;     /* enum frontend_kind; 0 when the request leads to no service */
	__u8 side;     /* enum side */
	__u8 loopback; /* 1: a NodePort at a loopback address, see client.h */
	__u8 pad[5];
};

/* A backend for the request. */
struct choice {
	struct addr addr;
	__be16 port;
	__u16 pad;
};

#define ADDR_BITS 128

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

static __always_inline bool addr_is_v4(const struct addr *a)
{
	const __u32 *w = (const __u32 *)a->b;

	return !(w[0] | w[1]) && w[2] == bpf_htonl(0xffff);
}

/* Is it an address at all, not 0.0.0.0 or ::? */
static __always_inline bool addr_is_set(const struct addr *a)
{
	const __u32 *w = (const __u32 *)a->b;

	return w[0] | w[1] | w[3] || (w[2] && w[2] != bpf_htonl(0xffff));
}

/* 127.0.0.0/8 or ::1. */
static __always_inline bool addr_is_loopback(const struct addr *a)
{
	const __u32 *w = (const __u32 *)a->b;

	if (addr_is_v4(a))
		return a->b[12] == 127;
	return !(w[0] | w[1] | w[2]) && w[3] == bpf_htonl(1);
}

static __always_inline void frontend_key_fill(struct frontend_key *key, const struct addr *vip,
					      __be16 port, __u8 proto)
{
	key->vip = *vip;
	*(__u64 *)&key->port = (__u64)proto << 16 | port;
}

/* The frontends of NodePorts have the unspecified address of the family. */
static __always_inline void node_port_key_fill(struct frontend_key *key,
					       const struct addr *addr, __be16 port, __u8 proto)
{
	struct addr any = {};

	if (addr_is_v4(addr))
		any = addr_from_v4(0);
	frontend_key_fill(key, &any, port, proto);
}

static __always_inline void target_set_range(struct target *t, __u64 range)
{
	t->base = range & ((1U << RANGE_BASE_BITS) - 1);
	t->count = (range >> RANGE_BASE_BITS) & ((1U << RANGE_COUNT_BITS) - 1);
	t->generation = range >> (RANGE_BASE_BITS + RANGE_COUNT_BITS) | (__u32)t->side << 24;
}

/* Seconds that a client keeps its backend, or 0. */
static __always_inline __u32 target_affinity(const struct target *t)
{
	return t->options;
}

/* Does the frontend ask who the client is? */
static __always_inline bool target_restricted(const struct target *t)
{
	return t->kind == FRONTEND_LOAD_BALANCER && t->options & OPTION_RESTRICTED;
}

/* The frontend's service from the side of the client. */
static __always_inline enum verdict lb_service(const struct frontend *frontend, __u8 outside,
					       struct target *target)
{
	__u32 id = frontend->service_id;
	struct service *service;

	service = bpf_map_lookup_elem(&services, &id);
	if (!service)
		return VERDICT_NO_BACKEND;
	target->service_id = id;
	target->kind = frontend->kind;
	if (target->kind == FRONTEND_CLUSTER_IP) {
		target->side = SIDE_CLUSTER_IP;
		target_set_range(target, *(volatile __u64 *)&service->range[SIDE_CLUSTER_IP]);
	} else if (outside) {
		target->side = SIDE_OUTSIDE;
		target_set_range(target, *(volatile __u64 *)&service->range[SIDE_OUTSIDE]);
	} else {
		target->side = SIDE_INSIDE;
		target_set_range(target, *(volatile __u64 *)&service->range[SIDE_INSIDE]);
	}
	/* After the range: OPTION_OUTSIDE_LOCAL ends before a flip to backends elsewhere. */
	target->options = *(volatile __u64 *)&service->options;
	if (target->count)
		return VERDICT_TRANSLATE;
	return target->base == EMPTY_ELSEWHERE ? VERDICT_NO_LOCAL : VERDICT_NO_BACKEND;
}

/* What holds for an address that has no frontend at the port that is asked for. A
 * node's own address is its own, also inside a service CIDR.
 */
static __always_inline enum verdict lb_address(const struct addr *addr, __u8 node_address)
{
	struct frontend *frontend;
	struct frontend_key key;
	struct cidr_key cidr;

	frontend_key_fill(&key, addr, 0, 0);
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (frontend)
		return frontend->kind == FRONTEND_FOREIGN ? VERDICT_PASS : VERDICT_NO_PORT;
	if (node_address)
		return VERDICT_PASS;

	cidr.prefixlen = ADDR_BITS;
	cidr.addr = *addr;
	return bpf_map_lookup_elem(&service_cidrs, &cidr) ? VERDICT_NO_SERVICE : VERDICT_PASS;
}

/*
 * Tells whose the request is. target must be zero; it is
 * filled in when the request leads to a service, and its count is above 0 for
 * VERDICT_TRANSLATE alone. What depends on the client is left to the caller:
 * target->loopback and target_restricted.
 */
static __always_inline enum verdict lb_find(const struct request *req, struct target *target)
{
	struct frontend *frontend;
	struct frontend_key key;
	__u8 *node_address, kind;

	frontend_key_fill(&key, &req->addr, req->port, req->proto);
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (frontend) {
		/* A client that dials the unspecified address means itself. */
		if (frontend->kind == FRONTEND_NODE_PORT)
			return VERDICT_PASS;
		return lb_service(frontend, req->outside, target);
	}

	node_address = bpf_map_lookup_elem(&node_addresses, &req->addr);
	kind = node_address ? *node_address : 0;
	if (kind == NODE_ADDRESS_OPEN || kind == NODE_ADDRESS_LOOPBACK) {
		node_port_key_fill(&key, &req->addr, req->port, req->proto);
		frontend = bpf_map_lookup_elem(&frontends, &key);
		if (frontend) {
			target->loopback = kind == NODE_ADDRESS_LOOPBACK;
			return lb_service(frontend, req->outside, target);
		}
	}
	return lb_address(&req->addr, kind);
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

/* May those who remember the backend for this service go on using it? */
static __always_inline bool lb_is_member(__u32 service_id, const struct addr *backend,
					 __be16 port, __u8 use)
{
	struct member_key key = {};

	key.service_id = service_id;
	key.backend = *backend;
	key.port = port;
	key.use = use;
	return bpf_map_lookup_elem(&members, &key) != NULL;
}

/* May a client with this address use the load-balancer IPs of a restricted
 * service?
 */
static __always_inline bool lb_is_source(__u32 service_id, const struct addr *client)
{
	struct source_key key;

	key.prefixlen = 32 + ADDR_BITS;
	key.service_id = service_id;
	key.addr = *client;
	return bpf_map_lookup_elem(&source_ranges, &key) != NULL;
}
