// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Test-only program: the backend that a packet's client would get of a service with
 * an affinity, from the tables of sockets that are there already. The question is
 * behind the Ethernet header of a packet, and so is the answer.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../affinity.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct packet_io {
	struct request req;
	struct addr client;
	struct choice choice;
	__u32 now;
	__u32 local; /* 1: a process on the node has sent it */
};

SEC("tc")
int test_packet(struct __sk_buff *skb)
{
	struct target target = {};
	struct packet_io io = {};

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &io, sizeof(io)))
		return TC_ACT_SHOT;
	io.now = bpf_ktime_get_ns() / 1000000000;
	if (lb_find(&io.req, &target) != VERDICT_TRANSLATE || !target_affinity(&target) ||
	    !affinity_of_packet(&io.client, io.local, &target, io.now, &io.choice))
		return TC_ACT_SHOT;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &io, sizeof(io), 0) ? TC_ACT_SHOT : TC_ACT_OK;
}

/* Types that no map holds reach BTF, and so the generated Go, through here. */
struct affinity_test_types {
	struct packet_io packet_io;
};

const struct affinity_test_types affinity_test_types = {};
