// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/privileges"
)

// readLacks asks the agent of a root what it lacks. The result is nil when none
// answers.
func readLacks(ctx context.Context, root string, running bool) []agent.Lack {
	if !running {
		return nil
	}
	lacks, err := agent.AskLacks(ctx, agent.SocketPath(root))
	if err != nil {
		return nil // it has another --socket, or is of a version that does not know
	}
	return lacks
}

// endsSockets says how stale UDP sockets are ended, by this agent on this kernel.
func (r *statusReport) endsSockets() string {
	if slices.ContainsFunc(r.Lacks, func(l agent.Lack) bool { return l.Capability == privileges.SysAdmin }) {
		return "not ended: the agent lacks " + privileges.SysAdmin
	}
	return r.Kernel.endsSockets()
}
