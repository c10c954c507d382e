// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// pass is one walk through the phases for some of what there is to do.
type pass struct {
	*Reconciler
	services  []lb.ServicePort // sorted
	frontends []lb.FrontendKey // sorted, wildcards last
	retired   []lb.ServiceID   // sorted
	addresses []netip.Addr     // sorted
	cidrs     []netip.Prefix   // sorted
	// leaving are the services that are finished after the grace period.
	leaving []leavers
	// failing are the Services of which something has failed in this pass.
	failing map[lb.Name]struct{}
	// graceErr is why the grace period did not come to an end. Once is enough
	// for a pass.
	graceErr error
	result   Result
}

// leavers are the rows of one service, perhaps none, that its clients ask no more.
type leavers struct {
	*service
	members []lb.Member
	sources []lb.Source
}

// newPass returns a pass over all there is to do for the Services of which
// concerned is true.
func (r *Reconciler) newPass(concerned func(lb.Name) bool) *pass {
	p := &pass{Reconciler: r, failing: map[lb.Name]struct{}{}}
	for sp := range r.todo.services {
		if concerned(sp.Service) {
			p.services = append(p.services, sp)
		}
	}
	for key, c := range r.todo.frontends {
		if concerned(c.service) {
			p.frontends = append(p.frontends, key)
		}
	}
	for id := range r.todo.retired {
		if concerned(r.have.services[id].name.Service) {
			p.retired = append(p.retired, id)
		}
	}
	if concerned(nobody) {
		p.addresses = slices.SortedFunc(maps.Keys(r.todo.addresses), netip.Addr.Compare)
		p.cidrs = slices.SortedFunc(maps.Keys(r.todo.cidrs), netip.Prefix.Compare)
	}
	slices.SortFunc(p.services, lb.ServicePort.Compare)
	slices.SortFunc(p.frontends, func(a, b lb.FrontendKey) int {
		return cmp.Or(compareBool(a.IsWildcard(), b.IsWildcard()), a.Compare(b))
	})
	slices.Sort(p.retired)
	return p
}

// run goes through the phases. With makeRoom it prunes before it writes, too,
// and then also what belongs to Services of which something fails.
func (p *pass) run(makeRoom bool) Result {
	p.deleteCIDRs()
	if makeRoom {
		p.prune(false)
	}
	p.update()
	p.prune(true)
	p.addCIDRs()
	return p.finish()
}

// update brings what is wanted into the kernel.
func (p *pass) update() {
	for _, sp := range p.services {
		if err := p.syncService(sp); err != nil {
			p.failService(sp, err)
			continue
		}
		s := p.have.named(sp)
		if gone := p.leavers(s); len(gone.members)+len(gone.sources) > 0 || s.options != p.wantedOptions(s) {
			if len(gone.sources) > 0 {
				// Programs may have passed by those that have just joined.
				p.waiting[sp.Service] = struct{}{}
			}
			p.todo.services[sp] = nil
			p.leaving = append(p.leaving, gone)
			continue
		}
		delete(p.todo.services, sp)
	}
	// All inserts come before the first replacement, which is the first write
	// that makes the next one wait. Wildcards are last among them, so that one
	// grace period is enough for all.
	for _, replace := range []bool{false, true} {
		p.setAddresses(replace)
		p.setFrontends(replace)
	}
}

// setAddresses writes the wanted node addresses that differ from the kernel's:
// with replace those that it has, otherwise those that it has not.
func (p *pass) setAddresses(replace bool) {
	for _, addr := range p.addresses {
		kind, wanted := p.want.NodeAddresses[addr]
		have, exists := p.have.addresses[addr]
		if !wanted || exists != replace {
			continue
		}
		var err error
		if kind != have {
			err = p.setAddress(addr, kind)
		}
		settle(p.todo.addresses, addr, err)
	}
}

// setFrontends is setAddresses for frontends.
func (p *pass) setFrontends(replace bool) {
	for _, key := range p.frontends {
		owner, wanted := p.want.Frontends[key]
		have, exists := p.have.frontends[key]
		if !wanted || exists != replace || p.blocked(key, owner) {
			continue
		}
		row, err := p.row(key, owner)
		if err == nil && row != have {
			err = p.setFrontend(key, row)
		}
		if err != nil {
			p.failFrontend(key, err)
			continue
		}
		delete(p.todo.frontends, key)
	}
}

// blocked tells whether key has to wait: a port until its service is in the
// kernel as it should be, a wildcard until all ports of its Service have
// succeeded, for it refuses those that are not there yet.
func (p *pass) blocked(key lb.FrontendKey, owner lb.Owner) bool {
	if key.IsWildcard() {
		return p.isFailing(owner.Service.Service)
	}
	return p.todo.services[owner.Service] != nil
}

// row returns the row that makes key lead to owner.
func (p *pass) row(key lb.FrontendKey, owner lb.Owner) (lb.Frontend, error) {
	if key.IsWildcard() {
		return lb.Frontend{Service: lb.NoService, Kind: owner.Kind}, nil
	}
	s := p.have.named(owner.Service)
	if s == nil {
		return lb.Frontend{}, fmt.Errorf("frontend %v: nothing is known about %v", key, owner.Service)
	}
	return lb.Frontend{Service: s.id, Kind: owner.Kind}, nil
}

// prune removes what nothing leads to any more. With suspend it leaves alone
// the frontends of Services of which something has failed in this pass.
func (p *pass) prune(suspend bool) {
	p.deleteFrontends(suspend)
	p.deleteAddresses()
	if len(p.waiting)+len(p.leaving)+len(p.retired) > 0 {
		// What may not be done without it looks at graceErr.
		_ = p.grace()
	}
	for _, gone := range p.leaving {
		err := p.graceErr
		if err == nil {
			err = p.finishService(gone)
		}
		if err != nil {
			p.failService(gone.name, err)
			continue
		}
		delete(p.todo.services, gone.name)
	}
	p.leaving = nil
	for _, id := range p.retired {
		if err := p.retire(id); err != nil {
			p.todo.retired[id] = err
			p.failing[p.have.services[id].name.Service] = struct{}{}
		}
	}
}

// deleteFrontends deletes the frontends that nobody is to have. Wildcards go
// first: alone they would refuse what has just been served.
func (p *pass) deleteFrontends(suspend bool) {
	for _, key := range slices.Backward(p.frontends) {
		c, todo := p.todo.frontends[key]
		if _, wanted := p.want.Frontends[key]; wanted || !todo {
			continue
		}
		if _, exists := p.have.frontends[key]; exists {
			if suspend && p.isFailing(c.service) {
				continue
			}
			if err := p.deleteFrontend(key); err != nil {
				p.failFrontend(key, err)
				continue
			}
		}
		delete(p.todo.frontends, key)
	}
}

// deleteAddresses deletes the node addresses that are not wanted.
func (p *pass) deleteAddresses() {
	for _, addr := range p.addresses {
		if _, wanted := p.want.NodeAddresses[addr]; wanted {
			continue
		}
		var err error
		if _, exists := p.have.addresses[addr]; exists {
			err = p.deleteAddress(addr)
		}
		settle(p.todo.addresses, addr, err)
	}
}

// deleteCIDRs deletes the service CIDRs that are not wanted.
func (p *pass) deleteCIDRs() {
	for _, cidr := range p.cidrs {
		if p.want.ServiceCIDRs[cidr] {
			continue
		}
		var err error
		if _, exists := p.have.cidrs[cidr]; exists {
			err = p.deleteCIDR(cidr)
		}
		settle(p.todo.cidrs, cidr, err)
	}
}

// addCIDRs adds the service CIDRs that are missing. They wait while frontends
// are missing, too, whose addresses would be taken for nobody's.
func (p *pass) addCIDRs() {
	wait := len(p.cidrs) > 0 && p.frontendsMissing()
	for _, cidr := range p.cidrs {
		_, exists := p.have.cidrs[cidr]
		switch {
		case !p.want.ServiceCIDRs[cidr]:
		case exists:
			settle(p.todo.cidrs, cidr, nil)
		case wait:
			p.todo.cidrs[cidr] = nil
		default:
			settle(p.todo.cidrs, cidr, p.addCIDR(cidr))
		}
	}
}

// frontendsMissing tells whether a wanted frontend is not in the kernel.
func (p *pass) frontendsMissing() bool {
	for key := range p.todo.frontends {
		_, wanted := p.want.Frontends[key]
		if _, exists := p.have.frontends[key]; wanted && !exists {
			return true
		}
	}
	return false
}

// settle notes in todo that what there was to do for key is done, or why it
// failed.
func settle[K comparable](todo map[K]error, key K, err error) {
	if err != nil {
		todo[key] = err
	} else {
		delete(todo, key)
	}
}

// retire removes all rows of a service that is not wanted and puts its ID to
// rest, unless a frontend still leads there.
func (p *pass) retire(id lb.ServiceID) error {
	if _, todo := p.todo.retired[id]; !todo {
		return nil
	}
	s := p.have.services[id]
	if p.alive(s) {
		delete(p.todo.retired, id)
		return nil
	}
	if len(s.frontends) > 0 {
		p.todo.retired[id] = nil
		return nil
	}
	if p.graceErr != nil {
		return p.graceErr
	}
	if err := p.removeService(s); err != nil {
		return err
	}
	delete(p.todo.retired, id)
	return nil
}

// finish writes the problems, which say how the pass went, and returns the
// result.
func (p *pass) finish() Result {
	before := p.failed
	p.failed = p.failures()
	for name := range before {
		p.todo.problems[name] = struct{}{}
	}
	for name := range p.failed {
		p.todo.problems[name] = struct{}{}
	}
	for _, name := range slices.SortedFunc(maps.Keys(p.todo.problems), lb.Name.Compare) {
		// People read problems, programs do not: that a problem cannot be
		// written is no reason for another one. It stays to be done.
		if err := p.syncProblem(name); err == nil {
			delete(p.todo.problems, name)
		}
	}
	if !p.Pending() {
		// A map that was large once is as slow to walk as a large one.
		p.todo = newTodo()
	}
	p.result.Failed = maps.Clone(p.failed)
	p.result.Answered = p.stillAnswered()
	return p.result
}

// stillAnswered returns the frontends in the result's Answered that have a
// backend now that the pass is over.
func (p *pass) stillAnswered() []lb.FrontendKey {
	keys := slices.DeleteFunc(p.result.Answered, func(key lb.FrontendKey) bool {
		return !p.have.answers(key)
	})
	slices.SortFunc(keys, lb.FrontendKey.Compare)
	if keys = slices.Compact(keys); len(keys) == 0 {
		return nil
	}
	return keys
}

// failures returns one error for each Service of which something has failed:
// that of the first service port, else of the first frontend, else of what is
// to be retired. Nobody's node addresses and service CIDRs come after those.
func (p *pass) failures() map[lb.Name]error {
	failed := map[lb.Name]error{}
	add := func(name lb.Name, err error) {
		if _, ok := failed[name]; err != nil && !ok {
			failed[name] = err
		}
	}
	for _, sp := range slices.SortedFunc(maps.Keys(p.todo.services), lb.ServicePort.Compare) {
		add(sp.Service, p.todo.services[sp])
	}
	for _, key := range slices.SortedFunc(maps.Keys(p.todo.frontends), lb.FrontendKey.Compare) {
		add(p.todo.frontends[key].service, p.todo.frontends[key].err)
	}
	for _, id := range slices.Sorted(maps.Keys(p.todo.retired)) {
		add(p.have.services[id].name.Service, p.todo.retired[id])
	}
	for _, addr := range slices.SortedFunc(maps.Keys(p.todo.addresses), netip.Addr.Compare) {
		add(nobody, p.todo.addresses[addr])
	}
	for _, cidr := range slices.SortedFunc(maps.Keys(p.todo.cidrs), netip.Prefix.Compare) {
		add(nobody, p.todo.cidrs[cidr])
	}
	for name := range p.waiting {
		add(name, p.graceErr)
	}
	return failed
}

func (p *pass) failService(sp lb.ServicePort, err error) {
	p.todo.services[sp] = fmt.Errorf("%v: %w", sp, err)
	p.failing[sp.Service] = struct{}{}
}

func (p *pass) failFrontend(key lb.FrontendKey, err error) {
	name := p.todo.frontends[key].service
	p.todo.frontends[key] = change{name, err}
	p.failing[name] = struct{}{}
}

func (p *pass) isFailing(name lb.Name) bool {
	_, failing := p.failing[name]
	return failing
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}
