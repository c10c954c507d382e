/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Options. The agent sets them before it loads the programs; the verifier then
 * drops the branches that are switched off.
 */
#pragma once

#include <linux/types.h>

/* Seconds after which an unconnected UDP socket that was silent chooses anew. */
const volatile __u32 udp_idle_sec = 120;

/* Places in the peers map minus one; the size is a power of two. */
const volatile __u32 peers_mask = 0xffff;

/* Inode of the cgroup the hooks are on. Sockets made elsewhere are not ours. */
const volatile __u64 cgroup_id = 0;

/* Cookie of the node's network namespace: its processes are not a pod. */
const volatile __u64 host_netns_cookie = 0;

/* The packet path. Source ports for SNAT, the first and the last one.
 * 1 <= first <= last.
 */
const volatile __u16 snat_port_first = 61000;
const volatile __u16 snat_port_last = 65535;

/* Answers of our own, RST and ICMP errors: how many a second each processor may
 * give, and how many at once after a pause.
 */
const volatile __u32 reply_rate = 1000;
const volatile __u32 reply_burst = 250;

/* Programs may ask the kernel's connection tracking (Linux 5.18, with its module in).
 * Not asked of the functions' own addresses: a loader of today cannot put those of a
 * module in, and the kernel says "BPF_LD_IMM64 uses reserved fields".
 */
const volatile __u8 has_conntrack = 0;
