/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The way to a backend, and packets that go around the node's stack on it.
 */
#pragma once

#include <linux/errno.h>

#include "flows.h"

/* The route's preferred source, too (Linux 6.7). */
#ifndef BPF_FIB_LOOKUP_SRC
#define BPF_FIB_LOOKUP_SRC (1U << 4)
#endif

/* From Linux 6.7's list of results. */
#define FIB_NO_SRC_ADDR 9

/* What a route lookup says. */
enum route {
	ROUTE_OUT,     /* by fib->ifindex, next hop in fib */
	ROUTE_HERE,    /* nowhere: the destination is the node's own, or unknown to it */
	ROUTE_TOO_BIG, /* fib->mtu_result is what fits */
	ROUTE_NONE,    /* the node does not forward there */
};

static __always_inline void fib_addr(__be32 *v4, __u32 *v6, const struct addr *addr, bool is_v6)
{
	const __u32 *w = (const __u32 *)addr->b;

	if (is_v6)
		__builtin_memcpy(v6, w, sizeof(*addr));
	else
		*v4 = w[3];
}

/*
 * Bytes that must fit through the device at once, from the IP header on; 0 when that is
 * not known. SCTP has cut its packets already, and says nothing about it (GSO_BY_FRAGS):
 * it finds a narrow way by what it sends again, alone.
 */
static __always_inline __u32 packet_length(struct __sk_buff *ctx, const struct packet *p)
{
	/* Not gso_segs: what comes from a virtual machine has none. */
	if (ctx->gso_size) {
		__u32 head = p->proto == IPPROTO_TCP ? p->code : sizeof(struct udphdr);

		if (p->proto == IPPROTO_SCTP)
			return 0;
		return ctx->gso_size + (p->l4 - p->l3) + head;
	}
	return p->end - p->l3;
}

static __always_inline void fib_fill(struct bpf_fib_lookup *fib, const struct packet *p,
				     const struct flow *flow, __u32 l3_ifindex, __u32 length)
{
	bool v6 = packet_is_v6(p);

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = v6 ? AF_INET6 : AF_INET;
	fib->l4_protocol = p->key.proto;
	fib->sport = flow->sport;
	fib->dport = flow->dport;
	fib->tot_len = length;
	fib->ifindex = l3_ifindex;
	fib_addr(&fib->ipv4_src, fib->ipv6_src, &flow->src, v6);
	fib_addr(&fib->ipv4_dst, fib->ipv6_dst, &flow->dst, v6);
}

/*
 * Looks up the way that a packet of the flow takes to its backend, as if it came in
 * by l3_ifindex. With length 0 the device is asked whether it fits. With
 * BPF_FIB_LOOKUP_SRC the source becomes the preferred one, if the kernel can tell.
 */
static __always_inline enum route route_find(struct __sk_buff *ctx, const struct packet *p,
					     const struct flow *flow, __u32 l3_ifindex,
					     __u32 length, __u32 flags,
					     struct bpf_fib_lookup *fib)
{
	long err;

	fib_fill(fib, p, flow, l3_ifindex, length);
	err = bpf_fib_lookup(ctx, fib, sizeof(*fib), flags);
	if (flags && (err == -EINVAL || err == FIB_NO_SRC_ADDR)) {
		fib_fill(fib, p, flow, l3_ifindex, length);
		err = bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
	}
	switch (err) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH: /* bpf_redirect_neigh asks for it */
		return ROUTE_OUT;
	case BPF_FIB_LKUP_RET_NOT_FWDED:
		return ROUTE_HERE;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return ROUTE_TOO_BIG;
	default:
		return ROUTE_NONE;
	}
}

/* A packet that came without an Ethernet header gets the place for one:
 * bpf_redirect_neigh starts from it.
 */
static __always_inline int route_make_l2(struct __sk_buff *ctx, struct packet *p)
{
	__be16 proto = ctx->protocol;

	if (p->flags & PACKET_L2)
		return 0;
	if (bpf_skb_change_head(ctx, ETH_HLEN, 0))
		return -1;
	p->flags |= PACKET_L2;
	return bpf_skb_store_bytes(ctx, offsetof(struct ethhdr, h_proto), &proto, sizeof(proto),
				   0);
}

/* Sends the packet to the route's next hop. */
static __always_inline int route_send(struct __sk_buff *ctx, struct packet *p,
				      const struct bpf_fib_lookup *fib)
{
	struct bpf_redir_neigh nh = {};

	if (route_make_l2(ctx, p)) {
		count(COUNTER_DROP_MALFORMED);
		return TC_ACT_SHOT;
	}
	nh.nh_family = fib->family;
	__builtin_memcpy(nh.ipv6_nh, fib->ipv6_dst, sizeof(nh.ipv6_nh));
	count(COUNTER_FLOW_REDIRECT);
	return bpf_redirect_neigh(fib->ifindex, &nh, sizeof(nh), 0);
}

_Static_assert(offsetof(struct flow, node_mac) == offsetof(struct flow, client_mac) + ETH_ALEN,
	       "as in an Ethernet header");

/* Sends an answer out of the client's device, to where its requests come from. */
static __always_inline int route_answer(struct __sk_buff *ctx, struct packet *p,
					const struct flow *flow)
{
	if (!(flow->flags & FLOW_NO_L2)) {
		if (route_make_l2(ctx, p) ||
		    bpf_skb_store_bytes(ctx, 0, flow->client_mac, 2 * ETH_ALEN, 0)) {
			count(COUNTER_DROP_MALFORMED);
			return TC_ACT_SHOT;
		}
	}
	count(COUNTER_FLOW_REDIRECT);
	return bpf_redirect(flow->ifindex, 0);
}

/* The index that routes know the packet's device by. */
static __always_inline __u32 route_device(const struct packet *p)
{
	struct device *device = device_find(p->ifindex);

	return device ? device->l3_ifindex : p->ifindex;
}

/*
 * Hands an answer for a process of the node to the stack, as if it had come in by the
 * device that the request went out of: there the way to the VIP leads, and a strict
 * rp_filter asks for that.
 */
static __always_inline int route_deliver(struct __sk_buff *ctx, struct packet *p,
					 const struct flow *flow)
{
	__u32 ifindex = flow->ifindex;
	struct device *device = device_find(ifindex);
	__u8 none[ETH_ALEN] = {};

	if (!device || device->l3_ifindex == route_device(p))
		return TC_ACT_UNSPEC;
	/* What is for another's Ethernet address the kernel drops. */
	if (__builtin_memcmp(device->mac, none, ETH_ALEN) &&
	    (route_make_l2(ctx, p) || bpf_skb_store_bytes(ctx, 0, device->mac, ETH_ALEN, 0))) {
		count(COUNTER_DROP_MALFORMED);
		return TC_ACT_SHOT;
	}
	return bpf_redirect(ifindex, BPF_F_INGRESS);
}
