/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Who the client is that a socket belongs to: a process on the node or a pod, and
 * at which address.
 */
#pragma once

#include <linux/if_addr.h>

#include "config.h"
#include "kernel.h"
#include "lookup.h"

/* Which hook asks; always a constant, since each has fields of its own. */
enum sock_hook {
	HOOK_CONNECT4,
	HOOK_CONNECT6,
	HOOK_SENDMSG4,
	HOOK_SENDMSG6,
};

static __always_inline bool client_on_node(struct bpf_sock_addr *ctx)
{
	return bpf_get_netns_cookie(ctx) == host_netns_cookie;
}

/*
 * The address that the socket has, or the one that a datagram names itself
 * (IP_PKTINFO). False when the kernel has yet to choose it.
 */
static __always_inline bool client_source(struct bpf_sock_addr *ctx, enum sock_hook hook,
					  struct addr *addr)
{
	struct bpf_sock *sk = ctx->sk;

	switch (hook) {
	case HOOK_CONNECT4:
		if (sk)
			*addr = addr_from_v4(sk->src_ip4);
		break;
	case HOOK_CONNECT6:
		if (sk)
			*addr = addr_from_words(sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2],
						sk->src_ip6[3]);
		break;
	case HOOK_SENDMSG4:
		*addr = addr_from_v4(ctx->msg_src_ip4);
		break;
	case HOOK_SENDMSG6:
		*addr = addr_from_words(ctx->msg_src_ip6[0], ctx->msg_src_ip6[1],
					ctx->msg_src_ip6[2], ctx->msg_src_ip6[3]);
		break;
	}
	return addr_is_set(addr);
}

/* The kernel's own socket, to be read with CO-RE; NULL where it cannot be. */
static __always_inline struct sock *client_sock(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sock *number = NULL;

	if (!bpf_core_type_exists(struct sock))
		return NULL;
	/* The verifier lets nobody calculate with sk ("pointer arithmetic
	 * prohibited"), but read it from the stack.
	 */
	bpf_probe_read_kernel(&number, sizeof(number), &sk);
	return number;
}

/* In sk_userlocks: the address was given by bind(). */
#define SOCK_BINDADDR_LOCK 4

/*
 * client_source, unless the kernel has chosen the address itself when the socket
 * was connected before: that was for a backend and says nothing of the client.
 */
static __always_inline bool client_bound(struct bpf_sock_addr *ctx, enum sock_hook hook,
					 struct addr *addr)
{
	struct bpf_sock *sk = ctx->sk;
	struct sock *kernel_sk;

	if (!client_source(ctx, hook, addr))
		return false;
	if (!sk || !sk->dst_port || !bpf_core_field_exists(struct sock, sk_userlocks))
		return true;
	kernel_sk = client_sock(ctx);
	return BPF_CORE_READ_BITFIELD_PROBED(kernel_sk, sk_userlocks) & SOCK_BINDADDR_LOCK;
}

#define LOOPBACK_IFINDEX 1
#define WALK_DEVICES 16
#define WALK_ADDRESSES 8

/* Addresses that the kernel would not choose itself. */
#define UNFIT (IFA_F_SECONDARY | IFA_F_DADFAILED | IFA_F_DEPRECATED | IFA_F_TENTATIVE)

/* Scope of addresses that are valid everywhere, of both families. */
#define SCOPE_GLOBAL 0

/*
 * The walk through the kernel's lists is in global functions, each of which the
 * verifier looks at alone and once: with one loop inside the other it counted
 * 300,000 instructions in every program (Linux 6.18). Each first asks whether the
 * kernel says how its structs look. Where it does not, or has no IPv6, that makes
 * the rest of the function dead code, which the verifier does not look at.
 */

/* Fills in the first IPv4 address of a device that fits. 0 when there is none, and
 * then nothing is written.
 */
__noinline int device_address_v4(__u64 device, struct addr *addr)
{
	struct net_device *dev = (void *)device;
	struct in_ifaddr *ifa;
	int i;

	if (!addr || !bpf_core_type_exists(struct in_ifaddr))
		return 0;
	ifa = BPF_CORE_READ(dev, ip_ptr, ifa_list);
#pragma clang loop unroll(disable)
	for (i = 0; i < WALK_ADDRESSES && ifa; i++) {
		if (BPF_CORE_READ(ifa, ifa_scope) == SCOPE_GLOBAL &&
		    !(BPF_CORE_READ(ifa, ifa_flags) & UNFIT)) {
			*addr = addr_from_v4(BPF_CORE_READ(ifa, ifa_local));
			return 1;
		}
		ifa = BPF_CORE_READ(ifa, ifa_next);
	}
	return 0;
}

/* The same for IPv6. */
__noinline int device_address_v6(__u64 device, struct addr *addr)
{
	struct net_device *dev = (void *)device;
	struct list_head *item, *end;
	struct inet6_ifaddr *ifa;
	struct inet6_dev *idev;
	int i;

	if (!addr || !bpf_core_type_exists(struct inet6_ifaddr))
		return 0;
	idev = BPF_CORE_READ(dev, ip6_ptr);
	end = &idev->addr_list;
	item = BPF_CORE_READ(idev, addr_list.next);
#pragma clang loop unroll(disable)
	for (i = 0; i < WALK_ADDRESSES && item && item != end; i++) {
		ifa = (void *)item - bpf_core_field_offset(struct inet6_ifaddr, if_list);
		if (BPF_CORE_READ(ifa, scope) == SCOPE_GLOBAL &&
		    !(BPF_CORE_READ(ifa, flags) & UNFIT)) {
			BPF_CORE_READ_INTO(addr, ifa, addr);
			return 1;
		}
		item = BPF_CORE_READ(item, next);
	}
	return 0;
}

/*
 * Fills in a pod's address of a family, AF_INET or AF_INET6: the first that fits
 * on the first device that has one. 0 when there is none. Devices are in the
 * order in which they came into the namespace, so the one that the network plugin
 * gave the pod is before those that its containers make; numbers tell nothing, as
 * a device may keep the one it had on the node.
 */
__noinline int pod_address(__u64 netns, __u32 family, struct addr *addr)
{
	struct net *net = (void *)netns;
	struct list_head *item, *end;
	__u64 device;
	int i;

	if (!addr || !bpf_core_type_exists(struct net_device))
		return 0;
	end = &net->dev_base_head;
	item = BPF_CORE_READ(net, dev_base_head.next);
#pragma clang loop unroll(disable)
	for (i = 0; i < WALK_DEVICES && item && item != end; i++) {
		device = (__u64)item - bpf_core_field_offset(struct net_device, dev_list);
		item = BPF_CORE_READ(item, next);
		if (BPF_CORE_READ((struct net_device *)device, ifindex) == LOOPBACK_IFINDEX)
			continue;
		if (family == AF_INET ? device_address_v4(device, addr)
				      : device_address_v6(device, addr))
			return 1;
	}
	return 0;
}

/*
 * Fills in the address of the request's family that the client's pod has. False for a
 * process on the node, and for a pod that has none.
 */
static __always_inline bool client_pod_address(struct bpf_sock_addr *ctx,
					       const struct request *req, struct addr *addr)
{
	__u64 netns;

	if (client_on_node(ctx) || !bpf_core_type_exists(struct net))
		return false;
	netns = (__u64)BPF_CORE_READ(client_sock(ctx), __sk_common.skc_net.net);
	return pod_address(netns, addr_is_v4(&req->addr) ? AF_INET : AF_INET6, addr);
}

/*
 * Fills in the client's address of the request's family. False for a process on
 * the node that is not bound to one, and for a pod that has none.
 */
static __always_inline bool client_address(struct bpf_sock_addr *ctx, enum sock_hook hook,
					   const struct request *req, struct addr *addr)
{
	return client_bound(ctx, hook, addr) || client_pod_address(ctx, req, addr);
}

/*
 * Does the datagram name a source that the kernel has not checked yet? It will
 * after this hook, and refuse what is not the client's; what the socket is bound
 * to, it has checked.
 */
static __always_inline bool client_unproven(struct bpf_sock_addr *ctx, enum sock_hook hook)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr named = {}, own = {};

	if (hook == HOOK_SENDMSG4) {
		named = addr_from_v4(ctx->msg_src_ip4);
		if (sk)
			own = addr_from_v4(sk->src_ip4);
	} else if (hook == HOOK_SENDMSG6) {
		named = addr_from_words(ctx->msg_src_ip6[0], ctx->msg_src_ip6[1],
					ctx->msg_src_ip6[2], ctx->msg_src_ip6[3]);
		if (sk)
			own = addr_from_words(sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2],
					      sk->src_ip6[3]);
	}
	return addr_is_set(&named) && addr_diff(&named, &own);
}

/* May the client use the load-balancer IP? The service is a restricted one. */
static __always_inline bool client_allowed(struct bpf_sock_addr *ctx, enum sock_hook hook,
					   const struct request *req,
					   const struct target *target)
{
	struct addr addr = {};

	if (client_address(ctx, hook, req, &addr))
		return lb_is_source(target->service_id, &addr);
	if (client_on_node(ctx))
		return target->options & OPTION_NODE_ALLOWED;
	count(COUNTER_CLIENT_UNKNOWN);
	return false;
}

/* Does a socket of this namespace listen on the loopback address itself? */
static __always_inline bool loopback_has_listener(struct bpf_sock_addr *ctx,
						  const struct request *req)
{
	const __u32 *w = (const __u32 *)req->addr.b;
	struct bpf_sock_tuple tuple = {};
	__u32 size = sizeof(tuple.ipv4);
	bool listens = true;
	struct bpf_sock *sk;

	/* No socket is connected to port 0, so only listeners can match. */
	if (addr_is_v4(&req->addr)) {
		tuple.ipv4.saddr = w[3];
		tuple.ipv4.daddr = w[3];
		tuple.ipv4.dport = req->port;
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, w, sizeof(tuple.ipv6.saddr));
		__builtin_memcpy(tuple.ipv6.daddr, w, sizeof(tuple.ipv6.daddr));
		tuple.ipv6.dport = req->port;
		size = sizeof(tuple.ipv6);
	}
	if (req->proto == IPPROTO_UDP) {
		sk = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	} else {
		sk = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		if (sk)
			listens = sk->state == BPF_TCP_LISTEN;
	}
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return listens;
}

/*
 * Does a loopback address lead this client to NodePorts? Only a process on the
 * node, and not in the way of a socket that listens there. One that has a loopback
 * address itself could not be answered by a backend.
 */
static __always_inline bool loopback_leads(struct bpf_sock_addr *ctx, enum sock_hook hook,
					   const struct request *req)
{
	struct addr source = {};

	if (!client_on_node(ctx))
		return false;
	if (client_source(ctx, hook, &source) && addr_is_loopback(&source))
		return false;
	return !loopback_has_listener(ctx, req);
}
