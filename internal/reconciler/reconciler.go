// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Reconciler turns what is wanted into writes. It is not safe for concurrent
// use, and nobody else may write the tables.
type Reconciler struct {
	kernel Kernel
	limits Limits
	ids    *lb.IDs
	blocks *lb.Blocks

	have mirror
	want lb.Delta // everything that is wanted; names nothing that is gone
	todo todo
	// failed is what the last Result said.
	failed map[lb.Name]error

	// inherited tells that programs may still read what the agent before us
	// retired: we do not know which rows these are.
	inherited bool
	// recycled tells that a frontend or a node address was replaced or deleted
	// since the last grace period.
	recycled bool
	// missed tells that a frontend was inserted since the last grace period:
	// programs may have missed it and be about to look at the service CIDRs.
	missed bool
	// missedPort tells that one of these was no wildcard: programs may be about
	// to look at the wildcard, which refuses what it has no port for.
	missedPort bool
	// waiting names the Services that have something retired since the last
	// grace period, or something that waits for it.
	waiting map[lb.Name]struct{}
}

// todo names the rows that may differ from what is wanted. An error is why the
// last attempt failed; nil is for what has not been tried or waits for
// something else.
type todo struct {
	services  map[lb.ServicePort]error
	frontends map[lb.FrontendKey]change
	// retired are services that are not wanted. They stay for as long as a
	// frontend leads to them.
	retired   map[lb.ServiceID]error
	addresses map[netip.Addr]error
	cidrs     map[netip.Prefix]error
	problems  map[lb.Name]struct{}
}

// change is a frontend to be written or deleted on behalf of a Service: the one
// that is to have it or, when it is to go, the one that had it.
type change struct {
	service lb.Name
	err     error
}

func newTodo() todo {
	return todo{
		services:  map[lb.ServicePort]error{},
		frontends: map[lb.FrontendKey]change{},
		retired:   map[lb.ServiceID]error{},
		addresses: map[netip.Addr]error{},
		cidrs:     map[netip.Prefix]error{},
		problems:  map[lb.Name]struct{}{},
	}
}

// New returns a reconciler that believes the kernel's tables to be empty and
// wants nothing.
func New(kernel Kernel, limits Limits) *Reconciler {
	return &Reconciler{
		kernel:  kernel,
		limits:  limits,
		ids:     lb.NewIDs(limits.Services),
		blocks:  lb.NewBlocks(limits.Slots),
		have:    newMirror(),
		want:    wanted(lb.Delta{}),
		todo:    newTodo(),
		failed:  map[lb.Name]error{},
		waiting: map[lb.Name]struct{}{},
	}
}

// wanted returns a copy of d without what d says is gone.
func wanted(d lb.Delta) lb.Delta {
	w := lb.Delta{
		Services:      make(map[lb.ServicePort]*lb.Backends, len(d.Services)),
		Frontends:     make(map[lb.FrontendKey]lb.Owner, len(d.Frontends)),
		NodeAddresses: make(map[netip.Addr]lb.NodeAddress, len(d.NodeAddresses)),
		ServiceCIDRs:  make(map[netip.Prefix]bool, len(d.ServiceCIDRs)),
		Problems:      make(map[lb.Name]lb.Problem, len(d.Problems)),
	}
	for sp, backends := range d.Services {
		put(w.Services, sp, backends, backends != nil)
	}
	for key, owner := range d.Frontends {
		put(w.Frontends, key, owner, owner.Exists())
	}
	for addr, kind := range d.NodeAddresses {
		put(w.NodeAddresses, addr, kind, kind != 0)
	}
	for cidr, exists := range d.ServiceCIDRs {
		put(w.ServiceCIDRs, cidr, true, exists)
	}
	for name, problem := range d.Problems {
		put(w.Problems, name, problem, problem != "")
	}
	return w
}

// put keeps value under key, or nothing when there is none.
func put[K comparable, V any](m map[K]V, key K, value V, exists bool) {
	if exists {
		m[key] = value
	} else {
		delete(m, key)
	}
}

// Adopt takes t for what the kernel holds, whatever was believed before, and
// writes nothing. IDs and blocks in use stay in use; IDs that t knows without a
// name rest until FreeIDs. What is wanted stays the same, so ApplyAll comes
// next: at the start with what the sources say, for a repair with Store.All.
func (r *Reconciler) Adopt(t lb.Tables) {
	before := r.have
	r.have = mirrorOf(t)
	r.blocks = lb.NewBlocks(r.limits.Slots)
	r.todo.retired = map[lb.ServiceID]error{}
	r.inherited = true
	r.waiting = map[lb.Name]struct{}{}

	for id := range before.services {
		r.ids.Release(id)
	}
	var damaged []lb.Range
	// In the order of their IDs, so that the same tables are always adopted the
	// same way when two ranges share slots.
	for _, id := range slices.Sorted(maps.Keys(r.have.services)) {
		s := r.have.services[id]
		if known := before.services[id]; known != nil && known.resting() && s.resting() {
			continue // free or at rest, as it was
		}
		exists := r.ids.Adopt(id)
		if s.resting() {
			r.ids.Release(id)
			continue
		}
		damaged = append(damaged, r.adoptBlocks(s)...)
		if s.name == (lb.ServicePort{}) || !exists {
			continue
		}
		if other := r.have.named(s.name); other == nil || s.outranks(other) {
			r.have.ids[s.name] = id
		}
	}
	r.quarantine(damaged)
}

// adoptBlocks takes the blocks that the sides of s lead to. It returns those
// that cannot be had: they belong to another service already, or to another side
// in part, or are not within the limits.
func (r *Reconciler) adoptBlocks(s *service) (damaged []lb.Range) {
	for i := range s.sides {
		this := &s.sides[i]
		j := slices.IndexFunc(s.sides[:i], func(o side) bool { return sameSlots(o.Range, this.Range) })
		if j >= 0 {
			this.block = s.sides[j].block
		} else {
			this.block = r.blocks.Adopt(this.Base, int(this.Count))
		}
		if this.Count > 0 && !this.block {
			damaged = append(damaged, this.Range)
		}
	}
	return damaged
}

// quarantine keeps the slots of damaged ranges out of use until the next Adopt.
// Programs read them, and go on even when the block's rightful owner leaves it.
func (r *Reconciler) quarantine(damaged []lb.Range) {
	if len(damaged) == 0 {
		return
	}
	slots := map[uint32]struct{}{}
	for _, d := range damaged {
		for i := d.Base; i < d.Base+uint32(d.Count); i++ {
			slots[i] = struct{}{}
			r.blocks.Adopt(i, 1)
		}
	}
	for _, s := range r.have.services {
		for i := range s.sides {
			this := &s.sides[i]
			for slot := this.Base; this.block && slot < this.Base+uint32(this.Count); slot++ {
				if _, ok := slots[slot]; ok {
					this.quarantined = true
				}
			}
		}
	}
}

// Apply brings what d names into the kernel. What has failed before is tried
// again only for the Services that d names.
func (r *Reconciler) Apply(d lb.Delta) Result {
	named := map[lb.Name]struct{}{}
	for sp, backends := range d.Services {
		named[sp.Service] = struct{}{}
		r.wantService(sp, backends)
	}
	for key, owner := range d.Frontends {
		c := change{service: owner.Service.Service}
		if !owner.Exists() {
			c.service = r.formerOwner(key)
		}
		named[c.service] = struct{}{}
		r.todo.frontends[key] = c
		put(r.want.Frontends, key, owner, owner.Exists())
	}
	for addr, kind := range d.NodeAddresses {
		named[nobody] = struct{}{}
		r.todo.addresses[addr] = nil
		put(r.want.NodeAddresses, addr, kind, kind != 0)
	}
	for cidr, exists := range d.ServiceCIDRs {
		named[nobody] = struct{}{}
		r.todo.cidrs[cidr] = nil
		put(r.want.ServiceCIDRs, cidr, true, exists)
	}
	for name, problem := range d.Problems {
		r.todo.problems[name] = struct{}{}
		put(r.want.Problems, name, problem, problem != "")
	}
	return r.newPass(func(name lb.Name) bool { _, ok := named[name]; return ok }).run(false)
}

// ApplyAll brings d into the kernel and removes everything else: d is all that
// is wanted. Nothing is written when the kernel holds just that.
func (r *Reconciler) ApplyAll(d lb.Delta) Result {
	r.want = wanted(d)
	r.todo = newTodo()
	for sp := range r.want.Services {
		r.todo.services[sp] = nil
	}
	owners := r.owners()
	for key := range r.have.frontends {
		c := change{service: owners[key.VIP]}
		if s := r.have.target(key); s != nil {
			c.service = s.name.Service
		}
		r.todo.frontends[key] = c
	}
	for key, owner := range r.want.Frontends {
		r.todo.frontends[key] = change{service: owner.Service.Service}
	}
	for id, s := range r.have.services {
		if !s.resting() && !r.alive(s) {
			r.todo.retired[id] = nil
		}
	}
	touch(r.todo.addresses, r.have.addresses)
	touch(r.todo.addresses, r.want.NodeAddresses)
	touch(r.todo.cidrs, r.have.cidrs)
	touch(r.todo.cidrs, r.want.ServiceCIDRs)
	touch(r.todo.problems, r.have.problems)
	touch(r.todo.problems, r.want.Problems)
	return r.newPass(everybody).run(false)
}

// touch puts the keys of rows into todo.
func touch[K comparable, T, V any](todo map[K]T, rows map[K]V) {
	var untried T
	for key := range rows {
		todo[key] = untried
	}
}

// Retry tries again what has failed. Rows that are to go go first, so that
// their room can be used.
func (r *Reconciler) Retry() Result { return r.newPass(everybody).run(true) }

// Pending tells whether Retry has anything to do.
func (r *Reconciler) Pending() bool {
	t := r.todo
	return len(t.services)+len(t.frontends)+len(t.retired)+len(t.addresses)+len(t.cidrs)+
		len(t.problems)+len(r.waiting) > 0
}

// Tables returns what the kernel holds, as far as the reconciler knows.
func (r *Reconciler) Tables() lb.Tables { return r.have.tables() }

// HasMember tells whether the kernel has this row, as far as the reconciler knows.
func (r *Reconciler) HasMember(m lb.Member) bool {
	s := r.have.services[m.Service]
	if s == nil {
		return false
	}
	_, found := slices.BinarySearchFunc(s.members, m, lb.Member.Compare)
	return found
}

// FreeIDs makes the service IDs that are at rest and that, as remembered says,
// nothing in the kernel remembers available for new services. They are
// available after a restart, too, only once FreeIDs has been called.
func (r *Reconciler) FreeIDs(remembered func(lb.ServiceID) bool) { r.ids.Free(remembered) }

func (r *Reconciler) wantService(sp lb.ServicePort, backends *lb.Backends) {
	if backends != nil {
		r.want.Services[sp] = backends
		r.todo.services[sp] = nil
		return
	}
	delete(r.want.Services, sp)
	delete(r.todo.services, sp)
	if s := r.have.named(sp); s != nil {
		r.todo.retired[s.id] = nil
	}
}

// formerOwner returns the Service that has key until now, the zero Name when
// nothing is known of it.
func (r *Reconciler) formerOwner(key lb.FrontendKey) lb.Name {
	if owner, ok := r.want.Frontends[key]; ok {
		return owner.Service.Service
	}
	if c, ok := r.todo.frontends[key]; ok {
		return c.service
	}
	if s := r.have.target(key); s != nil {
		return s.name.Service
	}
	return nobody
}

// owners returns the Service that ClusterIPs' frontends lead to. That is how a
// wildcard, which leads to none, finds its Service.
func (r *Reconciler) owners() map[netip.Addr]lb.Name {
	owners := map[netip.Addr]lb.Name{}
	for key, f := range r.have.frontends {
		if s := r.have.target(key); s != nil && f.Kind == lb.KindClusterIP {
			owners[key.VIP] = s.name.Service
		}
	}
	return owners
}

// alive tells whether s is wanted.
func (r *Reconciler) alive(s *service) bool {
	return r.want.Services[s.name] != nil && r.have.named(s.name) == s
}

// nobody stands for the Service of what belongs to none.
var nobody lb.Name

func everybody(lb.Name) bool { return true }
