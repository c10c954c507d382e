// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/flows"
)

func TestPacketPathByFlagsAndFile(t *testing.T) {
	const file = `
clusterCIDR: 10.244.0.0/16
conntrack: {tcpEstablishedTimeout: 2h, tcpCloseWaitTimeout: 0s, udpTimeout: 11s, udpStreamTimeout: 3m}
`
	standard := flows.Timeouts{TCPEstablished: 24 * time.Hour, TCPCloseWait: time.Hour}
	ports := datapath.PortRange{First: 61000, Last: 65535}
	for _, tt := range []struct {
		name, file string
		flags      []string
		off        bool
		devices    string
		ports      datapath.PortRange
		inside     []netip.Prefix
		timeouts   flows.Timeouts
	}{
		{name: "nothing said", devices: "auto", ports: ports, timeouts: standard},
		{
			name:  "all by flags",
			flags: []string{"--packet-path=off", "--devices=eth0, cali*", "--snat-ports=1-1", "--cluster-cidr=10.0.0.1/8, fd00::/48"},
			off:   true, devices: "eth0,cali*", ports: datapath.PortRange{First: 1, Last: 1},
			inside: prefixes("10.0.0.0/8", "fd00::/48"), timeouts: standard,
		},
		{
			name: "what a file says", file: file, devices: "auto", ports: ports, inside: prefixes("10.244.0.0/16"),
			timeouts: flows.Timeouts{TCPEstablished: 2 * time.Hour, UDP: 11 * time.Second, UDPStream: 3 * time.Minute},
		},
		{
			name: "a flag beats the file, also to say that nobody is", file: file, flags: []string{"--cluster-cidr="}, devices: "auto", ports: ports,
			timeouts: flows.Timeouts{TCPEstablished: 2 * time.Hour, UDP: 11 * time.Second, UDPStream: 3 * time.Minute},
		},
		{
			name: "a file that tells pods by their bridge", devices: "auto", ports: ports, timeouts: standard,
			file: "clusterCIDR: 10.0.0.0/8\ndetectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := settingsOf(t, tt.file, tt.flags...)
			if err != nil {
				t.Fatal(err)
			}
			p := s.agent.Packets
			if p.On == tt.off || p.Devices.String() != tt.devices || p.SNATPorts != tt.ports {
				t.Errorf("on is %v, devices are %q, ports %v", p.On, p.Devices, p.SNATPorts)
			}
			equal := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
			if diff := cmp.Diff(tt.inside, p.ClusterCIDRs, equal); diff != "" {
				t.Errorf("cluster CIDRs (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.timeouts, p.Timeouts); diff != "" {
				t.Errorf("timeouts (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPacketPathFlagsThatMeanNothingAreNamed(t *testing.T) {
	for flag, want := range map[string]string{
		"--packet-path=maybe":      "neither on nor off",
		"--packet-path=":           "neither on nor off",
		"--devices=":               "--devices",
		"--devices=eth0,auto":      "auto stands alone",
		"--devices=a/b":            "no name or pattern",
		"--snat-ports=":            "not the first and the last port",
		"--snat-ports=61000":       "not the first and the last port",
		"--snat-ports=0-5":         `port "0" is not`,
		"--snat-ports=1-65536":     `port "65536" is not`,
		"--snat-ports=a-b":         `port "a" is not`,
		"--snat-ports=9-5":         "9, the first port, is above 5",
		"--cluster-cidr=10.0.0.0":  "not a CIDR",
		"--cluster-cidr=10.0.0/8,": "not a CIDR",
	} {
		_, err := settingsOf(t, "", flag)
		name, _, _ := strings.Cut(flag, "=")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%s: %v, want %q", flag, err, want)
		}
	}
}
