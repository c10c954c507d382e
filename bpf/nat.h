/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Writing a flow's ends into a packet. Checksums are updated by what changed: the
 * kernel's helpers know which ones the hardware has yet to complete.
 */
#pragma once

#include <linux/errno.h>
#include <stddef.h>

#include "packet.h"
#include "sctp.h"

/* The checksum of an IPv6 packet that the hardware has summed up does not change
 * with its addresses, since nothing in the IP header makes up for them (Linux 6.16
 * and stable kernels of that time).
 */
#ifndef BPF_F_IPV6
#define BPF_F_IPV6 (1ULL << 7)
#endif

/* The pseudo header has changed by diff. */
static __always_inline int csum_addresses(struct __sk_buff *ctx, __u32 offset, __u64 diff,
					  bool v6, __u64 flags)
{
	int err;

	flags |= BPF_F_PSEUDO_HDR;
	if (v6) {
		err = bpf_l4_csum_replace(ctx, offset, 0, diff, flags | BPF_F_IPV6);
		if (err != -EINVAL)
			return err;
	}
	return bpf_l4_csum_replace(ctx, offset, 0, diff, flags);
}

/* What a flow changes in an IPv4 packet, from the time to live on: the ports are next to
 * the addresses unless there are options.
 */
struct v4_change {
	__u8 ttl;
	__u8 proto;
	__u16 check;
	__be32 saddr;
	__be32 daddr;
	struct ports ports;
};
_Static_assert(sizeof(struct v4_change) == 16, "as in the packet");

/* Both addresses of an IPv6 packet, and the ports if nothing is in between. */
struct v6_change {
	struct addr saddr;
	struct addr daddr;
	struct ports ports;
} __attribute__((packed));
_Static_assert(sizeof(struct v6_change) == 36, "as in the packet");

/* Room for either, which is too much for the stack. */
struct change {
	struct v4_change v4;
	struct v6_change v6;
};

static __always_inline __u32 ports_word(struct ports ports)
{
	return (__u32)ports.dest << 16 | ports.source;
}

/*
 * Writes the headers, in as few pieces as there are: each call finds out anew whether the
 * packet's bytes are its own. The ports are those of the flow, and not for later
 * fragments. hop is 1 for one hop further on; change is sum_change.
 */
static __always_inline int nat_v4(struct __sk_buff *ctx, const struct packet *p,
				  const struct flow *flow, struct ports ports, __u32 hop,
				  __u64 change, struct v4_change *c)
{
	c->ttl = p->ttl - hop;
	c->proto = p->proto;
	if (hop)
		change += bpf_htons(c->ttl << 8) + (__u16)~bpf_htons(p->ttl << 8);
	c->check = check_change(p->check, change);
	c->saddr = ((const __be32 *)flow->src.b)[3];
	c->daddr = ((const __be32 *)flow->dst.b)[3];
	c->ports = ports;
	if (p->flags & PACKET_LATER_FRAGMENT)
		return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct iphdr, ttl), c,
					   offsetof(struct v4_change, ports), 0);
	if (p->l4 == p->l3 + sizeof(struct iphdr))
		return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct iphdr, ttl), c,
					   sizeof(*c), 0);
	return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct iphdr, ttl), c,
				   offsetof(struct v4_change, ports), 0) ||
	       bpf_skb_store_bytes(ctx, p->l4, &ports, sizeof(ports), 0);
}

static __always_inline int nat_v6(struct __sk_buff *ctx, const struct packet *p,
				  const struct flow *flow, struct ports ports, __u32 hop,
				  struct v6_change *c)
{
	__u8 ttl = p->ttl - hop;

	c->saddr = flow->src;
	c->daddr = flow->dst;
	c->ports = ports;
	if (hop && bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, hop_limit), &ttl,
				       sizeof(ttl), 0))
		return -1;
	if (p->flags & PACKET_LATER_FRAGMENT)
		return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, saddr), c,
					   offsetof(struct v6_change, ports), 0);
	if (p->l4 == p->l3 + sizeof(struct ipv6hdr))
		return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, saddr), c,
					   sizeof(*c), 0);
	return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, saddr), c,
				   offsetof(struct v6_change, ports), 0) ||
	       bpf_skb_store_bytes(ctx, p->l4, &ports, sizeof(ports), 0);
}

/* The checksum behind the IP header, before the headers change. */
static __always_inline int nat_l4(struct __sk_buff *ctx, const struct packet *p,
				  struct ports from, struct ports to, __u32 change)
{
	__u32 old = ports_word(from), new = ports_word(to);
	__u32 offset = p->l4;
	__u64 flags = 0;

	if (p->proto == IPPROTO_SCTP)
		return sctp_ports_csum(ctx, p, from, to) ? 0 : -1;
	if (p->proto == IPPROTO_UDP) {
		offset += offsetof(struct udphdr, check);
		flags = BPF_F_MARK_MANGLED_0; /* no checksum stays no checksum */
	} else {
		offset += offsetof(struct tcphdr, check);
	}
	if (change && csum_addresses(ctx, offset, change, packet_is_v6(p), flags))
		return -1;
	if (old == new)
		return 0;
	return bpf_l4_csum_replace(ctx, offset, old, new, flags | sizeof(new));
}

/* Writes the flow's ends over those of the packet, hop hops further on. Not 0 when that
 * cannot be done: the packet is damaged then.
 */
static __always_inline int nat_rewrite(struct __sk_buff *ctx, const struct packet *p,
				       const struct flow *flow, __u32 hop,
				       struct change *change)
{
	struct ports from = { p->key.sport, p->key.dport };
	struct ports to = { flow->sport, flow->dport };
	__u32 sum = sum_change(p, flow);

	if (!(p->flags & PACKET_LATER_FRAGMENT) && nat_l4(ctx, p, from, to, sum))
		return -1;
	if (packet_is_v6(p))
		return nat_v6(ctx, p, flow, to, hop, &change->v6);
	return nat_v4(ctx, p, flow, to, hop, sum, &change->v4);
}

/* One hop more, of an ICMP error. The time to live is above 1. */
static __always_inline int nat_hop(struct __sk_buff *ctx, const struct packet *p)
{
	__u32 offset = p->l3 + offsetof(struct iphdr, ttl);
	__be16 old, new;
	__u8 ttl;

	if (packet_is_v6(p)) {
		ttl = p->ttl - 1;
		return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, hop_limit),
					   &ttl, sizeof(ttl), 0);
	}
	old = bpf_htons(p->ttl << 8 | p->proto);
	new = bpf_htons((p->ttl - 1) << 8 | p->proto);
	if (bpf_l3_csum_replace(ctx, p->l3 + offsetof(struct iphdr, check), old, new,
				sizeof(new)))
		return -1;
	return bpf_skb_store_bytes(ctx, offset, &new, sizeof(new), 0);
}
