/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Finding and ending UDP sockets whose backend is gone. The types are the
 * kernel's own, cut down to the fields that are read; the loader finds their
 * places in the running kernel (CO-RE).
 */
#pragma once

#include <stdbool.h>

#include <bpf/bpf_core_read.h>

#include "origins.h"

#define AF_INET 2
#define AF_INET6 10

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr_bytes {
	__u8 b[16];
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr_bytes skc_v6_daddr;
	struct in6_addr_bytes skc_v6_rcv_saddr;
	struct {
		long long counter;
	} skc_cookie;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	int level;
	struct kernfs_node *kn;
	struct cgroup *ancestors[];
};

struct sock_cgroup_data {
	struct cgroup *cgroup;
};

struct sock {
	struct sock_common __sk_common;
	struct sock_cgroup_data sk_cgrp_data;
};

struct udp_sock;

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};

struct bpf_map;

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	struct sock *sk;
	struct origin *value;
};

#pragma clang attribute pop

/* Ends a socket with ECONNABORTED (Linux 6.5). Where the kernel has no such
 * function the agent ends what it reads in the records through sock_diag.
 */
extern int bpf_sock_destroy(struct sock_common *sk) __ksym __weak;

static __always_inline struct addr sock_addr_v6(const struct in6_addr_bytes *from)
{
	struct addr a = {};

	bpf_core_read(&a, sizeof(a), from);
	return a;
}

/* Fills in who the socket is. False for one that is not connected. */
static __always_inline bool udp_record_fill(struct udp_record *rec, struct sock_common *sk)
{
	rec->family = sk->skc_family;
	rec->remote_port = sk->skc_dport;
	rec->local_port = bpf_htons(sk->skc_num);
	rec->ifindex = sk->skc_bound_dev_if;
	rec->cookie = sk->skc_cookie.counter;
	if (!rec->remote_port)
		return false;
	if (rec->family == AF_INET) {
		rec->local = addr_from_v4(sk->skc_rcv_saddr);
		rec->remote = addr_from_v4(sk->skc_daddr);
		return true;
	}
	if (rec->family != AF_INET6)
		return false;
	rec->local = sock_addr_v6(&sk->skc_v6_rcv_saddr);
	rec->remote = sock_addr_v6(&sk->skc_v6_daddr);
	return true;
}

/*
 * Is the socket connected to a backend that has left its service? The address
 * alone does not decide: the socket must remember that it got this backend for
 * a VIP. After a connect to AF_UNSPEC, which no hook sees, the remembered
 * backend and the remote address differ.
 */
static __always_inline bool udp_backend_gone(struct origin *origin,
					     const struct udp_record *rec)
{
	struct origin_entry entry = {};
	bool found = false;

	if (origin)
		found = origin_connected_find(origin, &rec->remote, rec->remote_port, &entry);
	else if (overflow_in_use())
		found = overflow_find(rec->cookie, OVERFLOW_BY_BACKEND, &rec->remote,
				      rec->remote_port, now_sec(), &entry);
	return found && !lb_is_member(entry.service_id, &entry.backend, entry.backend_port);
}

/* How deep cgroups can be before we take a socket for somebody else's. */
#define CGROUP_LEVELS 32

/* Was the socket made below the cgroup that our hooks are on? */
static __always_inline bool sock_is_ours(struct sock *sk)
{
	struct cgroup *cgroup, *ancestor;
	int i;

	cgroup = sk->sk_cgrp_data.cgroup;
	if (!cgroup)
		return false;
	for (i = 0; i < CGROUP_LEVELS && i <= cgroup->level; i++) {
		ancestor = NULL;
		bpf_core_read(&ancestor, sizeof(ancestor), &cgroup->ancestors[i]);
		if (BPF_CORE_READ(ancestor, kn, id) == cgroup_id)
			return true;
	}
	return false;
}

/*
 * Is the socket connected to a VIP itself, because nothing was behind it when
 * it connected, and does the VIP lead to a backend at this moment?
 */
static __always_inline bool udp_backend_came(struct sock *sk, const struct udp_record *rec)
{
	struct request req = {
		.addr = rec->remote,
		.port = rec->remote_port,
		.proto = IPPROTO_UDP,
	};
	struct frontend_key key;
	struct target target;

	frontend_key_fill(&key, &req.addr, req.port, req.proto);
	return bpf_map_lookup_elem(&answered, &key) &&
	       lb_find(&req, &target) == VERDICT_TRANSLATE && sock_is_ours(sk);
}

/*
 * What a socket remembers and whether it is connected to a backend that has
 * gone, without taking a lock: deciding is left to the walk in the namespace.
 */
static __always_inline void origin_record_fill(struct origin_record *rec, struct sock *sk,
					       const struct origin *origin)
{
	const struct origin_entry *entry;
	struct udp_record who = {};
	int i;

	rec->netns = sk->__sk_common.skc_net.net->ns.inum;
	udp_record_fill(&who, &sk->__sk_common);
#pragma unroll
	for (i = 0; i < ORIGIN_CONNECTED; i++) {
		entry = &origin->connected[i];
		if (!entry->vip_port)
			continue;
		rec->services[i] = entry->service_id;
		if (!entry_backend_diff(entry, &who.remote, who.remote_port) &&
		    !lb_is_member(entry->service_id, &who.remote, who.remote_port))
			rec->stale = 1;
	}
#pragma unroll
	for (i = 0; i < ORIGIN_SENT; i++) {
		entry = &origin->sent[i];
		if (entry->vip_port)
			rec->services[ORIGIN_CONNECTED + i] = entry->service_id;
	}
}
