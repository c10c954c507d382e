// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// AffinityEntry says which backend of a service a client has. Whether the client
// still gets it depends on the service's timeout and set: nobody removes entries
// that are too old or whose backend has gone.
type AffinityEntry struct {
	// Netns is the cookie of the client's network namespace; 0 for a client that
	// is known by its address alone.
	Netns uint64
	// Client is an address of the client; the zero Addr when it had none to show.
	Client  netip.Addr
	Service lb.ServiceID
	Backend lb.Backend
	Age     time.Duration // since the last new connection, in whole seconds
}

// Affinities returns all entries in no order. Programs go on writing meanwhile;
// it tells what was there at some time during the call.
func (t *Tables) Affinities() ([]AffinityEntry, error) {
	var out []AffinityEntry
	err := t.eachAffinity(func(_ bpfAffinityKey, e AffinityEntry) { out = append(out, e) })
	return out, err
}

// eachAffinity calls f for every entry.
func (t *Tables) eachAffinity(f func(bpfAffinityKey, AffinityEntry)) error {
	// The clock of bpf_ktime_get_ns.
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("read the clock of affinity entries: %w", err)
	}
	return each(t.maps[bpfMapAffinity], func(k *bpfAffinityKey, v *bpfAffinity) {
		f(*k, decodeAffinity(k, v, uint32(now.Sec)))
	})
}

// ForgetAffinities deletes the entries for which gone is true and returns how
// many it has deleted. The entry deleted may be newer than the one gone was asked
// about: a client that has connected meanwhile chooses anew.
func (d *Datapath) ForgetAffinities(gone func(AffinityEntry) bool) (n int, err error) {
	var keys []bpfAffinityKey
	err = d.eachAffinity(func(k bpfAffinityKey, e AffinityEntry) {
		if gone(e) {
			keys = append(keys, k)
		}
	})
	if err != nil {
		return 0, err
	}
	for _, k := range keys {
		switch err := d.maps[bpfMapAffinity].Delete(&k); {
		case err == nil:
			n++
		case !errors.Is(err, ebpf.ErrKeyNotExist): // it made room for another
			return n, fmt.Errorf("delete affinity for service ID %d: %w", k.ServiceId, err)
		}
	}
	return n, nil
}
