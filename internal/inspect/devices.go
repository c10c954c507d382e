// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// Device is a network device of the node that the packet path knows: it is on it, or
// on its ports, or packets leave by it.
type Device struct {
	Index uint32 `json:"index"`
	Name  string `json:"name"` // "" where it is not known
	Pod   bool   `json:"pod"`  // behind it are pods of this node and nothing else
	// L3Index and L3Name are the device that routes are of: the device's bridge,
	// or itself.
	L3Index uint32 `json:"l3Index"`
	L3Name  string `json:"l3Name"`
	// Sources are the addresses the node sends from by this device, where the
	// kernel's routes do not tell; IPv4 first, never null.
	Sources []netip.Addr `json:"sources"`
	MAC     string       `json:"mac"` // of the device L3Index, "" without one
}

// Devices returns a row for each device, in the order given. names holds names by
// index.
func Devices(devices []datapath.Device, names map[uint32]string) []Device {
	rows := make([]Device, 0, len(devices))
	for _, d := range devices {
		row := Device{
			Index: d.Index, Name: names[d.Index], Pod: d.Pod, L3Index: d.L3Index, L3Name: names[d.L3Index],
			Sources: []netip.Addr{},
		}
		for _, a := range []netip.Addr{d.Source4, d.Source6} {
			if a.IsValid() {
				row.Sources = append(row.Sources, a)
			}
		}
		if d.MAC != [6]byte{} {
			row.MAC = net.HardwareAddr(d.MAC[:]).String()
		}
		rows = append(rows, row)
	}
	return rows
}

func devicesTable(rows []Device) *table {
	t := &table{columns: numbers("INDEX")}
	t.columns = append(t.columns, columns("DEVICE", "BEHIND IT", "ROUTES OF", "SOURCES", "MAC")...)
	for _, d := range rows {
		behind, routes := "the network", ""
		if d.Pod {
			behind = "pods"
		}
		if d.L3Index != d.Index {
			routes = deviceName(d.L3Name, d.L3Index)
		}
		t.add(fmt.Sprint(d.Index), d.Name, behind, routes, list(text(d.Sources), true), d.MAC)
	}
	return t
}

// deviceNames returns the names of the node's devices by index: none when we are in
// another network namespace than nodeNetns, where the same indices are others'.
func deviceNames(nodeNetns uint64) map[uint32]string {
	if netns, err := netnsCookie(); err != nil || netns != nodeNetns {
		return nil
	}
	devices, err := net.Interfaces()
	if err != nil {
		return nil // indices do, too
	}
	names := make(map[uint32]string, len(devices))
	for _, d := range devices {
		names[uint32(d.Index)] = d.Name
	}
	return names
}

// netnsCookie returns the cookie of the network namespace we are in.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}
