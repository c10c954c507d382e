// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"cmp"
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

// OtherLinks returns the pins of the links that all versions but this one, older or
// newer, have on hooks: those that translate before those that translate back.
func OtherLinks(root string) (pins []string, err error) {
	versions, err := otherVersions(root)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, v := range versions {
		dir := filepath.Join(root, versionName(v), "links")
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("list links of another version: %w", err))
		}
		for _, e := range entries {
			pins = append(pins, filepath.Join(dir, e.Name()))
		}
	}
	// What has been translated must be translated back as long as anybody
	// translates.
	slices.SortStableFunc(pins, func(a, b string) int { return cmp.Compare(detachPhase(a), detachPhase(b)) })
	return pins, errors.Join(errs...)
}

// RemoveOtherLinks detaches and unpins what OtherLinks returns, and returns the pins
// in the order they went. Until then their programs run before or after ours, with
// tables that nobody writes: the caller holds the lock on root, so no other agent is
// alive. Maps stay, for a version that is gone back to. A link that cannot be removed
// is in the error and does not keep the others.
func RemoveOtherLinks(root string) (removed []string, err error) {
	pins, err := OtherLinks(root)
	errs := []error{err}
	for _, pin := range pins {
		if err := removeLink(pin); err != nil {
			errs = append(errs, fmt.Errorf("remove link of another version: %w", err))
			continue
		}
		removed = append(removed, pin)
	}
	return removed, errors.Join(errs...)
}

// OtherDevicesPaths returns DevicesPath of every version but this one that has such
// a directory. What RemoveOtherLinks says of links of hooks holds for those in them.
func OtherDevicesPaths(root string) ([]string, error) {
	versions, err := otherVersions(root)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, v := range versions {
		dir := filepath.Join(root, versionName(v), devicesDir)
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			out = append(out, dir)
		}
	}
	return out, nil
}

// detachPhase returns 1 for the link of a hook that answers with a service address
// and 0 for all others, those that translate one among them.
func detachPhase(pin string) int {
	hook := filepath.Base(pin)
	if strings.HasPrefix(hook, "recvmsg") || strings.HasPrefix(hook, "getpeername") {
		return 1
	}
	return 0
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
