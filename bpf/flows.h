/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Flows: what the packet path remembers. Each has two entries that live and die
 * together, see struct flow_key. A full map forgets by itself such as were
 * silent, one entry at a time, so each has all that is needed to make the other one
 * again.
 *
 * An entry that is evicted may be another flow's a moment later, also under the
 * hands of a program that has looked it up. It takes a full map and an eviction
 * between two instructions; what can come of it is one packet that goes astray.
 */
#pragma once

#include "client.h"
#include "gate.h"

/*
 * Seconds of silence after which another flow may have a flow's tuple, should it want just
 * that one: of datagrams, and of a connection that is still opening, so that a few SYNs a
 * second cannot hold all source ports. Whoever loses it begins anew with its next SYN.
 */
#define FLOW_OVER_UDP 180
#define FLOW_OVER_OPENING 10

/* How far ahead of what the other end has acknowledged a reset may be. */
#define RESET_WINDOW (1U << 22)

static __always_inline void flow_partner(const struct flow *flow, __u8 proto,
					 struct flow_key *key)
{
	key->src = flow->dst;
	key->dst = flow->src;
	key->sport = flow->dport;
	key->dport = flow->sport;
	key->proto = proto;
}

static __always_inline struct flow *flow_find(const struct flow_key *key)
{
	return bpf_map_lookup_elem(&flows, key);
}

/* Both directions have been closed, or either has been broken off. */
static __always_inline bool flow_closed(const struct flow *flow)
{
	__u32 both = FLOW_CLIENT_CLOSED | FLOW_BACKEND_CLOSED;

	return flow->state & FLOW_RESET || (flow->state & both) == both;
}

/* May somebody else have the tuple? */
static __always_inline bool flow_over(const struct flow *flow, __u8 proto, __u32 now)
{
	__s32 idle = now - flow->last_sec;

	if (proto == IPPROTO_UDP)
		return idle > FLOW_OVER_UDP;
	if (!(flow->state & FLOW_ESTABLISHED))
		return flow_closed(flow) || idle > FLOW_OVER_OPENING;
	return flow_closed(flow);
}

/* What the packet says about the flow it belongs to. */
static __always_inline __u32 flow_bits(const struct packet *p, const struct flow *flow)
{
	bool answer = flow->flags & FLOW_ANSWER;
	__u32 bits = 0;

	if (p->flags & PACKET_LATER_FRAGMENT)
		return 0;
	if (answer)
		bits |= FLOW_ANSWERED;
	else if (flow->state & FLOW_ANSWERED && !(p->proto == IPPROTO_TCP && p->kind & TCP_SYN))
		bits |= FLOW_ESTABLISHED;
	if (p->proto == IPPROTO_TCP) {
		/* A segment with SYN does not take a reset back. */
		if (p->kind & TCP_RST || (p->kind & TCP_SYN && flow->state & FLOW_RESET))
			return FLOW_RESET;
		if (p->kind & TCP_FIN)
			bits |= answer ? FLOW_BACKEND_CLOSED : FLOW_CLIENT_CLOSED;
	} else if (p->proto == IPPROTO_SCTP) {
		if (p->kind == SCTP_ABORT || p->kind == SCTP_SHUTDOWN_COMPLETE)
			return FLOW_RESET;
		if (p->kind == SCTP_SHUTDOWN || p->kind == SCTP_SHUTDOWN_ACK)
			bits |= answer ? FLOW_BACKEND_CLOSED : FLOW_CLIENT_CLOSED;
	}
	return bits;
}

/*
 * A reset that the other end did not take (one out of the window, say) leaves the
 * connection alive, and then it goes on.
 */
static __always_inline void flow_note(struct flow *flow, __u32 bits, __u32 now)
{
	flow->last_sec = now;
	if (bits & ~flow->state)
		__sync_fetch_and_or(&flow->state, bits);
	if (flow->state & FLOW_RESET && !(bits & FLOW_RESET))
		__sync_fetch_and_and(&flow->state, ~FLOW_RESET);
}

/* What a packet has acknowledged, for flow_is_reset. */
static __always_inline void flow_acknowledge(const struct packet *p, struct flow *flow)
{
	if (p->proto == IPPROTO_TCP && p->kind & TCP_ACK && !(p->kind & TCP_RST))
		flow->generation = p->ack;
}

/*
 * Does a reset count? Of an open connection only if the other end will take it (RFC 9293,
 * section 3.5.3): whoever knows the ports of one could end it otherwise, while it is
 * silent. partner is the flow's other entry, or NULL.
 */
static __always_inline bool flow_is_reset(const struct packet *p, const struct flow *flow,
					  const struct flow *partner)
{
	if (p->proto != IPPROTO_TCP || !(flow->state & FLOW_ESTABLISHED) || !partner)
		return true;
	return p->seq - partner->generation < RESET_WINDOW;
}

static __always_inline bool flow_is_noted(const struct flow *flow, __u32 bits, __u32 now)
{
	return flow->last_sec == now && !(bits & ~flow->state) &&
	       (bits & FLOW_RESET || !(flow->state & FLOW_RESET));
}

/* Where the client is, as its request shows. False when it is where it was. */
static __always_inline bool flow_locate(struct __sk_buff *ctx, const struct packet *p,
					struct flow *flow)
{
	__u8 macs[2 * ETH_ALEN] = {}; /* of whom it is for, of whom it is from */

	if (flow->flags & (FLOW_ANSWER | FLOW_NODE))
		return false;
	if (p->flags & PACKET_L2 && bpf_skb_load_bytes(ctx, 0, macs, sizeof(macs)))
		return false;
	if (flow->ifindex == p->ifindex && !__builtin_memcmp(flow->node_mac, macs, ETH_ALEN) &&
	    !__builtin_memcmp(flow->client_mac, macs + ETH_ALEN, ETH_ALEN))
		return false;
	flow->ifindex = p->ifindex;
	__builtin_memcpy(flow->node_mac, macs, ETH_ALEN);
	__builtin_memcpy(flow->client_mac, macs + ETH_ALEN, ETH_ALEN);
	if (p->flags & PACKET_L2)
		flow->flags &= ~FLOW_NO_L2;
	else
		flow->flags |= FLOW_NO_L2;
	return true;
}

static __always_inline void flow_copy_place(struct flow *to, const struct flow *from)
{
	to->ifindex = from->ifindex;
	__builtin_memcpy(to->client_mac, from->client_mac, ETH_ALEN);
	__builtin_memcpy(to->node_mac, from->node_mac, ETH_ALEN);
	to->flags = (to->flags & ~FLOW_NO_L2) | (from->flags & FLOW_NO_L2);
}

/* Is what is under the partner's key the other half of the entry with this key? */
static __always_inline bool flow_leads_to(const struct flow *partner,
					  const struct flow_key *key)
{
	return !(addr_diff(&partner->dst, &key->src) | addr_diff(&partner->src, &key->dst)) &&
	       partner->dport == key->sport && partner->sport == key->dport;
}

/* What the entry's partner would be. */
static __always_inline void flow_mirror(const struct flow *flow, const struct flow_key *key,
					struct flow *partner)
{
	*partner = *flow;
	partner->src = key->dst;
	partner->dst = key->src;
	partner->sport = key->dport;
	partner->dport = key->sport;
	partner->flags = flow->flags ^ FLOW_ANSWER;
}

static __always_inline void flow_forget(const struct flow_key *key, const struct flow *flow)
{
	struct flow_key partner = {};
	struct flow *other;

	flow_partner(flow, key->proto, &partner);
	other = flow_find(&partner);
	if (other && flow_leads_to(other, key))
		bpf_map_delete_elem(&flows, &partner);
	bpf_map_delete_elem(&flows, key);
}

/*
 * Notes a packet, which is no ICMP error, in both entries, once a second or when it
 * says something new. False when the flow has lost its other half to another flow,
 * and is over with that.
 */
static __noinline bool flow_touch(struct __sk_buff *ctx, struct packet *p, struct flow *flow,
				  struct flow *spare)
{
	struct flow_key key = {};
	struct flow *partner;
	__u32 bits;

	flow_acknowledge(p, flow);
	bits = flow_bits(p, flow);
	if (flow_is_noted(flow, bits, p->now_sec))
		return true;
	flow_partner(flow, p->key.proto, &key);
	partner = flow_find(&key);
	if (partner && !flow_leads_to(partner, &p->key)) {
		bpf_map_delete_elem(&flows, &p->key);
		return false;
	}
	if (bits & FLOW_RESET && !flow_is_reset(p, flow, partner))
		return true;
	flow_note(flow, bits, p->now_sec);
	if (flow_locate(ctx, p, flow) && partner)
		flow_copy_place(partner, flow);
	if (partner) {
		flow_note(partner, bits, p->now_sec);
		return true;
	}
	flow_mirror(flow, &p->key, spare);
	if (!bpf_map_update_elem(&flows, &key, spare, BPF_NOEXIST)) {
		count(COUNTER_FLOW_RESTORED);
		return true;
	}
	/* Another processor may have done the same. */
	partner = flow_find(&key);
	if (partner && flow_leads_to(partner, &p->key))
		return true;
	bpf_map_delete_elem(&flows, &p->key);
	return false;
}

/* Does the flow's backend still serve? Only datagrams ask: what is over for them
 * nobody tells the client.
 */
static __always_inline bool flow_serves(const struct flow *flow)
{
	struct service *service;
	struct target target = {};
	__u32 id = flow->service_id, side = flow->generation >> 24;

	service = bpf_map_lookup_elem(&services, &id);
	if (!service)
		return false;
	if (flow->generation != RANGE_UNKNOWN && side < SIDES) {
		target.side = side;
		target_set_range(&target, *(volatile __u64 *)&service->range[side]);
		if (target.generation == flow->generation)
			return true;
	}
	return lb_is_member(id, &flow->dst, flow->dport, USE_SERVING);
}

/* The ports of a datagram's first piece, for the later ones. */
static __always_inline void fragment_key_fill(struct fragment_key *key, const struct packet *p)
{
	key->src = p->key.src;
	key->dst = p->key.dst;
	key->id = p->fragment_id;
	key->proto = p->proto;
}

static __always_inline void fragment_remember(const struct packet *p)
{
	struct fragment_key key = {};
	struct fragment ports;

	fragment_key_fill(&key, p);
	ports.sport = p->key.sport;
	ports.dport = p->key.dport;
	bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
}

static __always_inline bool fragment_recall(struct packet *p)
{
	struct fragment_key key = {};
	struct fragment *ports;

	fragment_key_fill(&key, p);
	ports = bpf_map_lookup_elem(&fragments, &key);
	if (!ports)
		return false;
	p->key.proto = p->proto;
	p->key.sport = ports->sport;
	p->key.dport = ports->dport;
	return true;
}
