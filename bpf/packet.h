/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a packet shows: its ends, and where its headers are. Everything is read by
 * bpf_skb_load_bytes, which knows where a packet ends, and the offsets are those of
 * that helper: they begin at the Ethernet header where there is one.
 */
#pragma once

#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "lookup.h"

/* From linux/icmp.h, which wants the C library's headers. */
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_ECHO 8
#define ICMP_PORT_UNREACH 3
#define ICMP_FRAG_NEEDED 4

#ifndef IPPROTO_SCTP
#define IPPROTO_SCTP 132
#endif

enum packet_flag {
	PACKET_V6 = 1,
	PACKET_L2 = 2,		   /* begins with an Ethernet header */
	PACKET_FIRST_FRAGMENT = 4, /* has ports, and later fragments follow */
	PACKET_LATER_FRAGMENT = 8, /* has no ports of its own */
	PACKET_ERROR = 16,	   /* an ICMP error: see icmp.h */
	PACKET_LOCAL = 32,	   /* on its way out, from a process of this node */
	PACKET_EGRESS = 64,	   /* on its way out */
};

/* The flags of TCP that matter, as in the header's byte. */
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Chunks of SCTP that matter: what a packet's first one may be. */
#define SCTP_INIT 1
#define SCTP_ABORT 6
#define SCTP_SHUTDOWN 7
#define SCTP_SHUTDOWN_ACK 8
#define SCTP_SHUTDOWN_COMPLETE 14

struct packet {
	/* Both ends as they stand in the headers. The ports are 0 for what has none:
	 * later fragments, ICMP, other protocols.
	 */
	struct flow_key key;
	__u32 l3;	   /* offset of the IP header */
	__u32 l4;	   /* offset of what is behind it and its options */
	__u32 end;	   /* offset of the first byte behind the packet, as the header says */
	__u32 fragment_id; /* of a fragment, see struct fragment_key */
	__u32 ifindex;	   /* the device */
	__u32 now_sec;
	__u32 seq; /* TCP's, host byte order */
	__u32 ack;
	__u32 flags; /* enum packet_flag */
	__u8 proto;  /* of what is behind the IP header, IPPROTO_* */
	__u8 ttl;
	__u8 kind;   /* TCP's flags, SCTP's first chunk, ICMP's type */
	__u8 code;   /* ICMP's code; the length of TCP's header */
	__u16 check; /* IPv4's */
	__u16 pad;
};

/* What has been read, or why not. */
enum parsed {
	PARSED = 0,
	PARSED_NOT_IP,	  /* nothing to do with us */
	PARSED_MALFORMED, /* cut short, or more extension headers than we follow */
};

/* What the agent knows of a device, or NULL. */
static __always_inline struct device *device_find(__u32 ifindex)
{
	return bpf_map_lookup_elem(&devices, &ifindex);
}

static __always_inline bool device_is_pod(const struct device *device)
{
	return device && device->flags & DEVICE_POD;
}

static __always_inline bool packet_is_v6(const struct packet *p)
{
	return p->flags & PACKET_V6;
}

/* Does the protocol have ports, and flows? */
static __always_inline bool has_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* Only a first packet begins a flow. UDP has no first one. */
static __always_inline bool packet_begins(const struct packet *p)
{
	if (p->proto == IPPROTO_TCP)
		return (p->kind & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
	if (p->proto == IPPROTO_SCTP)
		return p->kind == SCTP_INIT;
	return true;
}

static __always_inline bool is_icmp_error(bool v6, __u8 type)
{
	if (v6)
		return type < ICMPV6_ECHO_REQUEST;
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED ||
	       type == ICMP_PARAMETERPROB;
}

#define IP_MORE_FRAGMENTS 0x2000
#define IP_DONT_FRAGMENT 0x4000
#define IP_OFFSET 0x1fff

/* Where a packet ends that has length bytes from an offset on. One that is too long for
 * the field, and that the kernel will cut into pieces later, has 0 there (BIG TCP).
 */
static __always_inline __u32 packet_end(struct __sk_buff *ctx, __u32 offset, __be16 length)
{
	if (!length && ctx->gso_size)
		return ctx->len;
	return offset + bpf_ntohs(length);
}

static __always_inline enum parsed parse_v4(struct __sk_buff *ctx, struct packet *p)
{
	struct iphdr ip;
	__u32 header;

	if (bpf_skb_load_bytes(ctx, p->l3, &ip, sizeof(ip)))
		return PARSED_MALFORMED;
	header = ip.ihl * 4;
	if (ip.version != 4 || header < sizeof(ip))
		return PARSED_MALFORMED;
	p->key.src = addr_from_v4(ip.saddr);
	p->key.dst = addr_from_v4(ip.daddr);
	p->proto = ip.protocol;
	p->ttl = ip.ttl;
	p->check = ip.check;
	p->l4 = p->l3 + header;
	p->end = packet_end(ctx, p->l3, ip.tot_len);
	if (ip.frag_off & bpf_htons(IP_OFFSET | IP_MORE_FRAGMENTS)) {
		p->flags |= ip.frag_off & bpf_htons(IP_OFFSET) ? PACKET_LATER_FRAGMENT
							       : PACKET_FIRST_FRAGMENT;
		p->fragment_id = ip.id;
	}
	return PARSED;
}

/* Extension headers: of hop-by-hop, routing, destination options and fragment. */
#define EXTENSION_HEADERS 6

/* The first bytes of all of them; of the fragment header the whole. */
struct extension {
	__u8 next;
	__u8 length; /* of hop-by-hop, routing, destination: in 8 bytes, less one */
	__be16 offset;
	__be32 id;
};

static __always_inline bool is_extension(__u8 proto)
{
	return proto == IPPROTO_HOPOPTS || proto == IPPROTO_ROUTING ||
	       proto == IPPROTO_DSTOPTS || proto == IPPROTO_FRAGMENT;
}

/* A fragment header says whether there are ports behind it. */
static __always_inline void parse_fragment(const struct extension *ext, __u32 *flags, __u32 *id)
{
	*id = ext->id;
	if (ext->offset & bpf_htons(0xfff8))
		*flags |= PACKET_LATER_FRAGMENT;
	else if (ext->offset & bpf_htons(1))
		*flags |= PACKET_FIRST_FRAGMENT;
}

/*
 * Follows the extension headers from *offset on, to what is behind them. The test comes
 * last so that a jump leads back: Linux 6.1 takes a loop that any other instruction
 * closes for an endless one ("back-edge from insn").
 */
static __always_inline enum parsed parse_extensions(struct __sk_buff *ctx, __u32 *offset,
						    __u8 *proto, __u32 *flags, __u32 *id)
{
	struct extension ext;
	__u32 length;
	int i = 0;

	if (!is_extension(*proto))
		return PARSED;
#pragma clang loop unroll(disable)
	do {
		if (bpf_skb_load_bytes(ctx, *offset, &ext, sizeof(ext)))
			return PARSED_MALFORMED;
		length = (ext.length + 1) * 8;
		if (*proto == IPPROTO_FRAGMENT) {
			parse_fragment(&ext, flags, id);
			length = sizeof(ext);
		}
		*offset += length;
		*proto = ext.next;
		if (*flags & PACKET_LATER_FRAGMENT)
			return PARSED;
	} while (++i < EXTENSION_HEADERS && is_extension(*proto));
	return is_extension(*proto) ? PARSED_MALFORMED : PARSED;
}

static __always_inline struct addr addr_from_in6(const struct in6_addr *in6)
{
	struct addr addr;

	__builtin_memcpy(&addr, in6, sizeof(addr));
	return addr;
}

static __always_inline enum parsed parse_v6(struct __sk_buff *ctx, struct packet *p)
{
	struct ipv6hdr ip;

	if (bpf_skb_load_bytes(ctx, p->l3, &ip, sizeof(ip)))
		return PARSED_MALFORMED;
	if (ip.version != 6)
		return PARSED_MALFORMED;
	p->key.src = addr_from_in6(&ip.saddr);
	p->key.dst = addr_from_in6(&ip.daddr);
	p->flags |= PACKET_V6;
	p->proto = ip.nexthdr;
	p->ttl = ip.hop_limit;
	p->l4 = p->l3 + sizeof(ip);
	p->end = packet_end(ctx, p->l4, ip.payload_len);
	return parse_extensions(ctx, &p->l4, &p->proto, &p->flags, &p->fragment_id);
}

struct ports {
	__be16 source;
	__be16 dest;
};

/* What stands in the header behind the IP header. */
static __always_inline enum parsed parse_l4(struct __sk_buff *ctx, struct packet *p)
{
	__u8 head[16] = {};

	if (p->flags & PACKET_LATER_FRAGMENT)
		return PARSED;
	if (p->proto == IPPROTO_TCP) {
		if (p->l4 + sizeof(struct tcphdr) > p->end ||
		    bpf_skb_load_bytes(ctx, p->l4, head, 16))
			return PARSED_MALFORMED;
		p->kind = head[13];
		p->code = (head[12] >> 4) * 4;
		p->seq = bpf_ntohl(((const __be32 *)head)[1]);
		p->ack = bpf_ntohl(((const __be32 *)head)[2]);
	} else if (p->proto == IPPROTO_SCTP) {
		if (p->l4 + 16 > p->end || bpf_skb_load_bytes(ctx, p->l4, head, 16))
			return PARSED_MALFORMED;
		p->kind = head[12];
	} else if (p->proto == IPPROTO_UDP) {
		if (p->l4 + sizeof(struct udphdr) > p->end ||
		    bpf_skb_load_bytes(ctx, p->l4, head, 8))
			return PARSED_MALFORMED;
	} else if (p->proto == (packet_is_v6(p) ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		if (p->l4 + 8 > p->end || bpf_skb_load_bytes(ctx, p->l4, head, 8))
			return PARSED_MALFORMED;
		p->kind = head[0];
		p->code = head[1];
		if (is_icmp_error(packet_is_v6(p), p->kind))
			p->flags |= PACKET_ERROR;
		return PARSED;
	} else {
		return PARSED;
	}
	p->key.proto = p->proto;
	p->key.sport = ((const struct ports *)head)->source;
	p->key.dport = ((const struct ports *)head)->dest;
	return PARSED;
}

/* Fills the packet, which must be zero but for l3, ifindex and flags. */
static __always_inline enum parsed packet_parse(struct __sk_buff *ctx, struct packet *p)
{
	enum parsed parsed;

	if (ctx->protocol == bpf_htons(ETH_P_IP))
		parsed = parse_v4(ctx, p);
	else if (ctx->protocol == bpf_htons(ETH_P_IPV6))
		parsed = parse_v6(ctx, p);
	else
		return PARSED_NOT_IP;
	/* What is shorter than it says has lost something on the way. */
	if (parsed == PARSED && (p->end < p->l4 || p->end > ctx->len))
		return PARSED_MALFORMED;
	return parsed == PARSED ? parse_l4(ctx, p) : parsed;
}
