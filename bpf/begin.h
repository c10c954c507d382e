/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How a flow begins: a backend is chosen as for a socket, the way to it says whether
 * the answers come back through this node's stack, and two entries are made.
 *
 * The functions that the verifier is to follow once, not once for each caller, are
 * global ones, and find what they work on by themselves: before Linux 6.2 memory that
 * is handed to such a function cannot be the key of a map.
 */
#pragma once

#include "affinity.h"
#include "conntrack.h"
#include "nat.h"
#include "route.h"

/* What is too much for the stack. No program interrupts another one here. */
struct work {
	struct packet packet;
	struct target target;
	struct choice choice;
	struct flow request; /* the new flow's entries */
	struct flow answer;
	struct flow_key answer_key;
	struct bpf_fib_lookup fib;
	struct change change; /* to the headers */
	__u32 l3_ifindex;     /* of the device the packet came by, or goes by */
	__u32 inside;	      /* 1: the client is on this node */
	__u32 behind;	      /* 1: the way to the client leads to that device */
	__u32 mtu;	      /* of the way that a packet is too big for */
};

/* No type: what is in there is nobody else's. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct work));
} work SEC(".maps");

static __always_inline struct work *work_get(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&work, &key);
}

/* How the beginning ends. */
enum begin {
	BEGIN_DONE,
	BEGIN_CONFLICT,	 /* another flow has the tuple */
	BEGIN_EXHAUSTED, /* all source ports that were tried are taken */
	BEGIN_FULL,	 /* the map takes no more */
	BEGIN_NO_ROUTE,	 /* the node does not forward there */
	BEGIN_SPOOFED,	 /* the client is not where it says it is */
};

/* Two backends to choose from conflict rarely, so more than a few tries mean that
 * there is but one.
 */
#define BACKEND_TRIES 4
#define SNAT_TRIES 32

static __always_inline bool flow_same(const struct flow *a, const struct flow *b)
{
	return !(addr_diff(&a->src, &b->src) | addr_diff(&a->dst, &b->dst)) &&
	       a->sport == b->sport && a->dport == b->dport;
}

/* Makes the entry of the answers, unless the tuple is another live flow's. */
static __always_inline enum begin answer_insert(struct work *w)
{
	struct flow *taken;

	flow_partner(&w->request, w->packet.key.proto, &w->answer_key);
	flow_mirror(&w->request, &w->packet.key, &w->answer);
	if (!bpf_map_update_elem(&flows, &w->answer_key, &w->answer, BPF_NOEXIST))
		return BEGIN_DONE;
	taken = flow_find(&w->answer_key);
	if (!taken)
		return BEGIN_FULL;
	if (!flow_same(taken, &w->answer) &&
	    !flow_over(taken, w->packet.key.proto, w->packet.now_sec))
		return BEGIN_CONFLICT;
	flow_forget(&w->answer_key, taken);
	return bpf_map_update_elem(&flows, &w->answer_key, &w->answer, BPF_NOEXIST)
		       ? BEGIN_CONFLICT
		       : BEGIN_DONE;
}

/* Would the answers be a local socket's? */
static __always_inline bool socket_has(struct __sk_buff *ctx, __u8 proto,
				       struct bpf_sock_tuple *tuple, __u32 size)
{
	struct bpf_sock *sk = NULL;

	if (proto == IPPROTO_TCP)
		sk = bpf_skc_lookup_tcp(ctx, tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (proto == IPPROTO_UDP)
		sk = bpf_sk_lookup_udp(ctx, tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* ... or another's, who goes by the node's address by the kernel's own NAT? */
static __always_inline bool conntrack_has(struct __sk_buff *ctx, __u8 proto,
					  struct bpf_sock_tuple *tuple, __u32 size)
{
	struct nf_conn *ct = conntrack_find(ctx, proto, tuple, size);

	if (!ct)
		return false;
	bpf_ct_release(ct);
	return true;
}

static __always_inline bool source_is_taken(struct __sk_buff *ctx, const struct packet *p,
					    const struct flow *flow)
{
	struct bpf_sock_tuple tuple = {};
	__u8 proto = p->key.proto;

	/* Of the answers. Each with a size that the verifier knows. */
	tuple_fill(&tuple, packet_is_v6(p), &flow->dst, flow->dport, &flow->src, flow->sport);
	if (packet_is_v6(p))
		return socket_has(ctx, proto, &tuple, sizeof(tuple.ipv6)) ||
		       conntrack_has(ctx, proto, &tuple, sizeof(tuple.ipv6));
	return socket_has(ctx, proto, &tuple, sizeof(tuple.ipv4)) ||
	       conntrack_has(ctx, proto, &tuple, sizeof(tuple.ipv4));
}

/* Tries one source port. The entry of the answers is what reserves it. */
__noinline int snat_try(struct __sk_buff *ctx)
{
	struct work *w = work_get();

	if (!w)
		return BEGIN_FULL;
	if (source_is_taken(ctx, &w->packet, &w->request))
		return BEGIN_CONFLICT;
	return answer_insert(w);
}

/* Gives the new flow a source port of the node's: the first free one from a random
 * one on.
 */
__noinline int snat_begin(struct __sk_buff *ctx)
{
	struct work *w = work_get();
	__u32 ports, place, i;
	int begin;

	if (!w || snat_port_first > snat_port_last)
		return BEGIN_EXHAUSTED;
	ports = snat_port_last - snat_port_first + 1;
	place = ((__u64)bpf_get_prandom_u32() * ports) >> 32;
#pragma clang loop unroll(disable)
	for (i = 0; i < SNAT_TRIES; i++) {
		w->request.sport = bpf_htons(snat_port_first + place);
		if (++place >= ports)
			place = 0;
		begin = snat_try(ctx);
		if (begin == BEGIN_DONE)
			count(COUNTER_SNAT_NEW);
		if (begin != BEGIN_CONFLICT)
			return begin;
		count(COUNTER_SNAT_COLLISION);
	}
	return BEGIN_EXHAUSTED;
}

/* The node's address on the way to the backend. What the route does not tell, the
 * device does.
 */
static __always_inline bool snat_source(struct work *w, const struct device *out,
					struct addr *source)
{
	if (packet_is_v6(&w->packet))
		__builtin_memcpy(source, w->fib.ipv6_src, sizeof(*source));
	else
		*source = addr_from_v4(w->fib.ipv4_src);
	if (!addr_diff(source, &w->request.src) && !(w->packet.flags & PACKET_LOCAL)) {
		if (!out)
			return false;
		*source = packet_is_v6(&w->packet) ? out->source6 : out->source4;
	}
	return addr_is_set(source);
}

/*
 * Does the client have to be hidden from the backend? When the answer would not come
 * back through this node: neither the client nor the backend is on it. When the
 * client is the backend. And where a process of this node, which has chosen its
 * address on the way to the VIP, would not be answered on the way to the backend.
 */
static __always_inline bool needs_snat(const struct work *w, bool in_pod, bool out_pod,
				       bool have_source, const struct addr *source)
{
	if (!addr_diff(&w->request.src, &w->request.dst))
		return true;
	if (out_pod)
		return false;
	if (w->packet.flags & PACKET_LOCAL)
		return have_source && addr_diff(source, &w->request.src);
	/* The backend is here, whatever device it is behind. */
	if (w->target.side == SIDE_OUTSIDE && w->target.options & OPTION_OUTSIDE_LOCAL)
		return false;
	return !in_pod;
}

/* Begins a flow with the chosen backend. hide asks for a source port that is free, since
 * the client's is not.
 */
__noinline int flow_begin_with(struct __sk_buff *ctx, int hide)
{
	struct device *in, *out = NULL;
	struct addr source = {};
	bool local, have_source;
	enum route route;
	struct work *w;
	struct flow *f;

	w = work_get();
	if (!w)
		return BEGIN_FULL;
	f = &w->request;
	f->src = w->packet.key.src;
	f->sport = w->packet.key.sport;
	f->dst = w->choice.addr;
	f->dport = w->choice.port;
	f->service_id = w->target.service_id;
	f->generation = w->target.generation;
	f->last_sec = w->packet.now_sec;
	f->state = 0;
	local = w->packet.flags & PACKET_LOCAL;
	f->flags = (local ? FLOW_NODE : 0) | (w->inside ? 0 : FLOW_OUTSIDE) |
		   (w->packet.flags & PACKET_L2 ? 0 : FLOW_NO_L2);
	f->ifindex = w->packet.ifindex;
	flow_locate(ctx, &w->packet, f);

	/* A length of 1 fits: how much does is asked for each packet. */
	route = route_find(ctx, &w->packet, f, w->l3_ifindex, 1, BPF_FIB_LOOKUP_SRC, &w->fib);
	if (route == ROUTE_HERE) {
		/* Out of its own stack no packet gets back in. */
		if (local)
			return BEGIN_NO_ROUTE;
		return hide ? snat_begin(ctx) : (int)answer_insert(w);
	}
	if (route != ROUTE_OUT)
		return BEGIN_NO_ROUTE;

	out = device_find(w->fib.ifindex);
	in = device_find(w->packet.ifindex);
	have_source = snat_source(w, out, &source);
	if (needs_snat(w, device_is_pod(in), device_is_pod(out), have_source, &source)) {
		if (!have_source)
			return BEGIN_NO_ROUTE;
		f->src = source;
		f->flags |= FLOW_SNAT | FLOW_REDIRECT;
	} else if (local || w->fib.ifindex == w->l3_ifindex) {
		f->flags |= FLOW_REDIRECT;
	}
	/* What is redirected passes no rp_filter, and a pod could begin flows in others'
	 * names.
	 */
	if (f->flags & FLOW_REDIRECT && device_is_pod(in) && !local && !w->behind)
		return BEGIN_SPOOFED;
	return hide || f->flags & FLOW_SNAT ? snat_begin(ctx) : (int)answer_insert(w);
}

/* The entry of the requests, when that of the answers is there. */
static __always_inline enum begin request_insert(struct work *w)
{
	struct flow *first;

	gate_set_flow(gate_end(gate_addr(&w->packet.key.dst), w->packet.key.dport));
	/* The answers': a client is known by its address, the node by its ports. */
	if (w->request.flags & FLOW_SNAT)
		gate_set_flow(gate_end(gate_addr(&w->request.src), w->request.sport));
	else
		gate_set_flow(gate_any_port(gate_addr(&w->packet.key.src)));
	if (!bpf_map_update_elem(&flows, &w->packet.key, &w->request, BPF_NOEXIST))
		return BEGIN_DONE;
	/* Another processor has had a packet of the same flow at the same time. */
	first = flow_find(&w->packet.key);
	if (first && flow_same(first, &w->request))
		return BEGIN_DONE;
	bpf_map_delete_elem(&flows, &w->answer_key);
	return first ? BEGIN_DONE : BEGIN_FULL;
}

/* Makes the flow of a packet whose target is known. */
__noinline int flow_begin(struct __sk_buff *ctx)
{
	int i, tries = BACKEND_TRIES, begin = BEGIN_CONFLICT;
	struct work *w = work_get();
	bool local;

	if (!w)
		return BEGIN_FULL;
	local = w->packet.flags & PACKET_LOCAL;
	if (target_affinity(&w->target)) {
		tries = 1;
		if (!affinity_of_packet(&w->packet.key.src, local, &w->target,
					w->packet.now_sec, &w->choice))
			return BEGIN_NO_ROUTE;
	}
#pragma clang loop unroll(disable)
	for (i = 0; i < BACKEND_TRIES && i < tries; i++) {
		if (tries > 1 && !lb_backend(&w->target, lb_pick(&w->target), &w->choice))
			return BEGIN_NO_ROUTE;
		begin = flow_begin_with(ctx, 0);
		if (begin != BEGIN_CONFLICT)
			break;
		count(COUNTER_FLOW_CONFLICT);
	}
	if (begin == BEGIN_CONFLICT)
		begin = flow_begin_with(ctx, 1);
	return begin == BEGIN_DONE ? (int)request_insert(w) : begin;
}
