// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is a line of /proc/self/mountinfo.
type mount struct {
	root   string // what of the filesystem is mounted
	point  string // where
	fsType string
}

// mounts returns the mount table of this process.
func mounts() ([]mount, error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(table)), nil
}

// parseMounts reads the format of proc_pid_mountinfo(5). Lines it cannot
// understand are left out.
func parseMounts(table string) []mount {
	var out []mount
	for line := range strings.Lines(table) {
		before, after, found := strings.Cut(line, " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !found || len(fields) < 5 || len(rest) < 1 {
			continue
		}
		out = append(out, mount{root: unescape(fields[3]), point: unescape(fields[4]), fsType: rest[0]})
	}
	return out
}

// unescape decodes the \ooo in which the kernel writes blanks and backslashes.
func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if code, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(code))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// MountBPFFS mounts a BPF filesystem of its own on dir, making dir if need be.
// What is pinned there is gone after unmount, which leaves dir.
func MountBPFFS(dir string) (unmount func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("mount bpffs: %w", err)
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		err = fmt.Errorf("mount bpffs on %s: %w", dir, err)
		if errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("%w (the kernel has no BPF filesystem)", err)
		}
		return nil, err
	}
	return func() error {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount bpffs on %s: %w", dir, err)
		}
		return nil
	}, nil
}
