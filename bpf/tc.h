/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The packet path: what happens to a packet that comes in by a device of the node or
 * leaves by it. All rewriting is done at the client's edge: a request's destination
 * when it comes in there, an answer's source when it leaves there. What is in between,
 * the node's stack and its connection tracking above all, sees a plain flow from the
 * client to the backend, in both directions or, where it would see but one of them, in
 * none.
 */
#pragma once

#include <linux/pkt_cls.h>

#include "begin.h"
#include "icmp.h"
#include "nat.h"
#include "reject.h"

/* What a program returns for a packet that goes on; other people's programs come
 * next. TCX_NEXT is the same number.
 */
#define TC_NEXT TC_ACT_UNSPEC

#define PACKET_OTHERHOST 3 /* of ctx->pkt_type */

/*
 * What is to be done next with a packet, where that is not an action of tc. The
 * programs go from step to step, each a function of its own that the verifier follows
 * once, and that finds the packet where the first one has left it.
 */
enum step {
	STEP_FLOW = 256, /* translate it, if a flow knows it */
	STEP_NEW,	 /* none does: decide about it */
	STEP_BEGIN,	 /* make the flow */
	STEP_REFUSE,	 /* answer it ourselves */
	STEP_TTL,
	STEP_TOO_BIG, /* work->mtu is what fits */
};

static __always_inline int tc_drop(enum counter reason)
{
	count(reason);
	return TC_ACT_SHOT;
}

/* Writes the flow's ends into a packet. */
__noinline int packet_rewrite(struct __sk_buff *ctx, struct flow *flow, int hop)
{
	struct work *w = work_get();

	if (!w || !flow)
		return -1;
	return nat_rewrite(ctx, &w->packet, flow, !!hop, &w->change);
}

/* Writes the flow's ends into the packet, with hop one hop further on, as it goes
 * around the node's stack. Not 0 when that cannot be done.
 */
static __always_inline int tc_rewrite(struct __sk_buff *ctx, struct packet *p,
				      struct flow *flow, bool hop)
{
	if (p->flags & PACKET_ERROR) {
		count(COUNTER_FLOW_ERROR);
		return hop && nat_hop(ctx, p) ? -1 : icmp_rewrite(ctx, p, flow);
	}
	count(flow->flags & FLOW_ANSWER ? COUNTER_FLOW_ANSWER : COUNTER_FLOW_REQUEST);
	return packet_rewrite(ctx, flow, hop);
}

/* A request that goes around the stack. */
static __always_inline int tc_redirect_request(struct __sk_buff *ctx, struct work *w,
					       struct flow *flow)
{
	struct packet *p = &w->packet;
	bool hop = !(p->flags & PACKET_LOCAL);

	if (hop && p->ttl <= 1)
		return STEP_TTL;
	switch (route_find(ctx, p, flow, route_device(p), packet_length(ctx, p), 0, &w->fib)) {
	case ROUTE_OUT:
		break;
	case ROUTE_TOO_BIG:
		w->mtu = w->fib.mtu_result;
		return STEP_TOO_BIG;
	default:
		return tc_drop(COUNTER_DROP_NO_ROUTE);
	}
	if (tc_rewrite(ctx, p, flow, hop))
		return tc_drop(COUNTER_DROP_MALFORMED);
	return route_send(ctx, p, &w->fib);
}

/* An answer that goes around the stack. */
static __always_inline int tc_redirect_answer(struct __sk_buff *ctx, struct work *w,
					      struct flow *flow)
{
	struct packet *p = &w->packet;
	__u32 length;

	if (p->ttl <= 1)
		return STEP_TTL;
	length = packet_length(ctx, p);
	w->mtu = length;
	/* It lets pass what is still to be cut into pieces, however long these are. */
	if (bpf_check_mtu(ctx, flow->ifindex, &w->mtu, 0, 0) >= 0 && length > w->mtu)
		return STEP_TOO_BIG;
	if (tc_rewrite(ctx, p, flow, true))
		return tc_drop(COUNTER_DROP_MALFORMED);
	return route_answer(ctx, p, flow);
}

/*
 * An answer that leaves by another uplink than the one its requests come in by. It
 * goes out of that one: others on the way may know no other path.
 */
static __always_inline bool tc_is_astray(const struct packet *p, struct flow *flow)
{
	struct device *device;

	if (flow->ifindex == p->ifindex)
		return false;
	device = device_find(flow->ifindex);
	if (!device || device_is_pod(device))
		return false;
	device = device_find(p->ifindex);
	return device && !device_is_pod(device);
}

/* Is the packet for this node at all? A device that is a port sees what its bridge
 * only passes on, one that listens to everything what others are sent.
 */
static __always_inline bool tc_is_for_us(struct __sk_buff *ctx, const struct packet *p)
{
	struct device *device;
	__u8 dest[ETH_ALEN];

	if (p->flags & PACKET_EGRESS || ctx->pkt_type != PACKET_OTHERHOST)
		return true;
	device = device_find(p->ifindex);
	if (!device || !(p->flags & PACKET_L2) ||
	    bpf_skb_load_bytes(ctx, 0, dest, sizeof(dest)))
		return false;
	return !__builtin_memcmp(dest, device->mac, sizeof(dest));
}

/* A packet on its way to the backend. */
static __always_inline int tc_request(struct __sk_buff *ctx, struct work *w, struct flow *flow)
{
	struct packet *p = &w->packet;

	/* A process of the node is met on its way out, all others on their way in. */
	if (!(p->flags & PACKET_EGRESS) != !(flow->flags & FLOW_NODE))
		return TC_NEXT;
	if (!tc_is_for_us(ctx, p))
		return TC_NEXT;
	if (flow->flags & FLOW_REDIRECT)
		return tc_redirect_request(ctx, w, flow);
	return tc_rewrite(ctx, p, flow, false) ? tc_drop(COUNTER_DROP_MALFORMED) : TC_NEXT;
}

/* A packet on its way to the client. */
static __always_inline int tc_answer(struct __sk_buff *ctx, struct work *w, struct flow *flow)
{
	struct packet *p = &w->packet;
	bool astray;

	if (!(p->flags & PACKET_EGRESS)) {
		if (flow->flags & FLOW_NODE)
			return tc_rewrite(ctx, p, flow, false) ? tc_drop(COUNTER_DROP_MALFORMED)
							       : route_deliver(ctx, p, flow);
		return flow->flags & FLOW_REDIRECT ? tc_redirect_answer(ctx, w, flow) : TC_NEXT;
	}
	if (flow->flags & FLOW_NODE)
		return TC_NEXT;
	astray = tc_is_astray(p, flow);
	if (tc_rewrite(ctx, p, flow, false))
		return tc_drop(COUNTER_DROP_MALFORMED);
	return astray ? route_answer(ctx, p, flow) : TC_NEXT;
}

static __always_inline bool is_cluster_source(const struct addr *addr)
{
	struct cidr_key key;

	key.prefixlen = ADDR_BITS;
	key.addr = *addr;
	return bpf_map_lookup_elem(&cluster_cidrs, &key) != NULL;
}

/* May the client use the frontend? */
static __always_inline bool tc_is_allowed(const struct packet *p, const struct target *target)
{
	if (!target_restricted(target))
		return true;
	if (p->flags & PACKET_LOCAL && target->options & OPTION_NODE_ALLOWED)
		return true;
	return lb_is_source(target->service_id, &p->key.src);
}

/* What holds for a packet of a protocol without ports. */
static __always_inline enum verdict tc_address(const struct packet *p)
{
	struct addr dst = p->key.dst;
	__u8 *node_address;

	node_address = bpf_map_lookup_elem(&node_addresses, &dst);
	return lb_address(&dst, node_address ? *node_address : 0);
}

/* Decides about a packet that no flow knows. */
static __always_inline enum verdict tc_find(struct __sk_buff *ctx, struct work *w)
{
	struct packet *p = &w->packet;
	struct request req = {};
	enum verdict verdict;

	if (!has_ports(p->proto))
		return tc_address(p);
	req.addr = p->key.dst;
	req.port = p->key.dport;
	req.proto = p->proto;
	req.outside = !w->inside;
	verdict = lb_find(&req, &w->target);
	if (w->target.loopback)
		return VERDICT_PASS; /* of the node's own sockets */
	if (!tc_is_allowed(p, &w->target))
		return VERDICT_DENIED;
	if (w->target.kind && conntrack_serves(ctx, p, w->target.service_id))
		return VERDICT_PASS;
	return verdict;
}

/* Does the way to the sender lead to the device that the packet came by? */
__noinline int source_is_behind(struct __sk_buff *ctx)
{
	struct work *w = work_get();

	if (!w)
		return 0;
	w->request.src = w->packet.key.dst;
	w->request.dst = w->packet.key.src;
	w->request.sport = w->packet.key.dport;
	w->request.dport = w->packet.key.sport;
	return route_find(ctx, &w->packet, &w->request, w->l3_ifindex, 1, 0, &w->fib) ==
		       ROUTE_OUT &&
	       w->fib.ifindex == w->l3_ifindex;
}

/* What the stack takes from no device: it is nobody's address, or the node's own. */
static __always_inline bool tc_is_martian(const struct packet *p)
{
	struct addr src = p->key.src;

	if (p->flags & PACKET_LOCAL)
		return false;
	return !addr_is_unicast(&src) || addr_is_loopback(&src) ||
	       bpf_map_lookup_elem(&node_addresses, &src);
}

/* Decides about a packet that belongs to no flow and may begin one. */
__noinline int packet_new(struct __sk_buff *ctx)
{
	struct work *w = work_get();
	enum verdict verdict;
	struct device *device;
	struct packet *p;

	if (!w)
		return TC_NEXT;
	p = &w->packet;
	if ((p->flags & (PACKET_EGRESS | PACKET_LOCAL)) == PACKET_EGRESS)
		return TC_NEXT;
	device = device_find(p->ifindex);
	if (!tc_is_for_us(ctx, p))
		return TC_NEXT;
	w->l3_ifindex = device ? device->l3_ifindex : p->ifindex;
	w->inside = p->flags & PACKET_LOCAL || device_is_pod(device) ||
		    is_cluster_source(&p->key.src);
	__builtin_memset(&w->target, 0, sizeof(w->target));
	verdict = tc_find(ctx, w);
	count(COUNTER_PACKET_PASS + verdict);
	switch (verdict) {
	case VERDICT_PASS:
		return TC_NEXT;
	case VERDICT_TRANSLATE:
		if (tc_is_martian(p))
			return TC_NEXT;
		w->behind = device_is_pod(device) && source_is_behind(ctx);
		return STEP_BEGIN;
	case VERDICT_NO_BACKEND:
	case VERDICT_NO_PORT:
		return STEP_REFUSE;
	default:
		return TC_ACT_SHOT;
	}
}

/* A fragment whose first one has not come, or belongs to nobody. It is of no use to a
 * service address, and others' are let alone.
 */
static __always_inline int tc_fragment(const struct packet *p)
{
	struct frontend *frontend;
	struct frontend_key key;

	frontend_key_fill(&key, &p->key.dst, 0, 0);
	frontend = bpf_map_lookup_elem(&frontends, &key);
	if (!frontend || frontend->kind == FRONTEND_FOREIGN)
		return TC_NEXT;
	return tc_drop(COUNTER_DROP_FRAGMENT);
}

/*
 * Is the request from somebody else who has the client's address? One outside may come by
 * another uplink; a pod has one link for as long as it lives, and nobody else speaks for
 * it. Who is the right one the route back says.
 */
static __always_inline bool tc_is_elsewhere(const struct packet *p, const struct flow *flow)
{
	if (p->ifindex == flow->ifindex || flow->flags & (FLOW_NODE | FLOW_ANSWER) ||
	    p->flags & PACKET_ERROR)
		return false;
	return device_is_pod(device_find(p->ifindex)) ||
	       device_is_pod(device_find(flow->ifindex));
}

/* Is the flow over for the packet, so that it begins anew? */
static __always_inline bool tc_is_over(const struct packet *p, const struct flow *flow)
{
	if (p->flags & PACKET_ERROR || flow->flags & FLOW_ANSWER)
		return false;
	if (p->proto != IPPROTO_UDP)
		return packet_begins(p) && flow_closed(flow);
	if (flow_serves(flow))
		return false;
	count(COUNTER_FLOW_MOVED);
	return true;
}

/* What a packet without a flow may do. */
static __always_inline int tc_without(const struct packet *p)
{
	if (p->flags & PACKET_ERROR)
		return TC_NEXT;
	if (p->flags & PACKET_LATER_FRAGMENT)
		return tc_fragment(p);
	return packet_begins(p) ? STEP_NEW : TC_NEXT;
}

/* Translates a packet that a flow knows. */
__noinline int packet_flow(struct __sk_buff *ctx)
{
	struct work *w = work_get();
	struct flow *flow = NULL;
	struct packet *p;

	if (!w)
		return TC_NEXT;
	p = &w->packet;
	if (has_ports(p->key.proto))
		flow = flow_find(&p->key);
	if (!flow)
		return tc_without(p);
	if (tc_is_elsewhere(p, flow)) {
		w->l3_ifindex = route_device(p);
		if (!source_is_behind(ctx))
			return tc_drop(COUNTER_DROP_SOURCE);
		flow_forget(&p->key, flow);
		return tc_without(p);
	}
	if (tc_is_over(p, flow)) {
		flow_forget(&p->key, flow);
		return tc_without(p);
	}
	if (!(p->flags & PACKET_ERROR) && !flow_touch(ctx, p, flow, &w->answer))
		return tc_without(p);
	if (p->flags & PACKET_FIRST_FRAGMENT)
		fragment_remember(p);
	return flow->flags & FLOW_ANSWER ? tc_answer(ctx, w, flow) : tc_request(ctx, w, flow);
}

/* Reads what the gate has let through. What cannot be read is not ours to judge. */
__noinline int packet_read(struct __sk_buff *ctx, int how)
{
	struct work *w = work_get();
	struct packet *p;

	if (!w)
		return TC_NEXT;
	p = &w->packet;
	__builtin_memset(p, 0, sizeof(*p));
	p->flags = how & (PACKET_L2 | PACKET_EGRESS | PACKET_LOCAL);
	p->l3 = how & PACKET_L2 ? ETH_HLEN : 0;
	p->ifindex = ctx->ifindex;
	/* The clock's last tick is near enough, and at hand. */
	p->now_sec = bpf_ktime_get_coarse_ns() / NSEC_PER_SEC;
	if (packet_parse(ctx, p) != PARSED)
		return TC_NEXT;
	if (p->flags & PACKET_LATER_FRAGMENT && !fragment_recall(p))
		return tc_fragment(p);
	if (p->flags & PACKET_ERROR && icmp_inner(ctx, p))
		return TC_NEXT;
	return STEP_FLOW;
}

/* What becomes of a flow that could not begin. */
static __always_inline int begin_failed(int begin)
{
	switch (begin) {
	case BEGIN_CONFLICT:
		return tc_drop(COUNTER_DROP_CONFLICT);
	case BEGIN_EXHAUSTED:
		return tc_drop(COUNTER_DROP_SNAT_EXHAUSTED);
	case BEGIN_FULL:
		return tc_drop(COUNTER_DROP_FLOWS_FULL);
	case BEGIN_SPOOFED:
		return tc_drop(COUNTER_DROP_SOURCE);
	default:
		return tc_drop(COUNTER_DROP_NO_ROUTE);
	}
}

static __always_inline int tc_reply(struct __sk_buff *ctx, int step)
{
	struct work *w = work_get();

	if (!w)
		return TC_ACT_SHOT;
	switch (step) {
	case STEP_REFUSE:
		return reply(ctx, &w->packet, REPLY_REFUSED, 0);
	case STEP_TTL:
		count(COUNTER_DROP_TTL);
		return reply(ctx, &w->packet, REPLY_TTL, 0);
	case STEP_TOO_BIG:
		count(COUNTER_DROP_TOO_BIG);
		return reply(ctx, &w->packet, REPLY_TOO_BIG, w->mtu);
	default: /* a flow that somebody else ended at once */
		return tc_drop(COUNTER_DROP_FLOWS_FULL);
	}
}

/* how is PACKET_L2 and PACKET_EGRESS. */
static __always_inline int tc_program(struct __sk_buff *ctx, __u32 how)
{
	int step, begin;

	if (!gate_open(ctx, how))
		return TC_NEXT;
	if (how & PACKET_EGRESS && !ctx->ingress_ifindex)
		how |= PACKET_LOCAL;
	step = packet_read(ctx, how);
	if (step == STEP_FLOW)
		step = packet_flow(ctx);
	if (step == STEP_NEW)
		step = packet_new(ctx);
	if (step == STEP_BEGIN) {
		begin = flow_begin(ctx);
		if (begin != BEGIN_DONE)
			return begin_failed(begin);
		step = packet_flow(ctx);
	}
	return step < STEP_FLOW ? step : tc_reply(ctx, step);
}
