// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup2 directory to attach to.
type Cgroup struct {
	Path string
	// ID is the directory's inode, the kernel's name for the cgroup. The root of
	// the hierarchy has ID 1.
	ID uint64
}

// OpenCgroup checks that path is a directory of cgroup2 and returns it.
func OpenCgroup(path string) (Cgroup, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return Cgroup{}, fmt.Errorf("cgroup root %s: %w", path, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		hint := "no cgroup2 is mounted here; mount one: mount -t cgroup2 none /sys/fs/cgroup"
		if mounts, err := cgroup2Mounts("/proc/self/mountinfo"); err == nil && len(mounts) > 0 {
			hint = "cgroup2 is at " + mounts[0].point
		}
		return Cgroup{}, fmt.Errorf("cgroup root %s is not a cgroup2 directory (%s)", path, hint)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Cgroup{}, fmt.Errorf("cgroup root %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return Cgroup{}, fmt.Errorf("cgroup root %s: %w", path, unix.ENOTDIR)
	}
	return Cgroup{Path: path, ID: st.Ino}, nil
}

// HostCgroup finds the cgroup that everything on this node is below: the root
// of PID 1's cgroup namespace. In a container with a private cgroup namespace
// /sys/fs/cgroup looks like a root and is not: hooks there would serve nobody but
// the container itself. PID 1 must be the node's, so a pod needs hostPID. Where
// PID 1 may not be looked at, only the root of all cgroups will do.
func HostCgroup() (Cgroup, error) {
	host, err := hostView()
	if err != nil {
		if cgroup, ok := wholeHierarchy(); ok {
			return cgroup, nil
		}
		return Cgroup{}, fmt.Errorf("find the node's cgroup root: %w (name it with --cgroup-root)", err)
	}
	if len(host.mounts) == 0 {
		return Cgroup{}, errors.New("no cgroup2 is mounted on this node (mount one: mount -t cgroup2 none /sys/fs/cgroup)")
	}
	for _, m := range host.mounts {
		if m.root != "/" {
			continue
		}
		cgroup, err := OpenCgroup(m.path())
		if err == nil && cgroup.ID != hierarchyRoot && host.own == "/" {
			return Cgroup{}, errors.New("PID 1 is in this container's own cgroup, so it is not the node's " +
				"(run the pod with hostPID: true, or name the node's root with --cgroup-root)")
		}
		return cgroup, err
	}
	m := host.mounts[0]
	return Cgroup{}, fmt.Errorf("cgroup2 at %s shows %s, not the root of the node's cgroups; "+
		"mount the whole hierarchy there or name the right directory with --cgroup-root", m.point, m.root)
}

// wholeHierarchy returns the root of all cgroups, if it is mounted where we can
// see it.
func wholeHierarchy() (Cgroup, bool) {
	mounts, err := cgroup2Mounts("/proc/self/mountinfo")
	if err != nil {
		return Cgroup{}, false
	}
	for _, m := range mounts {
		if cgroup, err := OpenCgroup(m.point); err == nil && cgroup.ID == hierarchyRoot {
			return cgroup, true
		}
	}
	return Cgroup{}, false
}

// hierarchyRoot is the inode of the root of all cgroups.
const hierarchyRoot = 1

// view is what the cgroup namespace of PID 1 makes of things.
type view struct {
	mounts []mount // cgroup2 mounts that PID 1 sees
	own    string  // the cgroup we are in
}

func hostView() (view, error) {
	var v view
	done := make(chan error)
	go func() {
		// The thread changes its cgroup namespace and is not given back:
		// without an unlock it ends with this goroutine.
		runtime.LockOSThread()
		err := enterCgroupNamespace("/proc/1/ns/cgroup")
		if err == nil {
			v.mounts, err = cgroup2Mounts("/proc/1/mountinfo")
		}
		if err == nil {
			v.own, err = ownCgroup()
		}
		done <- err
	}()
	err := <-done
	return v, err
}

// ownCgroup returns the path of our cgroup2 cgroup as the calling thread's cgroup
// namespace names it.
func ownCgroup() (string, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(path, "\n"), nil
		}
	}
	return "", errors.New("/proc/self/cgroup names no cgroup2 cgroup")
}

func enterCgroupNamespace(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open the cgroup namespace of PID 1: %w", err)
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("enter the cgroup namespace of PID 1: %w", err)
	}
	return nil
}

// mount is one cgroup2 mount of some process.
type mount struct {
	point string // where it is, in that process's mount namespace
	root  string // which directory of the hierarchy it shows
}

// path returns the way to the mount from our own mount namespace.
func (m mount) path() string {
	ours, err1 := os.Readlink("/proc/self/ns/mnt")
	theirs, err2 := os.Readlink("/proc/1/ns/mnt")
	if err1 == nil && err2 == nil && ours == theirs {
		return m.point
	}
	return filepath.Join("/proc/1/root", m.point)
}

// cgroup2Mounts reads a mountinfo file (proc_pid_mountinfo(5)).
func cgroup2Mounts(file string) ([]mount, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []mount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if m, ok := parseMount(lines.Text()); ok {
			out = append(out, m)
		}
	}
	return out, lines.Err()
}

func parseMount(line string) (mount, bool) {
	before, after, found := strings.Cut(line, " - ")
	left, right := strings.Fields(before), strings.Fields(after)
	if !found || len(left) < 5 || len(right) < 1 || right[0] != "cgroup2" {
		return mount{}, false
	}
	return mount{point: unescape(left[4]), root: unescape(left[3])}, true
}

// unescape undoes the kernel's octal escapes of blanks and backslashes.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
