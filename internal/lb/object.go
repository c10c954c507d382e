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
// reflector makes one only for Services that we serve: those of type
// ExternalName, without a ClusterIP, or meant for another proxy never arrive.
type Service struct {
	Name Name
	// Created decides between two Services that claim the same frontend: the
	// older one keeps it. API time, whole seconds.
	Created time.Time
	// ClusterIPs holds at most one address of each family, in the order of the
	// object.
	ClusterIPs []netip.Addr
	Ports      []Port
}

// Port is one port of a Service.
type Port struct {
	// Name matches the port name in EndpointSlices; it is empty when a Service
	// has a single unnamed port.
	Name     string
	Protocol Protocol
	// Number is the port clients dial, 1 to 65535.
	Number uint16
}

// Slice is what an EndpointSlice says, reduced to what matters here.
type Slice struct {
	Name    Name
	Service string // name of the owning Service, in the slice's namespace
	Family  Family
	Ports   []SlicePort
	// Endpoints hold the first address of each endpoint.
	Endpoints []Endpoint
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
}

func itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
