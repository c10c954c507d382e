// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupTimeout is how long a cgroup may stay busy after its last process left.
const cgroupTimeout = 5 * time.Second

// Cgroup is a cgroup (version 2) below the root of the mounted hierarchy.
type Cgroup struct {
	mount mount
	path  string
}

// NewCgroup makes a cgroup whose name begins with name, without entering it.
// The caller must close it.
func NewCgroup(name string) (*Cgroup, error) {
	m, err := cgroupMount()
	if err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", name, err)
	}
	path := filepath.Join(m.point, uniqueName(name))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", name, err)
	}
	return &Cgroup{mount: m, path: path}, nil
}

// cgroupMount returns where version 2 of cgroups is mounted. On a machine that
// has both versions that is not /sys/fs/cgroup.
func cgroupMount() (mount, error) {
	table, err := mounts()
	if err != nil {
		return mount{}, err
	}
	for _, m := range table {
		if m.fsType == "cgroup2" {
			return m, nil
		}
	}
	return mount{}, errors.New("no cgroup2 filesystem is mounted (mount -t cgroup2 none /sys/fs/cgroup)")
}

// CgroupRoot returns the directory that the hierarchy of version 2 is mounted
// on. The error says that there is none and how to mount one.
func CgroupRoot() (string, error) {
	m, err := cgroupMount()
	return m.point, err
}

// Path returns the cgroup's directory.
func (c *Cgroup) Path() string { return c.path }

// Enter moves this process with all its threads into the cgroup. leave moves it
// back to where it was.
func (c *Cgroup) Enter() (leave func() error, err error) {
	home, err := c.mount.home()
	if err != nil {
		return nil, fmt.Errorf("enter cgroup %s: %w", c.path, err)
	}
	if err := moveProcess(os.Getpid(), c.path); err != nil {
		return nil, fmt.Errorf("enter cgroup %s: %w", c.path, err)
	}
	return func() error {
		if err := moveProcess(os.Getpid(), home); err != nil {
			return fmt.Errorf("leave cgroup %s: %w", c.path, err)
		}
		return nil
	}, nil
}

// home returns the directory below m of the cgroup this process is in.
func (m mount) home() (string, error) {
	table, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(table)) {
		path, found := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !found {
			continue
		}
		rel, err := filepath.Rel(m.root, path)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			return "", fmt.Errorf("this process is in cgroup %s, outside of what is mounted on %s", path, m.point)
		}
		return filepath.Join(m.point, rel), nil
	}
	return "", errors.New("this process is in no cgroup of version 2")
}

func moveProcess(pid int, cgroup string) error {
	return os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// Close removes the cgroup. This process and those it has started are moved to
// the root of the hierarchy first; other processes are none of our business and
// make Close fail.
func (c *Cgroup) Close() error {
	var err error
	for end := time.Now().Add(cgroupTimeout); ; time.Sleep(10 * time.Millisecond) {
		c.removeChildren()
		err = unix.Rmdir(c.path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return fmt.Errorf("remove cgroup %s: %w", c.path, err)
		}
		if err := c.evict(); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", c.path, err)
		}
	}
}

// removeChildren removes cgroups below this one that nobody is in any more: what an
// agent that was killed has left.
func (c *Cgroup) removeChildren() {
	entries, _ := os.ReadDir(c.path)
	for _, e := range entries {
		if e.IsDir() {
			_ = unix.Rmdir(filepath.Join(c.path, e.Name()))
		}
	}
}

// evict moves this process and its descendants to the root of the hierarchy.
func (c *Cgroup) evict() error {
	list, err := os.ReadFile(filepath.Join(c.path, "cgroup.procs"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		pid, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil || !isOurs(pid) {
			continue
		}
		// A process that has ended in between is out as well.
		if err := moveProcess(pid, c.mount.point); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// isOurs tells whether pid is this process or descends from it.
func isOurs(pid int) bool {
	for pid > 1 && pid != os.Getpid() {
		_, parent, err := processStat(pid)
		if err != nil {
			return false
		}
		pid = parent
	}
	return pid == os.Getpid()
}

// processStat returns the state (R, S, Z, ...) and the parent of a process. The
// error is os.ErrNotExist when there is none.
func processStat(pid int) (state string, parent int, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ESRCH) { // it ended after the file was opened
		err = os.ErrNotExist
	}
	if err != nil {
		return "", 0, err
	}
	// The command's name, in parentheses, may itself hold blanks and
	// parentheses. The state and the parent follow it.
	_, err = fmt.Sscanf(string(stat[bytes.LastIndexByte(stat, ')')+1:]), "%s %d", &state, &parent)
	if err != nil {
		return "", 0, fmt.Errorf("read state of process %d: %w", pid, err)
	}
	return state, parent, nil
}
