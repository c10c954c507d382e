/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a TCP socket dialled, for getpeername. An array indexed by the socket's
 * cookie costs a tenth of socket storage at connect; in return a place may be
 * taken by a later socket, and then getpeername shows the backend.
 */
#pragma once

#include "config.h"
#include "lookup.h"

static __always_inline struct peer *peer_at(__u64 cookie)
{
	__u32 index = cookie & peers_mask;

	return bpf_map_lookup_elem(&peers, &index);
}

/*
 * The exchanges are full barriers: a reader that finds the same cookie before
 * and after has read what this writer wrote. Of two writers at one place the
 * second gives way, so that no entry is a mixture.
 */
static __always_inline void peer_remember(__u64 cookie, const struct request *req,
					  const struct choice *choice)
{
	struct peer *peer = peer_at(cookie);

	if (!peer)
		return;
	if (__sync_lock_test_and_set(&peer->cookie, PEER_BUSY) == PEER_BUSY) {
		count(COUNTER_PEER_LOST);
		return;
	}
	peer->vip = req->addr;
	peer->vip_port = req->port;
	peer->backend = choice->addr;
	peer->backend_port = choice->port;
	__sync_lock_test_and_set(&peer->cookie, cookie);
}

/* Puts the address that the socket dialled in the place of its backend's. */
static __always_inline bool peer_recall(__u64 cookie, struct request *req)
{
	struct peer *peer = peer_at(cookie);
	struct peer copy;

	if (!peer)
		return false;
	if (__sync_fetch_and_add(&peer->cookie, 0) != cookie)
		return false;
	copy = *(volatile struct peer *)peer;
	if (__sync_fetch_and_add(&peer->cookie, 0) != cookie)
		return false;
	if (addr_diff(&copy.backend, &req->addr) || copy.backend_port != req->port)
		return false;
	req->addr = copy.vip;
	req->port = copy.vip_port;
	return true;
}
