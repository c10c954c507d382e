/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What traffic that is not ours pays. Nearly all packets on a device belong to no
 * flow of ours and go to no frontend, and a few loads from two bitmaps tell so for
 * certain. A bit that is set for another's sake costs the lookups it was to save
 * and nothing else.
 *
 * frontend_gate has a bit for each address with a frontend, each NodePort and each
 * block of addresses that touches a service CIDR. The agent writes it; the hashes
 * below have their twins in internal/datapath/gate.go. flow_gate has bits for the
 * destinations of flows, which the programs set and nobody clears: an end that had
 * a flow once is looked up for as long as the map is there.
 */
#pragma once

#include "packet.h"

#define GATE_SHIFT 46 /* leaves the 18 bits of an index */
_Static_assert(1ULL << (64 - GATE_SHIFT) == GATE_BITS, "an index is what is left");

#define GATE_SEED_PORT 0xa0761d6478bd642fULL
#define GATE_SEED_CIDR4 0xe7037ed1a0b428dbULL
#define GATE_SEED_CIDR6 0x8ebc6af09c88c6a3ULL

static __always_inline __u32 gate_index(__u64 x)
{
	return (x * 0x9e3779b97f4a7c15ULL) >> GATE_SHIFT;
}

static __always_inline __u64 gate_fold(const struct addr *addr)
{
	const __u64 *w = (const __u64 *)addr->b;

	return w[0] * 0xff51afd7ed558ccdULL ^ w[1];
}

/* Has the address a frontend? */
static __always_inline __u32 gate_addr(const struct addr *addr)
{
	return gate_index(gate_fold(addr));
}

/* Is the port a NodePort? */
static __always_inline __u32 gate_port(__u8 proto, __be16 port)
{
	return gate_index(((__u64)proto << 16 | port) ^ GATE_SEED_PORT);
}

/* Does the address's block, of 16 bits for IPv4 and 64 for IPv6, touch a service
 * CIDR?
 */
static __always_inline __u32 gate_block(const struct addr *addr)
{
	const __u64 *w = (const __u64 *)addr->b;

	if (addr_is_v4(addr))
		return gate_index((w[1] >> 32 & 0xffff) ^ GATE_SEED_CIDR4);
	return gate_index(w[0] ^ GATE_SEED_CIDR6);
}

/* Is there a flow to this end? Port 0 is that of an end known by its address. */
static __always_inline __u32 gate_end(const struct addr *addr, __be16 port)
{
	return gate_index(gate_fold(addr) ^ port);
}

static __always_inline bool gate_has(void *gate, __u32 index)
{
	__u32 word = index >> 6;
	__u64 *bits;

	bits = bpf_map_lookup_elem(gate, &word);
	return bits && *(volatile __u64 *)bits >> (index & 63) & 1;
}

static __always_inline void gate_set(void *gate, __u32 index)
{
	__u64 *bits, bit = 1ULL << (index & 63);
	__u32 word = index >> 6;

	bits = bpf_map_lookup_elem(gate, &word);
	/* A store that changes nothing would still take the line from the others. */
	if (bits && !(*(volatile __u64 *)bits & bit))
		__sync_fetch_and_or(bits, bit);
}

/* What the gate looks at. */
struct glance {
	struct addr dst;
	struct ports ports;
	__u8 proto;
	__u8 begins; /* it may begin a flow, or needs none */
};

/* How a glance ends. */
enum gate {
	GATE_SHUT, /* not for us */
	GATE_OPEN, /* a packet to parse */
	GATE_ASK,  /* ask the bitmaps */
};

static __always_inline enum gate glance_begins(__u8 *l4, void *end, struct glance *g)
{
	g->begins = 1;
	if (g->proto != IPPROTO_TCP)
		return GATE_ASK;
	if ((void *)(l4 + 14) > end)
		return GATE_OPEN;
	g->begins = l4[13] & TCP_SYN;
	return GATE_ASK;
}

/* Later fragments, options, extension headers, ICMP errors: rare, and there is more
 * to them than a glance.
 */
static __always_inline enum gate glance_v4(void *ip_header, void *end, struct glance *g)
{
	struct iphdr *ip = ip_header;
	__u8 *l4 = (__u8 *)(ip + 1);

	if ((void *)(l4 + 8) > end)
		return GATE_OPEN;
	if (ip->version != 4)
		return GATE_SHUT;
	if (ip->ihl != 5 || ip->frag_off & bpf_htons(IP_OFFSET | IP_MORE_FRAGMENTS))
		return GATE_OPEN;
	g->dst = addr_from_v4(ip->daddr);
	g->proto = ip->protocol;
	if (g->proto == IPPROTO_ICMP && is_icmp_error(false, l4[0]))
		return GATE_OPEN;
	if (has_ports(g->proto))
		g->ports = *(struct ports *)l4;
	return glance_begins(l4, end, g);
}

static __always_inline enum gate glance_v6(void *ip_header, void *end, struct glance *g)
{
	struct ipv6hdr *ip = ip_header;
	__u8 *l4 = (__u8 *)(ip + 1);

	if ((void *)(l4 + 8) > end)
		return GATE_OPEN;
	if (ip->version != 6)
		return GATE_SHUT;
	if (is_extension(ip->nexthdr))
		return GATE_OPEN;
	g->dst = addr_from_words(ip->daddr.in6_u.u6_addr32[0], ip->daddr.in6_u.u6_addr32[1],
				 ip->daddr.in6_u.u6_addr32[2], ip->daddr.in6_u.u6_addr32[3]);
	g->proto = ip->nexthdr;
	if (g->proto == IPPROTO_ICMPV6 && is_icmp_error(true, l4[0]))
		return GATE_OPEN;
	if (has_ports(g->proto))
		g->ports = *(struct ports *)l4;
	return glance_begins(l4, end, g);
}

/*
 * Is there more to do than to let the packet go on? l3 is the offset of the IP
 * header, how has PACKET_EGRESS and PACKET_LOCAL.
 */
static __always_inline bool gate_open(struct __sk_buff *ctx, __u32 l3, __u32 how)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct glance g = {};
	enum gate gate;

	/* The VLAN's own device translates. */
	if (ctx->vlan_present)
		return false;
	if (ctx->protocol == bpf_htons(ETH_P_IP))
		gate = glance_v4(data + l3, end, &g);
	else if (ctx->protocol == bpf_htons(ETH_P_IPV6))
		gate = glance_v6(data + l3, end, &g);
	else
		return false;
	if (gate != GATE_ASK)
		return gate == GATE_OPEN;

	if (has_ports(g.proto) && (gate_has(&flow_gate, gate_end(&g.dst, g.ports.dest)) ||
				   gate_has(&flow_gate, gate_end(&g.dst, 0))))
		return true;
	if (!g.begins || (how & (PACKET_EGRESS | PACKET_LOCAL)) == PACKET_EGRESS)
		return false;
	return gate_has(&frontend_gate, gate_addr(&g.dst)) ||
	       gate_has(&frontend_gate, gate_block(&g.dst)) ||
	       (has_ports(g.proto) &&
		gate_has(&frontend_gate, gate_port(g.proto, g.ports.dest)));
}
