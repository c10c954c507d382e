/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Finding and ending UDP sockets whose backend is gone.
 */
#pragma once

#include <stdbool.h>

#include "config.h"
#include "kernel.h"
#include "origins.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
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
	return found &&
	       !lb_is_member(entry.service_id, &entry.backend, entry.backend_port, USE_SERVING);
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

/* May the socket's owner use a frontend that asks? Its local address is known by
 * now; whether it was bound to that is not.
 */
static __always_inline bool udp_allowed(struct sock *sk, const struct udp_record *rec,
					const struct target *target)
{
	if (lb_is_source(target->service_id, &rec->local))
		return true;
	return target->options & OPTION_NODE_ALLOWED &&
	       sk->__sk_common.skc_net.net->net_cookie == host_netns_cookie;
}

/*
 * Is the socket connected to a VIP itself, because nothing was behind it when
 * it connected, and does the VIP lead to a backend at this moment? A NodePort at
 * a loopback address does not count: nobody can be asked here whether the socket
 * talks to one that listens there, and where nobody does, it hears that.
 */
static __always_inline bool udp_backend_came(struct sock *sk, const struct udp_record *rec)
{
	struct request req = {
		.addr = rec->remote,
		.port = rec->remote_port,
		.proto = IPPROTO_UDP,
	};
	struct target target = {};
	struct frontend_key key;

	if (lb_find(&req, &target) != VERDICT_TRANSLATE || target.loopback)
		return false;
	if (target.kind == FRONTEND_NODE_PORT)
		node_port_key_fill(&key, &req.addr, req.port, req.proto);
	else
		frontend_key_fill(&key, &req.addr, req.port, req.proto);
	if (!bpf_map_lookup_elem(&answered, &key) || !sock_is_ours(sk))
		return false;
	return !target_restricted(&target) || udp_allowed(sk, rec, &target);
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
		    !lb_is_member(entry->service_id, &who.remote, who.remote_port, USE_SERVING))
			rec->stale = 1;
	}
#pragma unroll
	for (i = 0; i < ORIGIN_SENT; i++) {
		entry = &origin->sent[i];
		if (entry->vip_port)
			rec->services[ORIGIN_CONNECTED + i] = entry->service_id;
	}
}
