/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a UDP socket asked for and which backend it got: kept in the socket's
 * own storage, which is never full and goes with the socket. Datagrams of one
 * socket can be sent and received on several cores at once, so entries are read
 * and written under the storage's lock; no helper may be called there.
 */
#pragma once

#include "config.h"
#include "lookup.h"

static __always_inline __u32 now_sec(void)
{
	return bpf_ktime_get_ns() / 1000000000ULL;
}

/* 0 when the entry is for the VIP that is asked for. */
static __always_inline __u64 entry_vip_diff(const struct origin_entry *entry,
					    const struct addr *addr, __be16 port)
{
	return addr_diff(&entry->vip, addr) | (entry->vip_port ^ port);
}

/* 0 when the entry is for the backend; an empty one is for no backend at all. */
static __always_inline __u64 entry_backend_diff(const struct origin_entry *entry,
						const struct addr *addr, __be16 port)
{
	return addr_diff(&entry->backend, addr) | (entry->backend_port ^ port);
}

/* Signed: another core's clock may have been read a moment later than ours. */
static __always_inline bool entry_idle(const struct origin_entry *entry, __u32 now)
{
	return (__s32)(now - entry->last_sec) > (__s32)udp_idle_sec;
}

static __always_inline void entry_fill(struct origin_entry *entry, const struct request *req,
				       const struct target *target, const struct choice *choice,
				       __u32 now)
{
	entry->vip = req->addr;
	entry->vip_port = req->port;
	entry->backend = choice->addr;
	entry->backend_port = choice->port;
	entry->service_id = target->service_id;
	entry->generation = target->generation;
	entry->last_sec = now;
}

static __always_inline struct control *control_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/* Has origins_overflow ever been used? Keeps it out of everybody else's way. */
static __always_inline bool overflow_in_use(void)
{
	struct control *c = control_get();

	return c && c->overflowed;
}

static __always_inline void overflow_key_fill(struct overflow_key *key, __u64 cookie,
					      enum overflow_side side, const struct addr *addr,
					      __be16 port)
{
	key->cookie = cookie;
	key->addr = *addr;
	key->port = port;
	key->side = side;
}

static __always_inline bool overflow_find(__u64 cookie, enum overflow_side side,
					  const struct addr *addr, __be16 port, __u32 now,
					  struct origin_entry *copy)
{
	struct overflow_key key = {};
	struct origin_entry *entry;

	overflow_key_fill(&key, cookie, side, addr, port);
	entry = bpf_map_lookup_elem(&origins_overflow, &key);
	if (!entry)
		return false;
	*copy = *entry;
	/* The row may have become another socket's while it was copied. */
	if (side == OVERFLOW_BY_VIP ? entry_vip_diff(copy, addr, port)
				    : entry_backend_diff(copy, addr, port))
		return false;
	if (!entry_idle(entry, now))
		entry->last_sec = now;
	return true;
}

static __always_inline void overflow_put(__u64 cookie, const struct origin_entry *entry)
{
	struct control *c = control_get();
	struct overflow_key key = {};
	long err;

	if (c && !c->overflowed)
		c->overflowed = 1;
	overflow_key_fill(&key, cookie, OVERFLOW_BY_VIP, &entry->vip, entry->vip_port);
	err = bpf_map_update_elem(&origins_overflow, &key, entry, BPF_ANY);
	overflow_key_fill(&key, cookie, OVERFLOW_BY_BACKEND, &entry->backend,
			  entry->backend_port);
	err |= bpf_map_update_elem(&origins_overflow, &key, entry, BPF_ANY);
	count(err ? COUNTER_ORIGIN_LOST : COUNTER_ORIGIN_OVERFLOW);
}

/*
 * Where did this socket's datagrams for the VIP go? True with a copy of the
 * entry, unless the socket was silent for too long.
 */
static __always_inline bool origin_sent_find(struct origin *origin, void *ctx,
					     const struct request *req, __u32 now,
					     struct origin_entry *copy)
{
	bool found = false;
	int i;

	if (origin) {
		bpf_spin_lock(&origin->lock);
#pragma unroll
		for (i = 0; i < ORIGIN_SENT; i++) {
			struct origin_entry *entry = &origin->sent[i];

			if (!found && !entry_vip_diff(entry, &req->addr, req->port)) {
				*copy = *entry;
				found = true;
				origin->latest = i;
				if (!entry_idle(entry, now))
					entry->last_sec = now;
			}
		}
		bpf_spin_unlock(&origin->lock);
	}
	if (!found && overflow_in_use())
		found = overflow_find(bpf_get_socket_cookie(ctx), OVERFLOW_BY_VIP, &req->addr,
				      req->port, now, copy);
	return found && !entry_idle(copy, now);
}

/*
 * May a socket go on with the backend it remembers? While the generation is the
 * one it was chosen from nothing has happened to the set. After that each use
 * asks members: had the entry taken over the new generation instead, a backend
 * that is leaving between the flip and its members row would be kept for ever.
 */
static __always_inline bool origin_usable(const struct origin_entry *entry,
					  const struct target *target)
{
	if (entry->service_id != target->service_id)
		return false;
	if (entry->generation == target->generation)
		return true;
	return lb_is_member(target->service_id, &entry->backend, entry->backend_port,
			    USE_SERVING);
}

/* 1 when d is 0, else 0, without a branch. */
static __always_inline __u64 is_zero(__u64 d)
{
	return 1 ^ ((d | -d) >> 63);
}

/* Would an answer from this backend be taken for another VIP's? */
static __always_inline bool origin_ambiguous(struct origin *origin, const struct request *req,
					     const struct choice *choice)
{
	struct origin_entry *entry;
	__u64 other = 0;
	int i;

	bpf_spin_lock(&origin->lock);
#pragma clang loop unroll(disable)
	for (i = 0; i < ORIGIN_SENT; i++) {
		entry = &origin->sent[i];
		other |= is_zero(entry_backend_diff(entry, &choice->addr, choice->port)) *
			 entry_vip_diff(entry, &req->addr, req->port);
	}
	bpf_spin_unlock(&origin->lock);
	return other != 0;
}

#define AVOID_TRIES 8

/*
 * Chooses a backend at random, but not one that this socket already uses for
 * another VIP, if a few neighbours offer a way out: the answer could not tell
 * the two VIPs apart. origin may be NULL.
 */
static __always_inline bool origin_choose(struct origin *origin, const struct request *req,
					  const struct target *target, struct choice *choice)
{
	__u32 place = lb_pick(target);
	int i;

	if (!lb_backend(target, place, choice))
		return false;
	if (!origin)
		return true;
#pragma clang loop unroll(disable)
	for (i = 0; i < AVOID_TRIES && i < target->count; i++) {
		if (!origin_ambiguous(origin, req, choice))
			return true;
		place++;
		if (place >= target->count)
			place = 0;
		if (!lb_backend(target, place, choice))
			return false;
	}
	return true;
}

/* Has another thread chosen for the same VIP and service in the meantime? */
static __always_inline bool entry_stands(const struct origin_entry *entry,
					 const struct origin_entry *fresh,
					 const struct origin_entry *rejected)
{
	if (entry_vip_diff(entry, &fresh->vip, fresh->vip_port) ||
	    entry->service_id != fresh->service_id || entry_idle(entry, fresh->last_sec))
		return false;
	return !rejected ||
	       entry_backend_diff(entry, &rejected->backend, rejected->backend_port);
}

/*
 * Writes the choice into the socket's storage. When another thread has chosen
 * for the same VIP since we looked, its choice stands and is copied back;
 * rejected is the entry that we found and would not use, or NULL. False when
 * every place holds a VIP in use.
 */
static __always_inline bool origin_sent_put(struct origin *origin, struct origin_entry *fresh,
					    const struct origin_entry *rejected)
{
	__u32 i, place = ORIGIN_SENT, now = fresh->last_sec;
	struct origin_entry *entry;

	bpf_spin_lock(&origin->lock);
#pragma clang loop unroll(disable)
	for (i = 0; i < ORIGIN_SENT; i++) {
		entry = &origin->sent[i];
		if (!entry_vip_diff(entry, &fresh->vip, fresh->vip_port)) {
			place = i;
			break;
		}
		if (place == ORIGIN_SENT && (!entry->vip_port || entry_idle(entry, now)))
			place = i;
	}
	if (place < ORIGIN_SENT) {
		origin->latest = place;
		entry = &origin->sent[place];
		if (entry_stands(entry, fresh, rejected))
			*fresh = *entry;
		else
			*entry = *fresh;
	}
	bpf_spin_unlock(&origin->lock);
	return place < ORIGIN_SENT;
}

/* Remembers the backend of a socket that is being connected. */
static __always_inline void origin_connected_put(struct origin *origin,
						 const struct origin_entry *entry)
{
	bpf_spin_lock(&origin->lock);
	if (entry_backend_diff(&origin->connected[0], &entry->backend, entry->backend_port))
		origin->connected[1] = origin->connected[0];
	origin->connected[0] = *entry;
	bpf_spin_unlock(&origin->lock);
}

/*
 * The socket is being connected to an address of nobody's, which may be that of
 * a backend it was connected to through a VIP: it is itself from now on.
 */
static __always_inline void origin_connected_forget(struct origin *origin,
						    const struct request *req)
{
	struct origin_entry none = {};
	int i;

	bpf_spin_lock(&origin->lock);
#pragma unroll
	for (i = 0; i < ORIGIN_CONNECTED; i++)
		if (!entry_backend_diff(&origin->connected[i], &req->addr, req->port))
			origin->connected[i] = none;
	bpf_spin_unlock(&origin->lock);
}

/* What does a socket remember that is connected to this backend? True with a
 * copy of the entry.
 */
static __always_inline bool origin_connected_find(struct origin *origin,
						  const struct addr *backend, __be16 port,
						  struct origin_entry *copy)
{
	bool found = false;
	int i;

	bpf_spin_lock(&origin->lock);
#pragma unroll
	for (i = 0; i < ORIGIN_CONNECTED; i++) {
		if (!found && !entry_backend_diff(&origin->connected[i], backend, port)) {
			*copy = origin->connected[i];
			found = true;
		}
	}
	bpf_spin_unlock(&origin->lock);
	return found;
}

/*
 * Puts the VIP in the place of the backend that a socket is connected to. What
 * it has sent elsewhere says nothing about its connection.
 */
static __always_inline bool origin_peer(struct origin *origin, void *ctx, struct request *req)
{
	struct origin_entry copy = {};
	bool found = false;

	if (origin)
		found = origin_connected_find(origin, &req->addr, req->port, &copy);
	else if (overflow_in_use())
		found = overflow_find(bpf_get_socket_cookie(ctx), OVERFLOW_BY_BACKEND,
				      &req->addr, req->port, now_sec(), &copy);
	if (!found)
		return false;
	req->addr = copy.vip;
	req->port = copy.vip_port;
	return true;
}

/*
 * Puts the VIP in the place of the backend that a datagram comes from, on a
 * socket that is not connected. Of two VIPs that share the backend it is the one
 * that was sent to last.
 */
static __always_inline bool origin_recall(struct origin *origin, void *ctx, struct request *req,
					  __u32 now)
{
	struct origin_entry copy = {};
	bool found = false;
	int i;

	if (origin) {
		bpf_spin_lock(&origin->lock);
#pragma unroll
		for (i = 0; i < ORIGIN_SENT; i++) {
			struct origin_entry *entry = &origin->sent[i];

			if (entry_backend_diff(entry, &req->addr, req->port))
				continue;
			entry->last_sec = now;
			if (found && origin->latest != i)
				continue;
			copy = *entry;
			found = true;
		}
		bpf_spin_unlock(&origin->lock);
	}
	if (!found && overflow_in_use())
		found = overflow_find(bpf_get_socket_cookie(ctx), OVERFLOW_BY_BACKEND,
				      &req->addr, req->port, now, &copy);
	if (!found)
		return false;
	req->addr = copy.vip;
	req->port = copy.vip_port;
	return true;
}
