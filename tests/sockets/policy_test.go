// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sockets

import (
	"testing"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// on is a ready endpoint on a node.
func on(node string) lb.Endpoint { return lb.Endpoint{Ready: true, Serving: true, Node: node} }

// on puts the backends on a node.
func (s *service) on(t *testing.T, node string, backends ...string) {
	t.Helper()
	for _, b := range backends {
		s.backends[b] = on(node)
	}
	s.apply(t)
}

func internalLocal(spec *lb.Service) { spec.InternalLocal = true }

func externalLocal(spec *lb.Service) { spec.ExternalLocal = true }

func bothLocal(spec *lb.Service) { spec.InternalLocal, spec.ExternalLocal = true, true }

// TestTrafficPolicy: semantics.md, "Which endpoints get traffic" and "What
// survives".
func TestTrafficPolicy(t *testing.T) {
	inOneWorld(t, []worldTest{
		{"internalTrafficPolicy Local decides for ClusterIPs", internalTrafficPolicyLocal},
		{"inside clients of other frontends get the Cluster set", insideClientsGetTheClusterSet},
		{"a change holds at once for new connections", policyChangesAtOnce},
		{"sockets of a backend that is eligible no more but serves stay", hintsAndSocketsThatAreThere},
	})
}

// internalTrafficPolicyLocal: semantics.md, rules 3 and 5 of "Which endpoints
// get traffic"; peers.md, "EPERM where a client expects refused".
func internalTrafficPolicyLocal(t *testing.T, w *world) {
	s := w.expose(t, internalLocal)
	for _, step := range []struct {
		name    string
		do      func(t *testing.T)
		backend string  // of the ClusterIP
		verdict verdict // of the ClusterIP when it has no backend
	}{
		{"no endpoint anywhere", func(t *testing.T) { s.set(t) }, "", noBackend},
		{"an endpoint elsewhere", func(t *testing.T) { s.on(t, "other", "b:8080") }, "", noLocal},
		{"an endpoint whose node is unknown", func(t *testing.T) { s.on(t, "", "b:8080") }, "", noLocal},
		{"one here as well", func(t *testing.T) { s.on(t, nodeName, "a:8080") }, "a:8080", verdict{}},
		{"the one here terminates and serves", func(t *testing.T) {
			s.condition(t, "a:8080", lb.Endpoint{Serving: true, Terminating: true, Node: nodeName})
		}, "a:8080", verdict{}},
		{"the one here serves no more", func(t *testing.T) {
			s.condition(t, "a:8080", lb.Endpoint{Terminating: true, Node: nodeName})
		}, "", noLocal},
		{"the one elsewhere terminates and serves", func(t *testing.T) {
			s.condition(t, "b:8080", lb.Endpoint{Serving: true, Terminating: true, Node: "other"})
		}, "", noLocal},
		{"nobody serves any more", func(t *testing.T) {
			s.condition(t, "b:8080", lb.Endpoint{Terminating: true, Node: "other"})
		}, "", noBackend},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.do(t)
			w.eachClient(t, func(t *testing.T, c client, k kind) {
				if step.backend != "" {
					c.wantReach(t, k, s.dial(k), step.backend)
				} else {
					c.wantVerdict(t, k, s.dial(k), step.verdict)
				}
			})
		})
	}
}

// insideClientsGetTheClusterSet: semantics.md, rule 4; peers.md, "external
// policy Local: address unreachable from inside".
func insideClientsGetTheClusterSet(t *testing.T, w *world) {
	for _, tc := range []struct {
		name      string
		policy    func(*lb.Service)
		clusterIP bool // whether the ClusterIP has the endpoint, too
	}{
		{"externalTrafficPolicy Local", externalLocal, true},
		{"internalTrafficPolicy Local", internalLocal, false},
		{"both Local", bothLocal, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := w.expose(t, tc.policy)
			s.on(t, "other", "b:8080")
			w.eachClient(t, func(t *testing.T, c client, k kind) {
				for _, f := range frontendKinds[1:] {
					c.wantReach(t, k, f.at(s, k), "b:8080")
				}
				if tc.clusterIP {
					c.wantReach(t, k, s.dial(k), "b:8080")
				} else {
					c.wantVerdict(t, k, s.dial(k), noLocal)
				}
			})
			eachKind(t, func(t *testing.T, k kind) { w.process().wantReach(t, k, s.atLoopback(k), "b:8080") })
		})
	}

	t.Run("without any endpoint they are refused", func(t *testing.T) {
		s := w.expose(t, bothLocal)
		w.eachClient(t, func(t *testing.T, c client, k kind) {
			for _, f := range frontendKinds {
				c.wantVerdict(t, k, f.at(s, k), noBackend)
			}
		})
	})
}

// policyChangesAtOnce also shows that a flow that is there goes on: its
// backend serves, though it is in the set no more (semantics.md, "What survives").
func policyChangesAtOnce(t *testing.T, w *world) {
	s := w.expose(t, nil)
	s.on(t, "other", "b:8080")
	eachKind(t, func(t *testing.T, k kind) {
		flow, connected := openUDP(t, w.client, k), w.connected(t, k, s.dial(k))
		wantAnswer(t, "under Cluster", flow, s, "b:8080")
		s.update(t, internalLocal)
		w.pod().wantVerdict(t, k, s.dial(k), noLocal)
		wantAnswer(t, "under Local, on a flow that is there", flow, s, "b:8080")
		connected.wantUntouched(t, "a socket that was connected before")
		s.update(t, func(spec *lb.Service) { spec.InternalLocal = false })
		w.pod().wantReach(t, k, s.dial(k), "b:8080")
	})
}

// hintsAndSocketsThatAreThere: semantics.md, "endpoint no longer eligible but
// serving (terminating, hints, zone, policy)".
func hintsAndSocketsThatAreThere(t *testing.T, w *world) {
	w.needIterators(t)
	w.store.SetNode(lb.Node{Addresses: nodeAddr[:], Zone: "here", Eligible: true})
	s, stale := w.expose(t, nil, "a:8080"), w.service(t, lb.UDP, "c:8080")
	type socket struct{ clusterIP, nodePort, stale waiting }
	var all []socket
	for _, k := range kinds {
		all = append(all, socket{w.connected(t, k, s.dial(k)), w.connected(t, k, s.atNode(k)), w.connected(t, k, stale.dial(k))})
	}
	hinted := func(zone string) lb.Endpoint {
		return lb.Endpoint{Ready: true, Serving: true, ZoneHints: []string{zone}}
	}
	s.backends["b:8080"] = hinted("here")
	s.condition(t, "a:8080", hinted("there"))
	for _, f := range frontendKinds {
		w.pod().wantReach(t, kinds[0], f.at(s, kinds[0]), "b:8080")
	}
	// Once these are ended, the walk has been done.
	stale.set(t)
	for i, k := range kinds {
		all[i].stale.wantEnded(t, k.name)
		all[i].clusterIP.wantUntouched(t, k.name+" connected to the ClusterIP")
		all[i].nodePort.wantUntouched(t, k.name+" connected to the NodePort")
	}
}
