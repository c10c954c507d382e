/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * types.h is the ABI: the rows of every map, as programs and the agent share
 * them. The Go types are generated from here. A change of any struct, or of a
 * map's type, needs a new pin directory (ABI in internal/datapath).
 */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

/*
 * An address of either family; IPv4 as ::ffff:a.b.c.d. Network byte order. It is
 * moved as two words of 64 bits, also into keys: a hash map reads its key in
 * words of 32 and 64 bits, and a load that covers several narrower stores makes
 * the processor wait for them.
 */
struct addr {
	__u8 b[16];
} __attribute__((aligned(8)));

/* What a client dials. Port 0 with protocol 0 stands for every port and
 * protocol of the address that has no frontend of its own.
 */
struct frontend_key {
	struct addr vip;
	__be16 port;
	__u8 proto;  /* IPPROTO_* */
	__u8 pad[5]; /* zero: keys are compared byte by byte */
};
_Static_assert(sizeof(struct frontend_key) == 24, "ABI");

/* Which field of the Service a frontend comes from. */
enum frontend_kind {
	FRONTEND_CLUSTER_IP = 1,
	FRONTEND_NODE_PORT = 2, /* the VIP is unspecified and stands for node_addresses */
	FRONTEND_LOAD_BALANCER = 3,
	FRONTEND_EXTERNAL_IP = 4,
	FRONTEND_FOREIGN = 5, /* the wildcard of a ClusterIP that another proxy serves */
};

/* Belongs to no service: wildcards lead here. */
#define NO_SERVICE 0

struct frontend {
	__u32 service_id;
	enum frontend_kind kind;
};
_Static_assert(sizeof(struct frontend) == 8, "ABI");

/* Which of a service's sets of backends a client gets. */
enum side {
	SIDE_CLUSTER_IP = 0, /* whoever dials a ClusterIP */
	SIDE_INSIDE = 1,     /* pods and processes of this node, at all other frontends */
	SIDE_OUTSIDE = 2,    /* everybody else, at all other frontends */
};
#define SIDES 3

/*
 * For each side the block of slots that holds its set, in one word so that a
 * reader sees the old range or the new one and nothing between: bits 0-23 first
 * slot, 24-39 number of slots, 40-63 generation. Without slots the first one
 * says why, see enum empty_range. Sides with equal sets share a block.
 *
 * options is another such word: bits 0-31 the affinity's timeout in seconds or
 * 0, above them enum service_option.
 */
struct service {
	__u64 range[SIDES];
	__u64 options;
};
_Static_assert(sizeof(struct service) == 32, "ABI: the flip is one 64-bit store");

#define RANGE_BASE_BITS 24
#define RANGE_COUNT_BITS 16

enum empty_range {
	EMPTY_NOWHERE = 0,   /* there is no usable backend */
	EMPTY_ELSEWHERE = 1, /* there is none here, and a traffic policy says Local */
};

enum service_option {
	/* Load-balancer IPs are for clients in source_ranges alone. */
	OPTION_RESTRICTED = 1ULL << 32,
	/* Processes on the node are among these. */
	OPTION_NODE_ALLOWED = 1ULL << 33,
	/* Clients outside get backends of this node only (a traffic policy): they keep
	 * their address.
	 */
	OPTION_OUTSIDE_LOCAL = 1ULL << 34,
};

/* One backend of a block. */
struct slot {
	struct addr backend;
	__be16 port;
	__u8 pad[6];
};
_Static_assert(sizeof(struct slot) == 24, "ABI: mapped arrays have a stride of 8");

/* Who may go on using a backend that they remember. */
enum member_use {
	USE_SERVING = 0, /* UDP sockets: the backend serves, though it may be terminating */
	USE_SIDE = 1,	 /* plus enum side. Affinities: it is in the set of that side */
};

/* A backend that those who remember it for this service may go on using. The
 * row's presence is its meaning, the value is always 1.
 */
struct member_key {
	struct addr backend;
	__u32 service_id;
	__be16 port;
	__u8 use; /* enum member_use */
	__u8 pad; /* zero */
};
_Static_assert(sizeof(struct member_key) == 24, "ABI");

/* What an address of the node is for: the value of node_addresses, one byte. */
enum node_address {
	NODE_ADDRESS_OPEN = 1, /* NodePorts, for everybody */
	/* NodePorts, for processes on the node while no socket listens on the port
	 * itself.
	 */
	NODE_ADDRESS_LOOPBACK = 2,
	NODE_ADDRESS_LOCAL = 3, /* nothing but itself, in a service CIDR */
};

/*
 * Keys of the tries. prefixlen counts the bits that follow it, IPv4's from 96
 * on. A value is always 1.
 */
struct cidr_key {
	__u32 prefixlen;
	struct addr addr;
} __attribute__((packed, aligned(4)));
_Static_assert(sizeof(struct cidr_key) == 20, "ABI");

struct source_key {
	__u32 prefixlen; /* 32 and that of the address */
	__u32 service_id;
	struct addr addr;
};
_Static_assert(sizeof(struct source_key) == 24, "ABI");

/* A client with an affinity. Exactly one of netns and client is not zero. */
struct affinity_key {
	__u64 netns;	    /* cookie of the client's network namespace */
	struct addr client; /* where the namespace cannot be seen */
	__u32 service_id;
	__u32 pad; /* zero */
};
_Static_assert(sizeof(struct affinity_key) == 32, "ABI");

struct affinity {
	struct addr backend;
	struct addr client; /* for people: an address of the client, or zero */
	__be16 port;
	__u16 pad;
	__u32 last_sec; /* last new connection, CLOCK_MONOTONIC seconds */
};
_Static_assert(sizeof(struct affinity) == 40, "ABI");

/* What a UDP socket asked for and which backend it got. All zero when empty; no
 * frontend that translates has port 0.
 */
struct origin_entry {
	struct addr vip;
	struct addr backend;
	__be16 vip_port;
	__be16 backend_port;
	__u32 service_id;
	__u32 generation; /* of the range it was chosen from, or RANGE_UNKNOWN */
	__u32 last_sec;	  /* last send, CLOCK_MONOTONIC seconds */
};
_Static_assert(sizeof(struct origin_entry) == 48, "ABI");

/* Generation of a backend that was not taken from a range: members decides. No
 * range has it.
 */
#define RANGE_UNKNOWN (~0U)

#define ORIGIN_CONNECTED 2
#define ORIGIN_SENT 4

/*
 * All that a UDP socket remembers. Of its connects two, the newest first: the
 * hook comes before the kernel may refuse, and then the socket goes on with the
 * one before. Which of them holds, the socket's remote address says.
 */
struct origin {
	struct bpf_spin_lock lock;
	__u32 latest; /* place in sent of the VIP that was sent to last */
	struct origin_entry connected[ORIGIN_CONNECTED];
	struct origin_entry sent[ORIGIN_SENT];
};
_Static_assert(sizeof(struct origin) == 8 + 48 * (ORIGIN_CONNECTED + ORIGIN_SENT), "ABI");

/* Which of an origin entry's two addresses an overflow key holds. */
enum overflow_side {
	OVERFLOW_BY_VIP = 1,	 /* where did this socket's datagrams go? */
	OVERFLOW_BY_BACKEND = 2, /* for what does this backend answer? */
};

/* The place for what does not fit into the socket's storage. */
struct overflow_key {
	__u64 cookie; /* of the socket */
	struct addr addr;
	__be16 port;
	__u16 pad; /* zero */
	enum overflow_side side;
};
_Static_assert(sizeof(struct overflow_key) == 32, "ABI");

/* Written by programs, read by programs; survives the agent. */
struct control {
	__u32 overflowed; /* 1 once origins_overflow has been used */
	__u32 pad;
};
_Static_assert(sizeof(struct control) == 8, "ABI");

/*
 * What a TCP socket dialled. Lossy: the place is the socket's cookie modulo the
 * size of the array, and a later socket may take it.
 */
struct peer {
	__u64 cookie; /* 0 empty, PEER_BUSY being written */
	struct addr vip;
	struct addr backend;
	__be16 vip_port;
	__be16 backend_port;
	__u32 pad;
};
_Static_assert(sizeof(struct peer) == 48, "ABI");

/* No socket that connects has this cookie: the kernel counts up from 1, and down
 * from here only for sockets that are made in interrupts.
 */
#define PEER_BUSY (~0ULL)

/* What was decided about a connection. Each has its line in README.md. */
enum verdict {
	VERDICT_PASS = 0,
	VERDICT_TRANSLATE = 1,
	VERDICT_NO_BACKEND = 2,
	VERDICT_NO_PORT = 3,
	VERDICT_NO_LOCAL = 4,
	VERDICT_DENIED = 5,
	VERDICT_NO_SERVICE = 6,
};
#define VERDICTS 7

/*
 * One counter for every outcome. The groups with all verdicts are a hook's base
 * plus the verdict.
 */
enum counter {
	COUNTER_CONNECT_TCP_PASS = 0,
	COUNTER_CONNECT_TCP_TRANSLATE,
	COUNTER_CONNECT_TCP_NO_BACKEND,
	COUNTER_CONNECT_TCP_NO_PORT,
	COUNTER_CONNECT_TCP_NO_LOCAL,
	COUNTER_CONNECT_TCP_DENIED,
	COUNTER_CONNECT_TCP_NO_SERVICE,
	COUNTER_CONNECT_UDP_PASS,
	COUNTER_CONNECT_UDP_TRANSLATE,
	COUNTER_CONNECT_UDP_NO_BACKEND,
	COUNTER_CONNECT_UDP_NO_PORT,
	COUNTER_CONNECT_UDP_NO_LOCAL,
	COUNTER_CONNECT_UDP_DENIED,
	COUNTER_CONNECT_UDP_NO_SERVICE,
	COUNTER_SEND_UDP_PASS,
	COUNTER_SEND_UDP_TRANSLATE,
	COUNTER_SEND_UDP_NO_BACKEND,
	COUNTER_SEND_UDP_NO_PORT,
	COUNTER_SEND_UDP_NO_LOCAL,
	COUNTER_SEND_UDP_DENIED,
	COUNTER_SEND_UDP_NO_SERVICE,
	COUNTER_SEND_UDP_KEPT,	 /* translated to the remembered backend */
	COUNTER_ORIGIN_OVERFLOW, /* remembered in origins_overflow instead */
	COUNTER_ORIGIN_LOST,	 /* could not be remembered anywhere */
	COUNTER_PEER_LOST,	 /* TCP: the place was being written */
	COUNTER_AFFINITY_HIT,	 /* the client has got the backend it had */
	COUNTER_AFFINITY_NEW,	 /* ... a backend to keep */
	COUNTER_AFFINITY_LOST,	 /* ... a backend that could not be remembered */
	COUNTER_CLIENT_UNKNOWN,	 /* denied: the pod has no address of the family */

	/* The packet path. What no flow knows is decided about: */
	COUNTER_PACKET_PASS,
	COUNTER_PACKET_TRANSLATE,
	COUNTER_PACKET_NO_BACKEND,
	COUNTER_PACKET_NO_PORT,
	COUNTER_PACKET_NO_LOCAL,
	COUNTER_PACKET_DENIED,
	COUNTER_PACKET_NO_SERVICE,
	/* ... and the packets of flows are translated. */
	COUNTER_FLOW_REQUEST,	/* to the backend */
	COUNTER_FLOW_ANSWER,	/* to the client */
	COUNTER_FLOW_ERROR,	/* ICMP errors about either */
	COUNTER_FLOW_REDIRECT,	/* of all these: went around the node's stack */
	COUNTER_FLOW_MOVED,	/* UDP flows whose backend had gone */
	COUNTER_FLOW_CONFLICT,	/* another flow had the tuple: another choice was made */
	COUNTER_FLOW_RESTORED,	/* one of a flow's two entries had been evicted */
	COUNTER_SNAT_NEW,	/* flows with a source port from the node's range */
	COUNTER_SNAT_COLLISION, /* ports that were taken */
	/* Answers of our own. */
	COUNTER_REPLY_REFUSED, /* TCP RST, ICMP port unreachable */
	COUNTER_REPLY_TTL,     /* ICMP time exceeded */
	COUNTER_REPLY_TOO_BIG, /* ICMP fragmentation needed, packet too big */
	COUNTER_REPLY_LIMITED, /* none: there were too many of them already */
	/* Dropped for another reason than a verdict. */
	COUNTER_DROP_FLOWS_FULL,     /* no entry could be made */
	COUNTER_DROP_SNAT_EXHAUSTED, /* no port was free */
	COUNTER_DROP_CONFLICT,	     /* no backend's and no port's tuple was free */
	COUNTER_DROP_NO_ROUTE,	     /* the node cannot forward to the backend */
	COUNTER_DROP_TTL,	     /* the packet's time to live was over */
	COUNTER_DROP_TOO_BIG,	     /* the way to the backend or the client is too narrow */
	COUNTER_DROP_FRAGMENT,	     /* a later fragment before the first */
	COUNTER_DROP_MALFORMED,	     /* a flow's packet that could not be rewritten */
	COUNTER_DROP_SOURCE,	     /* a pod's, with a source that is not behind its link */
};
#define COUNTERS 58
_Static_assert(COUNTER_CONNECT_UDP_PASS == COUNTER_CONNECT_TCP_PASS + VERDICTS, "base");
_Static_assert(COUNTER_SEND_UDP_PASS == COUNTER_CONNECT_UDP_PASS + VERDICTS, "base");
_Static_assert(COUNTER_SEND_UDP_KEPT == COUNTER_SEND_UDP_PASS + VERDICTS, "base");
_Static_assert(COUNTER_FLOW_REQUEST == COUNTER_PACKET_PASS + VERDICTS, "base");
_Static_assert(COUNTERS == COUNTER_DROP_SOURCE + 1, "size of the map");

/*
 * The packet path. A flow is what a client has with one frontend, and has two
 * entries in the flows map: that of its requests, from the client to the VIP, and
 * that of its answers, from the backend to the client or to the node's address
 * and port that stand for it. The key is both ends as a packet shows them where
 * it is translated, the value what is written into it. So each entry leads to the
 * other: its key is the other's value the other way round.
 */
struct flow_key {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;  /* IPPROTO_TCP, _UDP, _SCTP */
	__u8 pad[3]; /* zero */
};
_Static_assert(sizeof(struct flow_key) == 40, "ABI");

/* What a flow is, the same in both entries but for FLOW_ANSWER. */
enum flow_flag {
	FLOW_ANSWER = 1, /* the entry of the answers */
	/* Both directions go around the node's stack: the answers are translated
	 * where they arrive and sent to the client's device.
	 */
	FLOW_REDIRECT = 2,
	FLOW_NODE = 4,	   /* the client is a process of this node */
	FLOW_SNAT = 8,	   /* the backend sees an address of the node as the client */
	FLOW_NO_L2 = 16,   /* the client's device has no Ethernet header */
	FLOW_OUTSIDE = 32, /* of enum side's two kinds of client, it is an outside one */
};

/* What has been seen of a flow. */
enum flow_state {
	FLOW_ANSWERED = 1,	 /* the backend has answered */
	FLOW_ESTABLISHED = 2,	 /* ... and the client after that */
	FLOW_CLIENT_CLOSED = 4,	 /* FIN, or SCTP's SHUTDOWN, from the client */
	FLOW_BACKEND_CLOSED = 8, /* ... from the backend */
	FLOW_RESET = 16,	 /* RST, or SCTP's ABORT, from either */
};

struct flow {
	struct addr src; /* what is written into a packet */
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u32 service_id;
	/* UDP: of the backend's range, with the side, or RANGE_UNKNOWN. TCP: what these
	 * packets have acknowledged last.
	 */
	__u32 generation;
	__u32 ifindex;	    /* the client's device */
	__u32 last_sec;	    /* last packet in either direction, CLOCK_MONOTONIC seconds */
	__u32 state;	    /* enum flow_state */
	__u32 flags;	    /* enum flow_flag */
	__u8 client_mac[6]; /* the neighbour that requests come from */
	__u8 node_mac[6];   /* the address they are sent to */
};
_Static_assert(sizeof(struct flow) == 72, "ABI");

/* A datagram in pieces: only the first one has ports. */
struct fragment_key {
	struct addr src;
	struct addr dst;
	__u32 id; /* network byte order, as in the header; IPv4's in the low half */
	__u8 proto;
	__u8 pad[3]; /* zero */
};
_Static_assert(sizeof(struct fragment_key) == 40, "ABI");

/* The ports of the first piece. */
struct fragment {
	__be16 sport;
	__be16 dport;
};

/* What a device of the node is for. */
enum device_flag {
	DEVICE_POD = 1, /* behind it are pods of this node and nothing else */
};

/* A device of the node, by its index. */
struct device {
	__u32 flags; /* enum device_flag */
	/* The device that routes are of: the device's bridge, or itself. */
	__u32 l3_ifindex;
	/* Sources for what is sent by it, where the kernel's lookup of a route cannot
	 * tell (before Linux 6.7): unspecified when there is none.
	 */
	struct addr source4;
	struct addr source6;
	__u8 mac[6]; /* of the device that routes are of; zero without L2 */
	__u8 pad[2];
};
_Static_assert(sizeof(struct device) == 48, "ABI");

/* How many answers of our own each processor may still give. */
struct reply_bucket {
	__u64 filled_ns; /* CLOCK_MONOTONIC */
	__u64 tokens;
};

/* The bits of the gates, see gate.h: those that are found by a hash, and then, of the
 * frontends, those that have a place of their own.
 */
#define GATE_HASHED 262144
#define GATE_PLACES (4 * 65536)

struct flow_gate {
	__u64 words[GATE_HASHED / 64];
};

struct frontend_gate {
	__u64 words[(GATE_HASHED + GATE_PLACES) / 64];
};
_Static_assert(sizeof(struct frontend_gate) == 65536, "ABI");

/* What only people read: the name behind a service ID. Strings end in a zero. */
#define NAME_LEN 64

struct service_name {
	__u8 namespace[NAME_LEN];
	__u8 name[NAME_LEN];
	__u8 port[NAME_LEN];
	__u8 proto;  /* IPPROTO_* */
	__u8 family; /* 4 or 6 */
	__u8 pad[2];
};
_Static_assert(sizeof(struct service_name) == 196, "ABI");

struct object_name {
	__u8 namespace[NAME_LEN];
	__u8 name[NAME_LEN];
};

/* Why a Service could not be programmed. */
#define PROBLEM_LEN 256

struct problem {
	__u8 text[PROBLEM_LEN];
};

/* What the agent leaves for fairlead status. */
struct agent_state {
	__s64 started;	    /* Unix time, ns */
	__s64 synced;	    /* last time all that could be written was, Unix time, ns */
	__u64 cgroup_id;    /* inode of the cgroup the hooks are on */
	__u64 netns_cookie; /* of the node's network namespace */
	__u32 pid;	    /* in the agent's PID namespace */
	__u32 pad;
	__u8 version[NAME_LEN];
};
_Static_assert(sizeof(struct agent_state) == 104, "ABI");

/*
 * What the iterators write: one record for each socket. Not pinned anywhere,
 * agent and programs always come from one build.
 */
struct origin_record {
	__u32 netns; /* inode of the socket's network namespace */
	__u32 stale; /* 1: connected to a backend that has gone */
	__u32 services[ORIGIN_CONNECTED +
		       ORIGIN_SENT]; /* service IDs the socket remembers, or 0 */
};

enum udp_reason {
	UDP_BACKEND_GONE = 1,
	UDP_BACKEND_CAME = 2,
};

struct udp_record {
	__u64 cookie;
	struct addr local;
	struct addr remote;
	__be16 local_port;
	__be16 remote_port;
	__u32 ifindex;	/* the device the socket is bound to, or 0 */
	__u8 family;	/* AF_INET or AF_INET6, of the socket */
	__u8 destroyed; /* 1: the program has ended it itself */
	__u8 pad[2];
	enum udp_reason reason;
};

/* Types that no map holds reach BTF, and so the generated Go, through here. */
struct exported_types {
	struct origin_record origin_record;
	struct udp_record udp_record;
	enum counter counter;
	enum verdict verdict;
	enum side side;
	enum empty_range empty_range;
	enum service_option service_option;
	enum member_use member_use;
	enum node_address node_address;
	enum flow_flag flow_flag;
	enum flow_state flow_state;
	enum device_flag device_flag;
};
