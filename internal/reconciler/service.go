// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"fmt"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// syncService makes the service of sp lead to the wanted backends and follow
// the wanted rules. Rows that are to leave are still there when it returns.
func (p *pass) syncService(sp lb.ServicePort) error {
	s, err := p.ensureService(sp)
	if err != nil {
		return err
	}
	want := p.want.Services[sp]
	opts := p.wantedOptions(s)
	// Who is to be kept out is, whatever else fails: rather a client too few
	// than one that nobody has allowed.
	sourcesErr := add(p, &s.sources, without(p.wantedSources(s), s.sources), p.kernel.SetSource)
	if err := p.setOptions(s, s.options.towards(opts)); err != nil {
		return err
	}
	if sourcesErr != nil {
		return sourcesErr
	}
	if err := p.addMembers(s); err != nil {
		return err
	}
	if err := p.setSides(s, &want.Sides); err != nil {
		return err
	}
	if p.leftBackends(s) {
		opts.outsideLocal = opts.outsideLocal && s.outsideLocal
	}
	return p.setOptions(s, opts)
}

// leftBackends tells whether a program may still give clients a backend that s
// has left: one that has read an old range, or that asks members of an affinity.
func (p *pass) leftBackends(s *service) bool {
	_, waiting := p.waiting[s.name.Service]
	return waiting || p.inherited || len(p.leavers(s).members) > 0
}

// towards returns what of want may be in force before all else of the service
// is as wanted. Nobody is let in yet. An affinity ends but does not begin: as
// long as there is one, members have what is in the slots. Nor do outside clients
// begin to keep their address: as long as they do, the backends are here, for the
// answers of others would pass by the node.
func (o options) towards(want options) options {
	next := want
	if o.affinity == 0 {
		next.affinity = 0
	}
	next.outsideLocal = o.outsideLocal && want.outsideLocal
	if o.restricted && (!want.restricted || want.nodeAllowed) {
		next.restricted, next.nodeAllowed = true, o.nodeAllowed
	}
	return next
}

// ensureService returns the service of that name, new if there is none.
func (p *pass) ensureService(sp lb.ServicePort) (*service, error) {
	if s := p.have.named(sp); s != nil {
		return s, nil
	}
	id, ok := p.ids.Alloc()
	if !ok {
		return nil, &lb.FullError{Table: "services", Err: fmt.Errorf(
			"no room: all %d service IDs are in use or were until lately (raise --max-services)", max(p.limits.Services-1, 0))}
	}
	if err := p.kernel.SetName(id, sp); err != nil {
		p.ids.Return(id)
		return nil, err
	}
	p.result.Writes++
	s := p.have.service(id)
	s.name = sp
	p.have.ids[sp] = id
	return s, nil
}

// wantedOptions returns the options that s should have.
func (p *pass) wantedOptions(s *service) options {
	want := p.want.Services[s.name]
	return options{want.Affinity, want.Restricted, want.NodeAllowed, want.OutsideLocal}
}

// wantedMembers returns the rows that members should have for s, sorted.
func (p *pass) wantedMembers(s *service) []lb.Member {
	return p.want.Services[s.name].MemberRows(s.id, s.name.Protocol)
}

// wantedSources returns the rows that sources should have for s, sorted.
func (p *pass) wantedSources(s *service) []lb.Source {
	return p.want.Services[s.name].SourceRows(s.id)
}

// addMembers writes the members of s that are missing. When one cannot be written
// the others are taken back, unless a range leads to their backends: for want of
// room for all of them s goes on with the backends it has, and what is left of the
// room is for services that fit.
func (p *pass) addMembers(s *service) error {
	missing := without(p.wantedMembers(s), s.members)
	if len(missing) == 0 {
		return nil
	}
	done, err := each(missing, p.kernel.SetMember)
	p.result.Writes += done
	s.members = union(s.members, missing[:done])
	if err == nil {
		return nil
	}
	chosen := s.backends()
	taken := slices.DeleteFunc(missing[:done], func(m lb.Member) bool {
		_, yes := chosen[m.Backend]
		return yes
	})
	// They count as neither written nor deleted, for nothing has changed. What
	// cannot be deleted stays until the next try.
	done, _ = each(taken, p.kernel.DeleteMember)
	p.result.Writes -= done
	s.members = without(s.members, taken[:done])
	return err
}

// leavers returns the members and sources of s that are not wanted.
func (p *pass) leavers(s *service) leavers {
	return leavers{
		service: s,
		members: without(s.members, p.wantedMembers(s)),
		sources: without(s.sources, p.wantedSources(s)),
	}
}

// finishService deletes what has left the service, now that no program asks for
// it, and makes the options what they should be.
func (p *pass) finishService(gone leavers) error {
	if err := p.deleteLeavers(gone); err != nil {
		return err
	}
	return p.setOptions(gone.service, p.wantedOptions(gone.service))
}

// deleteLeavers deletes these rows.
func (p *pass) deleteLeavers(gone leavers) error {
	if err := p.deleteMembers(gone.service, gone.members); err != nil {
		return err
	}
	return p.deleteSources(gone.service, gone.sources)
}

// deleteMembers deletes those of the members of s.
func (p *pass) deleteMembers(s *service, gone []lb.Member) error {
	return remove(p, &s.members, gone, func(m lb.Member) error {
		if err := p.kernel.DeleteMember(m); err != nil {
			return err
		}
		if m.Use == lb.UseServing {
			p.result.Stranded = true
		} else {
			p.result.Unremembered = true
		}
		return nil
	})
}

// deleteSources deletes those of the sources of s.
func (p *pass) deleteSources(s *service, gone []lb.Source) error {
	return remove(p, &s.sources, gone, p.kernel.DeleteSource)
}

// add writes the missing rows and adds them to those that the kernel has.
func add[T row[T]](p *pass, have *[]T, missing []T, write func(T) error) error {
	if len(missing) == 0 {
		return nil
	}
	done, err := each(missing, write)
	p.result.Writes += done
	*have = union(*have, missing[:done])
	return err
}

// remove deletes the rows in gone and takes them out of those that the kernel
// has.
func remove[T row[T]](p *pass, have *[]T, gone []T, write func(T) error) error {
	done, err := each(gone, write)
	p.result.Deletes += done
	*have = without(*have, gone[:done])
	return err
}

// each calls write for one row after the other, until there is an error. It
// returns for how many there was none.
func each[T any](rows []T, write func(T) error) (done int, err error) {
	for i, r := range rows {
		if err := write(r); err != nil {
			return i, err
		}
	}
	return len(rows), nil
}

// setOptions makes the options of s these, unless they are. Programs that have
// read the old ones may go on asking for rows that the new ones have no use for.
func (p *pass) setOptions(s *service, opts options) error {
	old := s.options
	if err := p.writeOptions(s, opts); err != nil {
		return err
	}
	if old.affinity > 0 && opts.affinity == 0 || old.restricted && !opts.restricted {
		p.waiting[s.name.Service] = struct{}{}
	}
	return nil
}

// writeOptions makes the options of s these, unless they are.
func (p *pass) writeOptions(s *service, opts options) error {
	if s.options == opts {
		return nil
	}
	if err := p.kernel.SetOptions(s.id, opts.row()); err != nil {
		return err
	}
	p.result.Writes++
	s.options = opts
	return nil
}

// setSides makes each side of s lead to its set, unless it does.
func (p *pass) setSides(s *service, sets *[lb.Sides]lb.Set) error {
	before := s.sides
	defer func() {
		for _, r := range s.abandoned(before) {
			p.blocks.Release(r.Base, int(r.Count))
		}
	}()
	for i, set := range sets {
		if s.sides[i].holds(set) {
			continue
		}
		if err := p.setSide(s, lb.Side(i), set, &before); err != nil {
			return err
		}
	}
	return nil
}

// setSide makes a side of s lead to set: to the block of another side, also of
// one that had it before, if that holds the same, else to a new one.
func (p *pass) setSide(s *service, i lb.Side, set lb.Set, before *[lb.Sides]side) error {
	old := s.sides[i]
	next, shared := s.blockOf(set, before)
	if !shared && len(set.Backends) > 0 {
		base, err := p.writeBlock(set.Backends)
		if err != nil {
			return err
		}
		next = side{Range: lb.Range{Base: base, Count: uint16(len(set.Backends))}, slots: set.Backends, block: true}
	}
	if next.block {
		next.Range = old.Next(next.Base, int(next.Count))
	} else {
		next.Range = old.NextEmpty(set.Elsewhere)
	}
	if err := p.kernel.SetRange(s.id, i, next.Range); err != nil {
		if next.block && !shared {
			p.blocks.Return(next.Base, int(next.Count))
		}
		return err
	}
	p.result.Writes++
	s.sides[i] = next
	if old.Count > 0 {
		p.waiting[s.name.Service] = struct{}{}
	} else {
		p.answered(s, i)
	}
	return nil
}

// blockOf returns a side of s, as they are or as they were before, whose block
// holds what is in set.
func (s *service) blockOf(set lb.Set, before *[lb.Sides]side) (found side, ok bool) {
	for _, sides := range [...]*[lb.Sides]side{&s.sides, before} {
		for _, candidate := range sides {
			if candidate.block && candidate.holds(set) {
				return candidate, true
			}
		}
	}
	return side{}, false
}

// answered notes the frontends of s on a side that had no backends until now.
func (p *pass) answered(s *service, i lb.Side) {
	for _, key := range s.frontends {
		if key.Protocol == lb.UDP && p.have.frontends[key].Kind.Inside() == i {
			p.result.Answered = append(p.result.Answered, key)
		}
	}
}

// writeBlock writes backends, of which there is at least one, into slots that
// nobody reads and returns the first slot.
func (p *pass) writeBlock(backends []lb.Backend) (base uint32, err error) {
	if p.inherited {
		if err := p.grace(); err != nil {
			return 0, err
		}
	}
	base, ok := p.blocks.Alloc(len(backends))
	if !ok && len(p.waiting) > 0 && p.grace() == nil {
		base, ok = p.blocks.Alloc(len(backends))
	}
	if !ok {
		return 0, &lb.FullError{Table: "slots", Err: fmt.Errorf(
			"no room: no %d of the %d slots in a row are free (raise --max-slots)", len(backends), p.limits.Slots)}
	}
	if err := p.kernel.SetSlots(base, backends); err != nil {
		p.blocks.Return(base, len(backends))
		return 0, err
	}
	p.result.Writes += len(backends)
	return base, nil
}

// removeService removes the rows of a service that no program can be reading,
// and puts its ID to rest. The name goes last: as long as it is there, the ID
// is known to be in use.
func (p *pass) removeService(s *service) error {
	if err := p.clearRow(s); err != nil {
		return err
	}
	if err := p.deleteLeavers(leavers{s, s.members, s.sources}); err != nil {
		return err
	}
	if s.name != (lb.ServicePort{}) {
		if err := p.kernel.DeleteName(s.id); err != nil {
			return err
		}
		p.result.Deletes++
	}
	if p.have.named(s.name) == s {
		delete(p.have.ids, s.name)
	}
	s.name = lb.ServicePort{}
	p.ids.Release(s.id)
	if !p.exists(s.id) {
		delete(p.have.services, s.id)
	}
	return nil
}

// exists tells whether the services table has a row for id. What was adopted
// may speak of others, when a damaged frontend does or the limits were higher.
func (p *pass) exists(id lb.ServiceID) bool { return int(id) < p.limits.Services }

// clearRow makes the ranges of a service that is to go empty, its blocks free
// and its options none. The generations stay behind for whoever gets the ID
// next.
func (p *pass) clearRow(s *service) error {
	before := s.sides
	defer func() {
		for _, r := range s.abandoned(before) {
			p.blocks.Return(r.Base, int(r.Count))
		}
	}()
	if !p.exists(s.id) {
		s.sides, s.options = [lb.Sides]side{}, options{}
		return nil
	}
	for i, old := range before {
		if old.blank() {
			continue
		}
		next := old.NextEmpty(false)
		if err := p.kernel.SetRange(s.id, lb.Side(i), next); err != nil {
			return err
		}
		p.result.Writes++
		s.sides[i] = side{Range: next}
	}
	return p.writeOptions(s, options{})
}
