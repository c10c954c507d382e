// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"slices"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func TestExampleIsAFrontendThatLeavesNothingBehind(t *testing.T) {
	w := newWorld(t, 0)
	if key, _, ok := w.rec.Example(lb.IPv4); ok {
		t.Errorf("%v without any Service", key)
	}
	sticky := svcWith("sticky", "10.96.0.2", lb.TCP, 80)
	sticky.Affinity = 60
	for _, svc := range []lb.Service{
		sticky, svcWith("dns", "10.96.0.1", lb.UDP, 53), svcWith("empty", "10.96.0.3", lb.TCP, 80),
		svcWith("web", "10.96.0.4", lb.TCP, 80), svcWith("other", "10.96.0.5", lb.TCP, 80),
	} {
		w.store.SetService(svc)
	}
	w.store.SetSlice(sliceOf("sticky", lb.TCP, 1))
	w.store.SetSlice(sliceOf("dns", lb.UDP, 1))
	w.store.SetSlice(sliceOf("web", lb.TCP, 1, 2))
	w.store.SetSlice(sliceOf("other", lb.TCP, 1, 2))
	w.apply()
	seen := map[string]bool{}
	for range 1000 {
		key, backends, ok := w.rec.Example(lb.IPv4)
		if !ok || key.Port != 80 || key.Protocol != lb.TCP {
			t.Fatalf("%v, %v", key, ok)
		}
		seen[key.VIP.String()] = true
		want := []lb.Backend{{Addr: sliceOf("web", lb.TCP, 1).Endpoints[0].Addr, Port: 9000}, {Addr: sliceOf("web", lb.TCP, 2).Endpoints[0].Addr, Port: 9000}}
		if !slices.Equal(backends, want) {
			t.Fatalf("backends %v, want %v", backends, want)
		}
	}
	if len(seen) != 2 || !seen["10.96.0.4"] || !seen["10.96.0.5"] {
		t.Errorf("examples are of %v, want of both Services that have TCP backends and no affinity", seen)
	}
	if key, _, ok := w.rec.Example(lb.IPv6); ok {
		t.Errorf("%v is of IPv6", key)
	}
}
