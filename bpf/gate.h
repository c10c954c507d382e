/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What traffic that is not ours pays. Nearly all packets on a device belong to no
 * flow of ours and go to no frontend, and a few loads tell so for certain. A bit that
 * is set for another's sake costs the lookups it was to save and nothing else.
 *
 * flow_gate has bits for the destinations of flows, which the programs set and nobody
 * clears: an end that had a flow once is looked up for as long as the map is there. All
 * bits of an address are in one word:
 *
 *	hash of the address
 *	+-----------+---------+      ^ 32           a flow to this address, whatever the port
 *	| word (12) | bit (6) |      ^ port / 2048  a flow to a port like that
 *	+-----------+---------+
 *
 * All of the node's source ports together, being neighbours, set a few bits only.
 *
 * frontend_gate is asked about packets that may begin a flow, and is written by the
 * agent: a bit for each address with a frontend and each block of addresses that
 * touches a service CIDR, found by hashes, but for the blocks of IPv4 and the
 * NodePorts, which have a place each. internal/datapath/gate.go is the twin.
 */
#pragma once

#include "packet.h"

#define GATE_SHIFT 46 /* leaves the 18 bits of a place */
_Static_assert(1ULL << (64 - GATE_SHIFT) == GATE_HASHED, "a place is what is left");

#define GATE_SEED_CIDR6 0x8ebc6af09c88c6a3ULL

/* Where the places begin that are not found by a hash. Each kind has as many as there
 * are ports: the NodePorts of SCTP, UDP and TCP, in the order of the protocols' last
 * two bits, and the blocks of IPv4.
 */
#define GATE_PORTS GATE_HASHED
#define GATE_BLOCKS4 (GATE_HASHED + 3 * 65536)
_Static_assert((IPPROTO_SCTP & 3) == 0 && (IPPROTO_UDP & 3) == 1 && (IPPROTO_TCP & 3) == 2,
	       "each has its own places");

static __always_inline __u32 gate_hash(__u64 x)
{
	return (x * 0x9e3779b97f4a7c15ULL) >> GATE_SHIFT;
}

static __always_inline __u32 gate_addr4(__be32 addr)
{
	return gate_hash(addr);
}

/* Not for an IPv4-mapped address: in an IPv6 header that is nobody's. */
static __always_inline __u32 gate_addr6(__u64 high, __u64 low)
{
	__u64 x = high * 0xff51afd7ed558ccdULL ^ low;

	return gate_hash(x ^ x >> 32);
}

/* Has the address a frontend? And where in flow_gate its bits are. */
static __always_inline __u32 gate_addr(const struct addr *addr)
{
	const __u64 *w = (const __u64 *)addr->b;

	return addr_is_v4(addr) ? gate_addr4(w[1] >> 32) : gate_addr6(w[0], w[1]);
}

/* Is the port a NodePort? */
static __always_inline __u32 gate_port(__u8 proto, __be16 port)
{
	return GATE_PORTS + (proto & 3) * 65536 + port;
}

/* Does the block of 16 bits that the address is in touch a service CIDR? */
static __always_inline __u32 gate_block4(__be32 addr)
{
	return GATE_BLOCKS4 + (addr & 0xffff);
}

/* ... the block of 64 bits? */
static __always_inline __u32 gate_block6(__u64 high)
{
	return gate_hash(high ^ GATE_SEED_CIDR6);
}

/* Is there a flow to this end? A port's upper 5 bits come first in the packet. */
static __always_inline __u32 gate_end(__u32 addr, __be16 port)
{
	return addr ^ (port & 0xff) >> 3;
}

/* ... to this address, whatever the port? */
static __always_inline __u32 gate_any_port(__u32 addr)
{
	return addr ^ 32;
}

/* The word of a place, of which there are places, a power of two. */
static __always_inline __u32 gate_word(__u32 place, __u32 places)
{
	__u32 word = place / 64;

	/* Linux 6.1 forgets what a sum of two numbers is below, and finds that the "max
	 * value is outside of the allowed memory range".
	 */
	barrier_var(word);
	return word & (places / 64 - 1);
}

/* The bit of a place of frontend_gate, in the lowest bit; others are above it. */
static __always_inline __u64 gate_bit(const struct frontend_gate *gate, __u32 place)
{
	__u32 word = gate_word(place, GATE_HASHED + GATE_PLACES);

	return *(volatile const __u64 *)&gate->words[word] >> (place % 64);
}

static __always_inline struct flow_gate *flow_gate_get(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&flow_gate, &key);
}

/* May there be a flow to this port of the address? */
static __always_inline bool gate_has_flow(const struct flow_gate *gate, __u32 addr, __be16 port)
{
	__u64 word = *(volatile const __u64 *)&gate->words[addr / 64];

	return (word >> (gate_end(addr, port) % 64) | word >> (gate_any_port(addr) % 64)) & 1;
}

static __always_inline void gate_set_flow(__u32 place)
{
	struct flow_gate *gate = flow_gate_get();
	__u64 *word, bit = 1ULL << (place % 64);

	if (!gate)
		return;
	word = &gate->words[gate_word(place, GATE_HASHED)];
	/* A store that changes nothing would still take the line from the others. */
	if (!(*(volatile __u64 *)word & bit))
		__sync_fetch_and_or(word, bit);
}

/* May there be a frontend with any of these? */
static __always_inline bool gate_has_frontend(__u32 addr, __u32 block, __u32 port)
{
	struct frontend_gate *gate;
	__u32 key = 0;
	__u64 bits;

	gate = bpf_map_lookup_elem(&frontend_gate, &key);
	if (!gate)
		return false;
	bits = gate_bit(gate, addr) | gate_bit(gate, block) | gate_bit(gate, port);
	return bits & 1;
}

#define unlikely(x) __builtin_expect(!!(x), 0)

/* One that is on its way out and has come in before begins no flow there. */
static __always_inline bool gate_may_begin(struct __sk_buff *ctx, __u32 how)
{
	return !(how & PACKET_EGRESS) || !ctx->ingress_ifindex;
}

/*
 * Asks the gates about a packet whose ports are at l4. addr is the place of its
 * destination, high the first half of that, of IPv4 the whole.
 */
static __always_inline bool gate_ask(struct __sk_buff *ctx, __u32 how,
				     const struct flow_gate *flows, __u8 proto, const __u8 *l4,
				     const void *end, __u32 addr, __u64 high, bool v6)
{
	__be16 port = ((const struct ports *)l4)->dest;

	if (unlikely(gate_has_flow(flows, addr, port)))
		return true;
	if (proto == IPPROTO_TCP) {
		if (unlikely((const void *)(l4 + 14) > end))
			return true;
		if (!(l4[13] & TCP_SYN))
			return false;
	}
	return gate_may_begin(ctx, how) &&
	       gate_has_frontend(addr, v6 ? gate_block6(high) : gate_block4(high),
				 gate_port(proto, port));
}

/* The same for a packet without ports. */
static __always_inline bool gate_ask_address(struct __sk_buff *ctx, __u32 how, __u32 addr,
					     __u32 block)
{
	return gate_may_begin(ctx, how) && gate_has_frontend(addr, block, block);
}

/* Later fragments, options, extension headers, ICMP errors: rare, and there is more
 * to them than a glance.
 */
static __always_inline bool gate_v4(struct __sk_buff *ctx, __u32 how,
				    const struct flow_gate *flows, void *l3, void *end)
{
	struct iphdr *ip = l3;
	__u8 *l4 = l3 + sizeof(*ip);

	if (unlikely((void *)(l4 + 8) > end))
		return true;
	if (unlikely(*(__u8 *)l3 != 0x45)) /* version 4, without options */
		return ip->version == 4;
	if (unlikely(ip->frag_off & bpf_htons(IP_OFFSET | IP_MORE_FRAGMENTS)))
		return true;
	if (has_ports(ip->protocol))
		return gate_ask(ctx, how, flows, ip->protocol, l4, end, gate_addr4(ip->daddr),
				ip->daddr, false);
	if (ip->protocol == IPPROTO_ICMP && is_icmp_error(false, l4[0]))
		return true;
	return gate_ask_address(ctx, how, gate_addr4(ip->daddr), gate_block4(ip->daddr));
}

static __always_inline bool gate_v6(struct __sk_buff *ctx, __u32 how,
				    const struct flow_gate *flows, void *l3, void *end)
{
	struct ipv6hdr *ip = l3;
	__u8 *l4 = l3 + sizeof(*ip);
	const __u32 *w = ip->daddr.in6_u.u6_addr32;
	__u64 high, low;

	if (unlikely((void *)(l4 + 8) > end))
		return true;
	if (unlikely(ip->version != 6))
		return false;
	high = (__u64)w[1] << 32 | w[0];
	low = (__u64)w[3] << 32 | w[2];
	if (has_ports(ip->nexthdr))
		return gate_ask(ctx, how, flows, ip->nexthdr, l4, end, gate_addr6(high, low),
				high, true);
	if (is_extension(ip->nexthdr))
		return true;
	if (ip->nexthdr == IPPROTO_ICMPV6 && is_icmp_error(true, l4[0]))
		return true;
	return gate_ask_address(ctx, how, gate_addr6(high, low), gate_block6(high));
}

/* Is there more to do than to let the packet go on? how has PACKET_L2 and
 * PACKET_EGRESS.
 */
static __always_inline bool gate_open(struct __sk_buff *ctx, __u32 how)
{
	/* First, as what is in registers before a call has to be kept over it. */
	const struct flow_gate *flows = flow_gate_get();
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 l3 = how & PACKET_L2 ? ETH_HLEN : 0;
	bool open = false;

	if (!flows)
		return false;
	if (ctx->protocol == bpf_htons(ETH_P_IP))
		open = gate_v4(ctx, how, flows, data + l3, end);
	else if (ctx->protocol == bpf_htons(ETH_P_IPV6))
		open = gate_v6(ctx, how, flows, data + l3, end);
	/* A VLAN's own device translates. */
	return open && !ctx->vlan_present;
}
