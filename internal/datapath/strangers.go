// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"

	"github.com/cilium/ebpf"
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

// ExpelStrangers deletes the rows with keys that we cannot have written, which Load
// leaves out, and returns how many there were. One in source_ranges can be for all
// services at once. It is for the goroutine that writes.
func (d *Datapath) ExpelStrangers() (n int, err error) {
	for _, expel := range []func() (int, error){
		func() (int, error) {
			return expelFrom[uint64](d, bpfMapFrontends, decodeFrontendKey, encodeFrontendKey)
		},
		func() (int, error) { return expelFrom[uint8](d, bpfMapMembers, decodeMember, encodeMember) },
		func() (int, error) { return expelFrom[uint8](d, bpfMapSourceRanges, decodeSource, encodeSource) },
		func() (int, error) { return expelFrom[uint8](d, bpfMapServiceCidrs, decodeCIDR, encodeCIDR) },
		func() (int, error) { return expelFrom[bpfProblem](d, bpfMapProblems, decodeObjectKey, encodeObjectKey) },
	} {
		removed, failed := expel()
		n, err = n+removed, errors.Join(err, failed)
	}
	if n > 0 {
		// Whatever is inserted next may take their places.
		err = errors.Join(err, d.WaitReaders())
	}
	return n, err
}

// expelFrom is ExpelStrangers for one table, whose values have the size of V.
func expelFrom[V any, K comparable, T any](d *Datapath, table string, decode func(K) T, encode func(T) K) (n int, err error) {
	var strangers []K
	err = each(d.maps[table], func(k *K, _ *V) {
		if !ours(*k, decode, encode) {
			strangers = append(strangers, *k)
		}
	})
	for _, key := range strangers {
		removed, failed := d.remove(table, decode(key), &key)
		if removed {
			n++
		}
		err = errors.Join(err, failed)
	}
	return n, err
}
