/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The socket path: what happens at connect(), sendto(), recvfrom() and
 * getpeername(). The programs in datapath.bpf.c only convert.
 */
#pragma once

#include <linux/errno.h>

#include "affinity.h"
#include "client.h"
#include "origins.h"
#include "peers.h"

/* What a cgroup/sock_addr program returns; with a retval of our own set, the
 * system call fails with that instead of EPERM (Linux 5.18).
 */
#define SOCK_REJECT 0
#define SOCK_PROCEED 1

/* What becomes of the system call. */
static __always_inline int sock_result(enum verdict verdict)
{
	switch (verdict) {
	case VERDICT_NO_BACKEND:
	case VERDICT_NO_PORT:
		bpf_set_retval(-ECONNREFUSED);
		return SOCK_REJECT;
	case VERDICT_NO_LOCAL:
	case VERDICT_DENIED:
	case VERDICT_NO_SERVICE:
		bpf_set_retval(-EHOSTUNREACH);
		return SOCK_REJECT;
	default:
		return SOCK_PROCEED;
	}
}

/* lb_find, for this client. */
static __always_inline enum verdict sock_find(struct bpf_sock_addr *ctx, enum sock_hook hook,
					      const struct request *req, struct target *target)
{
	enum verdict verdict = lb_find(req, target);

	if (target->loopback && !loopback_leads(ctx, hook, req))
		return VERDICT_PASS;
	return verdict;
}

/* What a verdict becomes for a new connection: not every client may use every
 * frontend, with or without backends.
 */
static __always_inline enum verdict sock_admit(struct bpf_sock_addr *ctx, enum sock_hook hook,
					       const struct request *req,
					       const struct target *target,
					       enum verdict verdict)
{
	if (target_restricted(target) && !client_allowed(ctx, hook, req, target))
		return VERDICT_DENIED;
	return verdict;
}

/* The backend of a service with an affinity. */
static __always_inline bool sock_affinity(struct bpf_sock_addr *ctx, enum sock_hook hook,
					  const struct request *req, struct target *target,
					  struct choice *choice)
{
	struct affinity_key key = {};
	enum affinity_state state;
	struct addr client = {};
	__u32 now = now_sec();

	key.netns = bpf_get_netns_cookie(ctx);
	key.service_id = target->service_id;
	state = affinity_recall(&key, target, now, choice);
	if (state == AFFINITY_KEPT)
		return true;
	/* The address by which the packet path knows this pod. Not one that the socket is
	 * bound to: anybody may bind to another's (IP_FREEBIND).
	 */
	if (client_pod_address(ctx, req, &client)) {
		if (state == AFFINITY_NONE &&
		    affinity_from_address(&key, &client, target, now, choice))
			return true;
		bpf_map_update_elem(&pods, &client, &key.netns, BPF_ANY);
	} else if (!client_bound(ctx, hook, &client)) {
		__builtin_memset(&client, 0, sizeof(client));
	}
	return affinity_settle(&key, state, &client, target, now, choice);
}

/* The backend of a new connection. */
static __always_inline bool sock_choose(struct bpf_sock_addr *ctx, enum sock_hook hook,
					const struct request *req, struct target *target,
					struct choice *choice)
{
	if (target_affinity(target))
		return sock_affinity(ctx, hook, req, target, choice);
	return lb_backend(target, lb_pick(target), choice);
}

/* TCP connect. On VERDICT_TRANSLATE the request holds the backend. */
static __always_inline enum verdict tcp_connect(struct bpf_sock_addr *ctx, enum sock_hook hook,
						struct request *req)
{
	struct choice choice = {};
	struct target target = {};
	enum verdict verdict;

	verdict = sock_find(ctx, hook, req, &target);
	verdict = sock_admit(ctx, hook, req, &target, verdict);
	if (verdict == VERDICT_TRANSLATE) {
		if (sock_choose(ctx, hook, req, &target, &choice)) {
			peer_remember(bpf_get_socket_cookie(ctx), req, &choice);
			req->addr = choice.addr;
			req->port = choice.port;
		} else {
			verdict = VERDICT_NO_BACKEND;
		}
	}
	count(COUNTER_CONNECT_TCP_PASS + verdict);
	return verdict;
}

/* UDP connect: a new choice each time, as for a new flow. */
static __always_inline enum verdict udp_connect(struct bpf_sock_addr *ctx, enum sock_hook hook,
						struct request *req)
{
	struct origin_entry entry = {};
	struct target target = {};
	struct choice choice = {};
	enum verdict verdict;
	struct origin *origin;

	origin = ctx->sk ? bpf_sk_storage_get(&origins, ctx->sk, NULL, 0) : NULL;
	verdict = sock_find(ctx, hook, req, &target);
	verdict = sock_admit(ctx, hook, req, &target, verdict);
	if (verdict == VERDICT_TRANSLATE && !sock_choose(ctx, hook, req, &target, &choice))
		verdict = VERDICT_NO_BACKEND;
	count(COUNTER_CONNECT_UDP_PASS + verdict);
	if (verdict != VERDICT_TRANSLATE) {
		if (origin)
			origin_connected_forget(origin, req);
		return verdict;
	}

	entry_fill(&entry, req, &target, &choice, now_sec());
	if (!origin && ctx->sk)
		origin = bpf_sk_storage_get(&origins, ctx->sk, NULL,
					    BPF_SK_STORAGE_GET_F_CREATE);
	if (origin)
		origin_connected_put(origin, &entry);
	else
		overflow_put(bpf_get_socket_cookie(ctx), &entry);
	req->addr = choice.addr;
	req->port = choice.port;
	return verdict;
}

/*
 * A datagram with an address of its own, on a socket that is connected: the
 * kernel gives it no answer but its peer's. So one for the VIP that the socket
 * is connected to goes to the peer as well. One for the peer itself is left
 * alone: an AF_INET6 socket comes here with each datagram to a mapped address.
 * VERDICT_NO_PORT stands for neither.
 */
static __always_inline enum verdict
udp_send_connected(struct bpf_sock_addr *ctx, struct request *req, const struct request *peer)
{
	struct origin_entry entry = {};
	struct origin *origin;

	if (!addr_diff(&req->addr, &peer->addr) && req->port == peer->port) {
		count(COUNTER_SEND_UDP_PASS);
		return VERDICT_PASS;
	}
	origin = ctx->sk ? bpf_sk_storage_get(&origins, ctx->sk, NULL, 0) : NULL;
	if (!origin || !origin_connected_find(origin, &peer->addr, peer->port, &entry) ||
	    entry_vip_diff(&entry, &req->addr, req->port))
		return VERDICT_NO_PORT;
	count(COUNTER_SEND_UDP_KEPT);
	req->addr = peer->addr;
	req->port = peer->port;
	return VERDICT_TRANSLATE;
}

/* The backend of a new flow of datagrams. An affinity comes before telling the
 * answers for two VIPs apart.
 */
static __always_inline bool udp_choose(struct bpf_sock_addr *ctx, enum sock_hook hook,
				       struct origin *origin, const struct request *req,
				       struct target *target, struct choice *choice)
{
	if (target_affinity(target))
		return sock_affinity(ctx, hook, req, target, choice);
	return origin_choose(origin, req, target, choice);
}

/*
 * A datagram with an address of its own. peer is what the socket is connected
 * to, its port 0 when it is not. A socket that has a backend for the VIP goes on
 * with it while it serves, whatever holds for new flows.
 */
static __always_inline enum verdict udp_send(struct bpf_sock_addr *ctx, enum sock_hook hook,
					     struct request *req, const struct request *peer)
{
	struct origin_entry found = {}, entry = {};
	struct target target = {};
	struct choice choice = {};
	enum verdict verdict;
	struct origin *origin;
	bool known;
	__u32 now;

	if (peer->port) {
		verdict = udp_send_connected(ctx, req, peer);
		if (verdict != VERDICT_NO_PORT)
			return verdict;
	}
	verdict = sock_find(ctx, hook, req, &target);
	if (verdict == VERDICT_PASS || !target.kind) {
		count(COUNTER_SEND_UDP_PASS + verdict);
		return verdict;
	}

	now = now_sec();
	origin = ctx->sk ? bpf_sk_storage_get(&origins, ctx->sk, NULL, 0) : NULL;
	known = origin_sent_find(origin, ctx, req, now, &found);
	if (known && origin_usable(&found, &target)) {
		count(COUNTER_SEND_UDP_KEPT);
		req->addr = found.backend;
		req->port = found.backend_port;
		return VERDICT_TRANSLATE;
	}
	verdict = sock_admit(ctx, hook, req, &target, verdict);
	if (verdict == VERDICT_TRANSLATE &&
	    !udp_choose(ctx, hook, origin, req, &target, &choice))
		verdict = VERDICT_NO_BACKEND;
	count(COUNTER_SEND_UDP_PASS + verdict);
	if (verdict != VERDICT_TRANSLATE)
		return verdict;

	/* Without an answer, a source that was only named proves nothing for the
	 * next datagram. An answer makes the entry a fresh one.
	 */
	if (target_restricted(&target) && client_unproven(ctx, hook))
		now -= udp_idle_sec + 1;
	entry_fill(&entry, req, &target, &choice, now);
	if (!origin && ctx->sk)
		origin = bpf_sk_storage_get(&origins, ctx->sk, NULL,
					    BPF_SK_STORAGE_GET_F_CREATE);
	if (!origin || !origin_sent_put(origin, &entry, known ? &found : NULL))
		overflow_put(bpf_get_socket_cookie(ctx), &entry);
	req->addr = entry.backend;
	req->port = entry.backend_port;
	return verdict;
}

/*
 * Whose address does the reader of a datagram see? On a connected socket only
 * its peer's can come in, and what it has sent elsewhere says nothing of that.
 */
static __always_inline bool udp_answer(struct bpf_sock_addr *ctx, struct request *req,
				       bool connected)
{
	struct origin *origin;

	origin = ctx->sk ? bpf_sk_storage_get(&origins, ctx->sk, NULL, 0) : NULL;
	if (!origin && !overflow_in_use())
		return false;
	return connected ? origin_peer(origin, ctx, req)
			 : origin_recall(origin, ctx, req, now_sec());
}
