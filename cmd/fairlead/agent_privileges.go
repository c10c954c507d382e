// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/privileges"
)

// dropPrivileges gives up what the agent does not need; see privileges.Drop.
func (f agentFlags) dropPrivileges(given func(flag string) bool) error {
	// Lowering it takes CAP_SYS_RESOURCE, which nothing else does. What goes wrong
	// here is found again and told when the agent begins.
	if s, err := f.settings(given); err == nil {
		_ = setOOMScore(s.oomScore)
	}
	return privileges.Drop()
}

// oomOfCriticalPods is the oom_score_adj that the kubelet gives containers of pods
// with the priority system-node-critical.
const oomOfCriticalPods = -997

// setOOMScore says how soon the kernel may kill this process when memory is short.
// Where it may not be lowered any more, that of a critical pod will do.
func setOOMScore(score int) error {
	const file = "/proc/self/oom_score_adj"
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	now, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err == nil && now == score {
		return nil
	}
	err = os.WriteFile(file, []byte(strconv.Itoa(score)), 0)
	if errors.Is(err, fs.ErrPermission) && score < now && now <= oomOfCriticalPods {
		return nil
	}
	return err
}

// explainDenied adds why root may not read a file: the agent has given up the
// capability to read what belongs to others.
func explainDenied(err error) error {
	var denied *fs.PathError
	if !errors.As(err, &denied) || !errors.Is(denied.Err, unix.EACCES) {
		return err
	}
	var st unix.Stat_t
	if unix.Stat(denied.Path, &st) != nil || int(st.Uid) == os.Geteuid() {
		return err
	}
	return fmt.Errorf("%w (it belongs to user %d, and the agent can only read what it owns or all may read)", err, st.Uid)
}
