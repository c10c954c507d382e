// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package privileges

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Capability is one that the agent uses if it has it.
type Capability struct {
	Name   string // as in capabilities(7)
	number int
	// Required says that the agent does not start without it.
	Required bool
	// For says what needs it.
	For string
	// Without says what falls away without it; empty where the agent says so
	// itself when it comes to it.
	Without string
}

// SysAdmin is the name of the capability to enter namespaces.
const SysAdmin = "CAP_SYS_ADMIN"

// Needed returns the capabilities that the agent keeps: those it cannot do
// without first. SECURITY.md has the same table.
func Needed() []Capability {
	return []Capability{
		{
			Name: "CAP_BPF", number: unix.CAP_BPF, Required: true,
			For: "maps and programs",
		},
		{
			Name: "CAP_NET_ADMIN", number: unix.CAP_NET_ADMIN, Required: true,
			For: "programs that look at connections and packets, and attaching them to the cgroup and to devices; ending UDP sockets before Linux 6.5; timeouts of connection tracking",
		},
		{
			Name: "CAP_PERFMON", number: unix.CAP_PERFMON, Required: true,
			For: "programs that keep pointers on their stack, as ours do, and those that look for stale UDP sockets",
		},
		{
			Name: SysAdmin, number: unix.CAP_SYS_ADMIN,
			For:     "entering network namespaces to end stale UDP sockets there, and the cgroup namespace of PID 1 to find the node's cgroup root",
			Without: "stale UDP sockets are not ended, their owners must connect anew by themselves; in a container with a cgroup namespace of its own --cgroup-root is needed",
		},
		{
			Name: "CAP_SYS_PTRACE", number: unix.CAP_SYS_PTRACE,
			For:     "looking into /proc at other processes: for the node's cgroup root, for network namespaces that have no name in /run/netns, and for the node's /proc/sys where ours is read-only",
			Without: "stale UDP sockets are ended only in network namespaces that have a name in /run/netns here; the limits of connection tracking stay as they are where /proc/sys is read-only; in a container with a cgroup namespace of its own --cgroup-root is needed",
		},
		{
			Name: "CAP_NET_BIND_SERVICE", number: unix.CAP_NET_BIND_SERVICE,
			For: "listening on ports below 1024, if a flag or a health check node port says so",
		},
	}
}

// standIn is a capability that the kernel takes for CAP_BPF and CAP_PERFMON, too.
const standIn = unix.CAP_SYS_ADMIN

// Missing returns the capabilities that the process lacks and that make a
// difference. When it cannot work without one of them the error, one line, says
// which.
func Missing() ([]Capability, error) {
	s, err := read()
	if err != nil {
		return nil, err
	}
	return missing(s.effective)
}

func missing(effective set) (lacks []Capability, err error) {
	var required []string
	for _, c := range Needed() {
		implied := effective.has(standIn) && (c.number == unix.CAP_BPF || c.number == unix.CAP_PERFMON)
		switch {
		case effective.has(c.number) || implied:
		case c.Required:
			required = append(required, fmt.Sprintf("%s (for %s)", c.Name, c.For))
		case c.Without != "":
			lacks = append(lacks, c)
		}
	}
	if len(required) > 0 {
		return nil, errors.New("the agent cannot work without " + strings.Join(required, "; ") +
			": run it as root, in a container with the capabilities that SECURITY.md lists")
	}
	return lacks, nil
}

// set is a set of capabilities, by number.
type set uint64

func (s set) has(number int) bool { return s&(1<<number) != 0 }

// kept returns the capabilities that stay.
func kept() (s set) {
	for _, c := range Needed() {
		s |= 1 << c.number
	}
	return s
}
