// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// Config says what a Store cannot learn from the objects it is given.
type Config struct {
	// NodeName is the name of the Node we run on, as EndpointSlices have it.
	NodeName  string
	NodePorts NodePorts
	Limits    Limits
}

// NodePorts says at which of the node's addresses NodePorts are reached.
type NodePorts struct {
	// Primary means the addresses in the Node, whatever CIDRs says. A family that
	// the Node has no address of counts with all its local addresses.
	Primary bool
	// CIDRs are the ranges in which local addresses count. A family that none of
	// them is of counts with all its local addresses.
	CIDRs []netip.Prefix
	// Loopback adds 127.0.0.1 and ::1 for processes on the node.
	Loopback bool
}

// Store collects Services, EndpointSlices and what is known of the node, and says
// what they mean: which service ports and frontends there are and which backends
// they have. It works in proportion to what has changed since it was last asked.
//
// A Store is not safe for concurrent use: one goroutine owns it. It keeps the
// objects it is given, so the caller must not change them afterwards; nor may
// it change the Backends it gets.
type Store struct {
	config   Config
	node     Node
	local    []netip.Addr // the node's local addresses, sorted
	cidrs    []netip.Prefix
	services map[Name]Service
	// endpoints holds the slices of each Service, sorted by name, and owners
	// the Service under which endpoints has a slice. A slice may come before
	// its Service.
	endpoints map[Name][]Slice
	owners    map[Name]Name
	// claims holds everybody who wants a frontend. The first one that is not
	// refused has it.
	claims map[FrontendKey][]Owner
	// reserved says why nobody can have an address and port; staleReserved that
	// it may not be true any more.
	reserved      map[netip.AddrPort]string
	staleReserved bool
	// cut holds how many backends in a set of a service port are beyond
	// MaxBackends.
	cut map[ServicePort]int

	// told is what Changes and All have said so far. The touched fields name
	// what may differ from it.
	told             Delta
	noLocal          map[Family]NoLocal
	refused          int // the sum of refusedOf
	refusedOf        map[Name]int
	touchedServices  map[ServicePort]struct{}
	touchedFrontends map[FrontendKey]struct{}
	touchedNames     map[Name]struct{}
	touchedNode      bool // addresses or CIDRs

	scratch []candidate
}

// NewStore returns an empty store. Nothing is known of the node.
func NewStore(c Config) *Store {
	s := &Store{
		config:    c,
		services:  map[Name]Service{},
		endpoints: map[Name][]Slice{},
		owners:    map[Name]Name{},
		claims:    map[FrontendKey][]Owner{},
		cut:       map[ServicePort]int{},
		told:      newDelta(),
		noLocal:   map[Family]NoLocal{},
		refusedOf: map[Name]int{},
	}
	s.touchNothing()
	s.touchedNode, s.staleReserved = true, true
	return s
}

// SetService adds svc or puts it in place of the Service of that name. It
// returns false when that is no change.
func (s *Store) SetService(svc Service) bool {
	old, ok := s.services[svc.Name]
	if ok && old.equal(svc) {
		return false
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
	return true
}

// DeleteService removes the Service of that name. It returns false when there is
// none.
func (s *Store) DeleteService(name Name) bool {
	old, ok := s.services[name]
	if ok {
		s.withdraw(old)
		delete(s.services, name)
	}
	return ok
}

// ReplaceServices makes the given Services all there are and returns how many
// Services that adds, changes or removes.
func (s *Store) ReplaceServices(services []Service) (changes int) {
	listed := make(map[Name]struct{}, len(services))
	for _, svc := range services {
		listed[svc.Name] = struct{}{}
	}
	for name := range s.services {
		if _, ok := listed[name]; !ok && s.DeleteService(name) {
			changes++
		}
	}
	for _, svc := range services {
		if s.SetService(svc) {
			changes++
		}
	}
	return changes
}

// SetSlice adds slice or puts it in place of the slice of that name. It returns
// false when that is no change.
func (s *Store) SetSlice(slice Slice) bool {
	owner := Name{slice.Name.Namespace, slice.Service}
	if old, ok := s.owners[slice.Name]; ok {
		of := s.endpoints[old]
		i, _ := findSlice(of, slice.Name)
		if of[i].equal(slice) {
			return false
		}
		s.touchFamily(old, of[i].Family)
		if old == owner {
			of[i] = slice
			s.touchFamily(owner, slice.Family)
			return true
		}
		s.DeleteSlice(slice.Name)
	}
	of := s.endpoints[owner]
	i, _ := findSlice(of, slice.Name)
	s.endpoints[owner] = slices.Insert(of, i, slice)
	s.owners[slice.Name] = owner
	s.touchFamily(owner, slice.Family)
	return true
}

// DeleteSlice removes the slice of that name. It returns false when there is
// none.
func (s *Store) DeleteSlice(name Name) bool {
	owner, ok := s.owners[name]
	if !ok {
		return false
	}
	delete(s.owners, name)
	of := s.endpoints[owner]
	i, _ := findSlice(of, name)
	s.touchFamily(owner, of[i].Family)
	if len(of) == 1 {
		delete(s.endpoints, owner)
		return true
	}
	s.endpoints[owner] = slices.Delete(of, i, i+1)
	return true
}

// ReplaceSlices makes the given slices all there are and returns how many slices
// that adds, changes or removes.
func (s *Store) ReplaceSlices(list []Slice) (changes int) {
	listed := make(map[Name]struct{}, len(list))
	for _, slice := range list {
		listed[slice.Name] = struct{}{}
	}
	for name := range s.owners {
		if _, ok := listed[name]; !ok && s.DeleteSlice(name) {
			changes++
		}
	}
	for _, slice := range list {
		if s.SetSlice(slice) {
			changes++
		}
	}
	return changes
}

// Services returns how many Services there are.
func (s *Store) Services() int { return len(s.services) }

// Changes returns what has changed since Changes or All was last called. It is
// empty when what happened in between made no difference.
func (s *Store) Changes() Delta {
	d := newDelta()
	s.reserve()
	for sp := range s.touchedServices {
		now, before := s.backends(sp), s.told.Services[sp]
		if !now.equal(before) {
			d.Services[sp] = now
			put(s.told.Services, sp, now, now != nil)
			s.noLocal[sp.Family] = s.noLocal[sp.Family].add(now, 1).add(before, -1)
		}
	}
	for key := range s.touchedFrontends {
		tell(d.Frontends, s.told.Frontends, key, s.owner(key))
	}
	for name := range s.touchedNames {
		tell(d.Problems, s.told.Problems, name, s.problem(name))
		s.countRefused(name)
		for _, family := range []Family{IPv4, IPv6} {
			tell(d.Health, s.told.Health, ServiceFamily{name, family}, s.health(name, family))
		}
	}
	if s.touchedNode {
		tellAll(d.NodeAddresses, s.told.NodeAddresses, s.nodeAddresses())
		cidrs := map[netip.Prefix]bool{}
		for _, p := range s.cidrs {
			cidrs[p] = true
		}
		tellAll(d.ServiceCIDRs, s.told.ServiceCIDRs, cidrs)
	}
	s.touchNothing()
	return d
}

// tell says in news what key has now, the zero value for nothing, if that is not
// what was told before.
func tell[K, V comparable](news, told map[K]V, key K, now V) {
	var none V
	if now != told[key] {
		news[key] = now
		put(told, key, now, now != none)
	}
}

// tellAll is tell for everything that is or was.
func tellAll[K, V comparable](news, told, now map[K]V) {
	for key := range told {
		if _, ok := now[key]; !ok {
			var none V
			tell(news, told, key, none)
		}
	}
	for key, value := range now {
		tell(news, told, key, value)
	}
}

// touchNothing forgets what was touched. It makes new maps because one that was
// large once is as slow to walk as a large one.
func (s *Store) touchNothing() {
	s.touchedServices = map[ServicePort]struct{}{}
	s.touchedFrontends = map[FrontendKey]struct{}{}
	s.touchedNames = map[Name]struct{}{}
	s.touchedNode = false
}

// All returns everything there is. What it says is not said again by Changes.
func (s *Store) All() Delta {
	s.Changes()
	return Delta{
		Services:      maps.Clone(s.told.Services),
		Frontends:     maps.Clone(s.told.Frontends),
		NodeAddresses: maps.Clone(s.told.NodeAddresses),
		ServiceCIDRs:  maps.Clone(s.told.ServiceCIDRs),
		Health:        maps.Clone(s.told.Health),
		Problems:      maps.Clone(s.told.Problems),
	}
}

// NoLocal counts the service ports that have no endpoint on this node though a
// traffic policy is Local and there are some elsewhere.
type NoLocal struct {
	Internal int // internalTrafficPolicy
	External int // externalTrafficPolicy
}

func (n NoLocal) add(b *Backends, times int) NoLocal {
	if b == nil {
		return n
	}
	if b.Sides[SideClusterIP].Elsewhere {
		n.Internal += times
	}
	if b.Sides[SideOutside].Elsewhere {
		n.External += times
	}
	return n
}

// NoLocal returns the counts for a family, as of the last call of Changes or All.
func (s *Store) NoLocal(family Family) NoLocal { return s.noLocal[family] }

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

// owner returns who has a frontend now, the zero Owner when nobody does.
func (s *Store) owner(key FrontendKey) Owner {
	for _, claim := range s.claims[key] {
		if s.refusal(key, claim) == "" {
			return claim
		}
	}
	return Owner{}
}

// insertClaim puts owner into claims at its place: ClusterIPs first, then the
// older Service, then by name and kind. All claimants must be in s.services.
func (s *Store) insertClaim(claims []Owner, owner Owner) []Owner {
	i, found := slices.BinarySearchFunc(claims, owner, func(a, b Owner) int {
		created := func(o Owner) time.Time { return s.services[o.Service.Service].Created }
		return cmp.Or(compareBool(!a.Kind.isClusterIP(), !b.Kind.isClusterIP()),
			created(a).Compare(created(b)), a.Service.Compare(b.Service), cmp.Compare(a.Kind, b.Kind))
	})
	if found {
		return claims // one port or address listed twice
	}
	return slices.Insert(claims, i, owner)
}

// isClusterIP tells whether it is a Service's own address in the cluster, to
// which nobody else has a right.
func (k FrontendKind) isClusterIP() bool { return k == KindClusterIP || k == KindForeign }

func (s *Store) touchService(svc Service) {
	for sp := range svc.servicePorts {
		s.touchedServices[sp] = struct{}{}
	}
	s.touchedNames[svc.Name] = struct{}{}
}

func (s *Store) touchFamily(name Name, family Family) {
	for sp := range s.services[name].servicePorts {
		if sp.Family == family {
			s.touchedServices[sp] = struct{}{}
		}
	}
	s.touchedNames[name] = struct{}{}
	s.staleReserved = s.staleReserved || name == apiServer
}

// touchFrontend marks key and everybody who claims it: who wins or loses it
// may have a problem more or less.
func (s *Store) touchFrontend(key FrontendKey) {
	s.touchedFrontends[key] = struct{}{}
	for _, owner := range s.claims[key] {
		s.touchedNames[owner.Service.Service] = struct{}{}
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
		winner, why := s.owner(key), s.refusal(key, owner)
		switch {
		case winner.Service == owner.Service:
		case why != "":
			add(key.String() + " is " + why)
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

// frontends yields what svc claims: for each ClusterIP the ports, the ClusterIP's
// wildcard, and what else leads to the service ports of its family.
func (svc Service) frontends(yield func(FrontendKey, Owner) bool) {
	for _, vip := range svc.ClusterIPs {
		family, kind := FamilyOf(vip), KindClusterIP
		if svc.Foreign {
			kind = KindForeign
		}
		for _, port := range svc.ports() {
			if !svc.portFrontends(port, vip, yield) {
				return
			}
		}
		if !yield(FrontendKey{VIP: vip}, Owner{ServicePort{Service: svc.Name, Family: family}, kind}) {
			return
		}
	}
}

// portFrontends yields what one port claims in the family of a ClusterIP. It
// returns false when yield does.
func (svc Service) portFrontends(port Port, clusterIP netip.Addr, yield func(FrontendKey, Owner) bool) bool {
	family := FamilyOf(clusterIP)
	sp := svc.servicePort(port, family)
	claim := func(vip netip.Addr, number uint16, kind FrontendKind) bool {
		return yield(FrontendKey{VIP: vip, Port: number, Protocol: port.Protocol}, Owner{sp, kind})
	}
	if !claim(clusterIP, port.Number, KindClusterIP) {
		return false
	}
	if port.NodePort != 0 && !claim(Unspecified(family), port.NodePort, KindNodePort) {
		return false
	}
	for _, vip := range svc.LoadBalancerIPs {
		if FamilyOf(vip) == family && !claim(vip, port.Number, KindLoadBalancer) {
			return false
		}
	}
	for _, vip := range svc.ExternalIPs {
		if FamilyOf(vip) == family && !claim(vip, port.Number, KindExternalIP) {
			return false
		}
	}
	return true
}

// Unspecified returns the VIP of the family's NodePorts.
func Unspecified(family Family) netip.Addr {
	if family == IPv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// servicePorts yields the service ports of svc: one for each port and family
// that has a ClusterIP.
func (svc Service) servicePorts(yield func(ServicePort) bool) {
	for _, vip := range svc.ClusterIPs {
		for _, port := range svc.ports() {
			if !yield(svc.servicePort(port, FamilyOf(vip))) {
				return
			}
		}
	}
}

// ports returns the ports that we serve.
func (svc Service) ports() []Port {
	if svc.Foreign {
		return nil
	}
	return svc.Ports
}

func (svc Service) servicePort(port Port, family Family) ServicePort {
	return ServicePort{Service: svc.Name, Port: port.Name, Protocol: port.Protocol, Family: family}
}

func (svc Service) equal(o Service) bool {
	return svc.Name == o.Name && svc.Created.Equal(o.Created) && svc.Foreign == o.Foreign &&
		slices.Equal(svc.ClusterIPs, o.ClusterIPs) && slices.Equal(svc.LoadBalancerIPs, o.LoadBalancerIPs) &&
		slices.Equal(svc.ExternalIPs, o.ExternalIPs) && slices.Equal(svc.Ports, o.Ports) &&
		svc.InternalLocal == o.InternalLocal && svc.ExternalLocal == o.ExternalLocal &&
		svc.Affinity == o.Affinity && slices.Equal(svc.Sources, o.Sources) &&
		svc.HealthCheckNodePort == o.HealthCheckNodePort
}

func (s Slice) equal(o Slice) bool {
	return s.Name == o.Name && s.Service == o.Service && s.Family == o.Family &&
		slices.Equal(s.Ports, o.Ports) && slices.EqualFunc(s.Endpoints, o.Endpoints, Endpoint.equal) &&
		slices.Equal(s.Invalid, o.Invalid)
}

func (e Endpoint) equal(o Endpoint) bool {
	return e.Addr == o.Addr && e.Ready == o.Ready && e.Serving == o.Serving && e.Terminating == o.Terminating &&
		e.Node == o.Node && slices.Equal(e.NodeHints, o.NodeHints) && slices.Equal(e.ZoneHints, o.ZoneHints)
}

func findSlice(of []Slice, name Name) (int, bool) {
	return slices.BinarySearchFunc(of, name, func(s Slice, n Name) int { return s.Name.Compare(n) })
}
