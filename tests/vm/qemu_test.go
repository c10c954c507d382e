// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// machine says what to boot.
type machine struct {
	accelerator string // "kvm" or "tcg"
	kernel      string // file of the kernel
	initramfs   string // file of the root file system
	console     string // file to write the kernel's log to
	environment []string
}

// boot runs the machine until it is off and calls line with each line its user
// space writes, without the line's end. It fails when ctx ends first.
func (m machine) boot(ctx context.Context, line func(string)) error {
	// The kernel hands words it does not know, of the form NAME=value, to init
	// as environment. An oops is a panic and a panic ends the machine.
	words := append([]string{"console=ttyS0", "loglevel=4", "panic=-1", "oops=panic"}, m.environment...)
	processors := "2"
	if m.accelerator == "tcg" {
		// Emulated processors that run side by side now and then meet the breakpoint by
		// which the kernel changes its code after it has been taken away: "Oops: int3".
		processors = "1"
	}
	args := append([]string{
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-accel", m.accelerator, "-cpu", "max", "-smp", processors, "-m", "2G",
		"-serial", "file:" + m.console, "-serial", "stdio",
		"-kernel", m.kernel, "-initrd", m.initramfs, "-append", strings.Join(words, " "),
	}, wire()...)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	var complaint strings.Builder
	cmd.Stderr = &complaint
	// A test that is killed takes its machine along.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	readErr := readLines(stdout, line)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("qemu: %w: %s", errors.Join(err, ctx.Err()), complaint.String())
	}
	return readErr
}

// wire returns the options for two network devices at one hub. They leave everything
// to the kernel that others do: checksums, and the cutting of packets. tests/sctp
// knows them by their addresses.
func wire() []string {
	var args []string
	for n := 1; n <= 2; n++ {
		args = append(args,
			"-netdev", fmt.Sprintf("hubport,id=port%d,hubid=0", n),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=port%d,mac=02:00:00:00:00:%02x,romfile=,csum=off,guest_csum=off,gso=off", n, n))
	}
	return args
}

func readLines(r io.Reader, line func(string)) error {
	lines := bufio.NewReader(r)
	for {
		text, err := lines.ReadString('\n')
		if text != "" {
			line(strings.TrimRight(text, "\r\n"))
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// chooseAccelerator returns "kvm" when this machine, without any packages,
// boots with it, "tcg" (emulation) otherwise. That /dev/kvm can be opened is not
// enough: under some hypervisors a guest then never executes an instruction.
func chooseAccelerator(ctx context.Context, m machine) string {
	device, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg"
	}
	device.Close()

	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	m.accelerator = "kvm"
	works := false
	err = m.boot(ctx, func(text string) { works = works || text == markDone })
	if err != nil || !works {
		return "tcg"
	}
	return "kvm"
}
