// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"net/netip"
	"strconv"
	"time"
)

// Name is the namespace and name of an API object.
type Name struct {
	Namespace string
	Name      string
}

// String returns "namespace/name".
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace, then name.
func (n Name) Compare(o Name) int {
	return cmp.Or(cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name))
}

// Protocol is an IP protocol number (IANA "Assigned Internet Protocol Numbers").
type Protocol uint8

// The protocols a Service port can have. Any is the zero value; as part of a
// frontend it stands for every protocol.
const (
	Any  Protocol = 0
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String returns the name the Kubernetes API uses, "*" for Any.
func (p Protocol) String() string {
	switch p {
	case Any:
		return "*"
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	default:
		return "protocol(" + itoa(uint32(p)) + ")"
	}
}

// ParseProtocol reads a protocol as the Kubernetes API spells it. The empty
// string is TCP, the API's default. ok is false for anything else.
func ParseProtocol(s string) (p Protocol, ok bool) {
	switch s {
	case "", "TCP":
		return TCP, true
	case "UDP":
		return UDP, true
	case "SCTP":
		return SCTP, true
	default:
		return Any, false
	}
}

// Family is an IP address family.
type Family uint8

// The two families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns "IPv4" or "IPv6".
func (f Family) String() string { return "IPv" + itoa(uint32(f)) }

// FamilyOf returns the family of a. An IPv4-mapped IPv6 address is IPv4.
func FamilyOf(a netip.Addr) Family {
	if a.Unmap().Is4() {
		return IPv4
	}
	return IPv6
}

// Service is what a Service object says, reduced to what matters here. The
// reflector makes one only for Services that have a ClusterIP and are not of
// type ExternalName.
type Service struct {
	Name Name
	// Created decides between two Services that claim the same frontend: the
	// older one keeps it. API time, whole seconds.
	Created time.Time
	// Foreign tells that another proxy serves this Service. Only Name and
	// ClusterIPs mean anything then: these addresses belong to somebody and are
	// left alone.
	Foreign bool
	// ClusterIPs holds at most one address of each family, in the order of the
	// object. A family without one has no frontends at all.
	ClusterIPs []netip.Addr
	// LoadBalancerIPs are the addresses in status.loadBalancer whose ipMode is
	// VIP, ExternalIPs those in spec.externalIPs. Either may be of any family and
	// hold an address that is elsewhere, too.
	LoadBalancerIPs []netip.Addr
	ExternalIPs     []netip.Addr
	Ports           []Port
	// InternalLocal is internalTrafficPolicy Local, ExternalLocal is
	// externalTrafficPolicy Local where the type of the Service gives that a
	// meaning.
	InternalLocal bool
	ExternalLocal bool
	// Affinity is the timeout of sessionAffinity ClientIP in seconds, 0 for None.
	Affinity uint32
	// Sources are the valid loadBalancerSourceRanges, masked. Those of one family
	// say nothing about the other.
	Sources []netip.Prefix
	// HealthCheckNodePort is the port that tells load balancers whether this node
	// has endpoints, 0 when there is none to serve.
	HealthCheckNodePort uint16
}

// Port is one port of a Service.
type Port struct {
	// Name matches the port name in EndpointSlices; it is empty when a Service
	// has a single unnamed port.
	Name     string
	Protocol Protocol
	// Number is the port clients dial, 1 to 65535.
	Number uint16
	// NodePort is the port of the node's addresses, 0 when there is none.
	NodePort uint16
}

// Slice is what an EndpointSlice says, reduced to what matters here.
type Slice struct {
	Name    Name
	Service string // name of the owning Service, in the slice's namespace
	Family  Family
	Ports   []SlicePort
	// Endpoints hold the first address of each endpoint.
	Endpoints []Endpoint
	// Invalid holds what is in the place of an endpoint and cannot be used.
	Invalid []InvalidEndpoint
}

// InvalidEndpoint is an endpoint that was left out.
type InvalidEndpoint struct {
	Address string // as the slice has it, "" when it has none
	Reason  string
}

// SlicePort is one port of an EndpointSlice. One port name may stand for
// different numbers in different slices.
type SlicePort struct {
	Name     string
	Protocol Protocol
	Number   uint16 // 1 to 65535
}

// Endpoint is one address of an EndpointSlice with its conditions, their
// defaults filled in (ready and serving true, terminating false when unset).
type Endpoint struct {
	Addr        netip.Addr
	Ready       bool
	Serving     bool
	Terminating bool
	// Node is the name of the node the endpoint is on, "" when it is not said.
	Node string
	// NodeHints and ZoneHints name the nodes and zones whose clients this
	// endpoint is meant for; nil when there is no such hint.
	NodeHints []string
	ZoneHints []string
}

// Node is what the Node object we run on says, reduced to what matters here.
type Node struct {
	// Zone is the label topology.kubernetes.io/zone, "" when there is none.
	Zone string
	// Addresses holds the node's own address of each family, at most one: the
	// first InternalIP, else the first ExternalIP.
	Addresses []netip.Addr
	// Eligible is false while the Node is being deleted or is tainted
	// ToBeDeletedByClusterAutoscaler: load balancers should not send to it.
	Eligible bool
}

func itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
