// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
	netutils "k8s.io/utils/net"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// fact is what decides about one copy of an address.
type fact struct {
	addr                               netip.Addr
	ready, serving, terminating, local bool
	zones, nodes                       string // the hints, as a set
}

// doubts says for which Services kube-proxy's outcome depends on the order in
// which it walks a map: those with several copies of an address of which it may
// take any one. It takes a copy that is not terminating over one that is.
func (u *upstream) doubts() doubts {
	var d doubts
	found := map[lb.ServiceFamily][]fact{}
	for _, slice := range u.slices {
		key, ok := ownerOf(slice)
		if !ok {
			continue
		}
		for _, f := range facts(slice) {
			if slices.ContainsFunc(found[key], f.contradicts) {
				if d == nil {
					d = doubts{}
				}
				d[key] = true
			}
			found[key] = append(found[key], f)
		}
	}
	return d
}

// contradicts tells whether it makes a difference which of two copies counts
// and kube-proxy does not say which. Two terminating copies may both give way to
// a third; that is not worth knowing.
func (f fact) contradicts(o fact) bool {
	return f.addr == o.addr && f.terminating == o.terminating && f != o
}

func ownerOf(s *discoveryv1.EndpointSlice) (key lb.ServiceFamily, ok bool) {
	key.Service = lb.Name{Namespace: s.Namespace, Name: s.Labels[discoveryv1.LabelServiceName]}
	switch s.AddressType {
	case discoveryv1.AddressTypeIPv4:
		key.Family = lb.IPv4
	case discoveryv1.AddressTypeIPv6:
		key.Family = lb.IPv6
	}
	return key, key.Family != 0 && key.Service.Name != ""
}

func facts(s *discoveryv1.EndpointSlice) []fact {
	out := make([]fact, 0, len(s.Endpoints))
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if len(e.Addresses) == 0 {
			continue
		}
		addr, _ := netip.AddrFromSlice(netutils.ParseIPSloppy(e.Addresses[0]))
		f := fact{
			addr:        addr.Unmap(),
			ready:       e.Conditions.Ready == nil || *e.Conditions.Ready,
			serving:     e.Conditions.Serving == nil || *e.Conditions.Serving,
			terminating: e.Conditions.Terminating != nil && *e.Conditions.Terminating,
			local:       e.NodeName != nil && *e.NodeName == nodeName,
		}
		if e.Hints != nil {
			for _, h := range e.Hints.ForZones {
				f.zones = addName(f.zones, h.Name)
			}
			for _, h := range e.Hints.ForNodes {
				f.nodes = addName(f.nodes, h.Name)
			}
		}
		out = append(out, f)
	}
	return out
}

// addName adds a name to a list. Two lists of the same names in another order
// count as different, which costs a comparison and no correctness.
func addName(list, name string) string { return list + "," + name }
