// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"

	"github.com/cilium/ebpf"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// ours tells whether we could have written a key: decoded and encoded again it is
// the same, byte by byte. Several keys can decode to one row: they differ in
// padding, after the end of a name, in the bits behind a prefix. Taken for that row,
// a stranger's key would hide ours, or be deleted again and again and never go.
func ours[K comparable, T any](key K, decode func(K) T, encode func(T) K) bool {
	return encode(decode(key)) == key
}

// eachOurs is each for rows whose keys we could have written.
func eachOurs[K comparable, V, T any](m *ebpf.Map, decode func(K) T, encode func(T) K, f func(T, *V)) error {
	return each(m, func(k *K, v *V) {
		if ours(*k, decode, encode) {
			f(decode(*k), v)
		}
	})
}

// ExpelStrangers deletes the rows that we cannot have written, which Load leaves
// out, and returns how many each table had, without examples: those whose keys are
// not ours and names without a name. One in source_ranges can be for all services at
// once. It is for the goroutine that writes.
func (d *Datapath) ExpelStrangers() (expelled []lb.Damage, err error) {
	for _, from := range []struct {
		table string
		expel func(*Datapath, string) (int, error)
	}{
		{bpfMapFrontends, expelFrom(foreign[bpfFrontend](decodeFrontendKey, encodeFrontendKey))},
		{bpfMapMembers, expelFrom(foreign[uint8](decodeMember, encodeMember))},
		{bpfMapSourceRanges, expelFrom(foreign[uint8](decodeSource, encodeSource))},
		{bpfMapServiceCidrs, expelFrom(foreign[uint8](decodeCIDR, encodeCIDR))},
		{bpfMapProblems, expelFrom(foreign[bpfProblem](decodeObjectKey, encodeObjectKey))},
		{bpfMapNames, expelFrom(func(_ *uint32, v *bpfServiceName) bool { return nameless(v) })},
	} {
		n, failed := from.expel(d, from.table)
		if n > 0 {
			expelled = append(expelled, lb.Damage{Table: from.table, Rows: n})
		}
		err = errors.Join(err, failed)
	}
	if len(expelled) > 0 {
		// Whatever is inserted next may take their places.
		err = errors.Join(err, d.WaitReaders())
	}
	return expelled, err
}

// nameless tells whether a row of names says nothing.
func nameless(n *bpfServiceName) bool { return decodeServiceName(n) == (lb.ServicePort{}) }

// foreign returns what tells the rows whose keys are not ours.
func foreign[V any, K comparable, T any](decode func(K) T, encode func(T) K) func(*K, *V) bool {
	return func(k *K, _ *V) bool { return !ours(*k, decode, encode) }
}

// expelFrom returns what deletes the strangers of a table.
func expelFrom[K, V any](stranger func(*K, *V) bool) func(*Datapath, string) (int, error) {
	return func(d *Datapath, table string) (n int, err error) {
		var keys []K
		err = each(d.maps[table], func(k *K, v *V) {
			if stranger(k, v) {
				keys = append(keys, *k)
			}
		})
		for _, key := range keys {
			removed, failed := d.remove(table, "a stranger's row", &key)
			if removed {
				n++
			}
			err = errors.Join(err, failed)
		}
		return n, err
	}
}
