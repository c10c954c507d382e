// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// addPath tells an installation the devices of the lane's node and has its packet
// path ready to be used there.
func (c *cluster) addPath(in *installation, root string, l *lane) error {
	d := in.datapath
	if d.NoPacketPath != nil {
		return d.NoPacketPath
	}
	devices, err := l.devices()
	if err != nil {
		return err
	}
	rows := make([]datapath.Device, len(devices))
	for i, device := range devices {
		rows[i] = datapath.Device{
			Index: uint32(device.Index), Pod: device.Pod, L3Index: uint32(device.L3Index), Source4: device.Source4,
			MAC: [6]byte(device.MAC),
		}
	}
	if err := d.SetDevices(rows); err != nil {
		return err
	}
	in.devices = devices
	return c.addPrograms(in, datapath.DevicesPath(root), l, attach.Programs{
		Ingress: d.Program("tc_ingress"), Egress: d.Program("tc_egress"),
		IngressL3: d.Program("tc_ingress_l3"), EgressL3: d.Program("tc_egress_l3"),
	})
}

// addEmpty makes an installation whose programs let all packets pass.
func (c *cluster) addEmpty(root string, l *lane) (*installation, error) {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, tcxNext), asm.Return()},
	})
	if err != nil {
		return nil, fmt.Errorf("load an empty program: %w", err)
	}
	c.onClose(program.Close)
	in := &installation{}
	if in.devices, err = l.devices(); err != nil {
		return nil, err
	}
	return in, c.addPrograms(in, root, l, attach.Programs{
		Ingress: program, Egress: program, IngressL3: program, EgressL3: program,
	})
}

// tcxNext lets other programs decide.
const tcxNext = -1

// addPrograms has programs ready to be put on devices of the lane's node.
func (c *cluster) addPrograms(in *installation, dir string, l *lane, programs attach.Programs) error {
	tc, err := attach.NewTC(dir, programs)
	if err != nil {
		return err
	}
	in.attach = func(devices []attach.Device) error {
		return l.node.Do(func() error {
			n, err := tc.Apply(devices)
			if err == nil && n != len(devices) {
				err = fmt.Errorf("the packet path is on %d of %d devices", n, len(devices))
			}
			return err
		})
	}
	c.onClose(func() error { return errors.Join(in.attach(nil), tc.Close()) })
	return nil
}

// devices returns what the packet path is to know of the lane's node.
func (l *lane) devices() (out []attach.Device, err error) {
	err = l.node.Do(func() error {
		for _, of := range []struct {
			name string
			pod  bool
		}{{"uplink", false}, {"wire", false}, {"pod0", true}, {"pod1", true}} {
			found, err := net.InterfaceByName(of.name)
			if err != nil {
				return fmt.Errorf("find device %s: %w", of.name, err)
			}
			out = append(out, attach.Device{
				Index: found.Index, Name: of.name, Hooked: true, L2: true, Pod: of.pod, L3Index: found.Index,
				Source4: nodeAddr, MAC: found.HardwareAddr, Up: true,
			})
		}
		return nil
	})
	return out, err
}

// use has the lane's node use an installation's packet path, or none.
func (l *lane) use(path *installation) error {
	if l.path == path {
		return nil
	}
	if l.path != nil {
		if err := l.path.attach(nil); err != nil {
			return err
		}
	}
	l.path = nil
	if path != nil {
		if err := path.attach(path.devices); err != nil {
			return err
		}
	}
	l.path = path
	return nil
}
