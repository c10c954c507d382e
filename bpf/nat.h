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

/* Both addresses, one behind the other, as in struct flow_key and struct flow. */
#define BOTH_ADDRS (2 * sizeof(struct addr))
_Static_assert(offsetof(struct flow_key, dst) == sizeof(struct addr), "adjacent");
_Static_assert(offsetof(struct flow, dst) == sizeof(struct addr), "adjacent");

static __always_inline int nat_addresses(struct __sk_buff *ctx, const struct packet *p,
					 const struct flow *flow, __u64 diff)
{
	__be32 v4[2];

	if (packet_is_v6(p))
		return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, saddr),
					   &flow->src, BOTH_ADDRS, 0);
	v4[0] = ((const __be32 *)flow->src.b)[3];
	v4[1] = ((const __be32 *)flow->dst.b)[3];
	if (bpf_l3_csum_replace(ctx, p->l3 + offsetof(struct iphdr, check), 0, diff, 0))
		return -1;
	return bpf_skb_store_bytes(ctx, p->l3 + offsetof(struct iphdr, saddr), v4, sizeof(v4),
				   0);
}

static __always_inline __u32 ports_word(struct ports ports)
{
	return (__u32)ports.dest << 16 | ports.source;
}

static __always_inline int nat_l4(struct __sk_buff *ctx, const struct packet *p,
				  const struct flow *flow, __u64 diff)
{
	struct ports from = { p->key.sport, p->key.dport };
	struct ports to = { flow->sport, flow->dport };
	__u32 old = ports_word(from), new = ports_word(to);
	__u32 offset = p->l4;
	__u64 flags = 0;

	if (p->proto == IPPROTO_SCTP) {
		if (!sctp_ports_csum(ctx, p, from, to))
			return -1;
		return bpf_skb_store_bytes(ctx, p->l4, &new, sizeof(new), 0);
	}
	if (p->proto == IPPROTO_UDP) {
		offset += offsetof(struct udphdr, check);
		flags = BPF_F_MARK_MANGLED_0; /* no checksum stays no checksum */
	} else {
		offset += offsetof(struct tcphdr, check);
	}
	if (diff && csum_addresses(ctx, offset, diff, packet_is_v6(p), flags))
		return -1;
	if (old == new)
		return 0;
	if (bpf_l4_csum_replace(ctx, offset, old, new, flags | sizeof(new)))
		return -1;
	return bpf_skb_store_bytes(ctx, p->l4, &new, sizeof(new), 0);
}

/* Writes the flow's ends over those of the packet. Not 0 when that cannot be done:
 * the packet is damaged then.
 */
static __always_inline int nat_rewrite(struct __sk_buff *ctx, const struct packet *p,
				       const struct flow *flow)
{
	__s64 diff;

	/* IPv4's first 12 bytes cancel out. */
	diff = bpf_csum_diff((__be32 *)&p->key.src, BOTH_ADDRS, (__be32 *)&flow->src,
			     BOTH_ADDRS, 0);
	if (diff < 0)
		return -1;
	if (!(p->flags & PACKET_LATER_FRAGMENT) && nat_l4(ctx, p, flow, diff))
		return -1;
	return nat_addresses(ctx, p, flow, diff);
}

/* One hop more. The time to live is above 1. */
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
