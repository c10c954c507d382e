/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Checksums. Sums are those of the Internet checksum (RFC 1071), in network byte order; a
 * change is the new sum less the old one. They are kept in 64 bits, where a few hundred
 * words and carries have room, until sum_fold.
 */
#pragma once

#include <stddef.h>

#include <bpf/bpf_core_read.h>

#include "packet.h"

static __always_inline __u16 sum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The inverse, of a sum in one word. */
static __always_inline __u32 sum_minus(__u32 sum)
{
	return ~sum;
}

/* An IPv4 address sums up as in its own 4 bytes: 0xffff counts as 0. */
static __always_inline __u64 sum_addr(const struct addr *addr)
{
	const __u32 *w = (const __u32 *)addr->b;

	return (__u64)w[0] + w[1] + w[2] + w[3];
}

/* What the flow's addresses change in the sum of the packet's. */
static __always_inline __u32 sum_change(const struct packet *p, const struct flow *flow)
{
	return sum_fold(sum_addr(&flow->src) + sum_addr(&flow->dst) +
			sum_minus(sum_fold(sum_addr(&p->key.src) + sum_addr(&p->key.dst))));
}

/* A checksum, the inverted sum, after the sum has changed. */
static __always_inline __u16 check_change(__u16 check, __u64 change)
{
	return ~sum_fold((__u64)(__u16)~check + change);
}

/* The kernel's own form of a packet, as far as it is read. */
struct sk_buff {
	__u8 ip_summed : 2;
} __attribute__((preserve_access_index));

/* From the kernel's skbuff.h: the device, or whoever takes the packet apart, puts
 * the checksum in.
 */
#define CHECKSUM_PARTIAL 3

/* Linux 6.2. */
extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym __weak;

/*
 * bpf_l4_csum_replace leaves a checksum that is not there yet alone unless it is the
 * pseudo-header that has changed. So it is tried on the first bytes behind the IP
 * header, whatever they are.
 */
static __always_inline bool packet_is_left_alone(struct __sk_buff *ctx, const struct packet *p)
{
	__u16 before, after;

	if (bpf_skb_load_bytes(ctx, p->l4, &before, sizeof(before)) ||
	    bpf_l4_csum_replace(ctx, p->l4, 0, 1, 0) ||
	    bpf_skb_load_bytes(ctx, p->l4, &after, sizeof(after)))
		return false;
	if (before == after)
		return true;
	bpf_skb_store_bytes(ctx, p->l4, &before, sizeof(before), 0);
	return false;
}

/*
 * Does the checksum behind the packet's IP header wait for the device? Where the kernel
 * does not tell (before Linux 6.2, or without type information) it is found out.
 */
static __always_inline bool skb_is_partial(struct __sk_buff *ctx, const struct packet *p)
{
	struct sk_buff *skb;

	if (!bpf_cast_to_kern_ctx || !bpf_core_field_exists(struct sk_buff, ip_summed))
		return packet_is_left_alone(ctx, p);
	skb = bpf_cast_to_kern_ctx(ctx);
	return BPF_CORE_READ_BITFIELD(skb, ip_summed) == CHECKSUM_PARTIAL;
}
