// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/config"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/flows"
)

// packets puts together what flags and file say of the packet path. The file does
// not speak of the path itself, but of who is inside and how long flows last.
func (f agentFlags) packets(c config.Config, given func(flag string) bool) (agent.Packets, error) {
	p := agent.Packets{
		ClusterCIDRs: c.DetectLocal.Inside(),
		Timeouts: flows.Timeouts{
			TCPEstablished: c.Conntrack.TCPEstablishedTimeout, TCPCloseWait: c.Conntrack.TCPCloseWaitTimeout,
			UDP: c.Conntrack.UDPTimeout, UDPStream: c.Conntrack.UDPStreamTimeout,
		},
	}
	switch f.packetPath {
	case packetsOn:
		p.On = true
	case packetsOff:
	default:
		return p, fmt.Errorf("--packet-path %q is neither %s nor %s", f.packetPath, packetsOn, packetsOff)
	}
	var err error
	if p.Devices, err = attach.ParseDevices(f.devices); err != nil {
		return p, fmt.Errorf("--%w", err)
	}
	if p.SNATPorts, err = parsePorts(f.snatPorts); err != nil {
		return p, fmt.Errorf("--snat-ports %q: %w", f.snatPorts, err)
	}
	if given("cluster-cidr") {
		if p.ClusterCIDRs, err = parseCIDRs(f.clusterCIDR); err != nil {
			return p, fmt.Errorf("--cluster-cidr %q: %w", f.clusterCIDR, err)
		}
	}
	return p, nil
}

// What --packet-path may be.
const (
	packetsOn  = "on"
	packetsOff = "off"
)

// parsePorts reads a range of ports, FIRST-LAST.
func parsePorts(text string) (datapath.PortRange, error) {
	var r datapath.PortRange
	first, last, found := strings.Cut(text, "-")
	if !found {
		return r, errors.New("not the first and the last port, such as 61000-65535")
	}
	for _, end := range []struct {
		text string
		port *uint16
	}{{first, &r.First}, {last, &r.Last}} {
		n, err := strconv.ParseUint(strings.TrimSpace(end.text), 10, 16)
		if err != nil || n == 0 {
			return r, fmt.Errorf("port %q is not a number from 1 to 65535", end.text)
		}
		*end.port = uint16(n)
	}
	if r.First > r.Last {
		return r, fmt.Errorf("%d, the first port, is above %d, the last", r.First, r.Last)
	}
	return r, nil
}

// parseCIDRs reads CIDRs with commas between them; there may be none.
func parseCIDRs(text string) ([]netip.Prefix, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	var out []netip.Prefix
	for word := range strings.SplitSeq(text, ",") {
		p, err := parseCIDR(word)
		if err != nil {
			return nil, fmt.Errorf("%q is not a CIDR such as 10.244.0.0/16", word)
		}
		out = append(out, p)
	}
	return out, nil
}

// parseCIDR reads a CIDR and masks it. The result is never within ::ffff:0:0/96.
func parseCIDR(word string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(strings.TrimSpace(word))
	if err != nil {
		return p, err
	}
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}
