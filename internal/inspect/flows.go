// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Flow is what a client has with a port of a Service on the packet path. Other
// programs read its JSON.
type Flow struct {
	Protocol string   `json:"protocol"`
	Client   Endpoint `json:"client"`
	VIP      Endpoint `json:"vip"` // what the client dialled, of a NodePort the node's address
	Backend  Endpoint `json:"backend"`
	// Source is whom the backend sees as the client: the client, or with SNAT an
	// address and port of the node.
	Source      Endpoint `json:"source"`
	SNAT        bool     `json:"snat"`
	Node        bool     `json:"node"`        // the client is a process on the node
	Outside     bool     `json:"outside"`     // the client counts as one from outside
	Redirect    bool     `json:"redirect"`    // packets go around the node's stack
	Device      string   `json:"device"`      // where the client is, "" for the node itself and where the name is not known
	DeviceIndex uint32   `json:"deviceIndex"` // 0 for the node itself
	State       string   `json:"state"`       // see flowState
	IdleSeconds int64    `json:"idleSeconds"` // since the last packet
	Service     string   `json:"service"`     // "namespace/name"
	PortName    string   `json:"portName"`
	Family      string   `json:"family"`
	// Entries tells which of a flow's two entries the kernel has: "both",
	// "requests" or "answers". It may evict one, which the other one restores.
	Entries string `json:"entries"`
}

// End is an address with or without a port. The zero End is any.
type End struct {
	Addr netip.Addr
	Port uint16 // 0 for any
}

// ParseEnd reads "address" or "address:port", IPv6 with a port in brackets.
func ParseEnd(s string) (End, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return End{Addr: a.Unmap()}, nil
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return End{}, fmt.Errorf("%q is neither an address nor address:port", s)
	}
	return End{Addr: ap.Addr().Unmap(), Port: ap.Port()}, nil
}

func (e End) is(ap netip.AddrPort) bool {
	return !e.Addr.IsValid() || e.Addr == ap.Addr() && (e.Port == 0 || e.Port == ap.Port())
}

// FlowFilter says which flows are shown: those that have all of its ends.
type FlowFilter struct{ Client, VIP, Backend End }

func (f FlowFilter) shows(flow *datapath.Flow) bool {
	return f.Client.is(flow.Client) && f.VIP.is(flow.VIP) && f.Backend.is(flow.Backend)
}

// PrintFlows is Print for flows, of which it shows those that filter lets through.
func PrintFlows(w io.Writer, root, format string, filter FlowFilter) error {
	return printKind(w, root, kindFlows, format, filter)
}

// Flows returns a row for each flow, sorted by Service, port name, protocol, family,
// VIP, client, backend. devices holds names by index.
func Flows(t lb.Tables, flows []datapath.Flow, devices map[uint32]string) []Flow {
	flows = slices.Clone(flows)
	slices.SortFunc(flows, func(a, b datapath.Flow) int {
		return cmp.Or(t.Names[a.Service].Compare(t.Names[b.Service]), cmp.Compare(a.Service, b.Service),
			a.VIP.Compare(b.VIP), a.Client.Compare(b.Client), a.Backend.Compare(b.Backend))
	})
	rows := make([]Flow, 0, len(flows))
	for _, f := range flows {
		row := Flow{
			Protocol: f.Protocol.String(), Client: endpoint(f.Client), VIP: endpoint(f.VIP),
			Backend: endpoint(f.Backend), Source: endpoint(f.Source),
			SNAT: f.SNAT, Node: f.Node, Outside: f.Outside, Redirect: f.Redirect,
			State: flowState(&f), IdleSeconds: int64(f.Idle / time.Second),
			Service: serviceName(t, f.Service), Entries: "both",
		}
		if port, named := t.Names[f.Service]; named {
			row.PortName, row.Family = port.Port, port.Family.String()
		}
		if !f.Node {
			row.Device, row.DeviceIndex = devices[f.Device], f.Device
		}
		switch {
		case !f.Answers:
			row.Entries = "requests"
		case !f.Requests:
			row.Entries = "answers"
		}
		rows = append(rows, row)
	}
	return rows
}

func endpoint(ap netip.AddrPort) Endpoint { return Endpoint{ap.Addr(), ap.Port()} }

// flowState returns "unanswered" or "answered" for UDP. For TCP and SCTP it is
// "opening", "established", "client_closed", "backend_closed", "closed" by both, or
// "reset".
func flowState(f *datapath.Flow) string {
	has := f.State.Has
	switch {
	case f.Protocol == lb.UDP && has(datapath.FlowAnswered):
		return "answered"
	case f.Protocol == lb.UDP:
		return "unanswered"
	case has(datapath.FlowReset):
		return "reset"
	case has(datapath.FlowClosed):
		return "closed"
	case has(datapath.FlowClientClosed):
		return "client_closed"
	case has(datapath.FlowBackendClosed):
		return "backend_closed"
	case has(datapath.FlowEstablished):
		return "established"
	}
	return "opening"
}

func flowsTable(rows []Flow, wide bool) *table {
	t := &table{columns: columns("PROTOCOL", "CLIENT", "VIP", "BACKEND", "SOURCE", "DEVICE", "STATE")}
	t.columns = append(t.columns, numbers("IDLE")...)
	t.columns = append(t.columns, columns("SERVICE", "PORT NAME")...)
	if wide {
		t.columns = append(t.columns, columns("SIDE", "PATH", "ENTRIES")...)
	}
	for _, f := range rows {
		source, device := "", deviceName(f.Device, f.DeviceIndex)
		if f.SNAT {
			source = f.Source.String()
		}
		if f.Node {
			device = clientNode
		}
		cells := []string{
			f.Protocol, f.Client.String(), f.VIP.String(), f.Backend.String(), source, device, f.State,
			age(f.IdleSeconds), f.Service, f.PortName,
		}
		if wide {
			side, path := lb.SideInside, "stack"
			if f.Outside {
				side = lb.SideOutside
			}
			if f.Redirect {
				path = "redirect"
			}
			cells = append(cells, side.String(), path, f.Entries)
		}
		t.add(cells...)
	}
	return t
}

// deviceName returns how people call a device: "" for none.
func deviceName(name string, index uint32) string {
	if name == "" && index != 0 {
		return "#" + strconv.FormatUint(uint64(index), 10)
	}
	return name
}
