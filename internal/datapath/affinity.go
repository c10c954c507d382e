// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

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
	now, err := programClock()
	if err != nil {
		return nil, err
	}
	var out []AffinityEntry
	err = each(t.maps[bpfMapAffinity], func(k *bpfAffinityKey, v *bpfAffinity) {
		out = append(out, decodeAffinity(k, v, now))
	})
	return out, err
}

// ForgetAffinities deletes the entries for which gone is true and returns how
// many it has deleted. gone is asked again about an entry that a client has
// changed meanwhile: it connects all the time, and most of all when its backend
// has gone.
func (d *Datapath) ForgetAffinities(gone func(AffinityEntry) bool) (n int, err error) {
	now, err := programClock()
	if err != nil {
		return 0, err
	}
	var keys []bpfAffinityKey
	err = each(d.maps[bpfMapAffinity], func(k *bpfAffinityKey, v *bpfAffinity) {
		if gone(decodeAffinity(k, v, now)) {
			keys = append(keys, *k)
		}
	})
	if err != nil {
		return 0, err
	}
	for _, k := range keys {
		forgotten, err := d.forgetAffinity(&k, func(v *bpfAffinity) bool { return gone(decodeAffinity(&k, v, now)) })
		if err != nil {
			return n, fmt.Errorf("delete affinity for service ID %d: %w", k.ServiceId, err)
		}
		if forgotten {
			n++
		}
	}
	return n, nil
}

// forgetAffinity deletes an entry if it is gone, as far as that can be had: the
// kernel knows no deleting under a condition. One that turns out to be another
// when it has been deleted is put back, unless there is a newer one by then.
func (d *Datapath) forgetAffinity(k *bpfAffinityKey, gone func(*bpfAffinity) bool) (bool, error) {
	m := d.maps[bpfMapAffinity]
	var v bpfAffinity
	err := m.Lookup(k, &v)
	if err == nil && !gone(&v) {
		return false, nil
	}
	if err == nil {
		err = m.LookupAndDelete(k, &v) // Linux 5.14
	}
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist): // it has made room for another
		return false, nil
	case err != nil:
		return false, err
	case gone(&v):
		return true, nil
	}
	if err := m.Update(k, &v, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return false, err
	}
	return false, nil
}
