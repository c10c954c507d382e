// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// cpu returns what this process has used so far.
func cpu(t testing.TB) time.Duration {
	t.Helper()
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// BenchmarkRepair is the cost of a repair pass with 10,000 Services of 10 endpoints:
// when nobody has written anything, and when every row must be looked at.
func BenchmarkRepair(b *testing.B) {
	a := filled(b, 10_000, 10)
	for _, bench := range []struct {
		name   string
		before func()
	}{{"quiet", func() {}}, {"every row", func() { a.proven = proven{} }}} {
		b.Run(bench.name, func(b *testing.B) {
			a.repair()
			start := cpu(b)
			for b.Loop() {
				bench.before()
				a.repair()
			}
			b.ReportMetric(float64((cpu(b)-start).Microseconds())/1000/float64(b.N), "cpu-ms/op")
		})
	}
}

// BenchmarkLook is the cost of looking after hooks and pins, which is done every
// checkEvery.
func BenchmarkLook(b *testing.B) {
	a := filled(b, 1, 1)
	start := cpu(b)
	for b.Loop() {
		a.lookAfter()
	}
	b.ReportMetric(float64((cpu(b)-start).Microseconds())/float64(b.N), "cpu-µs/op")
}

// filled returns an agent whose Services are in the kernel.
func filled(t testing.TB, services, endpoints int) *agent {
	t.Helper()
	cgroup := testutil.Cgroup(t)
	on, err := attach.OpenCgroup(cgroup.Path())
	if err != nil {
		t.Fatal(err)
	}
	root := testutil.BPFRoot(t)
	dp, err := datapath.Open(datapath.Config{Root: root, CgroupID: on.ID})
	if err != nil {
		t.Fatal(err)
	}
	a := newAgent(t.Context(), dp, Config{BPFRoot: root, CgroupRoot: cgroup.Path(), RepairEvery: time.Hour}, zap.NewNop())
	t.Cleanup(func() { a.guardian.close(); _ = dp.Close() })
	if err := a.adopt(datapath.AgentState{}); err != nil {
		t.Fatal(err)
	}
	a.cgroup, a.cgroupRoot = on, cgroup.Path()
	if err := a.attachAtStart(); err != nil {
		t.Fatal(err)
	}
	for i := range services {
		name := lb.Name{Namespace: "namespace", Name: fmt.Sprintf("service-%d", i)}
		a.store.SetService(lb.Service{
			Name: name, ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})},
			Ports: []lb.Port{{Name: "web", Protocol: lb.TCP, Number: 80}},
		})
		slice := lb.Slice{
			Name: name, Service: name.Name, Family: lb.IPv4,
			Ports: []lb.SlicePort{{Name: "web", Protocol: lb.TCP, Number: 8080}},
		}
		for e := range endpoints {
			slice.Endpoints = append(slice.Endpoints, lb.Endpoint{
				Addr: netip.AddrFrom4([4]byte{10, byte(100 + e), byte(i >> 8), byte(i)}), Ready: true, Serving: true,
			})
		}
		a.store.SetSlice(slice)
	}
	a.synced = synced{true, true, true, true, true}
	a.apply(time.Now())
	if len(a.failing) > 0 || a.reconciler.Pending() {
		t.Fatalf("not all is in the kernel: %v", a.failing)
	}
	return a
}
