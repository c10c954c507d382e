// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// limitFlags say which addresses and ports no Service gets.
type limitFlags struct{ externalIPs, loadBalancerIPs, reserved string }

// limitFlagNames are the flags that add makes.
var limitFlagNames = []string{"external-ip-cidrs", "load-balancer-cidrs", "reserved"}

// What the flags with CIDRs may say in place of these.
const (
	allAddresses = "all"
	noAddresses  = "none"
)

// kubelet is what nobody gets unless the flag says otherwise: with the kubelet's
// port taken, nobody can look into the node's pods any more.
const kubelet = ":10250"

// add makes the flags. Each usage begins with prefix.
func (l *limitFlags) add(fs *pflag.FlagSet, prefix string) {
	fs.StringVar(&l.externalIPs, limitFlagNames[0], allAddresses, prefix+"where externalIPs of Services may be: `CIDR,…`, or all, or none")
	fs.StringVar(&l.loadBalancerIPs, limitFlagNames[1], allAddresses, prefix+"where load-balancer IPs of Services may be: `CIDR,…`, or all, or none")
	fs.StringVar(&l.reserved, limitFlagNames[2], kubelet, prefix+"`ADDRESS:PORT,…` that no Service gets, :PORT for every address of the node, beside the API server's and the agent's own; empty for none")
}

// limits reads the flags.
func (l limitFlags) limits() (out lb.Limits, err error) {
	if out.ExternalIPs, err = parseAllowed(l.externalIPs); err != nil {
		return out, fmt.Errorf("--%s %q: %w", limitFlagNames[0], l.externalIPs, err)
	}
	if out.LoadBalancerIPs, err = parseAllowed(l.loadBalancerIPs); err != nil {
		return out, fmt.Errorf("--%s %q: %w", limitFlagNames[1], l.loadBalancerIPs, err)
	}
	if strings.TrimSpace(l.reserved) == "" {
		return out, nil
	}
	for word := range strings.SplitSeq(l.reserved, ",") {
		r, err := parseReserved(strings.TrimSpace(word))
		if err != nil {
			return out, fmt.Errorf("--%s %q: %w", limitFlagNames[2], l.reserved, err)
		}
		out.Reserved = append(out.Reserved, r)
	}
	return out, nil
}

// parseAllowed reads CIDRs, or a word in their place.
func parseAllowed(text string) (lb.Allowed, error) {
	switch strings.TrimSpace(text) {
	case allAddresses:
		return lb.Allowed{}, nil
	case noAddresses:
		return lb.Allowed{Limited: true}, nil
	case "":
		return lb.Allowed{}, fmt.Errorf("say %s, %s, or CIDRs such as 192.0.2.0/24", allAddresses, noAddresses)
	}
	cidrs, err := parseCIDRs(text)
	if err != nil {
		return lb.Allowed{}, fmt.Errorf("%w, and not %s or %s alone", err, allAddresses, noAddresses)
	}
	return lb.Allowed{Limited: true, CIDRs: cidrs}, nil
}

// parseReserved reads ADDRESS:PORT, or :PORT.
func parseReserved(word string) (lb.Reservation, error) {
	r, err := reservation(word, "--reserved has it")
	if err != nil {
		return r, fmt.Errorf("%q is not an address and a port, such as 192.0.2.1:22 or [2001:db8::1]:22, nor :22 for every address of the node", word)
	}
	return r, nil
}

// reservation reads an address to listen on, ADDRESS:PORT; the unspecified address,
// like none, is for every address of the node.
func reservation(address, why string) (lb.Reservation, error) {
	host, number, err := net.SplitHostPort(address)
	if err != nil {
		return lb.Reservation{}, err
	}
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil || port == 0 {
		return lb.Reservation{}, errors.New("port is not a number from 1 to 65535")
	}
	r := lb.Reservation{Port: uint16(port), Why: why}
	if host == "" {
		return r, nil
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" {
		return r, errors.New("not an IP address")
	}
	if !addr.IsUnspecified() {
		r.Addr = addr.Unmap()
	}
	return r, nil
}

// reserveListeners adds where the agent itself listens. The addresses have been
// checked; empty ones are for nowhere.
func reserveListeners(l *lb.Limits, healthz, metrics string) {
	for _, listener := range []struct{ address, why string }{
		{healthz, "the agent's /healthz listens there"}, {metrics, "the agent's metrics listen there"},
	} {
		if r, err := reservation(listener.address, listener.why); err == nil {
			l.Reserved = append(l.Reserved, r)
		}
	}
}
