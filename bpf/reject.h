/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Answers of our own: TCP RST and ICMP errors. An answer is made from the packet in
 * hand, which gets new headers, turns round and leaves by the device that it came by.
 */
#pragma once

#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

#include "config.h"
#include "icmp.h"

/* In the order of their counters. */
enum reply {
	REPLY_REFUSED, /* nobody listens: RST for TCP, ICMP port unreachable for the rest */
	REPLY_TTL,     /* ICMP time exceeded */
	REPLY_TOO_BIG, /* ICMP fragmentation needed, packet too big */
};
_Static_assert(COUNTER_REPLY_TTL == COUNTER_REPLY_REFUSED + REPLY_TTL, "order");
_Static_assert(COUNTER_REPLY_TOO_BIG == COUNTER_REPLY_REFUSED + REPLY_TOO_BIG, "order");

/* How long an ICMP error may be: RFC 1812, section 4.3.2.3, and RFC 4443, section 2.4. */
#define REPLY_MAX_V4 576
#define REPLY_MAX_V6 1280

#define REPLY_HOPS 64

#define NSEC_PER_SEC 1000000000ULL

static __always_inline bool addr_is_unicast(const struct addr *addr)
{
	const __u32 *w = (const __u32 *)addr->b;

	if (!addr_is_set(addr))
		return false;
	if (addr_is_v4(addr))
		return (addr->b[12] & 0xf0) != 0xe0 && w[3] != ~0U;
	return addr->b[0] != 0xff;
}

/* May the packet be answered at all (RFC 1122, section 3.2.2; RFC 4443, section 2.4)?
 * Of ICMP only what asks for an answer anyway.
 */
static __always_inline bool reply_is_due(struct __sk_buff *ctx, const struct packet *p)
{
	if (p->flags & (PACKET_ERROR | PACKET_LATER_FRAGMENT))
		return false;
	if (ctx->pkt_type == PACKET_BROADCAST || ctx->pkt_type == PACKET_MULTICAST)
		return false;
	if (p->proto == IPPROTO_TCP && p->kind & TCP_RST)
		return false;
	if (p->proto == IPPROTO_ICMP && p->kind != ICMP_ECHO)
		return false;
	if (p->proto == IPPROTO_ICMPV6 && p->kind != ICMPV6_ECHO_REQUEST)
		return false;
	return addr_is_unicast(&p->key.src) && !addr_is_loopback(&p->key.src) &&
	       addr_is_unicast(&p->key.dst);
}

/* Takes a token out of this processor's bucket, if there is one. */
static __always_inline bool reply_take(void)
{
	__u64 now, idle, fresh, rate = reply_rate;
	struct reply_bucket *bucket;
	__u32 key = 0;

	bucket = bpf_map_lookup_elem(&reply_buckets, &key);
	if (!bucket || !rate)
		return false;
	now = bpf_ktime_get_ns();
	idle = now - bucket->filled_ns;
	if (idle >= reply_burst * NSEC_PER_SEC / rate) {
		bucket->tokens = reply_burst;
		bucket->filled_ns = now;
	} else {
		fresh = idle * rate / NSEC_PER_SEC;
		/* The rest of the time counts for the next token. */
		bucket->filled_ns += fresh * NSEC_PER_SEC / rate;
		bucket->tokens += fresh;
		if (bucket->tokens > reply_burst)
			bucket->tokens = reply_burst;
	}
	if (!bucket->tokens)
		return false;
	bucket->tokens--;
	return true;
}

/*
 * Who answers. A refusal comes from where the packet was going. The rest is this node's
 * own word; but not to a process of this node, which the kernel would not let hear from
 * its own address on a device.
 */
static __always_inline struct addr reply_source(const struct packet *p, __u32 what)
{
	struct device *device;
	struct addr *source;

	if (what == REPLY_REFUSED || p->flags & PACKET_LOCAL)
		return p->key.dst;
	device = device_find(p->ifindex);
	if (!device)
		return p->key.dst;
	source = packet_is_v6(p) ? &device->source6 : &device->source4;
	return addr_is_set(source) ? *source : p->key.dst;
}

static __always_inline __u32 reply_ip_size(const struct packet *p)
{
	return packet_is_v6(p) ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
}

static __always_inline __u64 reply_pseudo_sum(const struct packet *p, const struct addr *src,
					      __u8 proto, __u16 length)
{
	return sum_addr(src) + sum_addr(&p->key.src) + bpf_htons(length) + bpf_htons(proto);
}

/* Writes the IP header of the answer with length bytes behind it. */
static __always_inline int reply_ip(struct __sk_buff *ctx, const struct packet *p,
				    const struct addr *src, __u8 proto, __u16 length)
{
	struct ipv6hdr v6 = {};
	struct iphdr v4 = {};
	__s64 sum;

	if (packet_is_v6(p)) {
		v6.version = 6;
		v6.payload_len = bpf_htons(length);
		v6.nexthdr = proto;
		v6.hop_limit = REPLY_HOPS;
		__builtin_memcpy(&v6.saddr, src, sizeof(v6.saddr));
		__builtin_memcpy(&v6.daddr, &p->key.src, sizeof(v6.daddr));
		return bpf_skb_store_bytes(ctx, p->l3, &v6, sizeof(v6), BPF_F_RECOMPUTE_CSUM);
	}
	v4.version = 4;
	v4.ihl = sizeof(v4) / 4;
	v4.tot_len = bpf_htons(sizeof(v4) + length);
	v4.frag_off = bpf_htons(IP_DONT_FRAGMENT);
	v4.ttl = REPLY_HOPS;
	v4.protocol = proto;
	v4.saddr = ((const __be32 *)src->b)[3];
	v4.daddr = ((const __be32 *)p->key.src.b)[3];
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&v4, sizeof(v4), 0);
	v4.check = ~sum_fold(sum);
	return bpf_skb_store_bytes(ctx, p->l3, &v4, sizeof(v4), BPF_F_RECOMPUTE_CSUM);
}

/* The header of the RST for a segment, without the checksum: RFC 9293, section
 * 3.10.7.1. False when the segment's makes no sense.
 */
static __always_inline bool rst_header(const struct packet *p, const struct tcphdr *segment,
				       struct tcphdr *rst)
{
	__u32 data = p->l4 + segment->doff * 4;

	if (segment->doff * 4 < sizeof(*segment) || data > p->end)
		return false;
	rst->source = segment->dest;
	rst->dest = segment->source;
	rst->doff = sizeof(*rst) / 4;
	rst->rst = 1;
	if (segment->ack) {
		rst->seq = segment->ack_seq;
		return true;
	}
	rst->ack = 1;
	rst->ack_seq = bpf_htonl(bpf_ntohl(segment->seq) + p->end - data + segment->syn +
				 segment->fin);
	return true;
}

/*
 * Makes a RST of a segment: the TCP header stays where it is, as the place of a
 * checksum that the device has yet to put in does, and what is behind it, IP options
 * and extension headers go.
 */
static __always_inline int reply_rst(struct __sk_buff *ctx, const struct packet *p)
{
	__u32 l4 = p->l3 + reply_ip_size(p);
	struct tcphdr segment, rst = {};
	bool partial;
	__u64 sum;

	if (bpf_skb_load_bytes(ctx, p->l4, &segment, sizeof(segment)) ||
	    !rst_header(p, &segment, &rst))
		return -1;
	partial = skb_is_partial(ctx, p);
	if (bpf_skb_change_tail(ctx, p->l4 + sizeof(rst), 0))
		return -1;
	if (p->l4 > l4 && bpf_skb_adjust_room(ctx, l4 - p->l4, BPF_ADJ_ROOM_MAC, 0))
		return -1;

	sum = reply_pseudo_sum(p, &p->key.dst, IPPROTO_TCP, sizeof(rst));
	if (partial)
		rst.check = sum_fold(sum);
	else
		rst.check =
			~sum_fold(sum + bpf_csum_diff(NULL, 0, (__be32 *)&rst, sizeof(rst), 0));
	if (bpf_skb_store_bytes(ctx, l4, &rst, sizeof(rst),
				BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH))
		return -1;
	return reply_ip(ctx, p, &p->key.dst, IPPROTO_TCP, sizeof(rst));
}

/* The first bytes of the ICMP error. */
static __always_inline struct icmp_head icmp_header(const struct packet *p, __u32 what,
						    __u32 mtu)
{
	struct icmp_head icmp = {};
	bool v6 = packet_is_v6(p);

	switch (what) {
	case REPLY_REFUSED:
		icmp.type = v6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH;
		icmp.code = v6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH;
		break;
	case REPLY_TTL:
		icmp.type = v6 ? ICMPV6_TIME_EXCEED : ICMP_TIME_EXCEEDED;
		break;
	default:
		icmp.type = v6 ? ICMPV6_PKT_TOOBIG : ICMP_DEST_UNREACH;
		icmp.code = v6 ? 0 : ICMP_FRAG_NEEDED;
		icmp.rest = bpf_htonl(mtu);
		break;
	}
	return icmp;
}

/*
 * Is the checksum of the packet one that the device has yet to put in? Then sum becomes
 * that of all that the checksum covers from the L4 header on: after it is put in,
 * header and data sum up to the inverse of the pseudo-header, which is what stands in
 * its place now.
 *
 * SCTP's is not such a sum, and of a packet in a tunnel it may be that of what is
 * inside. These come from devices that leave the checksum to whoever needs it, go back
 * by them, and nobody looks at a sum above one that is missing.
 */
static __always_inline bool quote_is_partial(struct __sk_buff *ctx, const struct packet *p,
					     __u64 *sum)
{
	__u32 offset = p->l4;
	__u16 check = 0;

	if (p->proto == IPPROTO_TCP)
		offset += offsetof(struct tcphdr, check);
	else if (p->proto == IPPROTO_UDP)
		offset += offsetof(struct udphdr, check);
	else
		return false;
	if (bpf_skb_load_bytes(ctx, offset, &check, sizeof(check)) || !check)
		return false;
	if (!skb_is_partial(ctx, p))
		return false;
	*sum = (__u16)~check;
	return true;
}

#define QUOTE_CHUNK 64

/* Adds up length bytes of the packet, at most REPLY_MAX_V6. */
static __always_inline int quote_sum(struct __sk_buff *ctx, __u32 offset, __u32 length,
				     __u64 *sum)
{
	__be32 chunk[QUOTE_CHUNK / 4];
	__u32 size;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < REPLY_MAX_V6 / QUOTE_CHUNK && length; i++) {
		__builtin_memset(chunk, 0, sizeof(chunk));
		size = length - 1;
		if (size >= sizeof(chunk))
			size = sizeof(chunk) - 1;
		/* Linux 6.1 loses track otherwise: "invalid zero-sized read". */
		barrier_var(size);
		size = (size & (sizeof(chunk) - 1)) + 1;
		if (bpf_skb_load_bytes(ctx, offset, chunk, size))
			return -1;
		*sum += (__u32)bpf_csum_diff(NULL, 0, chunk, sizeof(chunk), 0);
		offset += size;
		length -= size;
	}
	return 0;
}

/* Makes an ICMP error of the packet: it gets a second IP header and the ICMP header in
 * front of its own, and loses what is too much at the end.
 */
static __always_inline int reply_icmp(struct __sk_buff *ctx, const struct packet *p, __u32 what,
				      __u32 mtu)
{
	__u32 max = packet_is_v6(p) ? REPLY_MAX_V6 : REPLY_MAX_V4;
	struct icmp_head icmp = icmp_header(p, what, mtu);
	__u8 proto = packet_is_v6(p) ? IPPROTO_ICMPV6 : IPPROTO_ICMP;
	__u32 room = reply_ip_size(p) + sizeof(icmp);
	struct addr src = reply_source(p, what);
	__u32 length = p->end - p->l3;
	__u64 sum = 0;
	bool partial;

	if (length > max - room)
		length = max - room;
	partial = quote_is_partial(ctx, p, &sum);
	if (bpf_skb_change_tail(ctx, p->l3 + length, 0) ||
	    bpf_skb_adjust_room(ctx, room, BPF_ADJ_ROOM_MAC, 0))
		return -1;

	if (quote_sum(ctx, p->l3 + room, partial ? p->l4 - p->l3 : length, &sum))
		return -1;
	length += sizeof(icmp);
	sum += *(__u16 *)&icmp + (__u64)icmp.rest;
	if (packet_is_v6(p))
		sum += reply_pseudo_sum(p, &src, proto, length);
	icmp.check = ~sum_fold(sum);
	if (bpf_skb_store_bytes(ctx, p->l3 + reply_ip_size(p), &icmp, sizeof(icmp),
				BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH))
		return -1;
	return reply_ip(ctx, p, &src, proto, length);
}

/* What the hardware has summed up begins behind the Ethernet header. */
static __always_inline int reply_ethernet(struct __sk_buff *ctx)
{
	__u8 mac[2 * ETH_ALEN], swapped[2 * ETH_ALEN];

	if (bpf_skb_load_bytes(ctx, 0, mac, sizeof(mac)))
		return -1;
	__builtin_memcpy(swapped, mac + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(swapped + ETH_ALEN, mac, ETH_ALEN);
	return bpf_skb_store_bytes(ctx, 0, swapped, sizeof(swapped), 0);
}

/*
 * Answers the packet, which must be as it came: what is enum reply, mtu for
 * REPLY_TOO_BIG alone. The caller returns the result: TC_ACT_REDIRECT with an answer,
 * TC_ACT_SHOT when none is due, there were too many of them already, or it could not be
 * made. Neither is p of any use afterwards.
 */
__noinline int reply(struct __sk_buff *ctx, struct packet *p, __u32 what, __u32 mtu)
{
	int err;

	if (!p || !reply_is_due(ctx, p))
		return TC_ACT_SHOT;
	if (!reply_take()) {
		count(COUNTER_REPLY_LIMITED);
		return TC_ACT_SHOT;
	}
	if (what == REPLY_REFUSED && p->proto == IPPROTO_TCP)
		err = reply_rst(ctx, p);
	else
		err = reply_icmp(ctx, p, what, mtu);
	if (err || (p->flags & PACKET_L2 && reply_ethernet(ctx)))
		return TC_ACT_SHOT;
	count(COUNTER_REPLY_REFUSED + what);
	return bpf_redirect(ctx->ifindex, p->flags & PACKET_LOCAL ? BPF_F_INGRESS : 0);
}
