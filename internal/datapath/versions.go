// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/link"
)

// otherVersions returns, sorted, the ABI versions but ours that have a directory
// below root.
func otherVersions(root string) ([]int, error) {
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("list bpf root: %w", err)
	}
	var out []int
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), "v")
		n, err := strconv.Atoi(digits)
		if ok && err == nil && n != ABI && e.Name() == versionName(n) {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}

// whyNothing says what the likely cause is when nothing of our ABI is pinned.
func whyNothing(root string) string {
	versions, err := otherVersions(root)
	if err != nil || len(versions) == 0 {
		return "is the agent running with this --bpf-root?"
	}
	last := versions[len(versions)-1]
	age := "an older"
	if last > ABI {
		age = "a newer"
	}
	return versionName(last) + " is: it belongs to " + age + " fairlead"
}

// RemoveOldLinks detaches and unpins the links of versions before this one, and
// returns their pins, sorted. Until then their programs run before or after
// ours. Maps stay, so that the older version can be gone back to; what belongs to
// newer versions is never touched. A link that cannot be removed is in the error
// and does not keep the others.
func RemoveOldLinks(root string) (removed []string, err error) {
	versions, err := otherVersions(root)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, v := range versions {
		if v > ABI {
			break
		}
		dir := filepath.Join(root, versionName(v), "links")
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("list links of an older version: %w", err))
		}
		for _, e := range entries {
			pin := filepath.Join(dir, e.Name())
			if err := removeLink(pin); err != nil {
				errs = append(errs, fmt.Errorf("remove link of an older version: %w", err))
				continue
			}
			removed = append(removed, pin)
		}
	}
	return removed, errors.Join(errs...)
}

func removeLink(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("open %s: %w", pin, err)
	}
	defer l.Close()
	// Removing the pin detaches as well, but some time later. A link whose cgroup
	// is gone, or of a kind that knows no detaching, has just its pin.
	_ = l.Detach()
	return os.Remove(pin)
}
