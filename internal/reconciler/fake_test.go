// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

var errInjected = errors.New("injected failure")

// fakeKernel keeps the tables and watches them as a reader would: after every
// write it checks what a program could now meet, and at every write whether it
// hits something that a program could still be reading.
type fakeKernel struct {
	tb     testing.TB
	limits reconciler.Limits

	frontends map[lb.FrontendKey]lb.Frontend
	rows      map[lb.ServiceID]lb.ServiceRow
	slots     map[uint32]lb.Backend
	members   map[lb.Member]struct{}
	sources   map[lb.Source]struct{}
	addresses map[netip.Addr]lb.NodeAddress
	cidrs     map[netip.Prefix]struct{}
	names     map[lb.ServiceID]lb.ServicePort
	problems  map[lb.Name]lb.Problem

	maxFrontends, maxSources, maxMembers int // 0: no limit
	// fails is asked before every call, with the operation and the number of
	// calls so far.
	fails  func(op string, call int) bool
	calls  int
	graces int
	log    func(string)

	// recycled names the tables of which an element was replaced or deleted
	// since the last grace period.
	recycled map[string]bool
	// held is what programs may have read from frontends and services since
	// the last grace period.
	held map[holding]lb.ServicePort
	// missed are the frontends that programs may have looked for in vain since
	// the last grace period, passedBy the services with sources that programs may
	// have passed by.
	missed   map[lb.FrontendKey]bool
	passedBy map[lb.ServiceID]bool
	// lacking are the clients that a source that could not be written may have
	// been for, open the services with options that could not be written.
	lacking map[clientOf]bool
	open    map[lb.ServiceID]bool
	// kept are the service CIDRs that could not be deleted.
	kept map[netip.Prefix]bool
	// remembered are the IDs that sockets may remember.
	remembered map[lb.ServiceID]struct{}

	// wanted is what has been wanted, oldest first, since the tables were last
	// as wanted. Nothing is checked against it when it is empty.
	wanted []lb.Delta
	// damaged tells that a test has written to the tables by itself.
	damaged bool
}

// damage lets a test write to the tables by itself. What they hold means nothing
// to a reader then, until something new is wanted.
func (k *fakeKernel) damage() {
	k.wanted, k.damaged = nil, true
}

type holding struct {
	id  lb.ServiceID
	row lb.ServiceRow
}

type clientOf struct {
	id   lb.ServiceID
	addr netip.Addr
}

func newFake(tb testing.TB, limits reconciler.Limits) *fakeKernel {
	return &fakeKernel{
		tb:         tb,
		limits:     limits,
		frontends:  map[lb.FrontendKey]lb.Frontend{},
		rows:       map[lb.ServiceID]lb.ServiceRow{},
		slots:      map[uint32]lb.Backend{},
		members:    map[lb.Member]struct{}{},
		sources:    map[lb.Source]struct{}{},
		addresses:  map[netip.Addr]lb.NodeAddress{},
		cidrs:      map[netip.Prefix]struct{}{},
		names:      map[lb.ServiceID]lb.ServicePort{},
		problems:   map[lb.Name]lb.Problem{},
		recycled:   map[string]bool{},
		held:       map[holding]lb.ServicePort{},
		missed:     map[lb.FrontendKey]bool{},
		passedBy:   map[lb.ServiceID]bool{},
		lacking:    map[clientOf]bool{},
		open:       map[lb.ServiceID]bool{},
		kept:       map[netip.Prefix]bool{},
		remembered: map[lb.ServiceID]struct{}{},
		fails:      func(string, int) bool { return false },
		log:        func(string) {},
	}
}

// load returns the tables as the real kernel's are read back.
func (k *fakeKernel) load() lb.Tables {
	t := lb.NewTables()
	maps.Copy(t.Frontends, k.frontends)
	maps.Copy(t.Members, k.members)
	maps.Copy(t.Sources, k.sources)
	maps.Copy(t.NodeAddresses, k.addresses)
	maps.Copy(t.ServiceCIDRs, k.cidrs)
	maps.Copy(t.Names, k.names)
	maps.Copy(t.Problems, k.problems)
	for id := range k.names {
		t.Services[id] = k.rows[id]
	}
	for id, row := range k.rows {
		if row != (lb.ServiceRow{}) {
			t.Services[id] = row
		}
		for _, r := range row.Sides {
			for i := range slotsOf(r) {
				if b, ok := k.slots[i]; ok {
					t.Slots[i] = b
				}
			}
		}
	}
	return t
}

// slotsOf yields the slots of a range.
func slotsOf(r lb.Range) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for i := r.Base; i < r.Base+uint32(r.Count); i++ {
			if !yield(i) {
				return
			}
		}
	}
}

// backends returns what is in the slots of a range, in slot order.
func (k *fakeKernel) backends(r lb.Range) []lb.Backend {
	var out []lb.Backend
	for i := range slotsOf(r) {
		out = append(out, k.slots[i])
	}
	return out
}

// remember tells whether a socket may remember the ID, as FreeIDs asks.
func (k *fakeKernel) remember(id lb.ServiceID) bool { _, ok := k.remembered[id]; return ok }

func (k *fakeKernel) begin(op, line string) error {
	k.calls++
	if k.fails(op, k.calls) {
		k.log(line + " FAILED")
		return fmt.Errorf("%s: %w", line, errInjected)
	}
	k.log(line)
	return nil
}

func (k *fakeKernel) SetFrontend(key lb.FrontendKey, f lb.Frontend) error {
	_, exists := k.frontends[key]
	line := fmt.Sprintf("set frontend %v -> %d", key, f.Service)
	if err := k.begin("SetFrontend", line); err != nil {
		return err
	}
	if !exists && k.maxFrontends > 0 && len(k.frontends) >= k.maxFrontends {
		return fmt.Errorf("%s: table is full", line)
	}
	k.recycle(line, "frontends", exists)
	if key.IsWildcard() && f.Kind != lb.KindForeign {
		for port := range k.missed {
			if port.VIP == key.VIP && !port.IsWildcard() {
				k.errorf("%s: a program that has missed %v is refused", line, port)
			}
		}
	}
	if !exists {
		k.missed[key] = true
	}
	k.frontends[key] = f
	k.check(line)
	return nil
}

func (k *fakeKernel) DeleteFrontend(key lb.FrontendKey) error {
	line := fmt.Sprintf("delete frontend %v", key)
	if err := k.begin("DeleteFrontend", line); err != nil {
		return err
	}
	if _, exists := k.frontends[key]; !exists {
		k.errorf("%s: there is none", line)
	}
	k.recycled["frontends"] = true
	delete(k.frontends, key)
	k.check(line)
	return nil
}

// recycle notes an insert into a hash table, or a replacement.
func (k *fakeKernel) recycle(line, table string, replace bool) {
	if k.recycled[table] {
		k.errorf("%s: an element is recycled that a program may be reading", line)
	}
	k.recycled[table] = replace
}

func (k *fakeKernel) SetRange(id lb.ServiceID, side lb.Side, r lb.Range) error {
	line := fmt.Sprintf("set range %d %v %v", id, side, r)
	if err := k.begin("SetRange", line); err != nil {
		return err
	}
	row := k.rows[id]
	if id == lb.NoService || int(id) >= k.limits.Services || side >= lb.Sides {
		k.errorf("%s: no such row", line)
	}
	if row.Sides[side].Generation == r.Generation {
		k.errorf("%s: the generation is the old one", line)
	}
	if r.Count == 0 && r.Base != 0 && !r.Elsewhere() {
		k.errorf("%s: an empty range has no base", line)
	}
	if k.wanted != nil {
		k.checkBlock(line, id, side, r)
	}
	row.Sides[side] = r
	k.rows[id] = row
	k.check(line)
	return nil
}

// checkBlock reports a range that is to share slots with another service, or
// that could share them with another side and is to have its own.
func (k *fakeKernel) checkBlock(line string, id lb.ServiceID, side lb.Side, r lb.Range) {
	for other, row := range k.rows {
		for i, o := range row.Sides {
			if i == int(side) && other == id {
				continue
			}
			same := o.Base == r.Base && o.Count == r.Count
			if overlap(o, r) && (other != id || !same) {
				k.errorf("%s: service %d has some of these slots", line, other)
			}
			if other == id && r.Count > 0 && !same && !k.damaged && slices.Equal(k.backends(o), k.backends(r)) {
				k.errorf("%s: side %v has the same backends in another block", line, lb.Side(i))
			}
		}
	}
}

func (k *fakeKernel) SetOptions(id lb.ServiceID, options lb.ServiceRow) error {
	options.Sides = [lb.Sides]lb.Range{}
	line := fmt.Sprintf("set options %d affinity=%d restricted=%v node=%v",
		id, options.Affinity, options.Restricted, options.NodeAllowed)
	if options.OutsideLocal {
		line += " outside-local"
	}
	if err := k.begin("SetOptions", line); err != nil {
		k.open[id] = true
		return err
	}
	delete(k.open, id)
	row := k.rows[id]
	sides := row.Sides
	row.Sides = [lb.Sides]lb.Range{}
	if row == options {
		k.errorf("%s: they are that already", line)
	}
	options.Sides = sides
	k.rows[id] = options
	k.check(line)
	return nil
}

func (k *fakeKernel) SetSlots(base uint32, backends []lb.Backend) error {
	line := fmt.Sprintf("set slots %d %v", base, backends)
	if err := k.begin("SetSlots", line); err != nil {
		return err
	}
	written := lb.Range{Base: base, Count: uint16(len(backends))}
	if len(backends) == 0 || int(base)+len(backends) > k.limits.Slots {
		k.errorf("%s: no such slots", line)
	}
	for h := range k.held {
		for _, r := range h.row.Sides {
			if overlap(r, written) {
				k.errorf("%s: a program may be reading %v", line, r)
			}
		}
	}
	for id, row := range k.rows {
		for _, r := range row.Sides {
			if k.wanted != nil && overlap(r, written) {
				k.errorf("%s: service %d has them", line, id)
			}
		}
	}
	for i, b := range backends {
		k.slots[base+uint32(i)] = b
	}
	k.check(line)
	return nil
}

func (k *fakeKernel) SetMember(m lb.Member) error {
	line := fmt.Sprintf("set member %d %v %v", m.Service, m.Use, m.Backend)
	if err := k.begin("SetMember", line); err != nil {
		return err
	}
	if k.maxMembers > 0 && len(k.members) >= k.maxMembers {
		return fmt.Errorf("%s: table is full", line)
	}
	if _, exists := k.members[m]; exists {
		k.errorf("%s: it is there already", line)
	}
	k.members[m] = struct{}{}
	k.check(line)
	return nil
}

func (k *fakeKernel) DeleteMember(m lb.Member) error {
	line := fmt.Sprintf("delete member %d %v %v", m.Service, m.Use, m.Backend)
	if err := k.begin("DeleteMember", line); err != nil {
		return err
	}
	if _, exists := k.members[m]; !exists {
		k.errorf("%s: there is none", line)
	}
	delete(k.members, m)
	k.check(line)
	return nil
}

func (k *fakeKernel) SetSource(s lb.Source) error {
	line := fmt.Sprintf("set source %d %v", s.Service, s.Prefix)
	if err := k.begin("SetSource", line); err != nil {
		return k.lack(s.Service, err)
	}
	if k.maxSources > 0 && len(k.sources) >= k.maxSources {
		return k.lack(s.Service, fmt.Errorf("%s: table is full", line))
	}
	if _, exists := k.sources[s]; exists {
		k.errorf("%s: it is there already", line)
	}
	k.sources[s] = struct{}{}
	k.passedBy[s.Service] = true
	maps.DeleteFunc(k.lacking, func(c clientOf, _ bool) bool { return c.id == s.Service && s.Prefix.Contains(c.addr) })
	k.check(line)
	return nil
}

// lack notes the clients that are without a source of the service now that one
// could not be written because of err, and returns err.
func (k *fakeKernel) lack(id lb.ServiceID, err error) error {
	for _, client := range k.clients(k.names[id]) {
		if !k.inSources(id, client) {
			k.lacking[clientOf{id, client}] = true
		}
	}
	return err
}

func (k *fakeKernel) DeleteSource(s lb.Source) error {
	line := fmt.Sprintf("delete source %d %v", s.Service, s.Prefix)
	if err := k.begin("DeleteSource", line); err != nil {
		return err
	}
	if _, exists := k.sources[s]; !exists {
		k.errorf("%s: there is none", line)
	}
	if k.passedBy[s.Service] && k.isHeld(s.Service) {
		k.errorf("%s: a program may have passed by one that has joined", line)
	}
	delete(k.sources, s)
	k.check(line)
	return nil
}

func (k *fakeKernel) SetNodeAddress(addr netip.Addr, kind lb.NodeAddress) error {
	line := fmt.Sprintf("set node address %v %v", addr, kind)
	if err := k.begin("SetNodeAddress", line); err != nil {
		return err
	}
	have, exists := k.addresses[addr]
	if have == kind {
		k.errorf("%s: it is that already", line)
	}
	k.recycle(line, "node addresses", exists)
	k.addresses[addr] = kind
	k.check(line)
	return nil
}

func (k *fakeKernel) DeleteNodeAddress(addr netip.Addr) error {
	line := fmt.Sprintf("delete node address %v", addr)
	if err := k.begin("DeleteNodeAddress", line); err != nil {
		return err
	}
	if _, exists := k.addresses[addr]; !exists {
		k.errorf("%s: there is none", line)
	}
	k.recycled["node addresses"] = true
	delete(k.addresses, addr)
	k.check(line)
	return nil
}

func (k *fakeKernel) SetServiceCIDR(cidr netip.Prefix) error {
	line := fmt.Sprintf("set service CIDR %v", cidr)
	if err := k.begin("SetServiceCIDR", line); err != nil {
		return err
	}
	if _, exists := k.cidrs[cidr]; exists {
		k.errorf("%s: it is there already", line)
	}
	if len(k.wanted) > 0 {
		for key := range k.wanted[len(k.wanted)-1].Frontends {
			_, exists := k.frontends[key]
			if cidr.Contains(key.VIP) && (!exists || k.missed[key]) {
				k.errorf("%s: a program may drop what is for %v", line, key)
			}
		}
	}
	k.cidrs[cidr] = struct{}{}
	k.check(line)
	return nil
}

func (k *fakeKernel) DeleteServiceCIDR(cidr netip.Prefix) error {
	line := fmt.Sprintf("delete service CIDR %v", cidr)
	if err := k.begin("DeleteServiceCIDR", line); err != nil {
		k.kept[cidr] = true
		return err
	}
	if _, exists := k.cidrs[cidr]; !exists {
		k.errorf("%s: there is none", line)
	}
	delete(k.kept, cidr)
	delete(k.cidrs, cidr)
	return nil
}

func (k *fakeKernel) SetName(id lb.ServiceID, sp lb.ServicePort) error {
	line := fmt.Sprintf("set name %d %v", id, sp)
	if err := k.begin("SetName", line); err != nil {
		return err
	}
	if name, exists := k.names[id]; exists {
		k.errorf("%s: the ID belongs to %v", line, name)
	}
	if k.remember(id) {
		k.errorf("%s: sockets remember the ID", line)
	}
	k.names[id] = sp
	k.check(line)
	return nil
}

func (k *fakeKernel) DeleteName(id lb.ServiceID) error {
	line := fmt.Sprintf("delete name %d", id)
	if err := k.begin("DeleteName", line); err != nil {
		return err
	}
	if _, exists := k.names[id]; !exists {
		k.errorf("%s: there is none", line)
	}
	if k.isHeld(id) {
		k.errorf("%s: a program may be reading it", line)
	}
	row := k.rows[id]
	for i := range row.Sides {
		row.Sides[i].Generation = 0
	}
	if row != (lb.ServiceRow{}) {
		k.errorf("%s: more is left of it than generations: %+v", line, row)
	}
	for m := range k.members {
		if m.Service == id {
			k.errorf("%s: it has member %v", line, m.Backend)
		}
	}
	for s := range k.sources {
		if s.Service == id {
			k.errorf("%s: it has source %v", line, s.Prefix)
		}
	}
	delete(k.names, id)
	k.check(line)
	return nil
}

func (k *fakeKernel) SetProblem(name lb.Name, p lb.Problem) error {
	if err := k.begin("SetProblem", fmt.Sprintf("set problem %v: %s", name, p)); err != nil {
		return err
	}
	k.problems[name] = p
	return nil
}

func (k *fakeKernel) DeleteProblem(name lb.Name) error {
	if err := k.begin("DeleteProblem", fmt.Sprintf("delete problem %v", name)); err != nil {
		return err
	}
	delete(k.problems, name)
	return nil
}

func (k *fakeKernel) WaitReaders() error {
	if err := k.begin("WaitReaders", "wait for readers"); err != nil {
		return err
	}
	k.graces++
	clear(k.recycled)
	clear(k.held)
	clear(k.missed)
	clear(k.passedBy)
	k.hold()
	return nil
}

func overlap(a, b lb.Range) bool {
	return a.Count > 0 && b.Count > 0 &&
		a.Base < b.Base+uint32(b.Count) && b.Base < a.Base+uint32(a.Count)
}

func (k *fakeKernel) errorf(format string, args ...any) {
	k.tb.Helper()
	k.tb.Errorf("call %d: %s", k.calls, fmt.Sprintf(format, args...))
}

// hold notes what a program can read now.
func (k *fakeKernel) hold() {
	for _, f := range k.frontends {
		if f.Service == lb.NoService {
			continue
		}
		row := k.rows[f.Service]
		k.held[holding{f.Service, row}] = k.names[f.Service]
		for _, r := range row.Sides {
			if r.Count > 0 {
				k.remembered[f.Service] = struct{}{}
			}
		}
	}
}

// isHeld tells whether a program may have the row of id.
func (k *fakeKernel) isHeld(id lb.ServiceID) bool {
	for h := range k.held {
		if h.id == id {
			return true
		}
	}
	return false
}

// check fails the test if a program could meet something that is missing, half
// written, or somebody else's.
func (k *fakeKernel) check(after string) {
	k.hold()
	if len(k.wanted) == 0 {
		return
	}
	k.tb.Helper()
	for key, f := range k.frontends {
		if err := k.checkFrontend(key, f); err != nil {
			k.errorf("after %s: frontend %v: %v", after, key, err)
		}
	}
	for key := range k.wanted[0].Frontends {
		if _, ok := k.frontends[key]; !ok && k.throughout(func(w lb.Delta) bool { _, ok := w.Frontends[key]; return ok }) {
			k.errorf("after %s: frontend %v is missing", after, key)
		}
	}
	// Who has read a row before goes on with it until the next grace period.
	for h, sp := range k.held {
		if err := k.checkMembers(h, sp); err != nil {
			k.errorf("after %s: %v: %v", after, sp, err)
		}
		if err := k.checkSources(h, sp); err != nil {
			k.errorf("after %s: %v: %v", after, sp, err)
		}
		if err := k.checkOutside(h, sp); err != nil {
			k.errorf("after %s: %v: %v", after, sp, err)
		}
	}
	if err := k.checkNode(); err != nil {
		k.errorf("after %s: %v", after, err)
	}
}

// checkFrontend follows a frontend as a program does. It must lead to just the
// backends, and by just the rules, that its owner has, or had, since the tables
// were last as wanted.
func (k *fakeKernel) checkFrontend(key lb.FrontendKey, f lb.Frontend) error {
	var owners []lb.Owner
	for _, w := range k.wanted {
		if owner, ok := w.Frontends[key]; ok {
			owners = append(owners, owner)
		}
	}
	if len(owners) == 0 {
		return errors.New("nobody has ever wanted it")
	}
	if key.IsWildcard() {
		ofKind := func(o lb.Owner) bool { return o.Kind == f.Kind }
		if f.Service != lb.NoService || !slices.ContainsFunc(owners, ofKind) {
			return fmt.Errorf("is %v of service %d", f.Kind, f.Service)
		}
		return nil
	}
	sp, ok := k.names[f.Service]
	if !ok {
		return fmt.Errorf("leads to service %d, which has no name", f.Service)
	}
	if !slices.Contains(owners, lb.Owner{Service: sp, Kind: f.Kind}) {
		return fmt.Errorf("is %v of %v, which it never was", f.Kind, sp)
	}
	row := k.rows[f.Service]
	ever := func(was func(*lb.Backends) bool) bool {
		return slices.ContainsFunc(k.wanted, func(w lb.Delta) bool { return w.Services[sp] != nil && was(w.Services[sp]) })
	}
	for _, side := range []lb.Side{f.Kind.Inside(), f.Kind.Outside()} {
		r := row.Sides[side]
		if !ever(func(b *lb.Backends) bool {
			set := b.Sides[side]
			return slices.Equal(k.backends(r), set.Backends) && r.Elsewhere() == set.Elsewhere
		}) {
			return fmt.Errorf("leads to %v with backends %v (%v) on side %v, which it never had", sp, k.backends(r), r, side)
		}
	}
	if !ever(func(b *lb.Backends) bool { return b.Affinity == row.Affinity }) ||
		!ever(func(b *lb.Backends) bool { return b.Restricted == row.Restricted && b.NodeAllowed == row.NodeAllowed }) ||
		row.OutsideLocal && !ever(func(b *lb.Backends) bool { return b.OutsideLocal }) {
		return fmt.Errorf("leads to %v with options %+v, which it never had", sp, row)
	}
	return k.checkDenied(f.Service, sp)
}

// checkDenied reports a client that gets through though it never was to.
func (k *fakeKernel) checkDenied(id lb.ServiceID, sp lb.ServicePort) error {
	for _, client := range k.clients(sp) {
		never := k.throughout(func(w lb.Delta) bool { return !allows(w.Services[sp], client) })
		if never && (!k.rows[id].Restricted || k.inSources(id, client)) {
			return fmt.Errorf("client %v gets through, which it never was to", client)
		}
	}
	return nil
}

// checkMembers reports a backend that could be chosen from what a program holds
// and that members do not have for those who will remember it.
func (k *fakeKernel) checkMembers(h holding, sp lb.ServicePort) error {
	for i, r := range h.row.Sides {
		for slot := range slotsOf(r) {
			b := k.slots[slot]
			_, serving := k.members[lb.Member{Service: h.id, Backend: b, Use: lb.UseServing}]
			_, inSet := k.members[lb.Member{Service: h.id, Backend: b, Use: lb.UseOn(lb.Side(i))}]
			if sp.Protocol == lb.UDP && !serving || h.row.Affinity > 0 && !inSet {
				return fmt.Errorf("backend %v in slot %d on side %v is not in members", b, slot, lb.Side(i))
			}
		}
	}
	return nil
}

// checkSources reports a client that may use the service, and could all the
// time, and whom a program that holds h denies it, other than for want of a
// source that could not be written.
func (k *fakeKernel) checkSources(h holding, sp lb.ServicePort) error {
	if !h.row.Restricted {
		return nil
	}
	for _, client := range k.clients(sp) {
		always := k.throughout(func(w lb.Delta) bool { return w.Services[sp] == nil || allows(w.Services[sp], client) })
		if always && !k.inSources(h.id, client) && !k.lacking[clientOf{h.id, client}] {
			return fmt.Errorf("client %v is denied", client)
		}
	}
	return nil
}

// checkOutside reports a backend that is not of this node and that an outside
// client could get and keep its address: from the range that a program holds, or
// from members. Programs read the range before the options.
func (k *fakeKernel) checkOutside(h holding, sp lb.ServicePort) error {
	if !k.rows[h.id].OutsideLocal {
		return nil
	}
	never := func(b lb.Backend) bool {
		return k.throughout(func(w lb.Delta) bool {
			want := w.Services[sp]
			return want == nil || !want.OutsideLocal || !slices.Contains(want.Sides[lb.SideOutside].Backends, b)
		})
	}
	for _, b := range k.backends(h.row.Sides[lb.SideOutside]) {
		if never(b) {
			return fmt.Errorf("an outside client keeps its address to %v, which is elsewhere", b)
		}
	}
	for m := range k.members {
		if m.Service == h.id && m.Use == lb.UseOn(lb.SideOutside) && never(m.Backend) {
			return fmt.Errorf("an outside client that remembers %v keeps its address, which is elsewhere", m.Backend)
		}
	}
	return nil
}

// checkRestricted fails the test if a service lets in more than it is wanted
// to, now that there was an attempt to bring that into the kernel: only a
// failure to write the options excuses it.
func (k *fakeKernel) checkRestricted() {
	k.tb.Helper()
	if len(k.wanted) == 0 {
		return
	}
	for id, sp := range k.names {
		want := k.wanted[len(k.wanted)-1].Services[sp]
		if want == nil || !want.Restricted || k.open[id] {
			continue
		}
		if row := k.rows[id]; !row.Restricted || row.NodeAllowed && !want.NodeAllowed {
			k.errorf("%v is open to others than its clients: %+v", sp, row)
		}
	}
}

// clients returns addresses that different source ranges of sp hold.
func (k *fakeKernel) clients(sp lb.ServicePort) []netip.Addr {
	var out []netip.Addr
	for _, w := range k.wanted {
		if b := w.Services[sp]; b != nil {
			for _, p := range b.Sources {
				out = append(out, p.Addr())
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// allows tells whether b, which is not nil where it matters, is for this client.
func allows(b *lb.Backends, client netip.Addr) bool {
	return b != nil && (!b.Restricted ||
		slices.ContainsFunc(b.Sources, func(p netip.Prefix) bool { return p.Contains(client) }))
}

func (k *fakeKernel) inSources(id lb.ServiceID, client netip.Addr) bool {
	for s := range k.sources {
		if s.Service == id && s.Prefix.Contains(client) {
			return true
		}
	}
	return false
}

// checkNode reports a node address or service CIDR that was never wanted, or
// that was all the time and is missing.
func (k *fakeKernel) checkNode() error {
	for addr, kind := range k.addresses {
		if k.throughout(func(w lb.Delta) bool { return w.NodeAddresses[addr] != kind }) {
			return fmt.Errorf("node address %v is %v, which it never was", addr, kind)
		}
	}
	for addr := range k.wanted[0].NodeAddresses {
		if k.addresses[addr] == 0 && k.throughout(func(w lb.Delta) bool { return w.NodeAddresses[addr] != 0 }) {
			return fmt.Errorf("node address %v is missing", addr)
		}
	}
	for cidr := range k.cidrs {
		if !k.wanted[len(k.wanted)-1].ServiceCIDRs[cidr] && !k.kept[cidr] {
			return fmt.Errorf("service CIDR %v should have gone first", cidr)
		}
	}
	for cidr := range k.wanted[0].ServiceCIDRs {
		if _, ok := k.cidrs[cidr]; !ok && k.throughout(func(w lb.Delta) bool { return w.ServiceCIDRs[cidr] }) {
			return fmt.Errorf("service CIDR %v is missing", cidr)
		}
	}
	return nil
}

// throughout tells whether something has always been so since the tables were
// last as wanted.
func (k *fakeKernel) throughout(so func(lb.Delta) bool) bool {
	return !slices.ContainsFunc(k.wanted, func(w lb.Delta) bool { return !so(w) })
}
