// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"fmt"
	"net/netip"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Every method here and in service.go that writes changes the mirror after the
// write succeeded, and only as far as it did.

// setAddress inserts or replaces the row of addr, which differs from kind.
func (p *pass) setAddress(addr netip.Addr, kind lb.NodeAddress) error {
	if err := p.unrecycle(); err != nil {
		return err
	}
	if err := p.kernel.SetNodeAddress(addr, kind); err != nil {
		return err
	}
	p.result.Writes++
	if _, exists := p.have.addresses[addr]; exists {
		p.left(nobody)
	}
	p.have.addresses[addr] = kind
	return nil
}

func (p *pass) deleteAddress(addr netip.Addr) error {
	if err := p.kernel.DeleteNodeAddress(addr); err != nil {
		return err
	}
	p.result.Deletes++
	p.left(nobody)
	delete(p.have.addresses, addr)
	return nil
}

// setFrontend inserts or replaces the row of key, which differs from f.
func (p *pass) setFrontend(key lb.FrontendKey, f lb.Frontend) error {
	if key.IsWildcard() && f.Kind != lb.KindForeign && p.missedPort {
		p.waiting[p.todo.frontends[key].service] = struct{}{}
		if err := p.grace(); err != nil {
			return err
		}
	}
	if err := p.unrecycle(); err != nil {
		return err
	}
	if err := p.kernel.SetFrontend(key, f); err != nil {
		return err
	}
	p.result.Writes++
	if _, exists := p.have.frontends[key]; exists {
		p.leftFrontend(key)
	} else {
		p.missed = true
		p.missedPort = p.missedPort || !key.IsWildcard()
	}
	if key.Protocol == lb.UDP && !p.have.answers(key) {
		p.result.Answered = append(p.result.Answered, key)
	}
	p.have.setFrontend(key, f)
	return nil
}

func (p *pass) deleteFrontend(key lb.FrontendKey) error {
	if err := p.kernel.DeleteFrontend(key); err != nil {
		return err
	}
	p.result.Deletes++
	p.leftFrontend(key)
	p.have.deleteFrontend(key)
	return nil
}

// leftFrontend notes that the row of key was replaced or deleted. It may have
// been the last one that kept its service from being retired.
func (p *pass) leftFrontend(key lb.FrontendKey) {
	p.left(p.todo.frontends[key].service)
	old := p.have.target(key)
	if old == nil {
		return
	}
	if _, todo := p.todo.retired[old.id]; todo {
		p.retired = append(p.retired, old.id)
	}
}

// left notes that an element of a hash table was replaced or deleted on behalf
// of a Service.
func (p *pass) left(name lb.Name) {
	p.recycled = true
	p.waiting[name] = struct{}{}
}

// unrecycle waits until the next insert or replacement can take no element away
// from a program that holds it.
func (p *pass) unrecycle() error {
	if p.inherited || p.recycled {
		return p.grace()
	}
	return nil
}

func (p *pass) deleteCIDR(cidr netip.Prefix) error {
	if err := p.kernel.DeleteServiceCIDR(cidr); err != nil {
		return err
	}
	p.result.Deletes++
	delete(p.have.cidrs, cidr)
	return nil
}

// addCIDR adds a service CIDR once no program is running that missed a
// frontend.
func (p *pass) addCIDR(cidr netip.Prefix) error {
	if p.missed {
		p.waiting[nobody] = struct{}{}
	}
	if err := p.grace(); err != nil {
		return err
	}
	if err := p.kernel.SetServiceCIDR(cidr); err != nil {
		return err
	}
	p.result.Writes++
	p.have.cidrs[cidr] = struct{}{}
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
	p.inherited, p.recycled, p.missed, p.missedPort = false, false, false, false
	p.waiting = map[lb.Name]struct{}{}
	return nil
}

// syncProblem makes the problem row of a Service say why it has failed or else
// what the Store found wrong with it.
func (p *pass) syncProblem(name lb.Name) error {
	want := p.want.Problems[name]
	if err := p.failed[name]; err != nil && name != nobody {
		want = lb.Problem(err.Error())
	}
	// What would not be read back would be written again and again.
	want = want[:min(len(want), lb.MaxProblem)]
	have, exists := p.have.problems[name]
	switch {
	case want == have && exists == (want != ""):
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
