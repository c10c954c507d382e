/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The checksum of SCTP, a CRC32c over header and data (RFC 9260, appendix A), after
 * a change of the ports. Addresses are not in it.
 *
 * A CRC is linear: when m changes to m ^ d, it changes by the CRC of d alone, taken
 * from 0 and without the inversion at the end. Bits are coefficients of a polynomial
 * modulo P; that CRC is d(x) * x^32 mod P. Here d is zero but for the ports, the
 * first 4 of length bytes, so with D for these 32 bits d(x) = D(x) * x^(8 * (length
 * - 4)), and the change is D(x) * x^(8 * length) mod P: nothing else of the packet
 * need be read.
 *
 * The lowest bit of a byte stands for the highest power ("reflected"). So a word that
 * is loaded from the packet as it is has x^31 in bit 0 and x^0 in bit 31, and so has
 * the checksum.
 */
#pragma once

#include "csum.h"

/* The checksum's offset in the header. */
#define SCTP_CRC 8

/* P without x^32. */
#define CRC32C_POLYNOMIAL 0x82f63b78

/* x^(8 * 2^k) mod P: what 2^k zero bytes multiply a CRC by. */
static const __u32 crc32c_zeros[] = {
	0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a,
	0xb82be955, 0xb8fdb1e7, 0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a,
	0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
};

/* A packet's length has as many bits. */
#define CRC32C_ZEROS 16
_Static_assert(sizeof(crc32c_zeros) == CRC32C_ZEROS * sizeof(__u32), "one for each bit");

/*
 * a(x) * b(x) mod P. Without branches, so that the verifier walks each loop once; a
 * global function, so that it looks at this one alone.
 */
__noinline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = (b >> 1) ^ (CRC32C_POLYNOMIAL & -(b & 1));
	}
	return product;
}

/* The CRC, from 0 and not inverted, of length bytes that are zero but for the first
 * four.
 */
__noinline __u32 crc32c_of_first(__u32 first, __u32 length)
{
	int k;

#pragma clang loop unroll(disable)
	for (k = 0; k < CRC32C_ZEROS; k++) {
		if (length >> k & 1)
			first = crc32c_multiply(first, crc32c_zeros[k]);
	}
	return first;
}

/*
 * Makes the checksum right after the ports behind the IP header have changed, or for
 * when they will. One that the device will put in stays as it is. False when it
 * cannot be made right: the first fragment of a packet does not say how long that
 * is, and whatever were put there, the receiver would drop the whole.
 */
static __always_inline bool sctp_ports_csum(struct __sk_buff *ctx, const struct packet *p,
					    struct ports from, struct ports to)
{
	__u32 change = (__u32)(from.dest ^ to.dest) << 16 | (from.source ^ to.source);
	__u32 crc;

	if (!change || skb_is_partial(ctx, p))
		return true;
	if (p->flags & PACKET_FIRST_FRAGMENT)
		return false;
	if (bpf_skb_load_bytes(ctx, p->l4 + SCTP_CRC, &crc, sizeof(crc)))
		return false;
	crc ^= crc32c_of_first(change, p->end - p->l4);
	return !bpf_skb_store_bytes(ctx, p->l4 + SCTP_CRC, &crc, sizeof(crc),
				    BPF_F_RECOMPUTE_CSUM);
}
