// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
)

func newCleanupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything an agent has left in the kernel",
		Long: `Detaches the programs from the cgroup and from network devices and removes all
that is pinned below --bpf-root, also by other versions of Fairlead, and the
socket that explain asked the agent on. From then on Services of this node are
served by somebody else or not at all. Refuses while an agent is running.
Running it twice does no harm. Needs root and the node's network namespace.

Programs of ours that are still attached to the cgroup afterwards, such as those
of an agent with another --bpf-root, are named and left alone.`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	bpfRoot := addBPFRootFlag(cmd)
	cgroupRoot := addCgroupRootFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := removeDatapath(cmd.OutOrStdout(), filepath.Clean(*bpfRoot)); err != nil {
			return err
		}
		return reportAttached(cmd.OutOrStdout(), *cgroupRoot)
	}
	return cmd
}

// versionDir is what datapath names the directory of a version, stateDir that of a
// state, which versions share.
var (
	versionDir = regexp.MustCompile(`^v\d+$`)
	stateDir   = regexp.MustCompile(`^state\d+$`)
)

// removeDatapath removes every version's links, maps and pins below root, and the
// socket of its agent, and says on w what it has removed.
func removeDatapath(w io.Writer, root string) error {
	lock, err := lockRoot(root)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := fmt.Fprintf(w, "nothing is pinned at %s\n", root); err != nil {
			return err
		}
		return removeRun(w, root)
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	names, err := dirNames(root)
	if err != nil {
		return fmt.Errorf("list what is pinned: %w", err)
	}
	var versions, states []string
	for _, name := range names {
		switch {
		case versionDir.MatchString(name):
			versions = append(versions, name)
		case stateDir.MatchString(name):
			states = append(states, name)
		}
	}
	if len(versions)+len(states) == 0 {
		if _, err := fmt.Fprintf(w, "nothing is pinned at %s\n", root); err != nil {
			return err
		}
	}
	for _, name := range versions {
		if err := removeVersion(w, filepath.Join(root, name)); err != nil {
			return err
		}
	}
	for _, name := range states {
		if err := removePart(w, filepath.Join(root, name), filepath.Join(root, name), "removed maps", os.RemoveAll); err != nil {
			return err
		}
	}
	if err := removeRun(w, root); err != nil {
		return err
	}
	// The root may be where the file system is mounted, or hold what is not ours.
	if err := os.Remove(root); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove bpf root: %w", err)
	}
	return nil
}

// removeVersion removes the directory of one version. Links go before the maps,
// so that no program goes on with maps that nobody can reach.
func removeVersion(w io.Writer, dir string) error {
	for _, part := range []struct {
		name, done string
		remove     func(dir string) error
	}{
		{"links", "detached", attach.DetachAll},
		{devicesDir, "detached from devices", removeFromDevices},
		{"maps", "removed maps", os.RemoveAll},
	} {
		if err := removePart(w, dir, filepath.Join(dir, part.name), part.done, part.remove); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// removePart removes what is pinned in the directory path and says on w that it was
// part of dir.
func removePart(w io.Writer, dir, path, done string, remove func(dir string) error) error {
	names, err := pinNames(path)
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	if err := remove(path); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	if len(names) == 0 {
		return nil
	}
	_, err = fmt.Fprintf(w, "%s: %s %s\n", dir, done, strings.Join(names, ", "))
	return err
}

// devicesDir is what datapath names the directory of links on devices.
var devicesDir = filepath.Base(datapath.DevicesPath(""))

// removeFromDevices takes the programs of a version away from devices. Before Linux
// 6.6 there are no pins to tell of them.
func removeFromDevices(dir string) error {
	_, err := attach.RemoveTC(dir)
	return err
}

// removeRun removes what an agent with this root has left in /run.
func removeRun(w io.Writer, root string) error {
	_ = os.Remove(agent.RememberedPath(root)) // where it cannot be removed, neither can the socket
	return removeSocket(w, agent.SocketPath(root))
}

// removeSocket removes the socket of an agent that is gone, and the directory it
// was in if that is empty then. What somebody listens on it leaves alone: with the
// root locked that is not our agent.
func removeSocket(w io.Writer, path string) error {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return conn.Close()
	}
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w (run as root)", err)
	}
	// Refused are connections to other files as well.
	info, statErr := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), statErr == nil && info.Mode().Type() != fs.ModeSocket:
		return nil
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("look whether an agent listens: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove socket: %w", err)
	}
	// Others may have theirs in it, or something may be mounted there.
	_ = os.Remove(filepath.Dir(path))
	_, err = fmt.Fprintf(w, "removed socket %s\n", path)
	return err
}

// dirNames lists the directories in one; one that is missing is empty.
func dirNames(dir string) ([]string, error) { return entryNames(dir, fs.DirEntry.IsDir) }

// pinNames lists what is pinned in a directory; one that is missing is empty.
// Directories in it are none: before Linux 6.6 they are notes about devices. Neither
// are symbolic links, which are notes as well.
func pinNames(dir string) ([]string, error) {
	return entryNames(dir, func(e fs.DirEntry) bool { return !e.IsDir() && e.Type() != fs.ModeSymlink })
}

func entryNames(dir string, listed func(fs.DirEntry) bool) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if listed(e) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// lockRoot takes the lock an agent holds, so that none can start meanwhile. The
// error wraps fs.ErrNotExist when there is no root. The caller closes the file.
func lockRoot(root string) (*os.File, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err == nil && st.Type != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("bpf root %s is not on a BPF file system; nothing was removed", root)
	}
	lock, err := datapath.Lock(root)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w (run as root)", err)
	}
	return lock, err
}

// reportAttached names programs with our names that are attached to a cgroup,
// the node's root unless path names another. It detaches nothing: whose they
// are cannot be told from a name.
func reportAttached(w io.Writer, path string) error {
	cgroup, err := attach.HostCgroup()
	if path != "" {
		cgroup, err = attach.OpenCgroup(path)
	}
	if err != nil && path != "" {
		return err
	}
	if err != nil {
		_, err := fmt.Fprintf(w, "not looked for what is still attached: %v\n", err)
		return err
	}
	dir, err := os.Open(cgroup.Path)
	if err != nil {
		return fmt.Errorf("open cgroup: %w", err)
	}
	defer dir.Close()
	for _, hook := range attach.Hooks() {
		ids, err := attachedTo(dir, hook)
		if err != nil {
			return fmt.Errorf("list programs on %s of cgroup %s: %w", hook.Name, cgroup.Path, err)
		}
		for _, id := range ids {
			if _, err := fmt.Fprintf(w, "still attached to %s: %s, program %d (of another --bpf-root?)\n",
				cgroup.Path, hook.Name, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// attachedTo returns the programs on a hook of the cgroup that have our name.
func attachedTo(cgroup *os.File, hook attach.Hook) ([]ebpf.ProgramID, error) {
	got, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: hook.Type})
	if err != nil {
		return nil, err
	}
	// The kernel keeps this much of a name: BPF_OBJ_NAME_LEN, less the zero.
	want := hook.Program[:min(15, len(hook.Program))]
	var ids []ebpf.ProgramID
	for _, p := range got.Programs {
		prog, err := ebpf.NewProgramFromID(p.ID)
		if errors.Is(err, fs.ErrNotExist) {
			continue // detached meanwhile
		}
		if err != nil {
			return nil, err
		}
		info, err := prog.Info()
		_ = prog.Close()
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(info.Name, want) {
			ids = append(ids, p.ID)
		}
	}
	return ids, nil
}
