// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"hash/maphash"
	"unsafe"

	"github.com/cilium/ebpf"
)

// digestSeed makes digests of this process, which nobody outside can foresee.
var digestSeed = maphash.MakeSeed()

// Digest returns a number that is the same for as long as nobody changes a row of the
// tables the agent writes, and the gate that is derived from them. To compare it is
// much cheaper than Load, since no row is decoded.
func (t *Tables) Digest() (uint64, error) {
	var sum uint64
	err := errors.Join(
		digestRows[bpfFrontendKey, bpfFrontend](&sum, t.maps[bpfMapFrontends]),
		digestRows[bpfMemberKey, uint8](&sum, t.maps[bpfMapMembers]),
		digestRows[bpfSourceKey, uint8](&sum, t.maps[bpfMapSourceRanges]),
		digestRows[bpfAddr, uint8](&sum, t.maps[bpfMapNodeAddresses]),
		digestRows[bpfCidrKey, uint8](&sum, t.maps[bpfMapServiceCidrs]),
		digestRows[uint32, bpfServiceName](&sum, t.maps[bpfMapNames]),
		digestRows[bpfObjectName, bpfProblem](&sum, t.maps[bpfMapProblems]),
		digestRows[bpfCidrKey, uint8](&sum, t.maps[bpfMapClusterCidrs]),
	)
	for _, mem := range [][]byte{t.services, t.slots, t.had, t.gateMem} {
		sum = sum*31 + maphash.Bytes(digestSeed, mem)
	}
	return sum, err
}

// digestRows adds the rows of a table to a digest. The order in which the kernel
// gives them means nothing.
func digestRows[K, V any](sum *uint64, m *ebpf.Map) error {
	var row struct {
		key   K
		value V
	}
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&row)), unsafe.Sizeof(row))
	var rows uint64
	err := each(m, func(k *K, v *V) {
		row.key, row.value = *k, *v
		rows += maphash.Bytes(digestSeed, raw)
	})
	*sum = *sum*31 + rows
	return err
}
