// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf/link"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// packetStatus is about the packet path: as the agent says or, where none answers,
// as its maps and links have it.
type packetStatus struct {
	agent.PacketState
	Flows int `json:"flows"`
}

// readPackets reads the status below root. An agent that does not answer, since it
// has another --socket say, is no error.
func readPackets(ctx context.Context, view *datapath.View, root string, running bool) (packetStatus, error) {
	var s packetStatus
	flows, err := view.Flows()
	if err != nil {
		return s, err
	}
	s.Flows = len(flows)
	asked := errors.New("no agent")
	if running {
		s.PacketState, asked = agent.AskPackets(ctx, agent.SocketPath(root))
	}
	if asked != nil {
		s.PacketState, err = readDevices(view, root)
	}
	if s.Unsupported == nil {
		s.Unsupported = []string{}
	}
	return s, err
}

// readDevices looks at what an agent has left. Filters of clsact qdiscs, before
// Linux 6.6, it does not see.
func readDevices(view *datapath.View, root string) (agent.PacketState, error) {
	var s agent.PacketState
	rows, err := view.Devices()
	if err != nil {
		return s, err
	}
	s.On = len(rows) > 0
	dir := datapath.DevicesPath(root)
	pins, err := pinNames(dir)
	if err != nil {
		return s, fmt.Errorf("list pins: %w", err)
	}
	attached := map[string]int{} // programs on each device
	for _, pin := range pins {
		device, _, _ := strings.Cut(pin, "-")
		n, err := onDevice(dir + "/" + pin)
		if err != nil {
			return s, err
		}
		attached[device] += n
	}
	s.Devices = len(attached)
	for _, n := range attached {
		if n == 2 { // one for each direction
			s.Attached++
		}
	}
	return s, nil
}

// onDevice returns 1 for a pinned link that is on a device and 0 for one whose
// device is gone, or that somebody has taken off.
func onDevice(pin string) (int, error) {
	l, err := link.LoadPinnedLink(pin, nil) // links cannot be opened read-only
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("look at pinned link %s: %w", pin, err)
	}
	if tcx := info.TCX(); tcx == nil || tcx.Ifindex == 0 {
		return 0, nil
	}
	return 1, nil
}

// problem says what is wrong with the packet path, "" for nothing.
func (s packetStatus) problem() string {
	switch {
	case !s.On:
		return ""
	case s.Problem != "":
		return s.Problem
	case s.Attached < s.Devices:
		return fmt.Sprintf("programs are missing on %d of %d devices", s.Devices-s.Attached, s.Devices)
	default:
		return ""
	}
}

// lines returns what people are told.
func (s packetStatus) lines() []string {
	if !s.On {
		return []string{"off: only clients whose sockets are seen are served"}
	}
	first := fmt.Sprintf("on %d of %d devices, %d flows", s.Attached, s.Devices, s.Flows)
	if s.Devices == 0 {
		first = fmt.Sprintf("on, %d flows", s.Flows)
	}
	if problem := s.problem(); problem != "" {
		first += "; " + problem
	}
	out := []string{first}
	if len(s.Unsupported) > 0 {
		out = append(out, "not on "+strings.Join(s.Unsupported, "; "))
	}
	return out
}
