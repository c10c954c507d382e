// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Test-only program: the change of an SCTP packet's ports and checksum, behind the
 * Ethernet header of a packet, and the answer of sctp_ports_csum behind those.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../sctp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct sctp_io {
	struct ports from; /* the header as it is in a packet */
	__u32 verification_tag;
	__u32 checksum;
	struct ports to;
	__u32 length;	/* of the whole packet, whose rest is not here */
	__u32 fragment; /* 1: of its first fragment */
	__u32 right;	/* what sctp_ports_csum says */
};

SEC("tc")
int test_sctp(struct __sk_buff *skb)
{
	struct packet packet = {};
	struct sctp_io io = {};

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &io, sizeof(io)))
		return TC_ACT_SHOT;
	packet.proto = IPPROTO_SCTP;
	packet.l4 = ETH_HLEN;
	packet.end = ETH_HLEN + io.length;
	packet.flags = io.fragment ? PACKET_FIRST_FRAGMENT : 0;
	io.right = sctp_ports_csum(skb, &packet, io.from, io.to);
	if (bpf_skb_load_bytes(skb, ETH_HLEN + SCTP_CRC, &io.checksum, sizeof(io.checksum)))
		return TC_ACT_SHOT;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &io, sizeof(io), 0) ? TC_ACT_SHOT : TC_ACT_OK;
}

/* Types that no map holds reach BTF, and so the generated Go, through here. */
struct sctp_test_types {
	struct sctp_io sctp_io;
};

const struct sctp_test_types sctp_test_types = {};
