// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"maps"
	"slices"
	"strconv"
)

// Store collects Services and EndpointSlices and says what they mean: which
// service ports and frontends there are and which backends they have. It works
// in proportion to what has changed since it was last asked.
//
// A Store is not safe for concurrent use: one goroutine owns it. It keeps the
// objects it is given, so the caller must not change them afterwards; nor may
// it change the Backends it gets.
type Store struct {
	services map[Name]Service
	// endpoints holds the slices of each Service, sorted by name, and owners
	// the Service under which endpoints has a slice. A slice may come before
	// its Service.
	endpoints map[Name][]Slice
	owners    map[Name]Name
	// claims holds everybody who wants a frontend. The first one has it.
	claims map[FrontendKey][]Owner
	// cut holds how many eligible backends a service port has beyond
	// MaxBackends.
	cut map[ServicePort]int

	// told is what Changes and All have said so far. The touched sets name what
	// may differ from it.
	told             Delta
	touchedServices  map[ServicePort]struct{}
	touchedFrontends map[FrontendKey]struct{}
	touchedProblems  map[Name]struct{}

	scratch []candidate
}

// NewStore returns an empty store.
func NewStore() *Store {
	s := &Store{
		services:  map[Name]Service{},
		endpoints: map[Name][]Slice{},
		owners:    map[Name]Name{},
		claims:    map[FrontendKey][]Owner{},
		cut:       map[ServicePort]int{},
		told:      newDelta(),
	}
	s.touchNothing()
	return s
}

// SetService adds svc or puts it in place of the Service of that name.
func (s *Store) SetService(svc Service) {
	old, ok := s.services[svc.Name]
	if ok && old.equal(svc) {
		return
	}
	if ok {
		s.withdraw(old)
	}
	s.services[svc.Name] = svc
	for key, owner := range svc.frontends {
		s.claims[key] = s.insertClaim(s.claims[key], owner)
		s.touchFrontend(key)
	}
	s.touchService(svc)
}

// DeleteService removes the Service of that name, if there is one.
func (s *Store) DeleteService(name Name) {
	if old, ok := s.services[name]; ok {
		s.withdraw(old)
		delete(s.services, name)
	}
}

// ReplaceServices makes the given Services all there are.
func (s *Store) ReplaceServices(services []Service) {
	listed := make(map[Name]struct{}, len(services))
	for _, svc := range services {
		listed[svc.Name] = struct{}{}
	}
	for name := range s.services {
		if _, ok := listed[name]; !ok {
			s.DeleteService(name)
		}
	}
	for _, svc := range services {
		s.SetService(svc)
	}
}

// SetSlice adds slice or puts it in place of the slice of that name.
func (s *Store) SetSlice(slice Slice) {
	owner := Name{slice.Name.Namespace, slice.Service}
	if old, ok := s.owners[slice.Name]; ok {
		of := s.endpoints[old]
		i, _ := findSlice(of, slice.Name)
		if of[i].equal(slice) {
			return
		}
		s.touchFamily(old, of[i].Family)
		if old == owner {
			of[i] = slice
			s.touchFamily(owner, slice.Family)
			return
		}
		s.DeleteSlice(slice.Name)
	}
	of := s.endpoints[owner]
	i, _ := findSlice(of, slice.Name)
	s.endpoints[owner] = slices.Insert(of, i, slice)
	s.owners[slice.Name] = owner
	s.touchFamily(owner, slice.Family)
}

// DeleteSlice removes the slice of that name, if there is one.
func (s *Store) DeleteSlice(name Name) {
	owner, ok := s.owners[name]
	if !ok {
		return
	}
	delete(s.owners, name)
	of := s.endpoints[owner]
	i, _ := findSlice(of, name)
	s.touchFamily(owner, of[i].Family)
	if len(of) == 1 {
		delete(s.endpoints, owner)
		return
	}
	s.endpoints[owner] = slices.Delete(of, i, i+1)
}

// ReplaceSlices makes the given slices all there are.
func (s *Store) ReplaceSlices(list []Slice) {
	listed := make(map[Name]struct{}, len(list))
	for _, slice := range list {
		listed[slice.Name] = struct{}{}
	}
	for name := range s.owners {
		if _, ok := listed[name]; !ok {
			s.DeleteSlice(name)
		}
	}
	for _, slice := range list {
		s.SetSlice(slice)
	}
}

// Changes returns what has changed since Changes or All was last called. It is
// empty when what happened in between made no difference.
func (s *Store) Changes() Delta {
	d := newDelta()
	for sp := range s.touchedServices {
		now := s.backends(sp)
		if !now.equal(s.told.Services[sp]) {
			d.Services[sp] = now
			put(s.told.Services, sp, now, now != nil)
		}
	}
	for key := range s.touchedFrontends {
		var now Owner
		if claims := s.claims[key]; len(claims) > 0 {
			now = claims[0]
		}
		if now != s.told.Frontends[key] {
			d.Frontends[key] = now
			put(s.told.Frontends, key, now, now.Exists())
		}
	}
	for name := range s.touchedProblems {
		now := s.problem(name)
		if now != s.told.Problems[name] {
			d.Problems[name] = now
			put(s.told.Problems, name, now, now != "")
		}
	}
	s.touchNothing()
	return d
}

// touchNothing forgets what was touched. It makes new maps because one that was
// large once is as slow to walk as a large one.
func (s *Store) touchNothing() {
	s.touchedServices = map[ServicePort]struct{}{}
	s.touchedFrontends = map[FrontendKey]struct{}{}
	s.touchedProblems = map[Name]struct{}{}
}

// All returns everything there is. What it says is not said again by Changes.
func (s *Store) All() Delta {
	s.Changes()
	return Delta{
		Services:  maps.Clone(s.told.Services),
		Frontends: maps.Clone(s.told.Frontends),
		Problems:  maps.Clone(s.told.Problems),
	}
}

// put keeps value under key, or nothing when there is none.
func put[K comparable, V any](m map[K]V, key K, value V, exists bool) {
	if exists {
		m[key] = value
	} else {
		delete(m, key)
	}
}

// withdraw takes away the claims of svc, which must still be in s.services.
func (s *Store) withdraw(svc Service) {
	for key, owner := range svc.frontends {
		s.touchFrontend(key)
		claims := slices.DeleteFunc(s.claims[key], func(o Owner) bool { return o == owner })
		put(s.claims, key, claims, len(claims) > 0)
	}
	s.touchService(svc)
}

// insertClaim puts owner into claims at its place: the older Service first,
// then by name. All claimants must be in s.services.
func (s *Store) insertClaim(claims []Owner, owner Owner) []Owner {
	i, found := slices.BinarySearchFunc(claims, owner, func(a, b Owner) int {
		older := s.services[a.Service.Service].Created.Compare(s.services[b.Service.Service].Created)
		if older != 0 {
			return older
		}
		return a.Service.Compare(b.Service)
	})
	if found {
		return claims // one port listed twice
	}
	return slices.Insert(claims, i, owner)
}

func (s *Store) touchService(svc Service) {
	for sp := range svc.servicePorts {
		s.touchedServices[sp] = struct{}{}
	}
	s.touchedProblems[svc.Name] = struct{}{}
}

func (s *Store) touchFamily(name Name, family Family) {
	for sp := range s.services[name].servicePorts {
		if sp.Family == family {
			s.touchedServices[sp] = struct{}{}
		}
	}
	s.touchedProblems[name] = struct{}{}
}

// touchFrontend marks key and everybody who claims it: who wins or loses it
// may have a problem more or less.
func (s *Store) touchFrontend(key FrontendKey) {
	s.touchedFrontends[key] = struct{}{}
	for _, owner := range s.claims[key] {
		s.touchedProblems[owner.Service.Service] = struct{}{}
	}
}

// problem says what the store could not do as the Service asks, "" when there
// is nothing to say. Backends must have been worked out before.
func (s *Store) problem(name Name) Problem {
	svc, ok := s.services[name]
	if !ok {
		return ""
	}
	var first string
	others := 0
	add := func(text string) {
		if first == "" {
			first = text
		} else {
			others++
		}
	}
	for key, owner := range svc.frontends {
		switch winner := s.claims[key][0]; {
		case winner == owner:
		case winner.Service.Service == name:
			add("two of its ports ask for " + key.String())
		default:
			add(key.String() + " belongs to Service " + winner.Service.Service.String())
		}
	}
	for sp := range svc.servicePorts {
		if n := s.cut[sp]; n > 0 {
			add(sp.String() + " has " + strconv.Itoa(MaxBackends+n) + " backends; the last " +
				strconv.Itoa(n) + " are left out")
		}
	}
	if others > 0 {
		first += " (and " + strconv.Itoa(others) + " more)"
	}
	return Problem(first)
}

// frontends yields what svc claims: the ports of each ClusterIP and then the
// ClusterIP's wildcard.
func (svc Service) frontends(yield func(FrontendKey, Owner) bool) {
	for _, vip := range svc.ClusterIPs {
		for _, port := range svc.Ports {
			key := FrontendKey{VIP: vip, Port: port.Number, Protocol: port.Protocol}
			if !yield(key, Owner{svc.servicePort(port, FamilyOf(vip)), KindClusterIP}) {
				return
			}
		}
		owner := Owner{ServicePort{Service: svc.Name, Family: FamilyOf(vip)}, KindClusterIP}
		if !yield(FrontendKey{VIP: vip}, owner) {
			return
		}
	}
}

// servicePorts yields the service ports of svc: one for each port and family
// that has a ClusterIP.
func (svc Service) servicePorts(yield func(ServicePort) bool) {
	for _, vip := range svc.ClusterIPs {
		for _, port := range svc.Ports {
			if !yield(svc.servicePort(port, FamilyOf(vip))) {
				return
			}
		}
	}
}

func (svc Service) servicePort(port Port, family Family) ServicePort {
	return ServicePort{Service: svc.Name, Port: port.Name, Protocol: port.Protocol, Family: family}
}

func (svc Service) equal(o Service) bool {
	return svc.Name == o.Name && svc.Created.Equal(o.Created) &&
		slices.Equal(svc.ClusterIPs, o.ClusterIPs) && slices.Equal(svc.Ports, o.Ports)
}

func (s Slice) equal(o Slice) bool {
	return s.Name == o.Name && s.Service == o.Service && s.Family == o.Family &&
		slices.Equal(s.Ports, o.Ports) && slices.Equal(s.Endpoints, o.Endpoints)
}

func findSlice(of []Slice, name Name) (int, bool) {
	return slices.BinarySearchFunc(of, name, func(s Slice, n Name) int { return s.Name.Compare(n) })
}
