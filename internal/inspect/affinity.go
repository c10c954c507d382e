// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Affinity is the backend that a client keeps for a port of a Service in one
// family. Other programs read its JSON.
type Affinity struct {
	// Client is an address of the client, "node" for the processes in the node's
	// own network namespace, "" for a pod that had no address to show.
	Client     string   `json:"client"`
	Netns      uint64   `json:"netns"`   // cookie of its network namespace, 0 when not known
	Service    string   `json:"service"` // "namespace/name"
	PortName   string   `json:"portName"`
	Protocol   string   `json:"protocol"`
	Family     string   `json:"family"`
	Backend    Endpoint `json:"backend"`
	AgeSeconds int64    `json:"ageSeconds"` // since the last new connection
}

// clientNode is what the node's own processes are called, which have one entry
// together whatever address they had.
const clientNode = "node"

// Affinities returns a row for each entry that still means something: see Keeps.
// nodeNetns is datapath.AgentState.NetnsCookie. Sorted by Service, port name,
// protocol, family, client.
func Affinities(t lb.Tables, entries []datapath.AffinityEntry, nodeNetns uint64) []Affinity {
	type entry struct {
		datapath.AffinityEntry
		port lb.ServicePort
		node bool
	}
	var kept []entry
	for _, e := range entries {
		if port, named := t.Names[e.Service]; named && Keeps(t, e) {
			kept = append(kept, entry{e, port, e.Netns != 0 && e.Netns == nodeNetns})
		}
	}
	slices.SortFunc(kept, func(a, b entry) int {
		return cmp.Or(a.port.Compare(b.port), a.Client.Compare(b.Client), cmp.Compare(a.Netns, b.Netns))
	})
	rows := make([]Affinity, 0, len(kept))
	for _, e := range kept {
		row := Affinity{
			Netns: e.Netns, Service: e.port.Service.String(), PortName: e.port.Port,
			Protocol: e.port.Protocol.String(), Family: e.port.Family.String(),
			Backend: Endpoint{e.Backend.Addr, e.Backend.Port}, AgeSeconds: int64(e.Age / time.Second),
		}
		switch {
		case e.node:
			row.Client = clientNode
		case e.Client.IsValid():
			row.Client = e.Client.String()
		}
		rows = append(rows, row)
	}
	return rows
}

// Keeps tells whether the client of an entry still gets its backend: before the
// service's timeout is over, and while some side has the backend in its set.
func Keeps(t lb.Tables, e datapath.AffinityEntry) bool {
	timeout := t.Services[e.Service].Affinity
	if timeout == 0 || e.Age > time.Duration(timeout)*time.Second {
		return false
	}
	for side := range lb.Side(lb.Sides) {
		if _, in := t.Members[lb.Member{Service: e.Service, Backend: e.Backend, Use: lb.UseOn(side)}]; in {
			return true
		}
	}
	return false
}

// ClientAffinities returns what a client keeps for a service port, nil for
// nothing. nodeNetns is 0 unless client is an address of the node, whose processes
// have one entry together.
func ClientAffinities(t lb.Tables, entries []datapath.AffinityEntry, sp lb.ServicePort,
	client netip.Addr, nodeNetns uint64) []lb.ExplainedAffinity {
	var out []lb.ExplainedAffinity
	for _, e := range entries {
		asked := e.Client == client || nodeNetns != 0 && e.Netns == nodeNetns
		if asked && t.Names[e.Service] == sp && Keeps(t, e) {
			out = append(out, lb.ExplainedAffinity{
				Client: client.String(), Backend: e.Backend.String(), AgeSeconds: int64(e.Age / time.Second),
			})
		}
	}
	return out
}
