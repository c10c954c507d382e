// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/flows"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// Packets says whom the packet path serves and how.
type Packets struct {
	// On serves clients whose sockets cannot be seen, by their packets. Off takes
	// away what an agent that had it on has left: programs, devices and flows.
	On        bool
	Devices   attach.DeviceFilter
	SNATPorts datapath.PortRange
	// ClusterCIDRs are inside wherever their packets arrive.
	ClusterCIDRs []netip.Prefix
	Timeouts     flows.Timeouts
}

// openPackets makes the packet path ready to begin, or removes it. Without it the
// agent goes on: sockets are served all the same.
func (a *agent) openPackets(p Packets) error {
	a.packets.On = p.On
	if err := a.datapath.SetClusterCIDRs(p.ClusterCIDRs); err != nil {
		return err
	}
	switch {
	case !p.On:
		a.removePackets()
		return nil
	case a.datapath.NoPacketPath != nil:
		a.packets.Problem = a.datapath.NoPacketPath.Error()
		return nil
	}
	for _, taken := range overlaps(procSys, p.SNATPorts) {
		a.log.Warn("--snat-ports has ports that others use; each is looked at before it is taken, which costs time", logfield.Reason(taken))
	}
	others, err := datapath.OtherDevicesPaths(a.root)
	if err != nil {
		return err
	}
	tc, err := attach.NewTC(datapath.DevicesPath(a.root), packetPrograms(a.datapath.Program), others...)
	if err != nil {
		return err
	}
	held, err := a.datapath.Devices()
	if err != nil {
		_ = tc.Close()
		return err
	}
	a.tc = tc
	a.devices = newDevices(p.Devices, a.datapath, tc, held, a.log)
	a.devices.takeOver = func() {
		a.removeOtherPackets()
		a.alone.give()
	}
	a.devices.count = func(n int) { a.metrics.ProgramsRestored.Add(float64(n)) }
	a.devices.mendRows, a.devices.mend = a.repairEvery, a.mendDevices
	return nil
}

// packetPrograms returns the programs of the packet path by their names.
func packetPrograms(program func(name string) *ebpf.Program) attach.Programs {
	return attach.Programs{
		Ingress:   program("tc_ingress"),
		Egress:    program("tc_egress"),
		IngressL3: program("tc_ingress_l3"),
		EgressL3:  program("tc_egress_l3"),
	}
}

// removePackets takes away what an agent with a packet path has left.
func (a *agent) removePackets() {
	a.removeOtherPackets()
	removed, err := attach.RemoveTC(datapath.DevicesPath(a.root))
	err = errors.Join(err, a.datapath.SetDevices(nil))
	if removed > 0 {
		a.log.Info("the packet path is off; its programs are removed", logfield.Count(removed))
	}
	// They would keep service IDs from being used again.
	ended, flowsErr := endFlows(a.datapath.Tables)
	if ended > 0 {
		a.log.Info("the packet path is off; its flows are ended", logfield.Count(ended))
	}
	a.sweeps = flowsErr != nil
	if err := errors.Join(err, flowsErr); err != nil {
		a.log.Warn("the packet path is off, and not all that it has left can be removed", logfield.Error(err))
	}
}

// endFlows forgets all flows and returns how many there were.
func endFlows(t *datapath.Tables) (ended int, err error) {
	for scan := t.ScanFlows(); ; {
		entries, err := scan.Next()
		if err != nil || len(entries) == 0 {
			return ended, err
		}
		for _, f := range entries {
			outcome, err := t.DeleteFlow(f, func(datapath.Flow) bool { return true })
			if err != nil {
				return ended, err
			}
			if outcome == datapath.FlowDeleted {
				ended++
			}
		}
	}
}

// removeOtherPackets takes the programs of other versions away from devices that
// have none of ours. It may be called from any goroutine.
func (a *agent) removeOtherPackets() {
	dirs, err := datapath.OtherDevicesPaths(a.root)
	removed := 0
	for _, dir := range dirs {
		n, dirErr := attach.RemoveTC(dir)
		removed += n
		err = errors.Join(err, dirErr)
	}
	if err != nil {
		a.log.Warn("programs of another version cannot be removed from devices; both serve the node", logfield.Error(err))
	}
	if removed > 0 {
		a.log.Info("removed another version's programs from devices", logfield.Count(removed))
	}
}

// sweep looks for flows that are over, for as long as ctx lasts. Before the tables are
// filled no backend seems to serve.
func (a *agent) sweep(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-a.filled.given:
		a.sweeper.Run(ctx)
	}
}

// swept takes the result of a pass over the flows.
func (a *agent) swept(r flows.Report) {
	if r.InUse != nil { // else it has not seen all of them
		a.metrics.SetFlows(r.Flows, r.SNAT)
	}
	if r.Expired+r.Forgotten > 0 {
		a.log.Debug("ended flows", logfield.Silent(r.Expired), logfield.BackendGone(r.Forgotten))
	}
	switch {
	case r.Err != nil && !a.sweepFailing:
		a.log.Warn("looking for flows that are over failed", logfield.Error(r.Err))
	case r.Err == nil && a.sweepFailing:
		a.log.Info("looking for flows that are over works again")
	}
	a.sweepFailing = r.Err != nil
	a.byFlows = found{r.Ticket, r.InUse}
	a.freeIDs()
}

// procSys is where the kernel's settings are, those of the network namespace of
// who reads them.
const procSys = "/proc/sys"

// NodePorts that Kubernetes gives out unless its API server is told otherwise.
var usualNodePorts = datapath.PortRange{First: 30000, Last: 32767}

// overlaps says which ports in r others use as well.
func overlaps(root string, r datapath.PortRange) (taken []string) {
	if meet(r, usualNodePorts) {
		taken = append(taken, fmt.Sprintf("%d-%d: NodePorts", usualNodePorts.First, usualNodePorts.Last))
	}
	const name = "net/ipv4/ip_local_port_range"
	var local datapath.PortRange
	if text, err := os.ReadFile(filepath.Join(root, name)); err == nil {
		if _, err := fmt.Sscan(string(text), &local.First, &local.Last); err == nil && meet(r, local) {
			taken = append(taken, fmt.Sprintf("%d-%d: connections of processes on the node (net.ipv4.ip_local_port_range)", local.First, local.Last))
		}
	}
	return taken
}

func meet(a, b datapath.PortRange) bool { return a.First <= b.Last && b.First <= a.Last }

// notForwarding names the settings that keep the node from forwarding packets in
// the families it has addresses of.
func notForwarding(root string, addresses []netip.Addr) (names []string) {
	for _, setting := range []struct {
		family     lb.Family
		path, name string
	}{
		{lb.IPv4, "net/ipv4/ip_forward", "net.ipv4.ip_forward"},
		{lb.IPv6, "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"},
	} {
		if !slices.ContainsFunc(addresses, func(a netip.Addr) bool { return lb.FamilyOf(a) == setting.family }) {
			continue
		}
		if text, err := os.ReadFile(filepath.Join(root, setting.path)); err == nil && strings.TrimSpace(string(text)) == "0" {
			names = append(names, setting.name)
		}
	}
	return names
}
