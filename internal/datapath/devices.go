// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Device is what the packet path knows of a network device of the node.
type Device struct {
	Index uint32
	Pod   bool // behind it are pods of this node and nothing else
	// L3Index is the device that routes are of: the device's bridge, or itself.
	L3Index uint32
	// Source4 and Source6 are what the node sends from by this device, where the
	// kernel's routes cannot tell (before Linux 6.7); the zero Addr for none.
	Source4, Source6 netip.Addr
	MAC              [6]byte // of the device L3Index; zero where it has none
}

// SetDevices makes the rows those of devices, which have an Index each. It writes
// and deletes what differs. After an error it can be called again.
func (t *Tables) SetDevices(devices []Device) error {
	want := make(map[uint32]bpfDevice, len(devices))
	for _, d := range devices {
		want[d.Index] = encodeDevice(d)
	}
	return setRows(t, bpfMapDevices, want, func(index uint32) string { return strconv.FormatUint(uint64(index), 10) })
}

// SetClusterCIDRs makes the rows those of prefixes: clients in them are inside
// clients wherever their packets arrive. It writes and deletes what differs. After
// an error it can be called again.
func (t *Tables) SetClusterCIDRs(prefixes []netip.Prefix) error {
	want := make(map[bpfCidrKey]uint8, len(prefixes))
	for _, p := range prefixes {
		want[encodeCIDR(p)] = present
	}
	return setRows(t, bpfMapClusterCidrs, want, func(k bpfCidrKey) string { return decodeCIDR(k).String() })
}

// named is the key of a row as errors name it.
type named string

func (n named) String() string { return string(n) }

// setRows makes the rows of a table that few read and that is seldom written those
// wanted. It asks the kernel what is there, so that it also repairs. Rows come before
// others go, unless the table has no room for them.
func setRows[K, V comparable](t *Tables, table string, want map[K]V, name func(K) string) error {
	held := map[K]V{}
	if err := each(t.table(table), func(k *K, v *V) { held[*k] = *v }); err != nil {
		return err
	}
	put := func() error {
		for k, v := range want {
			if old, there := held[k]; there && old == v {
				continue
			}
			if err := t.put(table, named(name(k)), &k, &v); err != nil {
				return err
			}
			held[k] = v
		}
		return nil
	}
	full := put()
	if full != nil && !isFull(full) {
		return full
	}
	for k := range held {
		if _, wanted := want[k]; wanted {
			continue
		}
		if err := t.drop(table, name(k), &k); err != nil {
			return err
		}
	}
	if full != nil {
		return put()
	}
	return nil
}

// isFull tells whether a table has no room. A hash says the one, an LPM trie the
// other.
func isFull(err error) bool { return errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) }

// Devices returns the devices the packet path knows, sorted by index.
func (t *Tables) Devices() ([]Device, error) {
	var out []Device
	err := each(t.table(bpfMapDevices), func(k *uint32, v *bpfDevice) { out = append(out, decodeDevice(*k, v)) })
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	slices.SortFunc(out, func(a, b Device) int { return cmp.Compare(a.Index, b.Index) })
	return out, nil
}

// ClusterCIDRs returns what SetClusterCIDRs has set, sorted.
func (t *Tables) ClusterCIDRs() ([]netip.Prefix, error) {
	var out []netip.Prefix
	if err := each(t.table(bpfMapClusterCidrs), func(k *bpfCidrKey, _ *uint8) { out = append(out, decodeCIDR(*k)) }); err != nil {
		return nil, fmt.Errorf("list cluster CIDRs: %w", err)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out, nil
}
