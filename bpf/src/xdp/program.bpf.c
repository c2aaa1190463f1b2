// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// What a host's NIC does with each frame: to the guest's AF_XDP socket, to the link's, or on to the
// host, which keeps its management traffic on the same NIC.
//
// Invariants: a frame is classified by what it is, never by the mode, so that a promotion changes
// nothing but the fate of the guest's frames; frames to the guest's address never reach the host's
// stack; zero in every map is mute (nothing for the guest leaves the NIC). Every path counts once.
//
// Does not change frames, and does not know connections.

#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
// How a map is described to the loader by its type information.
#define __uint(name, value) int (*name)[value]
#define __type(name, value) typeof(value) *name

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NET16(x) ((__u16)__builtin_bswap16(x))
#else
#define NET16(x) ((__u16)(x))
#endif

// Helper functions, under the kernel's numbers. Neither is reserved for GPL programs.
static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*bpf_redirect_map)(void *map, __u64 key, __u64 flags) = (void *)BPF_FUNC_redirect_map;

// Also in settings.rs.
enum mode { MODE_DROP_GUEST = 0, MODE_GUEST = 1, MODE_OPEN = 2 };
enum groups { GROUPS_GUEST = 0, GROUPS_HOST = 1, GROUPS_COPIED = 2 };
enum owner { OWNER_HOST = 1, OWNER_GUEST = 2 };
// Also in counters.rs.
enum verdict {
	HOST,             // passed: neither the guest's nor the link's
	HOST_NEIGHBOUR,   // passed: asks for an address of the host
	HOST_GROUP,       // passed: broadcast or multicast, by the setting
	TOO_SHORT,        // passed: not an Ethernet header
	GUEST,            // to the guest's socket
	GUEST_GROUP,      // to the guest's socket, broadcast or multicast
	GUEST_DROPPED,    // the guest's, dropped: not promoted
	GUEST_UNBOUND,    // the guest's, dropped: no socket on this queue
	LINK,             // to the link's socket
	LINK_UNBOUND,     // the link's, dropped: no socket on this queue
	VERDICTS
};

enum { QUEUES_MAX = 1024, MACS_MAX = 64, ADDRESSES_MAX = 1024 };
enum { TAGS_MAX = 2 };

enum {
	TYPE_ARP = 0x0806,
	TYPE_IPV4 = 0x0800,
	TYPE_IPV6 = 0x86dd,
	TYPE_VLAN = 0x8100,
	TYPE_QINQ = 0x88a8,
	PROTOCOL_UDP = 17,
	PROTOCOL_ICMPV6 = 58,
	NEIGHBOUR_SOLICITATION = 135,
};

struct config {
	__u32 mode;
	__u32 groups;
	__u32 link_type; // EtherType of the link's channel; 0: none
	__u32 link_port; // UDP port of the link's channel; 0: none
};

struct mac {
	__u8 bytes[6];
};

// IPv6, or IPv4 mapped into IPv6 (RFC 4291 section 2.5.5.2).
struct address {
	__u8 bytes[16];
};

struct ethernet {
	__u8 destination[6];
	__u8 source[6];
	__u16 type;
} __attribute__((packed));

struct tag {
	__u16 control;
	__u16 type;
} __attribute__((packed));

// ARP for IPv4 over Ethernet (RFC 826).
struct arp {
	__u16 hardware;
	__u16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__u16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
} __attribute__((packed));

struct ipv4 {
	__u8 version_len;
	__u8 service;
	__u16 total_len;
	__u16 id;
	__u16 fragment;
	__u8 hops;
	__u8 protocol;
	__u16 checksum;
	__u8 source[4];
	__u8 destination[4];
} __attribute__((packed));

struct ipv6 {
	__u32 version_class_flow;
	__u16 payload_len;
	__u8 next;
	__u8 hops;
	__u8 source[16];
	__u8 destination[16];
} __attribute__((packed));

struct udp {
	__u16 source;
	__u16 destination;
} __attribute__((packed));

// Neighbour solicitation (RFC 4861 section 4.3).
struct solicitation {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 reserved;
	__u8 target[16];
} __attribute__((packed));

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MACS_MAX);
	__type(key, struct mac);
	__type(value, __u32);
} guest_macs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ADDRESSES_MAX);
	__type(key, struct address);
	__type(value, __u32);
} addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, QUEUES_MAX);
	__type(key, __u32);
	__type(value, __u32);
} guest_sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, QUEUES_MAX);
	__type(key, __u32);
	__type(value, __u32);
} link_sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, VERDICTS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

INLINE int counted(__u32 verdict, int action)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &verdict);
	if (counter)
		*counter += 1;
	return action;
}

// Hands the frame to the socket of its receive queue; without one it is dropped.
INLINE int to_socket(struct xdp_md *ctx, void *sockets, __u32 bound, __u32 unbound)
{
	long action = bpf_redirect_map(sockets, ctx->rx_queue_index, XDP_DROP);
	return counted(action == XDP_REDIRECT ? bound : unbound, action);
}

INLINE int to_guest(struct xdp_md *ctx, __u32 mode, __u32 verdict)
{
	if (mode == MODE_DROP_GUEST)
		return counted(GUEST_DROPPED, XDP_DROP);
	return to_socket(ctx, &guest_sockets, verdict, GUEST_UNBOUND);
}

INLINE __u32 owner_of(const struct address *address)
{
	__u32 *owner = bpf_map_lookup_elem(&addresses, address);
	return owner ? *owner : 0;
}

// Whose address an ARP packet asks for.
INLINE __u32 owner_by_arp(void *at, void *end)
{
	struct arp *arp = at;
	struct address target = {};

	if ((void *)(arp + 1) > end || arp->protocol != NET16(TYPE_IPV4) || arp->hardware_len != 6 ||
	    arp->protocol_len != 4)
		return 0;
	target.bytes[10] = target.bytes[11] = 0xff;
	__builtin_memcpy(&target.bytes[12], arp->target_ip, 4);
	return owner_of(&target);
}

// Whose address an IPv6 neighbour solicitation asks for.
INLINE __u32 owner_by_solicitation(void *at, void *end)
{
	struct ipv6 *ip = at;
	struct solicitation *asked = (void *)(ip + 1);
	struct address target;

	if ((void *)(asked + 1) > end || ip->next != PROTOCOL_ICMPV6 ||
	    asked->type != NEIGHBOUR_SOLICITATION)
		return 0;
	__builtin_memcpy(target.bytes, asked->target, 16);
	return owner_of(&target);
}

// Broadcast and multicast: what asks for a known address goes to its owner, the rest by the
// setting.
INLINE int group_frame(struct xdp_md *ctx, struct config *config, __u16 type, void *at, void *end)
{
	__u32 owner = 0;

	if (config->groups == GROUPS_COPIED)
		return counted(HOST_GROUP, XDP_PASS);
	if (type == NET16(TYPE_ARP))
		owner = owner_by_arp(at, end);
	else if (type == NET16(TYPE_IPV6))
		owner = owner_by_solicitation(at, end);
	if (owner == OWNER_HOST)
		return counted(HOST_NEIGHBOUR, XDP_PASS);
	if (owner != OWNER_GUEST && config->groups == GROUPS_HOST)
		return counted(HOST_GROUP, XDP_PASS);
	return to_guest(ctx, config->mode, GUEST_GROUP);
}

// The groups that a guest needs: broadcast, IPv4 and IPv6 multicast. Others (spanning tree, LLDP)
// are the host's.
INLINE int is_guest_group(const __u8 *mac)
{
	if (mac[0] == 0x33 && mac[1] == 0x33)
		return 1;
	if (mac[0] == 0x01 && mac[1] == 0x00 && mac[2] == 0x5e)
		return 1;
	return (mac[0] & mac[1] & mac[2] & mac[3] & mac[4] & mac[5]) == 0xff;
}

INLINE int is_port(void *at, void *end, __u32 port)
{
	struct udp *udp = at;

	return (void *)(udp + 1) <= end && udp->destination == NET16(port);
}

INLINE int is_link(struct config *config, __u16 type, void *at, void *end)
{
	if (config->link_type && type == NET16(config->link_type))
		return 1;
	if (!config->link_port)
		return 0;
	if (type == NET16(TYPE_IPV4)) {
		struct ipv4 *ip = at;

		if ((void *)(ip + 1) > end || ip->protocol != PROTOCOL_UDP ||
		    ip->version_len != 0x45 || (ip->fragment & NET16(0x3fff)))
			return 0;
		return is_port(ip + 1, end, config->link_port);
	}
	if (type == NET16(TYPE_IPV6)) {
		struct ipv6 *ip = at;

		if ((void *)(ip + 1) > end || ip->next != PROTOCOL_UDP)
			return 0;
		return is_port(ip + 1, end, config->link_port);
	}
	return 0;
}

SEC("xdp.frags")
int colo_xdp(struct xdp_md *ctx)
{
	void *at = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethernet *ethernet = at;
	struct mac destination;
	__u32 first = 0;
	__u16 type;
	int group;

	struct config *settings = bpf_map_lookup_elem(&config, &first);
	if (!settings)
		return XDP_PASS;
	if ((void *)(ethernet + 1) > end)
		return counted(TOO_SHORT, XDP_PASS);
	__builtin_memcpy(destination.bytes, ethernet->destination, 6);
	group = destination.bytes[0] & 1;
	if (!group && bpf_map_lookup_elem(&guest_macs, &destination))
		return to_guest(ctx, settings->mode, GUEST);

	type = ethernet->type;
	at = ethernet + 1;
#pragma clang loop unroll(full)
	for (int i = 0; i < TAGS_MAX; i++) {
		struct tag *tag = at;

		if (type != NET16(TYPE_VLAN) && type != NET16(TYPE_QINQ))
			break;
		if ((void *)(tag + 1) > end)
			break;
		type = tag->type;
		at = tag + 1;
	}
	if (!group && is_link(settings, type, at, end))
		return to_socket(ctx, &link_sockets, LINK, LINK_UNBOUND);
	if (settings->mode == MODE_OPEN)
		return to_guest(ctx, MODE_OPEN, group ? GUEST_GROUP : GUEST);
	if (is_guest_group(destination.bytes))
		return group_frame(ctx, settings, type, at, end);
	return counted(HOST, XDP_PASS);
}

char program_license[] SEC("license") = "Apache-2.0 OR MIT";
