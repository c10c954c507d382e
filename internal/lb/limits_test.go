// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func within(cidrs ...string) lb.Allowed { return lb.Allowed{Limited: true, CIDRs: prefixes(cidrs...)} }

// reserved reads "address:port", or ":port" for every address of the node.
func reserved(list ...string) []lb.Reservation {
	var out []lb.Reservation
	for _, text := range list {
		r := lb.Reservation{Why: "for tests"}
		if port, every := strings.CutPrefix(text, ":"); every {
			r.Port = netip.MustParseAddrPort("0.0.0.0:" + port).Port()
		} else {
			at := netip.MustParseAddrPort(text)
			r.Addr, r.Port = at.Addr(), at.Port()
		}
		out = append(out, r)
	}
	return out
}

func externalIPs(list ...string) func(*lb.Service) {
	return func(s *lb.Service) { s.ExternalIPs = addrs(list...) }
}

func loadBalancerIPs(list ...string) func(*lb.Service) {
	return func(s *lb.Service) { s.LoadBalancerIPs = addrs(list...) }
}

func port(number, nodePort uint16) func(*lb.Service) {
	return func(s *lb.Service) { s.Ports[0].Number, s.Ports[0].NodePort = number, nodePort }
}

// limited is a store on a node with two addresses, whose API server is at
// 192.0.2.10:6443.
func limited(limits lb.Limits) *lb.Store {
	s := lb.NewStore(lb.Config{NodeName: here, Limits: limits, NodePorts: lb.NodePorts{Primary: true}})
	s.SetNode(lb.Node{Addresses: addrs("192.0.2.1")})
	s.SetLocalAddresses(addrs("10.244.0.1", "192.0.2.1"))
	s.SetSlice(servers("192.0.2.10:6443"))
	return s
}

func TestWhatLimitsKeepFromAService(t *testing.T) {
	const own = "10.96.0.1:80/TCP ClusterIP"
	tests := []struct {
		name    string
		limits  lb.Limits
		service []func(*lb.Service)
		want    []string
		problem string
	}{{
		name:    "without limits every address can be had",
		service: []func(*lb.Service){externalIPs("203.0.113.1", "192.0.2.1"), loadBalancerIPs("198.51.100.1")},
		want:    []string{own, "198.51.100.1:80/TCP LoadBalancer", "203.0.113.1:80/TCP ExternalIP", "192.0.2.1:80/TCP ExternalIP"},
	}, {
		name:    "an external IP outside is left out and the others live",
		limits:  lb.Limits{ExternalIPs: within("203.0.113.0/24", "2001:db8::/32")},
		service: []func(*lb.Service){externalIPs("203.0.113.1", "198.51.100.1"), loadBalancerIPs("198.51.100.2")},
		want:    []string{own, "203.0.113.1:80/TCP ExternalIP", "198.51.100.2:80/TCP LoadBalancer"},
		problem: "198.51.100.1:80/TCP is outside --external-ip-cidrs",
	}, {
		name:    "no external IP at all",
		limits:  lb.Limits{ExternalIPs: within()},
		service: []func(*lb.Service){externalIPs("203.0.113.1", "198.51.100.1")},
		want:    []string{own},
		problem: "203.0.113.1:80/TCP is outside --external-ip-cidrs (and 1 more)",
	}, {
		name:    "a load-balancer IP outside is left out and the others live",
		limits:  lb.Limits{LoadBalancerIPs: within("203.0.113.0/24")},
		service: []func(*lb.Service){externalIPs("198.51.100.1"), loadBalancerIPs("203.0.113.1", "198.51.100.2")},
		want:    []string{own, "203.0.113.1:80/TCP LoadBalancer", "198.51.100.1:80/TCP ExternalIP"},
		problem: "198.51.100.2:80/TCP is outside --load-balancer-cidrs",
	}, {
		name:    "an address in both lists needs one of them and stays a load-balancer IP",
		limits:  lb.Limits{LoadBalancerIPs: within(), ExternalIPs: within("203.0.113.0/24")},
		service: []func(*lb.Service){externalIPs("203.0.113.1"), loadBalancerIPs("203.0.113.1")},
		want:    []string{own, "203.0.113.1:80/TCP LoadBalancer"},
	}, {
		name:    "a ClusterIP is not limited",
		limits:  lb.Limits{LoadBalancerIPs: within(), ExternalIPs: within(), Reserved: reserved("10.96.0.1:80")},
		service: []func(*lb.Service){externalIPs("10.96.0.1")},
		want:    []string{own},
	}, {
		name:    "the API server's endpoint cannot be taken",
		service: []func(*lb.Service){port(6443, 0), externalIPs("192.0.2.10"), loadBalancerIPs("192.0.2.10", "192.0.2.11")},
		want:    []string{"10.96.0.1:6443/TCP ClusterIP", "192.0.2.11:6443/TCP LoadBalancer"},
		problem: "192.0.2.10:6443/TCP is reserved, an API server listens there (and 1 more)",
	}, {
		name:    "another port of the API server's address can",
		service: []func(*lb.Service){loadBalancerIPs("192.0.2.10")},
		want:    []string{own, "192.0.2.10:80/TCP LoadBalancer"},
	}, {
		name:    "a port that is reserved on the node is so at each of its addresses, and for NodePorts",
		limits:  lb.Limits{Reserved: reserved(":10250")},
		service: []func(*lb.Service){port(10250, 10250), externalIPs("192.0.2.1", "203.0.113.1"), loadBalancerIPs("10.244.0.1")},
		want:    []string{"10.96.0.1:10250/TCP ClusterIP", "203.0.113.1:10250/TCP ExternalIP"},
		problem: "0.0.0.0:10250/TCP is reserved, for tests (and 2 more)",
	}, {
		name:    "a port reserved at one address of the node is no NodePort",
		limits:  lb.Limits{Reserved: reserved("10.244.0.1:30080")},
		service: []func(*lb.Service){port(80, 30080)},
		want:    []string{own},
		problem: "0.0.0.0:30080/TCP is reserved, for tests",
	}, {
		name:    "a port reserved elsewhere, or at loopback, can be a NodePort",
		limits:  lb.Limits{Reserved: reserved("203.0.113.1:30080", "127.0.0.1:30080")},
		service: []func(*lb.Service){port(80, 30080)},
		want:    []string{own, "0.0.0.0:30080/TCP NodePort"},
	}, {
		name:    "a load-balancer IP that equals a node's address works but for reserved ports",
		limits:  lb.Limits{Reserved: reserved(":10250")},
		service: []func(*lb.Service){loadBalancerIPs("192.0.2.1")},
		want:    []string{own, "192.0.2.1:80/TCP LoadBalancer"},
	}, {
		name:    "what is reserved is so for every protocol",
		limits:  lb.Limits{Reserved: reserved("203.0.113.1:80")},
		service: []func(*lb.Service){externalIPs("203.0.113.1"), func(s *lb.Service) { s.Ports[0].Protocol = lb.UDP }},
		want:    []string{"10.96.0.1:80/UDP ClusterIP"},
		problem: "203.0.113.1:80/UDP is reserved, for tests",
	}, {
		name:    "the address where clouds hand out credentials",
		service: []func(*lb.Service){loadBalancerIPs("169.254.169.254", "169.254.20.10")},
		want:    []string{own, "169.254.20.10:80/TCP LoadBalancer"},
		problem: "169.254.169.254:80/TCP is reserved, clouds hand out credentials there",
	}, {
		name: "the Service of the API server itself may lead there",
		service: []func(*lb.Service){port(6443, 0), loadBalancerIPs("192.0.2.10"), func(s *lb.Service) {
			s.Name = kubernetes
		}},
		want: []string{"10.96.0.1:6443/TCP ClusterIP", "192.0.2.10:6443/TCP LoadBalancer"},
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := limited(tt.limits)
			svc := webService(tt.service...)
			s.SetService(svc)
			d := s.Changes()
			got := frontends(d)
			for i := range got {
				got[i] = strings.Join(strings.Fields(got[i])[:2], " ")
			}
			slices.Sort(got)
			slices.Sort(tt.want)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("frontends (-want +got):\n%s", diff)
			}
			if got := string(d.Problems[svc.Name]); got != tt.problem {
				t.Errorf("problem %q, want %q", got, tt.problem)
			}
			if why := s.WhyRefused(svc.Name); (why == "") != (tt.problem == "") || (s.Refused() > 0) != (why != "") {
				t.Errorf("refused: %d, %q", s.Refused(), why)
			}
		})
	}
}

func TestWhoeverMayHaveAFrontendGetsItFromWhoMayNot(t *testing.T) {
	s := limited(lb.Limits{ExternalIPs: within()})
	greedy := webService(externalIPs("203.0.113.1"))
	greedy.Name, greedy.ClusterIPs = name("greedy"), addrs("10.96.0.2")
	s.SetService(greedy)
	s.SetService(webService(loadBalancerIPs("203.0.113.1"))) // the younger by name
	key := lb.FrontendKey{VIP: netip.MustParseAddr("203.0.113.1"), Port: 80, Protocol: lb.TCP}
	if got := s.Changes().Frontends[key]; got != (lb.Owner{Service: webPort, Kind: lb.KindLoadBalancer}) {
		t.Errorf("it belongs to %+v", got)
	}
}

func TestWhatIsReservedFollowsAPIServersAndTheNode(t *testing.T) {
	s := limited(lb.Limits{Reserved: reserved(":10250")})
	s.SetService(webService(port(6443, 10250), loadBalancerIPs("192.0.2.10", "192.0.2.11")))
	kubelet := webService(port(10250, 0), loadBalancerIPs("192.0.2.1", "192.0.2.2"))
	kubelet.Name, kubelet.ClusterIPs = name("kubelet"), addrs("10.96.0.2")
	s.SetService(kubelet)
	s.Changes()
	first, second := "192.0.2.10:6443/TCP", "192.0.2.11:6443/TCP"
	const node = "0.0.0.0:10250/TCP is reserved, for tests"

	s.SetSlice(servers("192.0.2.11:6443"))
	expect(t, "the API server has moved", s.Changes(),
		"frontend "+first+" LoadBalancer ns/web:http/TCP/IPv4", "frontend "+second+" gone")
	s.SetSlice(servers("192.0.2.10:6443", "192.0.2.11:6443"))
	expect(t, "a second API server", s.Changes(), "frontend "+first+" gone",
		"problem ns/web: "+node+" (and 2 more)")
	s.DeleteSlice(kubernetes)
	expect(t, "no API server is known", s.Changes(),
		"frontend "+first+" LoadBalancer ns/web:http/TCP/IPv4", "frontend "+second+" LoadBalancer ns/web:http/TCP/IPv4",
		"problem ns/web: "+node)

	s.SetLocalAddresses(addrs("10.244.0.1", "192.0.2.1", "192.0.2.2"))
	expect(t, "the node has an address more", s.Changes(), "frontend 192.0.2.2:10250/TCP gone",
		"problem ns/kubelet: 192.0.2.1:10250/TCP is reserved, for tests (and 1 more)")
	s.SetLocalAddresses(addrs("10.244.0.1"))
	s.SetNode(lb.Node{Addresses: addrs("192.0.2.2")})
	expect(t, "the node has another address", s.Changes(),
		"frontend 192.0.2.1:10250/TCP LoadBalancer ns/kubelet:http/TCP/IPv4",
		"node address 192.0.2.1 gone", "node address 192.0.2.2 open",
		"problem ns/kubelet: 192.0.2.2:10250/TCP is reserved, for tests")
	if got := s.Refused(); got != 2 {
		t.Errorf("%d frontends are refused, want the NodePort and the node's address", got)
	}
	s.DeleteService(name("kubelet"))
	s.DeleteService(name("web"))
	s.Changes()
	if got := s.Refused(); got != 0 {
		t.Errorf("%d frontends are refused without a Service", got)
	}
}

// What an API server's move costs does not depend on how many Services there are.
func TestAMoveOfTheAPIServerTouchesFewFrontends(t *testing.T) {
	s := limited(lb.Limits{})
	for i := range 2000 {
		svc := webService(port(80, uint16(30000+i)), loadBalancerIPs(fmt.Sprintf("203.0.%d.%d", i/256, i%256)))
		svc.Name = name(fmt.Sprint("web", i))
		svc.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i / 256), byte(i % 256)})}
		s.SetService(svc)
	}
	s.Changes()
	allocs := testing.AllocsPerRun(10, func() {
		for _, at := range []string{"192.0.2.10:6443", "192.0.2.11:6443"} {
			s.SetSlice(servers(at))
			if d := s.Changes(); !d.Empty() {
				t.Errorf("a change that concerns no Service: %s", text(d))
			}
		}
	})
	if allocs > 400 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestExplainSaysWhyNobodyGetsAFrontend(t *testing.T) {
	s := limited(lb.Limits{ExternalIPs: within("203.0.113.0/24"), Reserved: reserved(":10250")})
	s.SetService(webService(port(6443, 10250), externalIPs("203.0.113.1", "198.51.100.1", "192.0.2.10"),
		loadBalancerIPs("192.0.2.10")))
	e, err := s.Explain(lb.Query{Service: name("web")})
	if err != nil || len(e.Ports) != 1 {
		t.Fatalf("%+v, %v", e, err)
	}
	got := map[string]string{}
	for _, f := range e.Ports[0].Frontends {
		got[netip.AddrPortFrom(f.VIP, f.Port).String()+" "+f.Type] = f.Refused
		if f.Lost != "" {
			t.Errorf("%v belongs to %s", f.VIP, f.Lost)
		}
	}
	want := map[string]string{
		"10.96.0.1:6443 ClusterIP":     "",
		"0.0.0.0:10250 NodePort":       "reserved, for tests",
		"203.0.113.1:6443 ExternalIP":  "",
		"198.51.100.1:6443 ExternalIP": "outside --external-ip-cidrs",
		"192.0.2.10:6443 ExternalIP":   "outside --external-ip-cidrs",
		"192.0.2.10:6443 LoadBalancer": "reserved, an API server listens there",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !strings.Contains(e.Problem, "10250/TCP is reserved, for tests (and ") {
		t.Errorf("problem %q", e.Problem)
	}
	for at, want := range map[string]string{
		"192.0.2.10:6443":   "pass: 192.0.2.10:6443/TCP, for which Service ns/web asks, is reserved, an API server listens there",
		"198.51.100.1:6443": "pass: 198.51.100.1:6443/TCP, for which Service ns/web asks, is outside --external-ip-cidrs",
		"192.0.2.1:10250":   "pass: 0.0.0.0:10250/TCP, for which Service ns/web asks, is reserved, for tests",
		"198.51.100.1:81":   "pass: no Service has this address",
	} {
		at := netip.MustParseAddrPort(at)
		if e, err := s.Explain(lb.Query{VIP: at.Addr(), Number: at.Port()}); err != nil || e.Verdict != want {
			t.Errorf("%v: %q, %v; want %q", at, e.Verdict, err, want)
		}
	}
}
