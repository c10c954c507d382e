// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"fmt"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Every method here that writes changes the mirror after the write succeeded,
// and only as far as it did.

// syncService makes the service of sp lead to the wanted backends. Members that
// are to leave are still there when it returns.
func (p *pass) syncService(sp lb.ServicePort) error {
	s, err := p.ensureService(sp)
	if err != nil {
		return err
	}
	if err := p.addMembers(s); err != nil {
		return err
	}
	return p.setRange(s, p.want.Services[sp].Eligible)
}

// ensureService returns the service of that name, new if there is none.
func (p *pass) ensureService(sp lb.ServicePort) (*service, error) {
	if s := p.have.named(sp); s != nil {
		return s, nil
	}
	id, ok := p.ids.Alloc()
	if !ok {
		return nil, fmt.Errorf("no room: all %d service IDs are in use or were until lately (raise --max-services)",
			max(p.limits.Services-1, 0))
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

// wantedMembers returns the backends that the members table should have for s.
func (p *pass) wantedMembers(s *service) []lb.Backend {
	if !s.name.Protocol.Remembers() {
		return nil
	}
	return p.want.Services[s.name].Serving
}

// leavers returns the members of s that are not wanted.
func (p *pass) leavers(s *service) []lb.Backend { return without(s.members, p.wantedMembers(s)) }

// addMembers adds the members of s that are missing.
func (p *pass) addMembers(s *service) error {
	missing := without(p.wantedMembers(s), s.members)
	for i, b := range missing {
		if err := p.kernel.SetMember(lb.Member{Service: s.id, Backend: b}); err != nil {
			s.members = union(s.members, missing[:i])
			return err
		}
		p.result.Writes++
	}
	if len(missing) > 0 {
		s.members = union(s.members, missing)
	}
	return nil
}

// setRange makes the range of s lead to these backends, unless it does.
func (p *pass) setRange(s *service, backends []lb.Backend) error {
	if s.holds(backends) {
		return nil
	}
	base, err := p.writeBlock(backends)
	if err != nil {
		return err
	}
	next := s.rng.Next(base, len(backends))
	if err := p.kernel.SetService(s.id, next); err != nil {
		if next.Count > 0 {
			p.blocks.Return(base, len(backends))
		}
		return err
	}
	p.result.Writes++
	if s.block {
		p.blocks.Release(s.rng.Base, int(s.rng.Count))
	}
	if s.usable() {
		p.waiting[s.name.Service] = struct{}{}
	} else if s.name.Protocol == lb.UDP {
		p.result.Answered = append(p.result.Answered, s.frontends...)
	}
	s.rng, s.slots, s.block = next, backends, next.Count > 0
	return nil
}

// writeBlock writes backends into slots that nobody reads and returns the first
// one; no slot is needed for no backends.
func (p *pass) writeBlock(backends []lb.Backend) (base uint32, err error) {
	if len(backends) == 0 {
		return 0, nil
	}
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
		return 0, fmt.Errorf("no room: no %d of the %d slots in a row are free (raise --max-slots)",
			len(backends), p.limits.Slots)
	}
	if err := p.kernel.SetSlots(base, backends); err != nil {
		p.blocks.Return(base, len(backends))
		return 0, err
	}
	p.result.Writes += len(backends)
	return base, nil
}

// deleteLeavers deletes the members of s that are not wanted.
func (p *pass) deleteLeavers(s *service) error { return p.deleteMembers(s, p.leavers(s)) }

// deleteMembers deletes those of the members of s.
func (p *pass) deleteMembers(s *service, gone []lb.Backend) error {
	for i, b := range gone {
		if err := p.kernel.DeleteMember(lb.Member{Service: s.id, Backend: b}); err != nil {
			s.members = without(s.members, gone[:i])
			return err
		}
		p.result.Deletes++
		p.result.Stranded = true
	}
	s.members = without(s.members, gone)
	return nil
}

// setFrontend inserts or replaces the row of key, which differs from f.
func (p *pass) setFrontend(key lb.FrontendKey, f lb.Frontend) error {
	if p.inherited || p.recycled {
		if err := p.grace(); err != nil {
			return err
		}
	}
	if err := p.kernel.SetFrontend(key, f); err != nil {
		return err
	}
	p.result.Writes++
	old := p.have.target(key)
	if _, exists := p.have.frontends[key]; exists {
		p.leftFrontend(key, old)
	}
	p.have.setFrontend(key, f)
	if key.Protocol == lb.UDP && !old.usable() {
		p.result.Answered = append(p.result.Answered, key)
	}
	return nil
}

func (p *pass) deleteFrontend(key lb.FrontendKey) error {
	if err := p.kernel.DeleteFrontend(key); err != nil {
		return err
	}
	p.result.Deletes++
	p.leftFrontend(key, p.have.target(key))
	p.have.deleteFrontend(key)
	return nil
}

// leftFrontend notes that the row of key, which led to old, was replaced or
// deleted. It may have been the last one that kept old from being retired.
func (p *pass) leftFrontend(key lb.FrontendKey, old *service) {
	p.recycled = true
	p.waiting[p.todo.frontends[key].service] = struct{}{}
	if old == nil {
		return
	}
	if _, todo := p.todo.retired[old.id]; todo {
		p.retired = append(p.retired, old.id)
	}
}

// removeService removes the rows of a service that no program can be reading,
// and puts its ID to rest. The name goes last: as long as it is there, the ID
// is known to be in use.
func (p *pass) removeService(s *service) error {
	if s.rng.Count > 0 || len(s.members) > 0 {
		if err := p.clearRange(s); err != nil {
			return err
		}
	}
	if err := p.deleteMembers(s, s.members); err != nil {
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

// clearRange makes the range of a service that is to go empty and its block
// free. The generation stays behind for whoever gets the ID next.
func (p *pass) clearRange(s *service) error {
	next := s.rng.Next(0, 0)
	if p.exists(s.id) {
		if err := p.kernel.SetService(s.id, next); err != nil {
			return err
		}
		p.result.Writes++
	}
	if s.block {
		p.blocks.Return(s.rng.Base, int(s.rng.Count))
	}
	s.rng, s.slots, s.block = next, nil, false
	return nil
}

// grace waits until no program reads what was retired before the call, and then
// ends the rest of the blocks. It does nothing when nothing was retired since
// the last time.
func (p *pass) grace() error {
	if p.graceErr != nil || !p.inherited && !p.recycled && len(p.waiting) == 0 {
		return p.graceErr
	}
	if err := p.kernel.WaitReaders(); err != nil {
		p.graceErr = fmt.Errorf("wait for running programs to end: %w", err)
		return p.graceErr
	}
	p.blocks.Settle()
	p.inherited, p.recycled = false, false
	p.waiting = map[lb.Name]struct{}{}
	return nil
}

// syncProblem makes the problem row of a Service say why it has failed or else
// what the Store found wrong with it.
func (p *pass) syncProblem(name lb.Name) error {
	want := p.want.Problems[name]
	if err := p.failed[name]; err != nil {
		want = lb.Problem(err.Error())
	}
	have, exists := p.have.problems[name]
	switch {
	case name == (lb.Name{}) || want == have:
		return nil
	case want != "":
		if err := p.kernel.SetProblem(name, want); err != nil {
			return err
		}
		p.result.Writes++
	case exists:
		if err := p.kernel.DeleteProblem(name); err != nil {
			return err
		}
		p.result.Deletes++
	}
	put(p.have.problems, name, want, want != "")
	return nil
}
