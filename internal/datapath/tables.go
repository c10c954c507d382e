// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Tables reads and writes the rows of package lb in the kernel's maps. Writing
// is for one goroutine, and only on Tables that Open made; counting and reading
// are safe from any.
type Tables struct {
	// mu is held by others than the writer while they use maps or iterators, and by
	// the writer while it replaces them.
	mu       sync.RWMutex
	maps     map[string]*ebpf.Map
	rows     map[string]*atomic.Int64 // in hash tables that can grow, as far as the writer knows
	services []byte                   // mapped, one bpfService for each service ID
	slots    []byte                   // mapped, one bpfSlot for each slot
	had      []byte                   // mapped, the generations of each service ID
	writes   map[string]*atomic.Uint64

	// For writers; nil in a View.
	gateMem      []byte // mapped, frontend_gate
	gate         *gate
	grace, inner *ebpf.Map // for WaitReaders
}

// Names of the tables whose writes are counted, as in /metrics and errors.
var tableNames = []string{
	bpfMapFrontends, bpfMapServices, bpfMapSlots, bpfMapMembers, bpfMapSourceRanges,
	bpfMapNodeAddresses, bpfMapServiceCidrs, bpfMapNames, bpfMapProblems,
	bpfMapDevices, bpfMapClusterCidrs,
}

// countedTables are those whose rows are counted as they come and go.
var countedTables = []string{bpfMapFrontends, bpfMapMembers, bpfMapSourceRanges, bpfMapNames}

// sizeFlags say what to do when a table is full. The others have no flag.
var sizeFlags = map[string]string{
	bpfMapFrontends:    "; raise --max-frontends",
	bpfMapMembers:      "; raise --max-members",
	bpfMapSourceRanges: "; raise --max-source-ranges",
	bpfMapNames:        "; raise --max-services",
}

// newTables maps services, slots and generations into memory. The maps stay the caller's.
func newTables(maps map[string]*ebpf.Map, prot int) (*Tables, error) {
	t := &Tables{maps: maps, rows: map[string]*atomic.Int64{}, writes: make(map[string]*atomic.Uint64, len(tableNames))}
	for _, name := range tableNames {
		t.writes[name] = new(atomic.Uint64)
	}
	for _, name := range countedTables {
		t.rows[name] = new(atomic.Int64)
	}
	var err error
	for name, mem := range t.mapped() {
		if *mem, err = mapMemory(maps[name], prot); err != nil {
			t.unmap()
			return nil, err
		}
	}
	return t, nil
}

// mapped returns where the memory of maps is that are mapped.
func (t *Tables) mapped() map[string]*[]byte {
	return map[string]*[]byte{bpfMapServices: &t.services, bpfMapSlots: &t.slots, mapGenerations: &t.had}
}

// table returns a map for others than the writer; it must be one that cannot grow.
func (t *Tables) table(name string) *ebpf.Map {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.maps[name]
}

func mapMemory(m *ebpf.Map, prot int) ([]byte, error) {
	page := os.Getpagesize()
	size := (int(m.MaxEntries())*int(m.ValueSize()) + page - 1) / page * page
	mem, err := unix.Mmap(m.FD(), 0, size, prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s into memory: %w", m, err)
	}
	return mem, nil
}

// unmap gives back the mapped memory; the Tables must not be used afterwards.
func (t *Tables) unmap() {
	for _, mem := range [][]byte{t.services, t.slots, t.had, t.gateMem} {
		if mem != nil {
			// Fails only for memory that is not mapped.
			_ = unix.Munmap(mem)
		}
	}
	t.services, t.slots, t.had, t.gateMem = nil, nil, nil, nil
}

// openForWriting adds what only a writer has.
func (t *Tables) openForWriting() (err error) {
	if t.gateMem, err = mapMemory(t.maps[bpfMapFrontendGate], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	t.gate = newGate(t.gateMem)
	if err := t.loadGated(lb.NewTables()); err != nil {
		return err
	}
	t.grace, t.inner, err = newGrace()
	return err
}

// loadGated fills in the rows that the gate is made of, and repairs it.
func (t *Tables) loadGated(out lb.Tables) error {
	var version uint64
	if t.gate != nil {
		version = t.gate.version()
	}
	err := errors.Join(
		eachOurs(t.maps[bpfMapFrontends], decodeFrontendKey, encodeFrontendKey, func(k lb.FrontendKey, v *bpfFrontend) {
			out.Frontends[k] = decodeFrontend(*v)
		}),
		eachOurs(t.maps[bpfMapServiceCidrs], decodeCIDR, encodeCIDR, func(p netip.Prefix, _ *uint8) {
			out.ServiceCIDRs[p] = struct{}{}
		}),
	)
	if err == nil && t.gate != nil {
		t.gate.repair(version, out.Frontends, out.ServiceCIDRs)
	}
	return err
}

// errReadOnly says that Tables of a View were to be written.
var errReadOnly = errors.New("the tables are open for reading alone")

// Writes returns how many rows were written or deleted so far, by table.
func (t *Tables) Writes() map[string]uint64 {
	out := make(map[string]uint64, len(t.writes))
	for name, n := range t.writes {
		out[name] = n.Load()
	}
	return out
}

// Limits returns how many service IDs (ID 0 included) and slots there are. State and
// tables may have been made with different sizes.
func (t *Tables) Limits() (services, slots int) {
	ids := min(t.maps[bpfMapServices].MaxEntries(), t.maps[bpfMapNames].MaxEntries(), t.maps[mapGenerations].MaxEntries())
	return int(ids), int(t.maps[bpfMapSlots].MaxEntries())
}

// SetFrontend inserts or replaces a row. A reader finds the old row or the new one
// (one that is walking the bucket at that moment may find neither). The row it may
// still be reading is recycled by the next insertion or replacement: call
// WaitReaders before that.
func (t *Tables) SetFrontend(k lb.FrontendKey, f lb.Frontend) error {
	if t.gate == nil {
		return fmt.Errorf("update %s %v: %w", bpfMapFrontends, k, errReadOnly)
	}
	defer t.gate.change()()
	key, value, bit := encodeFrontendKey(k), encodeFrontend(f), gateFrontend(k)
	t.gate.hold(bit)
	err := t.update(bpfMapFrontends, k, &key, &value, ebpf.UpdateNoExist)
	if err == nil {
		t.rows[bpfMapFrontends].Add(1)
		return nil
	}
	there := errors.Is(err, ebpf.ErrKeyExist)
	if there {
		err = t.update(bpfMapFrontends, k, &key, &value, ebpf.UpdateExist)
	}
	// A row that is there counts already, unless a stranger has written it.
	if !there || t.gate.needs[bit] > 1 {
		t.gate.release(bit)
	}
	return err
}

// DeleteFrontend removes a row; it is no error when there is none.
func (t *Tables) DeleteFrontend(k lb.FrontendKey) error {
	if t.gate == nil {
		return fmt.Errorf("delete %s %v: %w", bpfMapFrontends, k, errReadOnly)
	}
	defer t.gate.change()()
	key := encodeFrontendKey(k)
	removed, err := t.remove(bpfMapFrontends, k, &key)
	if removed {
		t.gate.release(gateFrontend(k))
	}
	return err
}

// service returns the words of a service.
func (t *Tables) service(id lb.ServiceID) (*bpfService, error) {
	const size = int(unsafe.Sizeof(bpfService{}))
	if services, _ := t.Limits(); int(id) >= services {
		return nil, fmt.Errorf("service ID %d is outside the services map", id)
	}
	return (*bpfService)(unsafe.Pointer(&t.services[int(id)*size])), nil
}

// generations returns those of a service, whose ID is within the limits.
func (t *Tables) generations(id lb.ServiceID) *generations {
	const size = int(unsafe.Sizeof(generations{}))
	return (*generations)(unsafe.Pointer(&t.had[int(id)*size]))
}

// SetRange stores the range of one side of a service in one atomic step, after
// everything SetSlots has written before.
func (t *Tables) SetRange(id lb.ServiceID, side lb.Side, r lb.Range) error {
	s, err := t.service(id)
	if err != nil {
		return err
	}
	if side >= lb.Sides {
		return fmt.Errorf("range of service ID %d: there is no %v", id, side)
	}
	// First, so that no other tables give the same generation to another range.
	atomic.StoreUint32(&t.generations(id)[side], r.Generation)
	atomic.StoreUint64(&s.Range[side], encodeRange(r))
	t.writes[bpfMapServices].Add(1)
	return nil
}

// SetOptions stores everything in row but the ranges in one atomic step.
func (t *Tables) SetOptions(id lb.ServiceID, row lb.ServiceRow) error {
	s, err := t.service(id)
	if err != nil {
		return err
	}
	atomic.StoreUint64(&s.Options, encodeOptions(row))
	t.writes[bpfMapServices].Add(1)
	return nil
}

// SetSlots writes backends into consecutive slots. No reader may be led to them
// before SetRange.
func (t *Tables) SetSlots(base uint32, backends []lb.Backend) error {
	const size = int(unsafe.Sizeof(bpfSlot{}))
	if _, slots := t.Limits(); int(base)+len(backends) > slots {
		return fmt.Errorf("slots %d to %d are outside the slots map", base, int(base)+len(backends)-1)
	}
	for i, b := range backends {
		at := (int(base) + i) * size
		*(*bpfSlot)(unsafe.Pointer(&t.slots[at])) = encodeSlot(b)
	}
	t.writes[bpfMapSlots].Add(uint64(len(backends)))
	return nil
}

// present is the value of rows whose presence is their meaning.
const present = uint8(1)

// SetMember inserts a row; it is no error when it is there.
func (t *Tables) SetMember(m lb.Member) error {
	key, value := encodeMember(m), present
	return t.insert(bpfMapMembers, m.Backend, &key, &value)
}

// HasMember tells whether there is a row.
func (t *Tables) HasMember(m lb.Member) (bool, error) {
	key, value := encodeMember(m), present
	t.mu.RLock()
	defer t.mu.RUnlock()
	err := t.maps[bpfMapMembers].Lookup(&key, &value)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, fmt.Errorf("read %s %v: %w", bpfMapMembers, m.Backend, err)
	}
	return err == nil, nil
}

// DeleteMember removes a row; it is no error when there is none.
func (t *Tables) DeleteMember(m lb.Member) error {
	key := encodeMember(m)
	return t.drop(bpfMapMembers, m.Backend, &key)
}

// SetSource lets clients in a range use the load-balancer IPs of a service.
func (t *Tables) SetSource(s lb.Source) error {
	key, value := encodeSource(s), present
	return t.insert(bpfMapSourceRanges, s.Prefix, &key, &value)
}

// DeleteSource removes a row; it is no error when there is none.
func (t *Tables) DeleteSource(s lb.Source) error {
	key := encodeSource(s)
	return t.drop(bpfMapSourceRanges, s.Prefix, &key)
}

// SetNodeAddress inserts or replaces a row. What SetFrontend says of replacing
// holds here, too.
func (t *Tables) SetNodeAddress(a netip.Addr, kind lb.NodeAddress) error {
	key, value := encodeAddr(a), uint8(kind)
	return t.put(bpfMapNodeAddresses, a, &key, &value)
}

// DeleteNodeAddress removes a row; it is no error when there is none.
func (t *Tables) DeleteNodeAddress(a netip.Addr) error {
	key := encodeAddr(a)
	return t.drop(bpfMapNodeAddresses, a, &key)
}

// SetServiceCIDR makes addresses in p that nobody owns unreachable.
func (t *Tables) SetServiceCIDR(p netip.Prefix) error {
	if t.gate == nil {
		return fmt.Errorf("update %s %v: %w", bpfMapServiceCidrs, p, errReadOnly)
	}
	defer t.gate.change()()
	p = p.Masked()
	key, value := encodeCIDR(p), present
	there := t.gate.cidrs[p]
	t.gate.holdCIDR(p)
	err := t.put(bpfMapServiceCidrs, p, &key, &value)
	if err != nil && !there {
		t.gate.releaseCIDR(p)
	}
	return err
}

// DeleteServiceCIDR removes a row; it is no error when there is none.
func (t *Tables) DeleteServiceCIDR(p netip.Prefix) error {
	if t.gate == nil {
		return fmt.Errorf("delete %s %v: %w", bpfMapServiceCidrs, p, errReadOnly)
	}
	defer t.gate.change()()
	p = p.Masked()
	key := encodeCIDR(p)
	_, err := t.remove(bpfMapServiceCidrs, p, &key)
	if err == nil {
		t.gate.releaseCIDR(p)
	}
	return err
}

// SetName records which service port a service ID stands for.
func (t *Tables) SetName(id lb.ServiceID, s lb.ServicePort) error {
	value, err := encodeServiceName(s)
	if err != nil {
		return fmt.Errorf("name of service %v: %w", s, err)
	}
	key := uint32(id)
	return t.insert(bpfMapNames, s, &key, &value)
}

// DeleteName removes a name; it is no error when there is none.
func (t *Tables) DeleteName(id lb.ServiceID) error {
	key := uint32(id)
	return t.drop(bpfMapNames, id, &key)
}

// SetProblem records why a Service is not programmed as it should be.
func (t *Tables) SetProblem(name lb.Name, p lb.Problem) error {
	key, err := encodeObjectName(name)
	if err != nil {
		return fmt.Errorf("problem of service %v: %w", name, err)
	}
	value := encodeProblem(p)
	return t.put(bpfMapProblems, name, &key, &value)
}

// DeleteProblem removes a problem; it is no error when there is none.
func (t *Tables) DeleteProblem(name lb.Name) error {
	key, err := encodeObjectName(name)
	if err != nil {
		return nil // such a row cannot have been written
	}
	return t.drop(bpfMapProblems, name, &key)
}

// WaitReaders returns when every program that was running at the time of the
// call has ended.
//
// Programs run inside RCU read-side sections. The kernel waits for the end of
// all of them, synchronize_rcu, after each update of a map of maps, so that who
// replaces a map knows when the old one is out of use (Linux 5.0,
// maybe_wait_bpf_programs). membarrier(MEMBARRIER_CMD_GLOBAL) would do the same
// where it does anything: it returns at once on a machine with one processor,
// where a program may still have been preempted, and is refused with nohz_full.
func (t *Tables) WaitReaders() error {
	if err := t.grace.Put(uint32(0), t.inner); err != nil {
		return fmt.Errorf("wait for running programs to end: %w", err)
	}
	return nil
}

// newGrace makes the map of maps for WaitReaders, and the map to put into it.
func newGrace() (outer, inner *ebpf.Map, err error) {
	spec := &ebpf.MapSpec{Name: "grace_inner", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	if inner, err = ebpf.NewMap(spec); err != nil {
		return nil, nil, fmt.Errorf("create map %s: %w", spec.Name, err)
	}
	outer, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "grace", Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: spec,
	})
	if err != nil {
		_ = inner.Close()
		return nil, nil, fmt.Errorf("create map grace: %w", err)
	}
	return outer, inner, nil
}

// insert is put for tables whose rows are counted.
func (t *Tables) insert(table string, subject fmt.Stringer, key, value any) error {
	err := t.update(table, subject, key, value, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return t.put(table, subject, key, value)
	}
	if err == nil {
		t.rows[table].Add(1)
	}
	return err
}

func (t *Tables) put(table string, subject fmt.Stringer, key, value any) error {
	return t.update(table, subject, key, value, ebpf.UpdateAny)
}

func (t *Tables) update(table string, subject fmt.Stringer, key, value any, flags ebpf.MapUpdateFlags) error {
	m := t.table(table)
	if err := m.Update(key, value, flags); err != nil {
		// A hash says the one, an LPM trie the other.
		if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
			return &lb.FullError{Table: tableOf(table), Err: fmt.Errorf("update %s %v: %w (the map is full at %d rows%s)",
				table, subject, err, m.MaxEntries(), sizeFlags[table])}
		}
		return fmt.Errorf("update %s %v: %w", table, subject, err)
	}
	t.writes[table].Add(1)
	return nil
}

// drop is remove for those who need not know whether there was a row.
func (t *Tables) drop(table string, subject, key any) error {
	_, err := t.remove(table, subject, key)
	return err
}

// remove deletes a row and tells whether there was one.
func (t *Tables) remove(table string, subject, key any) (removed bool, err error) {
	switch err := t.table(table).Delete(key); {
	case err == nil:
		t.writes[table].Add(1)
		if rows := t.rows[table]; rows != nil {
			rows.Add(-1)
		}
		return true, nil
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return false, nil
	default:
		return false, fmt.Errorf("delete %s %v: %w", table, subject, err)
	}
}

// Load reads all rows. Slots are read where a service's ranges lead, services
// where a name does or a word says something, or where one was not zero in these or
// earlier tables: a range has at least the generation that a range of its service and
// side has had last. Rows that we cannot have written are left out: see
// ExpelStrangers. It can be called while another
// process writes; rows may then be from before or after. In the process that
// writes it also repairs what is derived from rows, unless one is written
// meanwhile.
func (t *Tables) Load() (lb.Tables, error) {
	out := lb.NewTables()
	err := errors.Join(
		t.loadGated(out),
		each(t.maps[bpfMapNames], func(k *uint32, v *bpfServiceName) {
			if !nameless(v) {
				out.Names[lb.ServiceID(*k)] = decodeServiceName(v)
			}
		}),
		eachOurs(t.maps[bpfMapMembers], decodeMember, encodeMember, func(m lb.Member, _ *uint8) {
			out.Members[m] = struct{}{}
		}),
		eachOurs(t.maps[bpfMapSourceRanges], decodeSource, encodeSource, func(s lb.Source, _ *uint8) {
			out.Sources[s] = struct{}{}
		}),
		each(t.maps[bpfMapNodeAddresses], func(k *bpfAddr, v *uint8) {
			out.NodeAddresses[decodeAddr(*k)] = lb.NodeAddress(*v)
		}),
		eachOurs(t.maps[bpfMapProblems], decodeObjectKey, encodeObjectKey, func(n lb.Name, v *bpfProblem) {
			out.Problems[n] = lb.Problem(decodeString(v.Text[:]))
		}),
	)
	if err != nil {
		return out, err
	}
	for table, n := range map[string]int{
		bpfMapFrontends: len(out.Frontends), bpfMapMembers: len(out.Members),
		bpfMapSourceRanges: len(out.Sources), bpfMapNames: len(out.Names),
	} {
		t.rows[table].Store(int64(n))
	}
	return out, t.loadServices(out)
}

// loadServices fills in services and slots; names are there already.
func (t *Tables) loadServices(out lb.Tables) error {
	services, _ := t.Limits()
	for id := range lb.ServiceID(services) {
		mapped, err := t.service(id)
		if err != nil {
			return err
		}
		s := bpfService{Options: atomic.LoadUint64(&mapped.Options)}
		for side := range s.Range {
			s.Range[side] = atomic.LoadUint64(&mapped.Range[side])
		}
		row := decodeService(s)
		for side := range row.Sides {
			if had := atomic.LoadUint32(&t.generations(id)[side]); had != 0 {
				row.Sides[side].Generation = had
			}
		}
		// Bits that mean nothing make no row, or it would never be what is wanted.
		if _, named := out.Names[id]; row == (lb.ServiceRow{}) && !named {
			continue
		}
		out.Services[id] = row
		for _, r := range row.Sides {
			t.loadSlots(out.Slots, r)
		}
	}
	return nil
}

func (t *Tables) loadSlots(slots map[uint32]lb.Backend, r lb.Range) {
	const size = int(unsafe.Sizeof(bpfSlot{}))
	for i := r.Base; i < r.Base+uint32(r.Count); i++ {
		if (int(i)+1)*size > len(t.slots) {
			return
		}
		slot := *(*bpfSlot)(unsafe.Pointer(&t.slots[int(i)*size]))
		if slot.Port != 0 {
			slots[i] = decodeSlot(slot)
		}
	}
}

// batch is how many rows are read at once. It must hold the longest chain of a
// bucket.
const batch = 1024

// each calls f for every row of a hash map or LPM trie, many rows in one system
// call. Rows that are deleted meanwhile may make it come to others twice.
func each[K, V any](m *ebpf.Map, f func(*K, *V)) error {
	keys, values := make([]K, batch), make([]V, batch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read map %s: %w", m, err)
		}
		for i := range n {
			f(&keys[i], &values[i])
		}
		if err != nil {
			return nil
		}
	}
}
