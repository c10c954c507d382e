/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ICMP errors about packets of flows. An error quotes the packet that it is about, as
 * that was where it could not go on, and goes back to who has sent it: it travels like
 * a packet of the flow's other direction, and is translated where such a one is. In
 * the quotation the translation is undone.
 */
#pragma once

#include <stddef.h>

#include "csum.h"
#include "packet.h"

/* From linux/icmp.h, too. */
#define ICMP_ECHO 8
#define ICMP_PORT_UNREACH 3
#define ICMP_FRAG_NEEDED 4

/* The header of ICMP and ICMPv6. */
struct icmp_head {
	__u8 type;
	__u8 code;
	__u16 check;
	__be32 rest;
};

/* What is right in a packet is never all zero, and RFC 1071 knows two zeros. */
static __always_inline int check_update(struct __sk_buff *ctx, __u32 offset, __u64 change)
{
	__u16 check;

	if (bpf_skb_load_bytes(ctx, offset, &check, sizeof(check)))
		return -1;
	check = check_change(check, change);
	return bpf_skb_store_bytes(ctx, offset, &check, sizeof(check), BPF_F_RECOMPUTE_CSUM);
}

/*
 * Follows the headers of the quoted packet; inner is zero but for l3 and PACKET_V6. A
 * global function, so that the verifier follows them once.
 */
__noinline int icmp_parse(struct __sk_buff *ctx, struct packet *inner)
{
	if (!inner)
		return PARSED_MALFORMED;
	return packet_is_v6(inner) ? parse_v6(ctx, inner) : parse_v4(ctx, inner);
}

/*
 * Makes p->key that of the packets which the error, p, travels like: both ends of the
 * quoted packet, the other way round. Not 0, and p as it was, when the quotation has
 * no ports or is of a packet that another than the error's receiver has sent.
 */
__noinline int icmp_inner(struct __sk_buff *ctx, struct packet *p)
{
	struct packet inner = {};
	struct ports ports;

	if (!p)
		return -1;
	inner.l3 = p->l4 + sizeof(struct icmp_head);
	inner.flags = p->flags & PACKET_V6;
	if (icmp_parse(ctx, &inner) != PARSED || inner.flags & PACKET_LATER_FRAGMENT ||
	    !has_ports(inner.proto) || addr_diff(&inner.key.src, &p->key.dst) ||
	    inner.l4 + sizeof(ports) > p->end ||
	    bpf_skb_load_bytes(ctx, inner.l4, &ports, sizeof(ports)))
		return -1;
	p->key.src = inner.key.dst;
	p->key.dst = inner.key.src;
	p->key.sport = ports.dest;
	p->key.dport = ports.source;
	p->key.proto = inner.proto;
	return 0;
}

/* Where the quoted packet's checksum is, or 0 when it has none, the quotation ends
 * before it, or a changed port does not matter to it.
 */
static __always_inline __u32 icmp_inner_check(struct __sk_buff *ctx, const struct packet *p,
					      const struct packet *inner, __u16 *check)
{
	__u32 offset = inner->l4;

	if (inner->proto == IPPROTO_TCP)
		offset += offsetof(struct tcphdr, check);
	else if (inner->proto == IPPROTO_UDP)
		offset += offsetof(struct udphdr, check);
	else
		return 0; /* nobody can tell SCTP's from a part of the packet */
	if (offset + sizeof(*check) > p->end ||
	    bpf_skb_load_bytes(ctx, offset, check, sizeof(*check)))
		return 0;
	return inner->proto == IPPROTO_UDP && !*check ? 0 : offset;
}

/*
 * Writes the quoted packet's ports, and its checksum after the addresses in the
 * pseudo-header have changed by addrs, too. *change becomes what that does to the sum
 * of the quotation.
 *
 * A checksum that the device has yet to put in, here that of a quotation, stands for
 * the sum of the pseudo-header so far, without the ports. What is summed up will then
 * have the inverse of it as its sum, so the change is the same as with one that is there.
 */
static __always_inline int icmp_inner_l4(struct __sk_buff *ctx, const struct packet *p,
					 const struct packet *inner, const struct flow *flow,
					 __u32 addrs, __u64 *change)
{
	struct ports ports = { .source = flow->dport, .dest = flow->sport };
	__u32 offset;
	__u16 check;

	*change =
		(__u64)flow->sport + flow->dport + (__u16)~p->key.sport + (__u16)~p->key.dport;
	offset = icmp_inner_check(ctx, p, inner, &check);
	if (offset) {
		if (skb_is_partial(ctx, p))
			check = sum_fold((__u64)check + addrs);
		else
			check = check_change(check, *change + addrs);
		if (!check && inner->proto == IPPROTO_UDP)
			check = 0xffff;
		*change = sum_minus(addrs);
		if (bpf_skb_store_bytes(ctx, offset, &check, sizeof(check),
					BPF_F_RECOMPUTE_CSUM))
			return -1;
	}
	return bpf_skb_store_bytes(ctx, inner->l4, &ports, sizeof(ports), BPF_F_RECOMPUTE_CSUM);
}

/* Writes addresses, which change the sum by change, into an IP header. */
static __always_inline int icmp_addrs(struct __sk_buff *ctx, __u32 l3, bool v6,
				      const struct addr *src, const struct addr *dst,
				      __u64 change)
{
	__be32 v4[2];

	if (v6)
		return bpf_skb_store_bytes(ctx, l3 + offsetof(struct ipv6hdr, saddr), src,
					   sizeof(*src), BPF_F_RECOMPUTE_CSUM) ||
		       bpf_skb_store_bytes(ctx, l3 + offsetof(struct ipv6hdr, daddr), dst,
					   sizeof(*dst), BPF_F_RECOMPUTE_CSUM);
	v4[0] = ((const __be32 *)src->b)[3];
	v4[1] = ((const __be32 *)dst->b)[3];
	if (check_update(ctx, l3 + offsetof(struct iphdr, check), change))
		return -1;
	return bpf_skb_store_bytes(ctx, l3 + offsetof(struct iphdr, saddr), v4, sizeof(v4),
				   BPF_F_RECOMPUTE_CSUM);
}

/* Both addresses of the error itself. */
static __always_inline int icmp_outer_addrs(struct __sk_buff *ctx, const struct packet *p,
					    struct addr *src, struct addr *dst)
{
	__be32 v4[2];

	if (packet_is_v6(p))
		return bpf_skb_load_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, saddr), src,
					  sizeof(*src)) ||
		       bpf_skb_load_bytes(ctx, p->l3 + offsetof(struct ipv6hdr, daddr), dst,
					  sizeof(*dst));
	if (bpf_skb_load_bytes(ctx, p->l3 + offsetof(struct iphdr, saddr), v4, sizeof(v4)))
		return -1;
	*src = addr_from_v4(v4[0]);
	*dst = addr_from_v4(v4[1]);
	return 0;
}

/*
 * Does the error get the source that packets of this direction get? When it comes from
 * the end that they come from. Also when the node stands for the client: on the way to
 * the backend nobody else's address may show. What a router says is the router's.
 */
static __always_inline bool icmp_is_hidden(const struct packet *p, const struct flow *flow,
					   const struct addr *src)
{
	return !addr_diff(src, &p->key.src) ||
	       (flow->flags & (FLOW_SNAT | FLOW_ANSWER)) == FLOW_SNAT;
}

/*
 * Translates an error, whose key icmp_inner has made, as a packet of the flow entry
 * under that key is: the ends that are written into such a packet get into the
 * quotation the other way round. Not 0 when that cannot be done: the packet is damaged
 * then.
 */
__noinline int icmp_rewrite(struct __sk_buff *ctx, struct packet *p, struct flow *flow)
{
	struct packet inner = {};
	struct addr src, dst;
	__u64 change, outer;
	__u32 addrs;
	bool v6;

	if (!p || !flow)
		return -1;
	v6 = packet_is_v6(p);
	inner.l3 = p->l4 + sizeof(struct icmp_head);
	inner.flags = p->flags & PACKET_V6;
	if (icmp_parse(ctx, &inner) != PARSED || icmp_outer_addrs(ctx, p, &src, &dst))
		return -1;

	addrs = sum_change(p, flow);
	if (icmp_inner_l4(ctx, p, &inner, flow, addrs, &change) ||
	    icmp_addrs(ctx, inner.l3, v6, &flow->dst, &flow->src, addrs))
		return -1;

	outer = sum_minus(sum_fold(sum_addr(&src) + sum_addr(&dst)));
	if (icmp_is_hidden(p, flow, &src))
		src = flow->src;
	outer += sum_addr(&src) + sum_addr(&flow->dst);
	/* An IPv4 header's own checksum makes up for its addresses, while ICMPv6 has a
	 * pseudo-header.
	 */
	if (v6)
		change += addrs + sum_fold(outer);
	if (check_update(ctx, p->l4 + offsetof(struct icmp_head, check), change))
		return -1;
	return icmp_addrs(ctx, p->l3, v6, &src, &flow->dst, outer);
}
