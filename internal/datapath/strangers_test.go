// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"net/netip"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// What the fuzzer of Load found: keys that decode to a row of ours, hide it, and
// cannot be deleted by what they decode to.
func TestRowsOfStrangersAreLeftOutAndDeleted(t *testing.T) {
	testutil.RequireRoot(t)
	d := openDatapath(t, testutil.BPFRoot(t), junkSizes)
	frontend := lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.1"), Port: 80, Protocol: lb.TCP}
	member := lb.Member{Service: 1, Backend: lb.Backend{Addr: netip.MustParseAddr("10.244.0.1"), Port: 80}}
	source := lb.Source{Service: 1, Prefix: netip.MustParsePrefix("192.0.2.0/24")}
	cidr, service := netip.MustParsePrefix("10.96.0.0/12"), lb.Name{Namespace: "ns", Name: "web"}
	fatal(t, d.SetFrontend(frontend, lb.Frontend{Service: 1, Kind: lb.KindClusterIP}))
	fatal(t, d.SetMember(member))
	fatal(t, d.SetSource(source))
	fatal(t, d.SetServiceCIDR(cidr))
	fatal(t, d.SetProblem(service, "ours"))
	want, err := d.Load()
	fatal(t, err)

	padded := encodeFrontendKey(frontend)
	padded.Pad[4] = 1
	memberPadded := encodeMember(member)
	memberPadded.Pad = 1
	hostBits := encodeCIDR(netip.MustParsePrefix("172.16.0.0/12"))
	hostBits.Addr.B[15] = 1
	behind, err := encodeObjectName(service)
	fatal(t, err)
	behind.Namespace[63] = 'x'
	endless := behind
	for i := range endless.Name {
		endless.Name[i] = 'x'
	}
	strangers := []struct {
		name, table string
		key, value  any
	}{
		{"padding of a frontend", bpfMapFrontends, &padded, &bpfFrontend{ServiceId: 2}},
		{"padding of a member", bpfMapMembers, &memberPadded, present},
		{"a source range for all services", bpfMapSourceRanges, &bpfSourceKey{}, present},
		{"a source range for every second service", bpfMapSourceRanges, &bpfSourceKey{Prefixlen: 1}, present},
		{"a source range for two services", bpfMapSourceRanges, &bpfSourceKey{Prefixlen: 31}, present},
		{"bits behind a prefix", bpfMapServiceCidrs, &hostBits, present},
		{"text after the end of a name", bpfMapProblems, &behind, &bpfProblem{}},
		{"a service ID without a name", bpfMapNames, uint32(0), &bpfServiceName{Pad: [2]uint8{1}}},
		{"a name without end", bpfMapProblems, &endless, &bpfProblem{}},
	}
	for _, s := range strangers {
		if err := d.maps[s.table].Put(s.key, s.value); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	unknown, err := d.service(81)
	fatal(t, err)
	unknown.Options = 1 << 63
	same := func(when string) {
		t.Helper()
		got, err := d.Load()
		fatal(t, err)
		if n := got.Differences(want); n > 0 {
			t.Errorf("%s: %d rows differ; got\n%v\nwant\n%v", when, n, got, want)
		}
	}
	same("with strangers")
	expelled, err := d.ExpelStrangers()
	n := 0
	for _, damage := range expelled {
		n += damage.Rows
	}
	if n != len(strangers) || err != nil {
		t.Errorf("%v were deleted, %v; want %d", expelled, err, len(strangers))
	}
	for _, s := range strangers {
		if found(t, d, s.table, s.key) {
			t.Errorf("%s is still there", s.name)
		}
	}
	same("without them")
	if more, err := d.ExpelStrangers(); len(more) > 0 || err != nil {
		t.Errorf("more were deleted: %v, %v", more, err)
	}
}
