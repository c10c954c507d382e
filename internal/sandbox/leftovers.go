// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// TempDir makes a directory in the system's directory for temporary files that
// CleanLeftovers recognises. The caller must remove it.
func TempDir(prefix string) (string, error) {
	dir := filepath.Join(os.TempDir(), uniqueName(prefix))
	return dir, os.Mkdir(dir, 0o700)
}

// CleanLeftovers removes the namespaces, cgroups and temporary directories,
// with what is mounted in them, that processes which no longer exist have made
// with this prefix. It goes on after a failure and returns all errors.
func CleanLeftovers(prefix string) error {
	var errs []error
	for _, path := range leftovers(netnsDir, prefix) {
		errs = append(errs, removeNamespace(path))
	}
	if m, err := cgroupMount(); err == nil {
		for _, path := range leftovers(m.point, prefix) {
			if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", path, err))
			}
		}
	}
	for _, path := range leftovers(os.TempDir(), prefix) {
		errs = append(errs, removeTempDir(path))
	}
	return errors.Join(errs...)
}

// leftovers returns the paths in dir whose names say that they were made with
// prefix by a process that no longer exists.
func leftovers(dir, prefix string) []string {
	paths, err := filepath.Glob(filepath.Join(dir, prefix+"-*"))
	if err != nil {
		return nil // no prefix that was ever used
	}
	var out []string
	for _, path := range paths {
		rest := strings.TrimPrefix(filepath.Base(path), prefix+"-")
		text, _, _ := strings.Cut(rest, "-")
		pid, err := strconv.Atoi(text)
		if err == nil && hasEnded(pid) {
			out = append(out, path)
		}
	}
	return out
}

// hasEnded tells whether pid is no process, or one that only waits for its
// parent to take notice of its end.
func hasEnded(pid int) bool {
	state, _, err := processStat(pid)
	return errors.Is(err, os.ErrNotExist) || state == "Z"
}

// removeTempDir removes a directory after unmounting everything below it.
func removeTempDir(dir string) error {
	table, err := mounts()
	if err != nil {
		return err
	}
	for _, m := range table {
		if !strings.HasPrefix(m.point, dir+"/") {
			continue
		}
		// Another process may be doing the same.
		if err := unix.Unmount(m.point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", m.point, err)
		}
	}
	return os.RemoveAll(dir)
}
