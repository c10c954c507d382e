// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"maps"
	"reflect"
	"slices"
	"testing"

	"k8s.io/kubernetes/pkg/proxy"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// A rule that no history meets is not compared, however many there are.
func TestHistoriesMeetEveryRule(t *testing.T) {
	const n, enough = 5_000, 25
	met := map[string]int{}
	for _, rule := range rules {
		met[rule.name] = 0
	}
	looks, doubtful := 0, 0
	for i := range uint64(n) {
		up, now := newUpstream(), map[string]bool{}
		for _, step := range Generate(newSeeded(i)) {
			up.apply(step)
			answer, doubts := up.answer(), up.doubts()
			looks += len(answer.Ports)
			doubtful += len(answer.Ports)
			answer.without(doubts)
			doubtful -= len(answer.Ports)
			for _, rule := range rules {
				now[rule.name] = now[rule.name] || rule.met(up, answer)
			}
		}
		for name, yes := range now {
			if yes {
				met[name]++
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(met)) {
		t.Logf("%5d of %d histories meet: %s", met[name], n, name)
		if met[name] < enough {
			t.Errorf("%s: %d of %d histories, want at least %d", name, met[name], n, enough)
		}
	}
	if doubtful*10 > looks {
		t.Errorf("kube-proxy leaves %d of %d service ports open, want at most a tenth", doubtful, looks)
	}
	t.Logf("kube-proxy leaves %d of %d service ports open", doubtful, looks)
}

func TestGenerateDependsOnTheChoicesAlone(t *testing.T) {
	r := &recording{choices: newSeeded(7)}
	first := Generate(r)
	if again := Generate(newSeeded(7)); !reflect.DeepEqual(first, again) {
		t.Errorf("one seed gives two histories:\n%s\nand\n%s", first, again)
	}
	if again := Generate(&recorded{r.bytes}); !reflect.DeepEqual(first, again) {
		t.Errorf("the recorded choices give another history:\n%s\nthan\n%s", again, first)
	}
}

type rule struct {
	name string
	met  func(*upstream, Answer) bool
}

var rules = []rule{
	{"a ready endpoint left out by node hints", anyPort(func(p seen) bool {
		return p.narrowed() && p.every(func(e proxy.Endpoint) bool { return e.NodeHints().Has(nodeName) })
	})},
	{"a ready endpoint left out by zone hints", anyPort(func(p seen) bool {
		return p.narrowed() && p.every(func(e proxy.Endpoint) bool { return e.ZoneHints().Has(p.zone) })
	})},
	{"hints that do not count", anyPort(func(p seen) bool {
		return !p.narrowed() && p.some(func(e proxy.Endpoint) bool { return e.ZoneHints().Has(p.zone) }) &&
			p.some(func(e proxy.Endpoint) bool { return e.ZoneHints().Len() == 0 })
	})},
	{"endpoints that serve while they terminate", anyPort(func(p seen) bool {
		return len(p.cluster()) > 0 && !p.some(proxy.Endpoint.IsReady)
	})},
	{"endpoints that serve while they terminate here and ready ones elsewhere", anyPort(func(p seen) bool {
		local := p.port.Sets[lb.SideOutside].Backends
		return len(local) > 0 && p.some(proxy.Endpoint.IsReady) &&
			!slices.ContainsFunc(p.endpoints, func(e proxy.Endpoint) bool { return e.IsReady() && e.IsLocal() }) &&
			!slices.Equal(local, p.cluster())
	})},
	{"a ready endpoint that does not serve", anyPort(func(p seen) bool { return len(p.port.unready) > 0 })},
	{"ClusterIP drops and an external IP does not", anyPort(func(p seen) bool {
		return p.port.Sets[lb.SideClusterIP].Verdict == VerdictDrop && len(p.cluster()) > 0
	})},
	{"outside clients are dropped and inside clients are not", anyPort(func(p seen) bool {
		return p.port.Sets[lb.SideOutside].Verdict == VerdictDrop && len(p.cluster()) > 0
	})},
	{"inside and outside clients get different backends", anyPort(func(p seen) bool {
		outside := p.port.Sets[lb.SideOutside].Backends
		return len(outside) > 0 && !slices.Equal(outside, p.cluster())
	})},
	{"clients are refused at an external IP", anyPort(func(p seen) bool {
		return p.port.Sets[lb.SideInside].Verdict == VerdictRefuse
	})},
	{"one port name with several numbers", anyPort(func(p seen) bool {
		set := p.port.Sets[lb.SideClusterIP].Backends
		return slices.ContainsFunc(set, func(b lb.Backend) bool { return b.Port != set[0].Port })
	})},
	{"source ranges", anyPort(func(p seen) bool { return len(p.port.Sources) > 0 && !p.port.NodeAllowed })},
	{"source ranges with the node in them", anyPort(func(p seen) bool { return p.port.NodeAllowed })},
	{"source ranges that are open", anyPort(func(p seen) bool {
		return len(p.info.LoadBalancerVIPs()) > 0 && p.port.Sources == nil &&
			len(p.up.services[p.name.NamespacedName].Spec.LoadBalancerSourceRanges) > 0
	})},
	{"affinity", anyPort(func(p seen) bool { return p.port.Affinity > 0 && len(p.cluster()) > 1 })},
	{"a Service in both families", anyPort(func(p seen) bool {
		_, both := p.up.families[1].ports[p.name]
		return both && p.sp.Family == lb.IPv4 && len(p.cluster()) > 0
	})},
	{"a health check with local endpoints", func(_ *upstream, a Answer) bool {
		return slices.ContainsFunc(slices.Collect(maps.Values(a.Health)), func(h lb.Health) bool { return h.Local > 1 })
	}},
	{"a health check without", func(_ *upstream, a Answer) bool {
		return slices.ContainsFunc(slices.Collect(maps.Values(a.Health)), func(h lb.Health) bool { return h.Local == 0 })
	}},
	{"a node port", frontend(lb.KindNodePort)},
	{"a load-balancer IP", frontend(lb.KindLoadBalancer)},
	{"an external IP", frontend(lb.KindExternalIP)},
	{"one address in two slices", func(u *upstream, _ Answer) bool {
		copies := map[string]int{}
		for _, s := range u.slices {
			for _, e := range s.Endpoints {
				if len(e.Addresses) > 0 {
					copies[s.Labels["kubernetes.io/service-name"]+e.Addresses[0]]++
				}
			}
		}
		return slices.ContainsFunc(slices.Collect(maps.Values(copies)), func(n int) bool { return n > 1 })
	}},
}

func frontend(kind lb.FrontendKind) func(*upstream, Answer) bool {
	return func(_ *upstream, a Answer) bool {
		return slices.ContainsFunc(slices.Collect(maps.Values(a.Frontends)), func(o lb.Owner) bool { return o.Kind == kind })
	}
}

// seen is a service port with what kube-proxy knows of it.
type seen struct {
	up        *upstream
	name      proxy.ServicePortName
	sp        lb.ServicePort
	port      Port
	info      proxy.ServicePort
	endpoints []proxy.Endpoint
	zone      string
}

// anyPort is met by an answer with such a service port.
func anyPort(met func(seen) bool) func(*upstream, Answer) bool {
	return func(u *upstream, a Answer) bool {
		for _, f := range u.families {
			for name, info := range f.ports {
				sp := f.servicePort(name)
				port, certain := a.Ports[sp]
				s := seen{u, name, sp, port, info, f.endpoints[name], u.topology["topology.kubernetes.io/zone"]}
				if certain && met(s) {
					return true
				}
			}
		}
		return false
	}
}

// cluster returns what clients get under the traffic policy Cluster, nil when no
// client is under it.
func (s seen) cluster() []lb.Backend {
	if !s.info.InternalPolicyLocal() {
		return s.port.Sets[lb.SideClusterIP].Backends
	}
	return s.port.Sets[lb.SideInside].Backends
}

// narrowed tells whether hints keep a ready endpoint from clients under the
// traffic policy Cluster.
func (s seen) narrowed() bool {
	ready := 0
	for _, e := range s.endpoints {
		if e.IsReady() {
			ready++
		}
	}
	return len(s.cluster()) > 0 && len(s.cluster()) < ready
}

// every tells whether all backends under the traffic policy Cluster are such
// endpoints.
func (s seen) every(such func(proxy.Endpoint) bool) bool {
	for _, e := range s.endpoints {
		if slices.Contains(s.cluster(), backend(e)) && !such(e) {
			return false
		}
	}
	return true
}

// some tells whether there is such an endpoint.
func (s seen) some(such func(proxy.Endpoint) bool) bool {
	return slices.ContainsFunc(s.endpoints, such)
}
