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
