// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"net/netip"
	"slices"
	"testing"
)

// wantWrites calls f and wants it to write or delete n rows of a table.
func wantWrites(t *testing.T, d *Datapath, table string, n uint64, f func() error) {
	t.Helper()
	before := d.Writes()[table]
	fatal(t, f())
	if got := d.Writes()[table] - before; got != n {
		t.Errorf("%d writes to %s, want %d", got, table, n)
	}
}

func testDevices(t *testing.T, d *Datapath) {
	uplink := Device{
		Index: 2, L3Index: 2, MAC: [6]byte{2, 0, 0, 0, 0, 1},
		Source4: netip.MustParseAddr("192.0.2.1"), Source6: netip.MustParseAddr("2001:db8::1"),
	}
	pod := Device{Index: 7, Pod: true, L3Index: 5, MAC: [6]byte{2, 0, 0, 0, 0, 5}}
	tunnel := Device{Index: 9, L3Index: 9, Source4: netip.MustParseAddr("10.244.0.0")}
	moved := pod
	moved.L3Index = 7
	for _, tc := range []struct {
		name    string
		devices []Device
		writes  uint64
	}{
		{"all are new", []Device{uplink, pod, tunnel}, 3},
		{"none has changed", []Device{tunnel, pod, uplink}, 0},
		{"one has changed", []Device{uplink, moved, tunnel}, 1},
		{"one is gone", []Device{uplink, moved}, 1},
		{"one takes another's place", []Device{uplink, tunnel}, 2},
		{"none is left", nil, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wantWrites(t, d, bpfMapDevices, tc.writes, func() error { return d.SetDevices(tc.devices) })
			want := slices.Clone(tc.devices)
			slices.SortFunc(want, func(a, b Device) int { return int(a.Index) - int(b.Index) })
			got, err := d.Devices()
			fatal(t, err)
			if !slices.Equal(got, want) {
				t.Errorf("the kernel has %+v, want %+v", got, want)
			}
		})
	}
}

func testClusterCIDRs(t *testing.T, d *Datapath) {
	p := netip.MustParsePrefix
	size := int(d.maps[bpfMapClusterCidrs].MaxEntries())
	full := func(first byte) (all []netip.Prefix) {
		for i := range size {
			all = append(all, netip.PrefixFrom(netip.AddrFrom4([4]byte{first, byte(i), 0, 0}), 16))
		}
		return all
	}
	for _, tc := range []struct {
		name     string
		prefixes []netip.Prefix
		writes   uint64
	}{
		{"all are new", []netip.Prefix{p("10.244.0.0/16"), p("fd00:244::/56")}, 2},
		{"none has changed", []netip.Prefix{p("10.244.0.0/16"), p("fd00:244::/56")}, 0},
		{"bits that do not count are none of a prefix", []netip.Prefix{p("10.244.0.0/16"), p("fd00:244::1/56")}, 0},
		{"a larger one takes the place of one", []netip.Prefix{p("10.0.0.0/8"), p("fd00:244::/56")}, 2},
		{"none is left", nil, 2},
		{"as many as there is room for", full(11), uint64(size)},
		{"as many others", full(12), uint64(2 * size)},
		{"none of these is left", nil, uint64(size)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wantWrites(t, d, bpfMapClusterCidrs, tc.writes, func() error { return d.SetClusterCIDRs(tc.prefixes) })
			var want []netip.Prefix
			for _, p := range tc.prefixes {
				want = append(want, p.Masked())
			}
			got, err := d.ClusterCIDRs()
			fatal(t, err)
			if !slices.Equal(got, want) {
				t.Errorf("the kernel has %v, want %v", got, want)
			}
		})
	}
}
