// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// frontends prints those that a delta names, sorted, wildcards left out.
func frontends(d lb.Delta) []string {
	var out []string
	for key, owner := range d.Frontends {
		if !key.IsWildcard() {
			out = append(out, fmt.Sprintf("%v %v %v", key, owner.Kind, owner.Service))
		}
	}
	slices.Sort(out)
	return out
}

func TestFrontendsAServiceHas(t *testing.T) {
	const clusterIP, clusterIP6 = "10.96.0.1:80/TCP ClusterIP ns/web:http/TCP/IPv4", "[fd00::1]:80/TCP ClusterIP ns/web:http/TCP/IPv6"
	tests := []struct {
		name    string
		service func(*lb.Service)
		want    []string
	}{{
		name: "clusterIPs[] + port", service: func(*lb.Service) {},
		want: []string{clusterIP},
	}, {
		name:    "nodePort",
		service: func(s *lb.Service) { s.Ports[0].NodePort = 30080 },
		want:    []string{clusterIP, "0.0.0.0:30080/TCP NodePort ns/web:http/TCP/IPv4"},
	}, {
		name: "allocateLoadBalancerNodePorts: false: no NodePort, nothing breaks",
		service: func(s *lb.Service) {
			s.Ports[0].NodePort = 0
			s.LoadBalancerIPs = addrs("192.0.2.1")
		},
		want: []string{clusterIP, "192.0.2.1:80/TCP LoadBalancer ns/web:http/TCP/IPv4"},
	}, {
		name:    "status.loadBalancer.ingress[].ip",
		service: func(s *lb.Service) { s.LoadBalancerIPs = addrs("192.0.2.1", "192.0.2.2") },
		want: []string{clusterIP, "192.0.2.1:80/TCP LoadBalancer ns/web:http/TCP/IPv4",
			"192.0.2.2:80/TCP LoadBalancer ns/web:http/TCP/IPv4"},
	}, {
		name:    "externalIPs[]",
		service: func(s *lb.Service) { s.ExternalIPs = addrs("198.51.100.1", "198.51.100.2") },
		want: []string{clusterIP, "198.51.100.1:80/TCP ExternalIP ns/web:http/TCP/IPv4",
			"198.51.100.2:80/TCP ExternalIP ns/web:http/TCP/IPv4"},
	}, {
		name: "a load-balancer IP also in externalIPs stays a load-balancer IP",
		service: func(s *lb.Service) {
			s.LoadBalancerIPs, s.ExternalIPs = addrs("192.0.2.1"), addrs("192.0.2.1")
		},
		want: []string{clusterIP, "192.0.2.1:80/TCP LoadBalancer ns/web:http/TCP/IPv4"},
	}, {
		name: "its own ClusterIP in externalIPs stays a ClusterIP",
		service: func(s *lb.Service) {
			s.LoadBalancerIPs, s.ExternalIPs = addrs("10.96.0.1"), addrs("10.96.0.1")
		},
		want: []string{clusterIP},
	}, {
		name: "an address listed twice",
		service: func(s *lb.Service) {
			s.LoadBalancerIPs, s.ExternalIPs = addrs("192.0.2.1", "192.0.2.1"), addrs("198.51.100.1", "198.51.100.1")
		},
		want: []string{clusterIP, "192.0.2.1:80/TCP LoadBalancer ns/web:http/TCP/IPv4",
			"198.51.100.1:80/TCP ExternalIP ns/web:http/TCP/IPv4"},
	}, {
		name: "a family without a ClusterIP has no frontend at all",
		service: func(s *lb.Service) {
			s.Ports[0].NodePort = 30080
			s.LoadBalancerIPs, s.ExternalIPs = addrs("2001:db8::1"), addrs("2001:db8::2")
		},
		want: []string{clusterIP, "0.0.0.0:30080/TCP NodePort ns/web:http/TCP/IPv4"},
	}, {
		name: "a family without a ClusterIP has no frontend at all (IPv6 only)",
		service: func(s *lb.Service) {
			s.ClusterIPs = addrs("fd00::1")
			s.Ports[0].NodePort = 30080
			s.LoadBalancerIPs, s.ExternalIPs = addrs("192.0.2.1"), addrs("198.51.100.1", "2001:db8::2")
		},
		want: []string{clusterIP6, "[::]:30080/TCP NodePort ns/web:http/TCP/IPv6", "[2001:db8::2]:80/TCP ExternalIP ns/web:http/TCP/IPv6"},
	}, {
		name: "dual stack, IPv4 first",
		service: func(s *lb.Service) {
			s.ClusterIPs = addrs("10.96.0.1", "fd00::1")
			s.Ports[0].NodePort = 30080
			s.LoadBalancerIPs, s.ExternalIPs = addrs("192.0.2.1", "2001:db8::1"), addrs("2001:db8::2", "198.51.100.1")
		},
		want: dualStackFrontends,
	}, {
		name: "dual stack, IPv6 first",
		service: func(s *lb.Service) {
			s.ClusterIPs = addrs("fd00::1", "10.96.0.1")
			s.Ports[0].NodePort = 30080
			s.LoadBalancerIPs, s.ExternalIPs = addrs("2001:db8::1", "192.0.2.1"), addrs("198.51.100.1", "2001:db8::2")
		},
		want: dualStackFrontends,
	}, {
		name: "the same port number on TCP, UDP and SCTP is three frontends",
		service: func(s *lb.Service) {
			s.Ports = []lb.Port{
				{Name: "dns", Protocol: lb.UDP, Number: 53, NodePort: 30053},
				{Name: "dns-tcp", Protocol: lb.TCP, Number: 53, NodePort: 30053},
				{Name: "sig", Protocol: lb.SCTP, Number: 53, NodePort: 30053},
			}
		},
		want: []string{
			"10.96.0.1:53/UDP ClusterIP ns/web:dns/UDP/IPv4", "10.96.0.1:53/TCP ClusterIP ns/web:dns-tcp/TCP/IPv4", "10.96.0.1:53/SCTP ClusterIP ns/web:sig/SCTP/IPv4",
			"0.0.0.0:30053/UDP NodePort ns/web:dns/UDP/IPv4", "0.0.0.0:30053/TCP NodePort ns/web:dns-tcp/TCP/IPv4", "0.0.0.0:30053/SCTP NodePort ns/web:sig/SCTP/IPv4",
		},
	}, {
		name:    "a Service without ports",
		service: func(s *lb.Service) { s.Ports, s.ExternalIPs = nil, addrs("198.51.100.1") },
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore()
			svc := webService(tt.service)
			s.SetService(svc)
			d := s.Changes()
			slices.Sort(tt.want)
			if diff := cmp.Diff(tt.want, frontends(d)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(d.Problems) > 0 {
				t.Errorf("problems: %v", d.Problems)
			}
			// A ClusterIP's undefined port is refused: ClusterIPs only.
			for key, owner := range d.Frontends {
				if key.IsWildcard() != (owner.Service.Port == "" && owner.Service.Protocol == lb.Any) ||
					key.IsWildcard() && (owner.Kind != lb.KindClusterIP || !slices.Contains(svc.ClusterIPs, key.VIP)) {
					t.Errorf("frontend %v %+v", key, owner)
				}
			}
			for _, vip := range svc.ClusterIPs {
				if _, ok := d.Frontends[lb.FrontendKey{VIP: vip}]; !ok {
					t.Errorf("%v has no wildcard", vip)
				}
			}
			s.DeleteService(svc.Name)
			s.Changes()
			expect(t, "gone without a trace", s.All())
		})
	}
}

var dualStackFrontends = []string{
	"10.96.0.1:80/TCP ClusterIP ns/web:http/TCP/IPv4", "[fd00::1]:80/TCP ClusterIP ns/web:http/TCP/IPv6",
	"0.0.0.0:30080/TCP NodePort ns/web:http/TCP/IPv4", "[::]:30080/TCP NodePort ns/web:http/TCP/IPv6",
	"192.0.2.1:80/TCP LoadBalancer ns/web:http/TCP/IPv4", "[2001:db8::1]:80/TCP LoadBalancer ns/web:http/TCP/IPv6",
	"198.51.100.1:80/TCP ExternalIP ns/web:http/TCP/IPv4", "[2001:db8::2]:80/TCP ExternalIP ns/web:http/TCP/IPv6",
}

func TestFrontendsFollowTheFields(t *testing.T) {
	s := newStore()
	s.SetService(webService())
	s.Changes()
	steps := []struct {
		name string
		set  func(*lb.Service)
		want []string
	}{
		{"type becomes NodePort", func(s *lb.Service) { s.Ports[0].NodePort = 30080 },
			[]string{"frontend 0.0.0.0:30080/TCP NodePort ns/web:http/TCP/IPv4"}},
		{"another nodePort", func(s *lb.Service) { s.Ports[0].NodePort = 30081 },
			[]string{"frontend 0.0.0.0:30080/TCP gone", "frontend 0.0.0.0:30081/TCP NodePort ns/web:http/TCP/IPv4"}},
		{"an external IP becomes a load-balancer IP", func(s *lb.Service) { s.ExternalIPs = addrs("192.0.2.1") },
			[]string{"frontend 0.0.0.0:30081/TCP gone", "frontend 192.0.2.1:80/TCP ExternalIP ns/web:http/TCP/IPv4"}},
		{"it becomes one", func(s *lb.Service) { s.LoadBalancerIPs = addrs("192.0.2.1") },
			[]string{"frontend 192.0.2.1:80/TCP LoadBalancer ns/web:http/TCP/IPv4"}},
		{"one family more", dualStack, []string{"frontend 192.0.2.1:80/TCP gone", "service ns/web:http/TCP/IPv6 [] serving []",
			"frontend [fd00::1]:80/TCP ClusterIP ns/web:http/TCP/IPv6", "frontend [fd00::1]:* ClusterIP ns/web/*/IPv6"}},
		{"the families in the other order", func(s *lb.Service) { s.ClusterIPs = addrs("fd00::1", "10.96.0.1") }, nil},
		{"one family less", func(*lb.Service) {}, []string{"service ns/web:http/TCP/IPv6 gone",
			"frontend [fd00::1]:80/TCP gone", "frontend [fd00::1]:* gone"}},
	}
	for _, step := range steps {
		s.SetService(webService(step.set))
		expect(t, step.name, s.Changes(), step.want...)
	}
}

// foreignService is a Service that another proxy serves, at those ClusterIPs.
func foreignService(service string, clusterIPs ...string) lb.Service {
	return lb.Service{Name: name(service), Foreign: true, ClusterIPs: addrs(clusterIPs...)}
}

func TestAServiceThatAnotherProxyServes(t *testing.T) {
	s := newStore()
	s.SetSlice(webSlice("a", 80, endpoint("10.0.0.1", "rs")))
	s.SetService(foreignService("web", "10.96.0.1", "fd00::1"))
	expect(t, "its addresses belong to somebody and are left alone", s.Changes(),
		"frontend 10.96.0.1:* Foreign ns/web/*/IPv4", "frontend [fd00::1]:* Foreign ns/web/*/IPv6")
	s.SetService(webService(dualStack))
	expect(t, "the label goes", s.Changes(),
		"service ns/web:http/TCP/IPv4 [10.0.0.1:80] serving [10.0.0.1:80]", "service ns/web:http/TCP/IPv6 [] serving []",
		"frontend 10.96.0.1:80/TCP ClusterIP ns/web:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/web/*/IPv4",
		"frontend [fd00::1]:80/TCP ClusterIP ns/web:http/TCP/IPv6", "frontend [fd00::1]:* ClusterIP ns/web/*/IPv6")
	s.SetService(foreignService("web", "10.96.0.1", "fd00::1"))
	expect(t, "the label comes", s.Changes(),
		"service ns/web:http/TCP/IPv4 gone", "service ns/web:http/TCP/IPv6 gone",
		"frontend 10.96.0.1:80/TCP gone", "frontend 10.96.0.1:* Foreign ns/web/*/IPv4",
		"frontend [fd00::1]:80/TCP gone", "frontend [fd00::1]:* Foreign ns/web/*/IPv6")
	s.DeleteService(name("web"))
	expect(t, "the Service goes", s.Changes(), "frontend 10.96.0.1:* gone", "frontend [fd00::1]:* gone")
}

// claimant is a Service with the one port 80 and a ClusterIP of its own, by its age.
func claimant(service string, age int64, more ...func(*lb.Service)) lb.Service {
	svc := webService(func(s *lb.Service) {
		s.Name, s.Created = name(service), time.Unix(1000-age, 0)
		s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 1, byte(len(service))})}
	})
	for _, set := range more {
		set(&svc)
	}
	return svc
}

func TestAddressAndPortClaimedTwice(t *testing.T) {
	lbIP := func(s *lb.Service) { s.LoadBalancerIPs = addrs("192.0.2.1") }
	externalIP := func(s *lb.Service) { s.ExternalIPs = addrs("192.0.2.1") }
	clusterIP := func(s *lb.Service) { s.ClusterIPs = addrs("192.0.2.1") }
	nodePort := func(s *lb.Service) { s.Ports[0].NodePort = 30080 }
	tests := []struct {
		name          string
		winner, loser lb.Service
		want          string // the frontend
		problem       lb.Problem
	}{
		{"the older Service keeps it: load-balancer IPs", claimant("old", 2, lbIP), claimant("young", 1, lbIP),
			"192.0.2.1:80/TCP LoadBalancer", "192.0.2.1:80/TCP belongs to Service ns/old"},
		{"the older Service keeps it: an external IP against a load-balancer IP", claimant("old", 2, externalIP), claimant("young", 1, lbIP),
			"192.0.2.1:80/TCP ExternalIP", "192.0.2.1:80/TCP belongs to Service ns/old"},
		{"the older Service keeps it: NodePorts", claimant("old", 2, nodePort), claimant("young", 1, nodePort),
			"0.0.0.0:30080/TCP NodePort", "0.0.0.0:30080/TCP belongs to Service ns/old"},
		{"a ClusterIP beats any other claim, however old: an external IP", claimant("young", 1, clusterIP), claimant("old", 2, externalIP),
			"192.0.2.1:80/TCP ClusterIP", "192.0.2.1:80/TCP belongs to Service ns/young"},
		{"a ClusterIP beats any other claim, however old: a load-balancer IP", claimant("young", 1, clusterIP), claimant("old", 2, lbIP),
			"192.0.2.1:80/TCP ClusterIP", "192.0.2.1:80/TCP belongs to Service ns/young"},
		{"of one age the first by name", claimant("a", 1, lbIP), claimant("bb", 1, externalIP),
			"192.0.2.1:80/TCP LoadBalancer", "192.0.2.1:80/TCP belongs to Service ns/a"},
	}
	for _, tt := range tests {
		for _, order := range [][]lb.Service{{tt.winner, tt.loser}, {tt.loser, tt.winner}} {
			t.Run(tt.name+": "+order[0].Name.Name+" comes first", func(t *testing.T) {
				s := newStore()
				for _, svc := range order {
					s.SetService(svc)
					s.Changes()
				}
				owner := func(svc lb.Service) string { return tt.want + " " + svc.Name.String() + ":http/TCP/IPv4" }
				all := s.All()
				if got := frontends(all); !slices.Contains(got, owner(tt.winner)) {
					t.Errorf("%q is not among\n%s", owner(tt.winner), strings.Join(got, "\n"))
				}
				if diff := cmp.Diff(map[lb.Name]lb.Problem{tt.loser.Name: tt.problem}, all.Problems); diff != "" {
					t.Errorf("reported (-want +got):\n%s", diff)
				}
				s.DeleteService(tt.winner.Name)
				if problem, ok := s.Changes().Problems[tt.loser.Name]; !ok || problem != "" {
					t.Errorf("the winner has gone and the problem stays: %q", problem)
				}
				s.DeleteService(tt.loser.Name)
				s.Changes()
				expect(t, "both gone", s.All())
			})
		}
	}
}

func TestAnExternalIPThatIsAnotherProxysClusterIP(t *testing.T) {
	s := newStore()
	s.SetService(webService(func(s *lb.Service) { s.ExternalIPs = addrs("10.96.0.2") }))
	s.SetService(foreignService("other", "10.96.0.2"))
	expect(t, "a port of its own beside the wildcard of another proxy's ClusterIP", s.Changes(),
		"service ns/web:http/TCP/IPv4 [] serving []",
		"frontend 10.96.0.1:80/TCP ClusterIP ns/web:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/web/*/IPv4",
		"frontend 10.96.0.2:80/TCP ExternalIP ns/web:http/TCP/IPv4", "frontend 10.96.0.2:* Foreign ns/other/*/IPv4")
}

func TestAFrontendClaimedTwiceChangesHands(t *testing.T) {
	claim := func(service string, created int64) lb.Service {
		return webService(func(s *lb.Service) { s.Name, s.Created = name(service), time.Unix(created, 0) })
	}
	created := map[string]int64{"old": 1, "young": 2}
	for _, order := range [][2]string{{"old", "young"}, {"young", "old"}} {
		t.Run(order[0]+" comes first", func(t *testing.T) {
			s := newStore()
			s.SetService(claim(order[0], created[order[0]]))
			s.SetService(claim(order[1], created[order[1]]))
			expect(t, "both", s.Changes(),
				"service ns/old:http/TCP/IPv4 [] serving []", "service ns/young:http/TCP/IPv4 [] serving []",
				"frontend 10.96.0.1:80/TCP ClusterIP ns/old:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/old/*/IPv4",
				"problem ns/young: 10.96.0.1:80/TCP belongs to Service ns/old (and 1 more)")
			s.DeleteService(name("old"))
			expect(t, "the winner goes", s.Changes(), "service ns/old:http/TCP/IPv4 gone",
				"frontend 10.96.0.1:80/TCP ClusterIP ns/young:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/young/*/IPv4",
				"problem ns/young: ")
			s.SetService(claim("another", 2))
			expect(t, "of one age the first by name", s.Changes(), "service ns/another:http/TCP/IPv4 [] serving []",
				"frontend 10.96.0.1:80/TCP ClusterIP ns/another:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/another/*/IPv4",
				"problem ns/young: 10.96.0.1:80/TCP belongs to Service ns/another (and 1 more)")
			s.SetService(claim("another", 3))
			expect(t, "created anew", s.Changes(),
				"frontend 10.96.0.1:80/TCP ClusterIP ns/young:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/young/*/IPv4",
				"problem ns/young: ", "problem ns/another: 10.96.0.1:80/TCP belongs to Service ns/young (and 1 more)")
		})
	}
}

func TestOneServiceThatAsksForAFrontendTwice(t *testing.T) {
	s := newStore()
	s.SetService(webService(func(s *lb.Service) {
		s.Ports = append(s.Ports, s.Ports[0], lb.Port{Name: "alt", Protocol: lb.TCP, Number: 80})
	}))
	expect(t, "two ports with one number", s.Changes(),
		"service ns/web:http/TCP/IPv4 [] serving []", "service ns/web:alt/TCP/IPv4 [] serving []",
		"frontend 10.96.0.1:80/TCP ClusterIP ns/web:alt/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/web/*/IPv4",
		"problem ns/web: two of its ports ask for 10.96.0.1:80/TCP (and 1 more)")
	s.DeleteService(name("web"))
	s.Changes()
	expect(t, "gone without a trace", s.All())
}

// TestALoadBalancerIPThatEqualsANodesAddress also has a NodePort and an external
// IP there: an (address, port) frontend beats a NodePort on the same node address.
func TestALoadBalancerIPThatEqualsANodesAddress(t *testing.T) {
	s := lb.NewStore(lb.Config{NodeName: here, NodePorts: lb.NodePorts{Primary: true}})
	s.SetNode(lb.Node{Addresses: addrs("10.0.9.9")})
	s.SetService(webService(func(s *lb.Service) {
		s.LoadBalancerIPs, s.Ports[0].NodePort = addrs("10.0.9.9"), 30080
	}))
	s.SetService(claimant("other", 1, func(s *lb.Service) {
		s.Ports[0].Number, s.ExternalIPs = 30080, addrs("10.0.9.9")
	}))
	expect(t, "legal and works", s.Changes(),
		"service ns/web:http/TCP/IPv4 [] serving []", "service ns/other:http/TCP/IPv4 [] serving []",
		"node address 10.0.9.9 open",
		"frontend 10.96.0.1:80/TCP ClusterIP ns/web:http/TCP/IPv4", "frontend 10.96.0.1:* ClusterIP ns/web/*/IPv4",
		"frontend 10.0.9.9:80/TCP LoadBalancer ns/web:http/TCP/IPv4", "frontend 0.0.0.0:30080/TCP NodePort ns/web:http/TCP/IPv4",
		"frontend 10.96.1.5:30080/TCP ClusterIP ns/other:http/TCP/IPv4", "frontend 10.96.1.5:* ClusterIP ns/other/*/IPv4",
		"frontend 10.0.9.9:30080/TCP ExternalIP ns/other:http/TCP/IPv4")
	verdicts := map[uint16]string{80: "ns/web", 30080: "ns/other", 81: "pass: an address of this node, but no Service has NodePort 81"}
	for number, want := range verdicts {
		e, err := s.Explain(lb.Query{VIP: addrs("10.0.9.9")[0], Number: number})
		if err != nil {
			t.Fatal(err)
		}
		got := e.Verdict
		for _, p := range e.Ports {
			got += p.Service
		}
		if got != want {
			t.Errorf("port %d: %q, want %q", number, got, want)
		}
	}
}
