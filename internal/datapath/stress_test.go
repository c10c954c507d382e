// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
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

// Readers of two kinds. Those in a hurry make up the number; those that stay
// give a writer that does not wait for them the time for several batches.
var (
	hurrying = bpftestStressIo{Lookups: 2000}
	staying  = bpftestStressIo{Lookups: 16, PauseNs: 5_000_000}
)

// TestReadersMeetNoTornTable lets a reader on every core look up frontends as
// fast as it can while one writer changes the sets of services side by side,
// lets sides share a block and part again, switches affinities, gives addresses
// to other services, and adds and removes services, all through the reconciler.
// No reader may see a backend of another frontend or of another side, one that is
// not among the members of a service whose clients remember theirs, an address
// with another one's port, or nothing where there was always something.
func TestReadersMeetNoTornTable(t *testing.T) {
	w := newStress(t, func(k reconciler.Kernel) reconciler.Kernel { return k })
	many, few := uint64(100_000_000), uint64(30_000)
	if testing.Short() || testutil.Emulated() {
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
				t.Errorf("%v, want no wrong, torn, missing or strange answer", seen)
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

// forgetful is a kernel that holds no members.
type forgetful struct{ reconciler.Kernel }

func (forgetful) SetMember(lb.Member) error { return nil }

// TestReadersNoticeABadWriter proves that the test above can fail: without grace
// periods slots are used again under the readers' hands, and a backend that is
// given before it is a member is noticed as well.
func TestReadersNoticeABadWriter(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("a reader and a writer at the same time need two processors")
	}
	for _, tc := range []struct {
		name  string
		wrap  func(reconciler.Kernel) reconciler.Kernel
		fault func(bpftestStressResult) uint64
	}{
		{
			"without a grace period", func(k reconciler.Kernel) reconciler.Kernel { return hasty{k} },
			bpftestStressResult.errors,
		},
		{
			"without members", func(k reconciler.Kernel) reconciler.Kernel { return forgetful{k} },
			func(r bpftestStressResult) uint64 { return r.Strange },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newStress(t, tc.wrap)
			seen := w.run(t, staying, func(r bpftestStressResult) bool { return tc.fault(r) > 0 })
			t.Logf("%v while %d batches were written", seen, w.batches)
			if tc.fault(seen) == 0 {
				t.Errorf("%v: the test cannot see what it is for", seen)
			}
		})
	}
}

// errors returns the number of answers that no reader may get.
func (r bpftestStressResult) errors() uint64 { return r.Wrong + r.Torn + r.Missing + r.Strange }

func (r bpftestStressResult) String() string {
	return fmt.Sprintf("%d lookups: %d wrong, %d torn, %d missing, %d strange, %d absent",
		r.Lookups, r.Wrong, r.Torn, r.Missing, r.Strange, r.Absent)
}

// stress is the writer with its readers.
type stress struct {
	datapath   *Datapath
	objects    *bpftestObjects
	reconciler *reconciler.Reconciler
	random     *rand.Rand
	delta      lb.Delta // changes of this batch
	batches    int
	owners     [stressTotal]*lb.Owner // nil for a frontend that is away
	made       int                    // services so far; each has a name of its own
}

func newStress(t *testing.T, wrap func(reconciler.Kernel) reconciler.Kernel) *stress {
	d := openDatapath(t, testutil.BPFRoot(t), Sizes{Frontends: 1024, Services: 512, Slots: 4096, Members: 65536, Peers: 64})
	objects := loadTests(t, d, func(spec *ebpf.CollectionSpec) {
		fatal(t, spec.Variables[bpftestVarStressStable].Set(uint32(stressStable)))
		fatal(t, spec.Variables[bpftestVarStressTotal].Set(uint32(stressTotal)))
	})
	services, slots := d.Limits()
	w := &stress{
		datapath: d, objects: objects,
		reconciler: reconciler.New(wrap(d.Tables), reconciler.Limits{Services: services, Slots: slots}),
		random:     rand.New(rand.NewPCG(1, 2)),
	}
	w.begin()
	for n := range stressStable {
		w.create(n)
	}
	w.apply(t)
	return w
}

// stressKey and stressPort are stress_request and stress_port of the program.
func stressKey(n int) lb.FrontendKey {
	k := lb.FrontendKey{VIP: netip.AddrFrom4([4]byte{10, 96, byte(n >> 8), byte(n)}), Port: 80, Protocol: lb.TCP}
	if n&1 != 0 {
		k.VIP = netip.AddrFrom16([16]byte{0: 0xfd, 13: 96, 14: byte(n >> 8), 15: byte(n)})
	}
	if n&2 != 0 {
		k.Protocol = lb.UDP
	}
	return k
}

func stressPort(n, k int) uint16 { return 0x8000 | uint16((n*251+k*7919)&0x7fff) }

// stressDecoy in a tag marks backends of a side that readers do not ask for.
const stressDecoy = 0x8000

// begin starts a batch.
func (w *stress) begin() {
	w.delta = lb.Delta{Services: map[lb.ServicePort]*lb.Backends{}, Frontends: map[lb.FrontendKey]lb.Owner{}}
}

// create makes a service with frontend n and sets of backends.
func (w *stress) create(n int) {
	k := stressKey(n)
	w.made++
	w.owners[n] = &lb.Owner{
		Service: lb.ServicePort{
			Service:  lb.Name{Namespace: "default", Name: fmt.Sprintf("s%d", w.made)},
			Protocol: k.Protocol, Family: lb.FamilyOf(k.VIP),
		},
		Kind: []lb.FrontendKind{lb.KindClusterIP, lb.KindLoadBalancer, lb.KindExternalIP}[n/4%3],
	}
	w.delta.Frontends[k] = *w.owners[n]
	w.change(n)
}

// change gives the service of frontend n other backends and another affinity.
// Each of the sides that readers do not ask for has the same set as the one they
// do, one of its own, or nothing.
func (w *stress) change(n int) {
	asked := w.owners[n].Kind.Inside()
	b := &lb.Backends{Affinity: uint32(w.random.IntN(2) * 10800)}
	b.Sides[asked] = w.set(n)
	for side := range b.Sides {
		if lb.Side(side) == asked {
			continue
		}
		switch w.random.IntN(4) {
		case 0, 1:
			b.Sides[side] = b.Sides[asked]
		case 2:
			b.Sides[side] = w.set(n | stressDecoy)
		case 3:
			b.Sides[side] = lb.Set{Elsewhere: true}
		}
	}
	for _, set := range b.Sides {
		b.Serving = append(b.Serving, set.Backends...)
	}
	slices.SortFunc(b.Serving, lb.Backend.Compare)
	b.Serving = slices.Compact(b.Serving)
	w.delta.Services[w.owners[n].Service] = b
}

// set makes 1 to 12 backends that carry tag.
func (w *stress) set(tag int) lb.Set {
	a := stressKey(tag).VIP.As16()
	first, count := w.random.IntN(200), 1+w.random.IntN(12)
	var out lb.Set
	for k := first; k < first+count; k++ {
		a[12], a[13] = 172, byte(k)
		out.Backends = append(out.Backends, lb.Backend{Addr: netip.AddrFrom16(a).Unmap(), Port: stressPort(tag, k)})
	}
	return out // sorted, since the address grows with k
}

func (w *stress) remove(n int) {
	w.delta.Services[w.owners[n].Service] = nil
	w.delta.Frontends[stressKey(n)] = lb.Owner{}
	w.owners[n] = nil
}

// batch changes a few services at once.
func (w *stress) batch() {
	w.begin()
	for range 1 + w.random.IntN(20) {
		n := w.random.IntN(stressTotal)
		switch {
		case w.owners[n] == nil:
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
	result := w.reconciler.Apply(w.delta)
	for name, err := range result.Failed {
		t.Fatalf("batch %d: Service %v: %v", w.batches, name, err)
	}
	// Nobody remembers any, so every ID may be used again at once.
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
		sum.Strange += r.Strange
		sum.Absent += r.Absent
	}
	return sum
}
