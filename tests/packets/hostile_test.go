// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import (
	"testing"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// testHostile sends what somebody would who means no good.
func testHostile(t *testing.T, w *world) {
	inFamilies(t, w, "a pod in another's name begins nothing that is redirected", func(t *testing.T, f family) {
		s := clusterService(f, lb.UDP, podB)
		w.add(t, f, s)
		// As if the backend had called itself.
		p := later(lb.UDP, at(podB[f], clientPort), at(clusterIP[f], port), "let me in")
		w.counts(t, map[string]uint64{"packet_translate": 1, "drop_source": 1}, func() {
			w.run(t, in("pod0"), p).dropped(t)
		})
		if n := w.countFlows(t); n != 0 {
			t.Errorf("it has left %d entries", n)
		}
	})
	inFamilies(t, w, "nobody but a client's own devices speak for it", func(t *testing.T, f family) {
		s := clusterService(f, lb.UDP, remotePod)
		w.add(t, f, s)
		fl := w.begin(t, f, wayTo(t, remotePod), s, at(clusterIP[f], port))
		w.translates(t, fl, "before")
		w.counts(t, map[string]uint64{"drop_source": 1}, func() {
			w.run(t, in("pod0"), fl.request("answer me instead")).dropped(t)
		})
		w.translates(t, fl, "after")
	})
	inFamilies(t, w, "a flow that a pod began in a client's name is over when that comes", func(t *testing.T, f family) {
		s := clusterService(f, lb.UDP, pod)
		w.add(t, f, s)
		w.run(t, in("pod1"), later(lb.UDP, at(client[f], clientPort), at(clusterIP[f], port), "in its name"))
		fl := w.begin(t, f, wayTo(t, pod), s, at(clusterIP[f], port))
		w.translates(t, fl, "itself")
	})
	inFamilies(t, w, "sources that no client has begin nothing", func(t *testing.T, f family) {
		s := clusterService(f, lb.UDP, remotePod)
		w.add(t, f, s)
		w.run(t, in("eth0"), later(lb.UDP, at(nodeAddr[f], clientPort), at(clusterIP[f], port), "yours")).untouched(t)
	})
	inFamilies(t, w, "a reset out of the window does not end a connection", func(t *testing.T, f family) {
		s := clusterService(f, lb.TCP, remotePod)
		w.add(t, f, s)
		fl := w.begin(t, f, wayTo(t, remotePod), s, at(clusterIP[f], port))
		reply := fl.answer("")
		reply.Flags = packet.SYN | packet.ACK
		w.run(t, in("eth0"), reply)
		w.translates(t, fl, "open")
		reset := fl.request("")
		reset.Flags, reset.Seq = packet.RST, fl.answer("").Ack-10
		w.run(t, in("eth0"), reset)
		w.move(t, s, at(podB[f], backendPort))
		// A SYN would begin anew if the flow were over.
		w.run(t, in("eth0"), opening(lb.TCP, fl.from, fl.vip)).redirected(t, fl.requested(opening(lb.TCP, fl.from, fl.vip)))
		reset.Seq = fl.answer("").Ack
		w.run(t, in("eth0"), reset)
		if got := dst(w.run(t, in("eth0"), opening(lb.TCP, fl.from, fl.vip)).packet(t)); got != at(podB[f], backendPort) {
			t.Errorf("after a reset in the window a SYN goes to %v, want the new backend", got)
		}
	})
	inFamilies(t, w, "two SYNs do not open a connection", func(t *testing.T, f family) {
		s := clusterService(f, lb.TCP, remotePod)
		w.add(t, f, s)
		fl := w.begin(t, f, wayTo(t, remotePod), s, at(clusterIP[f], port))
		reply := fl.answer("")
		reply.Flags = packet.SYN | packet.ACK
		w.run(t, in("eth0"), reply)
		w.run(t, in("eth0"), opening(lb.TCP, fl.from, fl.vip))
		list, err := w.datapath.Flows()
		must(t, err)
		for _, flow := range list {
			if flow.State.Has(datapath.FlowEstablished) {
				t.Errorf("the flow counts as established: %+v", flow)
			}
		}
	})
}

// testPolicyLocal sends to a backend of this node that is behind a device which is not
// known to be a pod's.
func testPolicyLocal(t *testing.T, w *world) {
	inFamilies(t, w, "an outside client keeps its address whatever the backend is behind", func(t *testing.T, f family) {
		s := &service{
			proto: lb.TCP, frontends: []frontend{{lb.KindExternalIP, external[f], port}},
			backends: everywhere(at(farPod[f], backendPort)), outsideLocal: true,
		}
		w.add(t, f, s)
		p := opening(lb.TCP, at(client[f], clientPort), at(external[f], port))
		w.run(t, in("eth0"), p).passes(t, between(p, at(client[f], clientPort), at(farPod[f], backendPort)))
		answer := later(lb.TCP, at(farPod[f], backendPort), at(client[f], clientPort), "answer")
		w.run(t, out("eth0", "eth1"), answer).passes(t, between(answer, at(external[f], port), at(client[f], clientPort)))
	})
}
