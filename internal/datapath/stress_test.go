// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

const (
	stressStable = 96  // frontends that always have a backend
	stressTotal  = 192 // with those that come and go
	stressTime   = 2 * time.Minute
	leastBatches = 50 // that are written meanwhile
)

// emulated tells that this is a test machine whose processor may be emulated.
func emulated() bool { return os.Getenv("FAIRLEAD_VM_KERNEL") != "" }

// Readers of two kinds. Those in a hurry make up the number; those that stay
// give a writer that does not wait for them the time for several batches.
var (
	hurrying = bpftestStressIo{Lookups: 2000}
	staying  = bpftestStressIo{Lookups: 16, PauseNs: 5_000_000}
)

// TestReadersMeetNoTornTable lets a reader on every core look up frontends as
// fast as it can while one writer changes the sets of Services, gives addresses
// to other Services, and adds and removes Services, all through the reconciler.
// No reader may see a backend of another frontend, an address with another
// one's port, or nothing where there was always something.
func TestReadersMeetNoTornTable(t *testing.T) {
	w := newStress(t, func(k reconciler.Kernel) reconciler.Kernel { return k })
	many, few := uint64(100_000_000), uint64(30_000)
	if testing.Short() || emulated() {
		many, few = 5_000_000, 3_000
	}
	for _, tc := range []struct {
		name    string
		readers bpftestStressIo
		lookups uint64
	}{{"readers in a hurry", hurrying, many}, {"readers that stay", staying, few}} {
		t.Run(tc.name, func(t *testing.T) {
			batches := w.batches
			enough := func(r bpftestStressResult) bool {
				return r.Lookups >= tc.lookups && r.Absent > 0 && w.batches-batches >= leastBatches
			}
			seen := w.run(t, tc.readers, enough)
			done := enough(seen)
			batches = w.batches - batches
			t.Logf("%v while %d batches were written", seen, batches)
			if seen.errors() != 0 {
				t.Errorf("%v, want no wrong, torn or missing answer", seen)
			}
			if !done {
				t.Errorf("%v during %d batches: too little was done in %s to prove anything", seen, batches, stressTime)
			}
		})
	}
}

// hasty is a kernel whose grace period is over at once.
type hasty struct{ reconciler.Kernel }

func (hasty) WaitReaders() error { return nil }

// TestReadersNoticeAHastyWriter proves that the test above can fail: without
// grace periods slots are used again under the readers' hands.
func TestReadersNoticeAHastyWriter(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("a reader and a writer at the same time need two processors")
	}
	w := newStress(t, func(k reconciler.Kernel) reconciler.Kernel { return hasty{k} })
	seen := w.run(t, staying, func(r bpftestStressResult) bool { return r.errors() > 0 })
	t.Logf("%v while %d batches were written", seen, w.batches)
	if seen.errors() == 0 {
		t.Errorf("%v without a grace period: the test cannot see what it is for", seen)
	}
}

// errors returns the number of answers that no reader may get.
func (r bpftestStressResult) errors() uint64 { return r.Wrong + r.Torn + r.Missing }

func (r bpftestStressResult) String() string {
	return fmt.Sprintf("%d lookups: %d wrong, %d torn, %d missing, %d absent",
		r.Lookups, r.Wrong, r.Torn, r.Missing, r.Absent)
}

// stress is the writer with its readers.
type stress struct {
	datapath   *Datapath
	objects    *bpftestObjects
	store      *lb.Store
	reconciler *reconciler.Reconciler
	random     *rand.Rand
	batches    int
	services   [stressTotal]*lb.Service // nil for one that is away
	made       int                      // Services so far; each has a name of its own
}

func newStress(t *testing.T, wrap func(reconciler.Kernel) reconciler.Kernel) *stress {
	d := openDatapath(t, testutil.BPFRoot(t), Sizes{Frontends: 1024, Services: 512, Slots: 4096, Members: 8192, Peers: 64})
	objects := loadTests(t, d, func(spec *ebpf.CollectionSpec) {
		fatal(t, spec.Variables[bpftestVarStressStable].Set(uint32(stressStable)))
		fatal(t, spec.Variables[bpftestVarStressTotal].Set(uint32(stressTotal)))
	})
	services, slots := d.Limits()
	w := &stress{
		datapath: d, objects: objects, store: lb.NewStore(),
		reconciler: reconciler.New(wrap(d.Tables), reconciler.Limits{Services: services, Slots: slots}),
		random:     rand.New(rand.NewPCG(1, 2)),
	}
	for n := range stressStable {
		w.create(n)
	}
	w.apply(t)
	return w
}

// stressVIP and stressPort are stress_request and stress_port of the program.
func stressVIP(n int) (vip netip.Addr, protocol lb.Protocol) {
	protocol = lb.TCP
	if n&2 != 0 {
		protocol = lb.UDP
	}
	if n&1 != 0 {
		return netip.AddrFrom16([16]byte{0: 0xfd, 13: 96, 14: byte(n >> 8), 15: byte(n)}), protocol
	}
	return netip.AddrFrom4([4]byte{10, 96, byte(n >> 8), byte(n)}), protocol
}

func stressPort(n, k int) uint16 { return 0x8000 | uint16((n*251+k*7919)&0x7fff) }

// create makes a Service with frontend n and a set of backends.
func (w *stress) create(n int) {
	vip, protocol := stressVIP(n)
	w.made++
	w.services[n] = &lb.Service{
		Name:       lb.Name{Namespace: "default", Name: fmt.Sprintf("s%d", w.made)},
		ClusterIPs: []netip.Addr{vip},
		Ports:      []lb.Port{{Protocol: protocol, Number: 80}},
	}
	w.store.SetService(*w.services[n])
	w.change(n)
}

// change gives the Service of frontend n another set of 1 to 12 backends.
func (w *stress) change(n int) {
	vip, protocol := stressVIP(n)
	svc := w.services[n]
	first, count := w.random.IntN(200), 1+w.random.IntN(12)
	// Backends of one port number make one port of a slice each.
	for i := range 12 {
		name := lb.Name{Namespace: "default", Name: fmt.Sprintf("%s-%d", svc.Name.Name, i)}
		if i >= count {
			w.store.DeleteSlice(name)
			continue
		}
		k := first + i
		a := vip.As16()
		a[12], a[13] = 172, byte(k)
		w.store.SetSlice(lb.Slice{
			Name: name, Service: svc.Name.Name, Family: lb.FamilyOf(vip),
			Ports:     []lb.SlicePort{{Protocol: protocol, Number: stressPort(n, k)}},
			Endpoints: []lb.Endpoint{{Addr: netip.AddrFrom16(a).Unmap(), Ready: true, Serving: true}},
		})
	}
}

func (w *stress) remove(n int) {
	name := w.services[n].Name
	w.store.DeleteService(name)
	for i := range 12 {
		w.store.DeleteSlice(lb.Name{Namespace: "default", Name: fmt.Sprintf("%s-%d", name.Name, i)})
	}
	w.services[n] = nil
}

// batch changes a few Services at once.
func (w *stress) batch() {
	for range 1 + w.random.IntN(20) {
		n := w.random.IntN(stressTotal)
		switch {
		case w.services[n] == nil:
			w.create(n)
		case n >= stressStable && w.random.IntN(2) == 0:
			w.remove(n)
		case w.random.IntN(3) == 0: // the address gets another owner
			w.remove(n)
			w.create(n)
		default:
			w.change(n)
		}
	}
}

func (w *stress) apply(t *testing.T) {
	t.Helper()
	result := w.reconciler.Apply(w.store.Changes())
	for name, err := range result.Failed {
		t.Fatalf("batch %d: Service %v: %v", w.batches, name, err)
	}
	// No socket remembers any, so every ID may be used again at once.
	w.reconciler.FreeIDs(func(lb.ServiceID) bool { return false })
	w.batches++
}

// run writes until enough was seen or time is up, and returns what the readers
// saw meanwhile.
func (w *stress) run(t *testing.T, question bpftestStressIo, enough func(bpftestStressResult) bool) bpftestStressResult {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stressTime)
	defer cancel()
	fatal(t, w.objects.StressResults.Put(uint32(0), make([]bpftestStressResult, ebpf.MustPossibleCPU())))
	var readers sync.WaitGroup
	for cpu := range runtime.NumCPU() {
		readers.Go(func() {
			if err := w.read(ctx, cpu, question); err != nil {
				t.Error(err)
				cancel()
			}
		})
	}
	for ctx.Err() == nil && !enough(w.results(t)) {
		w.batch()
		w.apply(t)
	}
	cancel()
	readers.Wait()
	return w.results(t)
}

// read lets the program look up until ctx ends, on one processor.
func (w *stress) read(ctx context.Context, cpu int, question bpftestStressIo) error {
	// Never unlocked: the thread, bound to its processor, ends with the goroutine.
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind to processor %d: %w", cpu, err)
	}
	packet := append(make([]byte, ethernet), bytesOf(&question)...)
	for ctx.Err() == nil {
		switch code, err := w.objects.TestStress.Run(&ebpf.RunOptions{Data: packet}); {
		case err != nil:
			return fmt.Errorf("run reader: %w", err)
		case code != 0:
			return fmt.Errorf("run reader: the program returned %d", code)
		}
	}
	return nil
}

func (w *stress) results(t *testing.T) bpftestStressResult {
	t.Helper()
	var each []bpftestStressResult
	fatal(t, w.objects.StressResults.Lookup(uint32(0), &each))
	var sum bpftestStressResult
	for _, r := range each {
		sum.Lookups += r.Lookups
		sum.Wrong += r.Wrong
		sum.Torn += r.Torn
		sum.Missing += r.Missing
		sum.Absent += r.Absent
	}
	return sum
}
