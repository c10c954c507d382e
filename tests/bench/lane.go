// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil/packet"
)

// Where everybody is in every lane.
var (
	outsideAddr   = netip.MustParseAddr("192.0.2.2")
	nodeAddr      = netip.MustParseAddr("192.0.2.1")
	wireAddr      = netip.MustParseAddr("198.51.100.1") // the node's, too
	neighbourAddr = netip.MustParseAddr("10.244.0.200")
)

// lane is a node between clients outside of the cluster and pods:
//
//	client ── uplink  node  pod0 ── server
//	            wire        pod1 ── neighbour
//
// All links but the wire are pairs of veth, and the node routes.
type lane struct {
	node, server *sandbox.Namespace
	outside      *sandbox.Namespace // the client's
	client       *remote
	neighbour    *remote       // sends to the server's addresses, straight
	wire         *wire         // another uplink, for floods
	path         *installation // whose packet path is in use
}

// Target lists of a lane's client.
const (
	lanePods      = iota // the pod's addresses
	laneNodePort         // the NodePort of the first Service
	laneNodePorts        // each NodePort in turn, in no order
)

// newLane makes namespaces and the processes in them. Services is how many
// NodePorts the client is told of.
func (c *cluster) newLane(ctx context.Context, services int) (*lane, error) {
	network, err := sandbox.NewNetwork(prefix)
	if err != nil {
		return nil, err
	}
	c.onClose(network.Close)
	at := map[string]*sandbox.Namespace{}
	for _, name := range []string{"client", "node", "server", "neighbour"} {
		if at[name], err = network.AddNamespace(name); err != nil {
			return nil, err
		}
	}
	if err := connectLane(at); err != nil {
		return nil, err
	}
	l := &lane{node: at["node"], server: at["server"], outside: at["client"]}
	server, err := startServer(ctx, l.server)
	if err != nil {
		return nil, err
	}
	c.onClose(server.stop)
	return l, c.startSenders(ctx, l, at["neighbour"], services)
}

// connectLane gives the namespaces of a lane links, addresses and routes.
func connectLane(at map[string]*sandbox.Namespace) error {
	node := at["node"]
	if err := node.SetSysctl("ipv4/ip_forward", "1"); err != nil {
		return err
	}
	pods := &strings.Builder{}
	for _, addr := range podAddrs() {
		fmt.Fprintf(pods, "addr add %s dev eth0\n", addr)
	}
	const inPod = "link set eth0 up\nroute add 10.244.0.1 dev eth0\nroute add default via 10.244.0.1\n"
	for _, of := range []struct {
		ns       *sandbox.Namespace
		commands string
	}{
		{node, fmt.Sprintf(`
			link add uplink type veth peer name eth0 netns %s
			link add pod0 type veth peer name eth0 netns %s
			link add pod1 type veth peer name eth0 netns %s
			link set uplink up
			link set pod0 up
			link set pod1 up
			addr add %s/24 dev uplink
			addr add 10.244.0.1 dev pod0
			route add 10.244.0.0/26 dev pod0
			route add %s dev pod1`,
			at["client"].Name(), at["server"].Name(), at["neighbour"].Name(), nodeAddr, neighbourAddr)},
		{at["client"], fmt.Sprintf("addr add %s/24 dev eth0\nlink set eth0 up\nroute add 10.244.0.0/16 via %s\n", outsideAddr, nodeAddr)},
		{at["server"], pods.String() + inPod},
		{at["neighbour"], fmt.Sprintf("addr add %s dev eth0\n", neighbourAddr) + inPod},
	} {
		if err := of.ns.Configure(of.commands); err != nil {
			return err
		}
	}
	return nil
}

// startSenders starts the client and the neighbour, and makes the wire.
func (c *cluster) startSenders(ctx context.Context, l *lane, neighbour *sandbox.Namespace, services int) (err error) {
	client := make([][]netip.AddrPort, laneNodePorts+1)
	client[lanePods] = withPort(podAddrs(), port)
	client[laneNodePort] = nodePorts(1)
	client[laneNodePorts] = nodePorts(services)
	if l.client, err = startClient(ctx, l.outside, client); err != nil {
		return err
	}
	c.onClose(l.client.stop)
	if l.neighbour, err = startClient(ctx, neighbour, [][]netip.AddrPort{lanePods: withPort(podAddrs(), sinkPort)}); err != nil {
		return err
	}
	c.onClose(l.neighbour.stop)

	if err = l.node.Do(func() (err error) { l.wire, err = openWire("wire"); return err }); err != nil {
		return err
	}
	c.onClose(l.wire.close)
	return l.node.Configure(fmt.Sprintf("addr add %s/24 dev wire\nlink set wire up", wireAddr))
}

// framesTo returns UDP packets from somebody behind the wire, each from another port,
// to all of targets in turn.
func (l *lane) framesTo(targets []netip.AddrPort) (out [][]byte, err error) {
	p := packet.Packet{
		SrcMAC: packet.MAC{2, 0, 0, 0, 0, 1}, Src: wireAddr.Next(), Proto: packet.UDP, TTL: 64,
		Payload: strings.Repeat("x", 22),
	}
	err = l.node.Do(func() error {
		device, err := net.InterfaceByName("wire")
		if err == nil {
			copy(p.DstMAC[:], device.HardwareAddr)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find the wire: %w", err)
	}
	for i := range frames {
		to := targets[i%len(targets)]
		p.SrcPort, p.Dst, p.DstPort = uint16(10_000+i), to.Addr(), to.Port()
		out = append(out, p.Marshal())
	}
	return out, nil
}

// floodFromOutside has the node receive packets to a list of the client's and returns
// how many nanoseconds each took that arrived.
func (l *lane) floodFromOutside(list, packets int) (ns float64, err error) {
	targets := withPort(podAddrs(), sinkPort)
	if list == laneNodePort {
		targets = []netip.AddrPort{netip.AddrPortFrom(nodeAddr, sinkNodePort)}
	}
	frames, err := l.framesTo(targets)
	if err != nil {
		return 0, err
	}
	if err := l.wire.set(frames); err != nil {
		return 0, err
	}
	arrived, err := l.arrivals(func() error {
		return l.node.Do(func() error {
			return alone(func() error { ns, err = l.wire.receive(packets); return err })
		})
	})
	return ns * float64(packets) / float64(arrived), err
}

// floodFromNeighbour has the neighbour send to the server's addresses for some time
// and returns how many nanoseconds each datagram took that arrived.
func (l *lane) floodFromNeighbour(d time.Duration) (ns float64, err error) {
	var got result
	arrived, err := l.arrivals(func() error {
		got, err = l.neighbour.do(order{Workload: flood, Targets: lanePods, Time: d})
		return err
	})
	return float64(got.Took) / float64(arrived), err
}

// arrivals does something and returns how many datagrams have reached the server's
// sink in the meantime; none is an error.
func (l *lane) arrivals(f func() error) (uint64, error) {
	before, err := l.arrived()
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	after, err := l.arrived()
	if err == nil && after == before {
		err = errors.New("no packet has arrived")
	}
	return after - before, err
}

// arrived returns how many datagrams of floods have reached the server since its
// namespace was made.
func (l *lane) arrived() (n uint64, err error) {
	err = l.server.Do(func() error {
		snmp, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		n, err = counter(snmp, "Udp", "RcvbufErrors")
		return err
	})
	return n, err
}

// counter finds a counter in what /proc/net/snmp says: a line of names and a line of
// values for each protocol.
func counter(snmp []byte, protocol, name string) (uint64, error) {
	var names [][]byte
	for line := range bytes.Lines(snmp) {
		fields := bytes.Fields(line)
		if len(fields) == 0 || string(fields[0]) != protocol+":" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i := range min(len(names), len(fields)) {
			if string(names[i]) == name {
				return strconv.ParseUint(string(fields[i]), 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("the kernel counts no %s%s", protocol, name)
}
