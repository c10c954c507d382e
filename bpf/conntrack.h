/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the kernel's own connection tracking knows, where programs may ask it: see
 * has_conntrack.
 */
#pragma once

#include "flows.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* An end of a connection. IPv4 is in the first of the words. */
struct nf_end {
	__u32 words[4];
};

struct nf_port {
	__be16 all;
};

struct nf_conntrack_man {
	struct nf_end u3;
	struct nf_port u;
};

struct nf_conntrack_tuple {
	struct nf_conntrack_man src;
};

struct nf_conntrack_tuple_hash {
	struct nf_conntrack_tuple tuple;
};

struct nf_conn {
	struct nf_conntrack_tuple_hash tuplehash[2]; /* of the requests, of the answers */
	unsigned long status;
};

#pragma clang attribute pop

/* A bit of nf_conn.status: the destination has been rewritten. */
#define IPS_DST_NAT (1UL << 5)

struct ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};

extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *ctx, struct bpf_sock_tuple *tuple,
					 __u32 tuple_size, struct ct_opts *opts,
					 __u32 opts_size) __ksym __weak;
extern void bpf_ct_release(struct nf_conn *ct) __ksym __weak;

static __always_inline void tuple_fill(struct bpf_sock_tuple *tuple, bool v6,
				       const struct addr *src, __be16 sport,
				       const struct addr *dst, __be16 dport)
{
	if (v6) {
		__builtin_memcpy(tuple->ipv6.saddr, src->b, sizeof(*src));
		__builtin_memcpy(tuple->ipv6.daddr, dst->b, sizeof(*dst));
		tuple->ipv6.sport = sport;
		tuple->ipv6.dport = dport;
	} else {
		tuple->ipv4.saddr = ((const __be32 *)src->b)[3];
		tuple->ipv4.daddr = ((const __be32 *)dst->b)[3];
		tuple->ipv4.sport = sport;
		tuple->ipv4.dport = dport;
	}
}

/* The connection with the tuple in one of its directions, to be released; or NULL. No
 * program can ask for SCTP's.
 */
static __always_inline struct nf_conn *conntrack_find(struct __sk_buff *ctx, __u8 proto,
						      struct bpf_sock_tuple *tuple, __u32 size)
{
	struct ct_opts opts = { .netns_id = BPF_F_CURRENT_NETNS, .l4proto = proto };

	if (!has_conntrack || proto == IPPROTO_SCTP)
		return NULL;
	return bpf_skb_ct_lookup(ctx, tuple, size, &opts, sizeof(opts));
}

/* The end that the connection's answers come from. */
static __always_inline void conntrack_backend(struct nf_conn *ct, bool v6,
					      struct choice *backend)
{
	struct nf_conntrack_man *man = &ct->tuplehash[1].tuple.src;
	__u32 w[4] = {};

	bpf_probe_read_kernel(w, sizeof(w), &man->u3);
	bpf_probe_read_kernel(&backend->port, sizeof(backend->port), &man->u);
	backend->addr = v6 ? addr_from_words(w[0], w[1], w[2], w[3]) : addr_from_v4(w[0]);
}

/*
 * Is the packet one of a flow of datagrams that the kernel's own NAT sends to a backend
 * of the service? kube-proxy has begun it then, before us, and it goes on as it was for
 * as long as the backend serves.
 */
static __always_inline bool conntrack_serves(struct __sk_buff *ctx, const struct packet *p,
					     __u32 service_id)
{
	struct bpf_sock_tuple tuple = {};
	struct choice backend = {};
	unsigned long status = 0;
	struct nf_conn *ct;

	if (p->key.proto != IPPROTO_UDP)
		return false;
	tuple_fill(&tuple, packet_is_v6(p), &p->key.src, p->key.sport, &p->key.dst,
		   p->key.dport);
	if (packet_is_v6(p))
		ct = conntrack_find(ctx, IPPROTO_UDP, &tuple, sizeof(tuple.ipv6));
	else
		ct = conntrack_find(ctx, IPPROTO_UDP, &tuple, sizeof(tuple.ipv4));
	if (!ct)
		return false;
	bpf_probe_read_kernel(&status, sizeof(status), &ct->status);
	conntrack_backend(ct, packet_is_v6(p), &backend);
	bpf_ct_release(ct);
	return status & IPS_DST_NAT &&
	       lb_is_member(service_id, &backend.addr, backend.port, USE_SERVING);
}
