// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Test-only programs: the kernel runs no cgroup/connect program on request, but
 * it does run tc programs, so these stand between a test and the functions that
 * decide. A test puts its question behind the Ethernet header of a packet and
 * finds the answer there.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../affinity.h"
#include "../client.h"
#include "../gate.h"
#include "../origins.h"
#include "../peers.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Reads the question, or leaves with an error that the test notices. */
#define ASK(skb, io) bpf_skb_load_bytes(skb, ETH_HLEN, &(io), sizeof(io))
#define ANSWER(skb, io) bpf_skb_store_bytes(skb, ETH_HLEN, &(io), sizeof(io), 0)

/* Whose is a request, and which backend is chosen? */
struct lookup_io {
	struct request req;
	enum verdict verdict;
	struct target target;
	struct choice choice;
};

SEC("tc")
int test_lookup(struct __sk_buff *skb)
{
	struct lookup_io io = {};

	if (ASK(skb, io))
		return TC_ACT_SHOT;
	io.verdict = lb_find(&io.req, &io.target);
	if (io.verdict == VERDICT_TRANSLATE &&
	    !lb_backend(&io.target, lb_pick(&io.target), &io.choice))
		return TC_ACT_SHOT;
	return ANSWER(skb, io) ? TC_ACT_SHOT : TC_ACT_OK;
}

/* Which bits do an address, a port and the block of the address have? */
struct gate_io {
	struct request req;
	__u32 addr;
	__u32 port;
	__u32 block;
	__u32 open; /* of these: 1, 2 and 4 for what frontend_gate has */
};

SEC("tc")
int test_gate(struct __sk_buff *skb)
{
	struct frontend_gate *gate;
	struct gate_io io = {};
	const __u64 *w = (const __u64 *)io.req.addr.b;
	__u32 key = 0;

	gate = bpf_map_lookup_elem(&frontend_gate, &key);
	if (!gate || ASK(skb, io))
		return TC_ACT_SHOT;
	io.addr = gate_addr(&io.req.addr);
	io.port = gate_port(io.req.proto, io.req.port);
	io.block = addr_is_v4(&io.req.addr) ? gate_block4(w[1] >> 32) : gate_block6(w[0]);
	io.open = (gate_bit(gate, gate_addr(&io.req.addr)) & 1) |
		  (gate_bit(gate, gate_port(io.req.proto, io.req.port)) & 1) << 1;
	if (addr_is_v4(&io.req.addr))
		io.open |= (gate_bit(gate, gate_block4(w[1] >> 32)) & 1) << 2;
	else
		io.open |= (gate_bit(gate, gate_block6(w[0])) & 1) << 2;
	return ANSWER(skb, io) ? TC_ACT_SHOT : TC_ACT_OK;
}

#define SPREAD_PLACES 256

/* How often each place of a block was picked. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SPREAD_PLACES);
	__type(key, __u32);
	__type(value, __u64);
} spread SEC(".maps");

struct spread_io {
	__u32 count;
	__u32 picks;
};

static long spread_one(__u32 index, struct target *target)
{
	__u32 place = lb_pick(target);
	__u64 *picked;

	picked = bpf_map_lookup_elem(&spread, &place);
	if (picked)
		(*picked)++;
	return 0;
}

SEC("tc")
int test_spread(struct __sk_buff *skb)
{
	struct target target = {};
	struct spread_io io = {};

	if (ASK(skb, io))
		return TC_ACT_SHOT;
	target.count = io.count;
	bpf_loop(io.picks, spread_one, &target, 0);
	return TC_ACT_OK;
}

enum peer_op {
	PEER_REMEMBER = 1,
	PEER_RECALL = 2,
};

struct peer_io {
	__u64 cookie;
	enum peer_op op;
	struct request req;
	struct choice choice;
	__u32 found;
};

SEC("tc")
int test_peer(struct __sk_buff *skb)
{
	struct peer_io io = {};

	if (ASK(skb, io))
		return TC_ACT_SHOT;
	if (io.op == PEER_REMEMBER)
		peer_remember(io.cookie, &io.req, &io.choice);
	else
		io.found = peer_recall(io.cookie, &io.req);
	return ANSWER(skb, io) ? TC_ACT_SHOT : TC_ACT_OK;
}

/* Stands for the storage of one socket. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct origin);
} one_origin SEC(".maps");

enum origin_op {
	ORIGIN_SENT_PUT = 1,
	ORIGIN_SENT_FIND = 2,
	ORIGIN_CONNECTED_PUT = 3,
	ORIGIN_RECALL = 4,
	ORIGIN_CHOOSE = 5,
	ORIGIN_USABLE = 6,
	ORIGIN_CONNECTED_FORGET = 7,
	ORIGIN_PEER = 8,
};

struct origin_io {
	enum origin_op op;
	__u32 now;
	__u32 reject; /* ORIGIN_SENT_PUT: 1 when rejected is given */
	__u32 found;
	struct request req;
	struct choice choice;
	struct origin_entry entry;
	struct origin_entry rejected;
	struct target target;
};

SEC("tc")
int test_origin(struct __sk_buff *skb)
{
	struct origin_io io = {};
	struct origin *origin;
	__u32 zero = 0;

	origin = bpf_map_lookup_elem(&one_origin, &zero);
	if (!origin || ASK(skb, io))
		return TC_ACT_SHOT;
	switch (io.op) {
	case ORIGIN_SENT_PUT:
		io.found = origin_sent_put(origin, &io.entry, io.reject ? &io.rejected : NULL);
		break;
	case ORIGIN_SENT_FIND:
		io.found = origin_sent_find(origin, skb, &io.req, io.now, &io.entry);
		break;
	case ORIGIN_CONNECTED_PUT:
		origin_connected_put(origin, &io.entry);
		break;
	case ORIGIN_RECALL:
		io.found = origin_recall(origin, skb, &io.req, io.now);
		break;
	case ORIGIN_CONNECTED_FORGET:
		origin_connected_forget(origin, &io.req);
		break;
	case ORIGIN_PEER:
		io.found = origin_peer(origin, skb, &io.req);
		break;
	case ORIGIN_CHOOSE:
		io.found = origin_choose(origin, &io.req, &io.target, &io.choice);
		break;
	case ORIGIN_USABLE:
		io.found = origin_usable(&io.entry, &io.target);
		break;
	default:
		return TC_ACT_SHOT;
	}
	return ANSWER(skb, io) ? TC_ACT_SHOT : TC_ACT_OK;
}

struct affinity_io {
	__u32 connect; /* 1: as a connection does; 0: look up alone */
	__u32 now;
	__u32 found;
	enum affinity_state state; /* of the lookup */
	struct affinity_key key;
	struct addr client;
	struct target target;
	struct choice choice;
};

SEC("tc")
int test_affinity(struct __sk_buff *skb)
{
	struct affinity_io io = {};

	if (ASK(skb, io))
		return TC_ACT_SHOT;
	io.state = affinity_recall(&io.key, &io.target, io.now, &io.choice);
	io.found = io.state == AFFINITY_KEPT;
	if (io.connect && !io.found)
		io.found = affinity_settle(&io.key, io.state, &io.client, &io.target, io.now,
					   &io.choice);
	return ANSWER(skb, io) ? TC_ACT_SHOT : TC_ACT_OK;
}

/* Which address does a pod have that the calling thread is in, and may a client
 * with that use a restricted service?
 */
struct client_io {
	__u32 family;
	__u32 service_id;
	struct addr addr;
	__u32 found;
	__u32 allowed;
};

struct nsproxy {
	struct net *net_ns;
} __attribute__((preserve_access_index));

struct task_struct {
	struct nsproxy *nsproxy;
} __attribute__((preserve_access_index));

SEC("tc")
int test_client(struct __sk_buff *skb)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct client_io io = {};

	if (ASK(skb, io))
		return TC_ACT_SHOT;
	if (io.family)
		io.found = pod_address((__u64)BPF_CORE_READ(task, nsproxy, net_ns), io.family,
				       &io.addr);
	io.allowed = lb_is_source(io.service_id, &io.addr);
	return ANSWER(skb, io) ? TC_ACT_SHOT : TC_ACT_OK;
}

/*
 * The stress test. Frontend n has the VIP that stress_request makes, and every
 * backend of it carries n in the last two bytes of its address and agrees with
 * stress_port: an answer that belongs to another frontend, or is put together
 * from two, shows.
 */

/* Frontends 0 to stress_stable-1 always have a backend, those above come and go. */
const volatile __u32 stress_stable = 1;
const volatile __u32 stress_total = 1;

struct stress_result {
	__u64 lookups;
	__u64 wrong;   /* belongs to another frontend */
	__u64 torn;    /* address and port do not belong together */
	__u64 missing; /* no answer for a frontend that is always there */
	__u64 strange; /* a backend that the service's clients may not remember */
	__u64 absent;  /* no answer for one that comes and goes: no error */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct stress_result);
} stress_results SEC(".maps");

static __always_inline void stress_request(struct request *req, __u32 n)
{
	req->addr.b[10] = 0xff;
	req->addr.b[11] = 0xff;
	req->addr.b[12] = 10;
	if (n & 1) {
		req->addr.b[0] = 0xfd;
		req->addr.b[10] = 0;
		req->addr.b[11] = 0;
		req->addr.b[12] = 0;
	}
	req->addr.b[13] = 96;
	req->addr.b[14] = n >> 8;
	req->addr.b[15] = n;
	req->port = bpf_htons(80);
	req->proto = n & 2 ? IPPROTO_UDP : IPPROTO_TCP;
}

/* The port of the k-th backend of frontend n. */
static __always_inline __u16 stress_port(__u32 n, __u32 k)
{
	return 0x8000 | ((n * 251 + k * 7919) & 0x7fff);
}

struct stress_io {
	__u32 lookups;
	__u32 pause_ns; /* how long every 16th reader stays between range and slot */
};

struct stress_run {
	struct stress_io io;
	struct stress_result result;
};

#define STRESS_WAITS (1 << 20)

static long stress_wait(__u32 index, const __u64 *until)
{
	return bpf_ktime_get_ns() >= *until;
}

static __always_inline void stress_stay(__u32 pause_ns)
{
	__u64 until;

	if (!pause_ns || bpf_get_prandom_u32() & 15)
		return;
	until = bpf_ktime_get_ns() + pause_ns;
	bpf_loop(STRESS_WAITS, stress_wait, &until, 0);
}

/*
 * Clients remember what they are given: whoever takes a backend from a set finds
 * it among the members for as long as the same program runs.
 */
static __always_inline bool stress_is_strange(const struct request *req,
					      const struct target *target,
					      const struct choice *choice)
{
	if (req->proto == IPPROTO_UDP &&
	    !lb_is_member(target->service_id, &choice->addr, choice->port, USE_SERVING))
		return true;
	return target_affinity(target) && !lb_is_member(target->service_id, &choice->addr,
							choice->port, USE_SIDE + target->side);
}

static long stress_one(__u32 index, struct stress_run *run)
{
	__u32 n = bpf_get_prandom_u32() % stress_total;
	struct request req = {};
	struct target target = {};
	struct choice choice = {};
	__u32 tag;

	run->result.lookups++;
	stress_request(&req, n);
	if (lb_find(&req, &target) != VERDICT_TRANSLATE) {
		if (n < stress_stable)
			run->result.missing++;
		else
			run->result.absent++;
		return 0;
	}
	stress_stay(run->io.pause_ns);
	if (!lb_backend(&target, lb_pick(&target), &choice)) {
		run->result.missing++;
		return 0;
	}
	tag = choice.addr.b[14] << 8 | choice.addr.b[15];
	if (bpf_ntohs(choice.port) != stress_port(tag, choice.addr.b[13]))
		run->result.torn++;
	else if (tag != n)
		run->result.wrong++;
	else if (stress_is_strange(&req, &target, &choice))
		run->result.strange++;
	return 0;
}

SEC("tc")
int test_stress(struct __sk_buff *skb)
{
	struct stress_result *sum;
	struct stress_run run = {};
	__u32 zero = 0;

	if (ASK(skb, run.io))
		return TC_ACT_SHOT;
	bpf_loop(run.io.lookups, stress_one, &run, 0);
	sum = bpf_map_lookup_elem(&stress_results, &zero);
	if (!sum)
		return TC_ACT_SHOT;
	sum->lookups += run.result.lookups;
	sum->wrong += run.result.wrong;
	sum->torn += run.result.torn;
	sum->missing += run.result.missing;
	sum->strange += run.result.strange;
	sum->absent += run.result.absent;
	return TC_ACT_OK;
}

/* Types that no map holds reach BTF, and so the generated Go, through here. */
struct test_types {
	struct lookup_io lookup_io;
	struct gate_io gate_io;
	struct spread_io spread_io;
	struct peer_io peer_io;
	struct origin_io origin_io;
	struct affinity_io affinity_io;
	struct client_io client_io;
	struct stress_io stress_io;
};

const struct test_types test_types = {};
