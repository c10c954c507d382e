// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The programs. Each turns its hook's context into a request, lets the headers
 * decide and writes the answer back.
 */
#include <linux/bpf.h>
#include <linux/in.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "iter.h"
#include "sock.h"
#include "tc.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const struct exported_types exported_types = {};

/* bpf_sock_addr.protocol of MPTCP; some hooks show the socket, some its subflow. */
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

/* From the C library's socket.h, which is not for this side. */
#define SOCK_DGRAM 2

static __always_inline bool is_tcp(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_MPTCP;
}

/* Raw sockets may name UDP as their protocol, too. */
static __always_inline bool is_udp(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_UDP && ctx->type == SOCK_DGRAM;
}

static __always_inline void request_from_v4(struct request *req, struct bpf_sock_addr *ctx)
{
	req->addr = addr_from_v4(ctx->user_ip4);
	req->port = (__be16)ctx->user_port;
	req->proto = is_tcp(ctx) ? IPPROTO_TCP : IPPROTO_UDP;
}

static __always_inline void request_from_v6(struct request *req, struct bpf_sock_addr *ctx)
{
	req->addr = addr_from_words(ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
				    ctx->user_ip6[3]);
	req->port = (__be16)ctx->user_port;
	req->proto = is_tcp(ctx) ? IPPROTO_TCP : IPPROTO_UDP;
}

/*
 * Without the barrier clang-19 keeps the address of a field that was read before
 * in a register, and Linux 6.18 says "dereference of modified ctx ptr".
 */
static __always_inline void request_to_v4(const struct request *req, struct bpf_sock_addr *ctx)
{
	barrier_var(ctx);
	ctx->user_ip4 = ((const __u32 *)req->addr.b)[3];
	ctx->user_port = req->port;
}

static __always_inline void request_to_v6(const struct request *req, struct bpf_sock_addr *ctx)
{
	const __u32 *w = (const __u32 *)req->addr.b;

	barrier_var(ctx);
	ctx->user_ip6[0] = w[0];
	ctx->user_ip6[1] = w[1];
	ctx->user_ip6[2] = w[2];
	ctx->user_ip6[3] = w[3];
	ctx->user_port = req->port;
}

/* What the socket is connected to; port 0 when it is not. */
static __always_inline void peer_from_v4(struct request *peer, struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return;
	peer->addr = addr_from_v4(sk->dst_ip4);
	peer->port = sk->dst_port;
}

static __always_inline void peer_from_v6(struct request *peer, struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return;
	peer->addr =
		addr_from_words(sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3]);
	peer->port = sk->dst_port;
}

static __always_inline bool is_connected(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk && sk->dst_port;
}

/*
 * UDP connect is never refused: resolvers connect UDP sockets only to learn
 * which source address they would use (RFC 6724), and an error would change the
 * order of the addresses they return.
 */
static __always_inline enum verdict sock_connect(struct bpf_sock_addr *ctx, enum sock_hook hook,
						 struct request *req)
{
	if (is_tcp(ctx))
		return tcp_connect(ctx, hook, req);
	return udp_connect(ctx, hook, req) == VERDICT_TRANSLATE ? VERDICT_TRANSLATE
								: VERDICT_PASS;
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	struct request req = {};
	enum verdict verdict;

	if (!is_tcp(ctx) && !is_udp(ctx))
		return SOCK_PROCEED;
	request_from_v4(&req, ctx);
	verdict = sock_connect(ctx, HOOK_CONNECT4, &req);
	if (verdict == VERDICT_TRANSLATE)
		request_to_v4(&req, ctx);
	return sock_result(verdict);
}

SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	struct request req = {};
	enum verdict verdict;

	if (!is_tcp(ctx) && !is_udp(ctx))
		return SOCK_PROCEED;
	request_from_v6(&req, ctx);
	verdict = sock_connect(ctx, HOOK_CONNECT6, &req);
	if (verdict == VERDICT_TRANSLATE)
		request_to_v6(&req, ctx);
	return sock_result(verdict);
}

SEC("cgroup/sendmsg4")
int sock_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct request req = {}, peer = {};
	enum verdict verdict;

	if (!is_udp(ctx))
		return SOCK_PROCEED;
	request_from_v4(&req, ctx);
	peer_from_v4(&peer, ctx);
	verdict = udp_send(ctx, HOOK_SENDMSG4, &req, &peer);
	if (verdict == VERDICT_TRANSLATE)
		request_to_v4(&req, ctx);
	return sock_result(verdict);
}

SEC("cgroup/sendmsg6")
int sock_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct request req = {}, peer = {};
	enum verdict verdict;

	if (!is_udp(ctx))
		return SOCK_PROCEED;
	request_from_v6(&req, ctx);
	peer_from_v6(&peer, ctx);
	verdict = udp_send(ctx, HOOK_SENDMSG6, &req, &peer);
	if (verdict == VERDICT_TRANSLATE)
		request_to_v6(&req, ctx);
	return sock_result(verdict);
}

SEC("cgroup/recvmsg4")
int sock_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct request req = {};

	request_from_v4(&req, ctx);
	if (udp_answer(ctx, &req, is_connected(ctx)))
		request_to_v4(&req, ctx);
	return SOCK_PROCEED;
}

SEC("cgroup/recvmsg6")
int sock_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct request req = {};

	request_from_v6(&req, ctx);
	if (udp_answer(ctx, &req, is_connected(ctx)))
		request_to_v6(&req, ctx);
	return SOCK_PROCEED;
}

static __always_inline bool sock_peername(struct bpf_sock_addr *ctx, struct request *req)
{
	if (is_tcp(ctx))
		return peer_recall(bpf_get_socket_cookie(ctx), req);
	return is_udp(ctx) && udp_answer(ctx, req, true);
}

SEC("cgroup/getpeername4")
int sock_getpeername4(struct bpf_sock_addr *ctx)
{
	struct request req = {};

	request_from_v4(&req, ctx);
	if (sock_peername(ctx, &req))
		request_to_v4(&req, ctx);
	return SOCK_PROCEED;
}

SEC("cgroup/getpeername6")
int sock_getpeername6(struct bpf_sock_addr *ctx)
{
	struct request req = {};

	request_from_v6(&req, ctx);
	if (sock_peername(ctx, &req))
		request_to_v6(&req, ctx);
	return SOCK_PROCEED;
}

/* Walks the storage of all UDP sockets in all network namespaces. */
SEC("iter/bpf_sk_storage_map")
int iter_origins(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct origin_record rec = {};
	struct origin *origin = ctx->value;
	struct sock *sk = ctx->sk;

	if (!sk || !origin)
		return 0;
	origin_record_fill(&rec, sk, origin);
	bpf_seq_write(ctx->meta->seq, &rec, sizeof(rec));
	return 0;
}

/* Walks the UDP sockets of the network namespace of the thread that opens it. */
SEC("iter/udp")
int iter_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *udp_sk = ctx->udp_sk;
	struct udp_record rec = {};
	struct origin *origin;

	if (!udp_sk)
		return 0;
	if (!udp_record_fill(&rec, (struct sock_common *)udp_sk))
		return 0;
	origin = bpf_sk_storage_get(&origins, udp_sk, NULL, 0);
	if (udp_backend_gone(origin, &rec))
		rec.reason = UDP_BACKEND_GONE;
	else if (udp_backend_came((struct sock *)udp_sk, &rec))
		rec.reason = UDP_BACKEND_CAME;
	else
		return 0;

	/* A socket that no program has asked for its cookie has none so far, and
	 * sock_diag takes that for another one's.
	 */
	rec.cookie = bpf_get_socket_cookie(udp_sk);
	if (bpf_sock_destroy)
		rec.destroyed = !bpf_sock_destroy((struct sock_common *)udp_sk);
	bpf_seq_write(ctx->meta->seq, &rec, sizeof(rec));
	return 0;
}

/* The packet path, on devices with an Ethernet header and on those without. */
SEC("tc")
int tc_ingress(struct __sk_buff *ctx)
{
	return tc_program(ctx, PACKET_L2);
}

SEC("tc")
int tc_egress(struct __sk_buff *ctx)
{
	return tc_program(ctx, PACKET_L2 | PACKET_EGRESS);
}

SEC("tc")
int tc_ingress_l3(struct __sk_buff *ctx)
{
	return tc_program(ctx, 0);
}

SEC("tc")
int tc_egress_l3(struct __sk_buff *ctx)
{
	return tc_program(ctx, PACKET_EGRESS);
}
