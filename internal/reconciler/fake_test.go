// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"errors"
	"fmt"
	"maps"
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
	words     map[lb.ServiceID]lb.Range
	slots     map[uint32]lb.Backend
	members   map[lb.Member]struct{}
	names     map[lb.ServiceID]lb.ServicePort
	problems  map[lb.Name]lb.Problem

	maxFrontends int // 0: no limit
	// fails is asked before every call, with the operation and the number of
	// calls so far.
	fails  func(op string, call int) bool
	calls  int
	graces int
	log    func(string)

	// recycled tells that an element of frontends was replaced or deleted since
	// the last grace period.
	recycled bool
	// held is what programs may have read from frontends and services since
	// the last grace period.
	held map[holding]lb.ServicePort
	// remembered are the IDs that sockets may remember.
	remembered map[lb.ServiceID]struct{}

	// wanted is what has been wanted, oldest first, since the tables were last
	// as wanted. Nothing is checked against it when it is empty.
	wanted []lb.Delta
}

type holding struct {
	id  lb.ServiceID
	rng lb.Range
}

func newFake(tb testing.TB, limits reconciler.Limits) *fakeKernel {
	return &fakeKernel{
		tb:         tb,
		limits:     limits,
		frontends:  map[lb.FrontendKey]lb.Frontend{},
		words:      map[lb.ServiceID]lb.Range{},
		slots:      map[uint32]lb.Backend{},
		members:    map[lb.Member]struct{}{},
		names:      map[lb.ServiceID]lb.ServicePort{},
		problems:   map[lb.Name]lb.Problem{},
		held:       map[holding]lb.ServicePort{},
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
	maps.Copy(t.Names, k.names)
	maps.Copy(t.Problems, k.problems)
	for id := range k.names {
		t.Services[id] = k.words[id]
	}
	for id, r := range k.words {
		if r != (lb.Range{}) {
			t.Services[id] = r
		}
		for i := r.Base; i < r.Base+uint32(r.Count); i++ {
			if b, ok := k.slots[i]; ok {
				t.Slots[i] = b
			}
		}
	}
	return t
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
	if k.recycled {
		k.errorf("%s: an element is recycled that a program may be reading", line)
	}
	k.recycled = exists
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
	k.recycled = true
	delete(k.frontends, key)
	k.check(line)
	return nil
}

func (k *fakeKernel) SetService(id lb.ServiceID, r lb.Range) error {
	line := fmt.Sprintf("set service %d base=%d count=%d generation=%d", id, r.Base, r.Count, r.Generation)
	if err := k.begin("SetService", line); err != nil {
		return err
	}
	if id == lb.NoService || int(id) >= k.limits.Services {
		k.errorf("%s: no such ID", line)
	}
	if k.words[id].Generation == r.Generation {
		k.errorf("%s: the generation is the old one", line)
	}
	if r.Count == 0 && r.Base != 0 {
		k.errorf("%s: an empty range has no base", line)
	}
	k.words[id] = r
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
		if overlap(h.rng, written) {
			k.errorf("%s: a program may be reading %v", line, h.rng)
		}
	}
	for id, r := range k.words {
		if k.wanted != nil && overlap(r, written) {
			k.errorf("%s: service %d has them", line, id)
		}
	}
	for i, b := range backends {
		k.slots[base+uint32(i)] = b
	}
	k.check(line)
	return nil
}

func (k *fakeKernel) SetMember(m lb.Member) error {
	line := fmt.Sprintf("set member %d %v", m.Service, m.Backend)
	if err := k.begin("SetMember", line); err != nil {
		return err
	}
	if _, exists := k.members[m]; exists {
		k.errorf("%s: it is there already", line)
	}
	k.members[m] = struct{}{}
	k.check(line)
	return nil
}

func (k *fakeKernel) DeleteMember(m lb.Member) error {
	line := fmt.Sprintf("delete member %d %v", m.Service, m.Backend)
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
	for h, sp := range k.held {
		if h.id == id {
			k.errorf("%s: a program may be reading %v", line, sp)
		}
	}
	if k.words[id].Count > 0 {
		k.errorf("%s: it has backends", line)
	}
	for m := range k.members {
		if m.Service == id {
			k.errorf("%s: it has member %v", line, m.Backend)
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
	k.recycled = false
	clear(k.held)
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
		k.held[holding{f.Service, k.words[f.Service]}] = k.names[f.Service]
		if k.words[f.Service].Count > 0 {
			k.remembered[f.Service] = struct{}{}
		}
	}
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
		if _, ok := k.frontends[key]; !ok && k.wantedThroughout(key) {
			k.errorf("after %s: frontend %v is missing", after, key)
		}
	}
	// Who has read a range before may choose from it until the next grace
	// period, and whoever remembers the choice asks members.
	for h, sp := range k.held {
		for i := h.rng.Base; i < h.rng.Base+uint32(h.rng.Count); i++ {
			if _, ok := k.members[lb.Member{Service: h.id, Backend: k.slots[i]}]; !ok && sp.Protocol == lb.UDP {
				k.errorf("after %s: %v: backend %v in slot %d is not in members", after, sp, k.slots[i], i)
			}
		}
	}
}

// checkFrontend follows a frontend as a program does. It must lead to just the
// backends that its owner has, or had, since the tables were last as wanted.
func (k *fakeKernel) checkFrontend(key lb.FrontendKey, f lb.Frontend) error {
	var owners []lb.ServicePort
	for _, w := range k.wanted {
		if owner, ok := w.Frontends[key]; ok {
			owners = append(owners, owner.Service)
		}
	}
	if len(owners) == 0 {
		return errors.New("nobody has ever wanted it")
	}
	if key.IsWildcard() {
		if f.Service != lb.NoService {
			return fmt.Errorf("leads to service %d", f.Service)
		}
		return nil
	}
	sp, ok := k.names[f.Service]
	if !ok {
		return fmt.Errorf("leads to service %d, which has no name", f.Service)
	}
	if !slices.Contains(owners, sp) {
		return fmt.Errorf("leads to %v, which never had it", sp)
	}
	var have []lb.Backend
	r := k.words[f.Service]
	for i := r.Base; i < r.Base+uint32(r.Count); i++ {
		have = append(have, k.slots[i])
	}
	for _, w := range k.wanted {
		if b := w.Services[sp]; b != nil && slices.Equal(have, b.Eligible) {
			return nil
		}
	}
	return fmt.Errorf("leads to %v with backends %v, which it never had", sp, have)
}

// wantedThroughout tells whether key has always been wanted since the tables
// were last as wanted.
func (k *fakeKernel) wantedThroughout(key lb.FrontendKey) bool {
	return !slices.ContainsFunc(k.wanted, func(w lb.Delta) bool {
		_, ok := w.Frontends[key]
		return !ok
	})
}
