/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The socket path: what happens at connect(), sendto(), recvfrom() and
 * getpeername(). The programs in datapath.bpf.c only convert.
 */
#pragma once

#include <linux/errno.h>

#include "origins.h"
#include "peers.h"

/* What a cgroup/sock_addr program returns; with a retval of our own set, the
 * system call fails with that instead of EPERM (Linux 5.18).
 */
#define SOCK_REJECT 0
#define SOCK_PROCEED 1

static __always_inline int sock_refuse(void)
{
	bpf_set_retval(-ECONNREFUSED);
	return SOCK_REJECT;
}

/* TCP connect. On VERDICT_TRANSLATE the request holds the backend. */
static __always_inline enum verdict tcp_connect(struct bpf_sock_addr *ctx, struct request *req)
{
	struct choice choice = {};
	struct target target = {};
	enum verdict verdict;

	verdict = lb_find(req, &target);
	if (verdict == VERDICT_TRANSLATE) {
		if (lb_backend(&target, lb_pick(&target), &choice)) {
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
static __always_inline enum verdict udp_connect(struct bpf_sock_addr *ctx, struct request *req)
{
	struct origin_entry entry = {};
	struct target target = {};
	struct choice choice = {};
	enum verdict verdict;
	struct origin *origin;

	origin = ctx->sk ? bpf_sk_storage_get(&origins, ctx->sk, NULL, 0) : NULL;
	verdict = lb_find(req, &target);
	if (verdict == VERDICT_TRANSLATE && !lb_backend(&target, lb_pick(&target), &choice))
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

/*
 * A datagram with an address of its own. peer is what the socket is connected
 * to, its port 0 when it is not.
 */
static __always_inline enum verdict udp_send(struct bpf_sock_addr *ctx, struct request *req,
					     const struct request *peer)
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
	verdict = lb_find(req, &target);
	if (verdict != VERDICT_TRANSLATE && verdict != VERDICT_NO_BACKEND) {
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
	if (verdict == VERDICT_TRANSLATE && !origin_choose(origin, req, &target, &choice))
		verdict = VERDICT_NO_BACKEND;
	count(COUNTER_SEND_UDP_PASS + verdict);
	if (verdict != VERDICT_TRANSLATE)
		return verdict;

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
