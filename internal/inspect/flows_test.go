// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

func end(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// flows are those of the fixture: of clients outside with SNAT and without, of a
// pod, of a process on the node, of a Service that has gone, and one in each state.
func flows() []datapath.Flow {
	snat := datapath.Flow{
		Protocol: lb.TCP, Client: end("198.51.100.7:40001"), VIP: end("192.0.2.1:30443"), Backend: end("10.244.2.22:8443"),
		Source: end("192.0.2.1:61017"), Service: 8, Device: 2, Redirect: true, SNAT: true, Outside: true,
		State: datapath.FlowAnswered | datapath.FlowEstablished, Idle: 3 * time.Second, Requests: true, Answers: true,
	}
	local := snat
	local.Client, local.Backend, local.SNAT, local.Redirect = end("198.51.100.7:40002"), end("10.244.0.21:8443"), false, false
	local.Source = local.Client
	v6 := local
	v6.Client, v6.VIP, v6.Backend = end("[2001:db8::7]:40000"), end("[fd00:96::20]:443"), end("[fd00:244::21]:8443")
	v6.Source, v6.Service, v6.Requests, v6.State = v6.Client, 9, false, v6.State|datapath.FlowClientClosed
	pod := datapath.Flow{
		Protocol: lb.UDP, Client: end("10.244.0.33:5000"), Source: end("10.244.0.33:5000"), VIP: end("10.96.0.10:53"),
		Backend: end("10.244.0.3:53"), Service: 3, Device: 7, State: datapath.FlowAnswered, Requests: true, Answers: true,
	}
	unanswered := pod
	unanswered.Client, unanswered.Device, unanswered.State, unanswered.Answers = end("10.244.0.34:5000"), 8, 0, false
	unanswered.Source = unanswered.Client
	node := datapath.Flow{
		Protocol: lb.SCTP, Client: end("192.0.2.1:33333"), Source: end("192.0.2.1:33333"), VIP: end("10.96.0.200:9"),
		Backend: end("10.244.2.22:9"), Service: 17, Node: true, Redirect: true, Idle: 90 * time.Second, Requests: true, Answers: true,
	}
	all := []datapath.Flow{v6, node, unanswered, pod, snat, local}
	for i, state := range []datapath.FlowState{
		datapath.FlowBackendClosed, datapath.FlowClosed, datapath.FlowReset | datapath.FlowClosed,
	} {
		f := local
		f.State |= state
		f.Client = netip.AddrPortFrom(f.Client.Addr(), uint16(50000+i))
		f.Source = f.Client
		all = append(all, f)
	}
	return all
}

func devices() []datapath.Device {
	return []datapath.Device{
		{
			Index: 2, L3Index: 2, MAC: [6]byte{2, 0, 0, 0, 0, 1},
			Source4: netip.MustParseAddr("192.0.2.1"), Source6: netip.MustParseAddr("2001:db8::1"),
		},
		{Index: 7, L3Index: 5, Pod: true, MAC: [6]byte{2, 0, 0, 0, 0, 5}},
		{Index: 8, L3Index: 6, Pod: true, MAC: [6]byte{2, 0, 0, 0, 0, 6}},
		{Index: 9, L3Index: 9, Source4: netip.MustParseAddr("10.244.0.0")},
	}
}

func TestFlowFilter(t *testing.T) {
	of := func(s string) End {
		e, err := ParseEnd(s)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	for _, test := range []struct {
		name   string
		filter FlowFilter
		want   []uint16 // ports of the clients
	}{
		{"all", FlowFilter{}, []uint16{5000, 5000, 33333, 40000, 40001, 40002, 50000, 50001, 50002}},
		{"an address's", FlowFilter{Client: of("10.244.0.33")}, []uint16{5000}},
		{"an address and port's", FlowFilter{Client: of("198.51.100.7:40002")}, []uint16{40002}},
		{"a VIP's", FlowFilter{VIP: of("10.96.0.10")}, []uint16{5000, 5000}},
		{"another port of the VIP's", FlowFilter{VIP: of("10.96.0.10:54")}, nil},
		{"an IPv6 VIP and port's", FlowFilter{VIP: of("[fd00:96::20]:443")}, []uint16{40000}},
		{"an IPv6 client's", FlowFilter{Client: of("2001:db8::7")}, []uint16{40000}},
		{"a backend's", FlowFilter{Backend: of("10.244.2.22:8443")}, []uint16{40001}},
		{"all at once", FlowFilter{of("198.51.100.7"), of("192.0.2.1"), of("10.244.0.21")}, []uint16{40002, 50000, 50001, 50002}},
		{"an IPv4 address, however it is written", FlowFilter{Client: of("::ffff:10.244.0.33")}, []uint16{5000}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []uint16
			for _, f := range flows() {
				if test.filter.shows(&f) {
					got = append(got, f.Client.Port())
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, test.want) {
				t.Errorf("shows the flows of %v, want %v", got, test.want)
			}
		})
	}
	for _, s := range []string{"", "web", "10.0.0.1:", "10.0.0.1:99999", "fd00::1:53:x", "10.0.0.0/8"} {
		if _, err := ParseEnd(s); err == nil {
			t.Errorf("%q is an end", s)
		}
	}
}
