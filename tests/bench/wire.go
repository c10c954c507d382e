// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// frameSize is the size of every frame of a flood, and frames how many different ones
// there are.
const (
	frameSize = 64
	frames    = 64
)

// xdpPass is the XDP verdict that gives a packet to the stack.
const xdpPass = 2

// wire is a network device that receives frames from nowhere, as if its driver had
// found them in memory. So a node's own work is all that a flood costs, as where the
// one who sends is another machine.
type wire struct {
	device  *os.File // it is there as long as this is open
	program *ebpf.Program
	frames  *ebpf.Map
	context []byte // struct xdp_md
}

// openWire makes a tap device in the calling thread's namespace. It is down.
func openWire(name string) (*wire, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open tun: %w", err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	w := &wire{device: os.NewFile(uintptr(fd), name)}
	if err != nil {
		return nil, fmt.Errorf("make tap device %s: %w", name, err)
	}
	made, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("find tap device %s: %w", name, err)
	}
	if w.frames, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: frameSize, MaxEntries: frames}); err != nil {
		return nil, fmt.Errorf("make a map for frames: %w", err)
	}
	spec := &ebpf.ProgramSpec{Type: ebpf.XDP, License: "Apache-2.0", Instructions: anyFrame(w.frames)}
	if w.program, err = ebpf.NewProgram(spec); err != nil {
		return nil, fmt.Errorf("load the program that makes frames: %w", err)
	}
	// data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
	for _, field := range []uint32{0, frameSize, 0, uint32(made.Index), 0, 0} {
		w.context = binary.NativeEndian.AppendUint32(w.context, field)
	}
	return w, nil
}

// anyFrame is an XDP program that makes each packet one of the frames. It has to: the
// kernel hands it the memory of earlier packets with all that the stack wrote there.
func anyFrame(frames *ebpf.Map) asm.Instructions {
	out := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetPrandomU32.Call(),
		asm.And.Imm(asm.R0, frameSize-1),
		asm.StoreMem(asm.RFP, -4, asm.R0, asm.Word),
		asm.LoadMapPtr(asm.R1, frames.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.LoadMem(asm.R2, asm.R6, 0, asm.Word), // data
		asm.LoadMem(asm.R3, asm.R6, 4, asm.Word), // data_end
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, frameSize),
		asm.JGT.Reg(asm.R4, asm.R3, "drop"),
	}
	for at := int16(0); at < frameSize; at += 8 {
		out = append(out, asm.LoadMem(asm.R5, asm.R0, at, asm.DWord), asm.StoreMem(asm.R2, at, asm.R5, asm.DWord))
	}
	return append(out,
		asm.Mov.Imm(asm.R0, xdpPass), asm.Return(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("drop"), asm.Return())
}

// set says what is received from now on.
func (w *wire) set(list [][]byte) error {
	for i := range frames {
		if err := w.frames.Put(uint32(i), list[i%len(list)]); err != nil {
			return fmt.Errorf("set frame %d: %w", i, err)
		}
	}
	return nil
}

// testRun is the part of union bpf_attr that BPF_PROG_TEST_RUN takes. The library's
// call does not tell what the kernel has measured.
type testRun struct {
	program     uint32
	_           uint32
	dataSize    uint32
	_           uint32
	data        unsafe.Pointer
	_           uint64
	repeat      uint32
	duration    uint32 // mean, nanoseconds
	contextSize uint32
	_           uint32
	context     unsafe.Pointer
	_           uint64
	flags       uint32
	_           [2]uint32
	_           uint32
}

// receive has the stack work on a number of packets on the calling thread's CPU and
// returns how many nanoseconds each took, as the kernel has measured it: without the
// preparations. Each has arrived, or is lost, when it returns. The thread must be in
// the device's namespace.
func (w *wire) receive(packets int) (float64, error) {
	var frame [frameSize]byte
	run := &testRun{
		program: uint32(w.program.FD()),
		data:    unsafe.Pointer(&frame[0]), dataSize: frameSize,
		context: unsafe.Pointer(&w.context[0]), contextSize: uint32(len(w.context)),
		repeat: uint32(packets), flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES,
	}
	for {
		// Not a raw call, or the scheduler would interrupt it.
		_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(run)), unsafe.Sizeof(*run))
		switch errno {
		case 0:
			return float64(run.duration), nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("receive packets: %w", errno)
		}
	}
}

func (w *wire) close() error {
	return errors.Join(w.program.Close(), w.frames.Close(), w.device.Close())
}
