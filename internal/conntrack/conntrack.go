// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package conntrack sets the limits and timeouts of the kernel's connection
// tracking, as kube-proxy does and operators therefore expect. The datapath
// does not need them; what else tracks connections on the node does, such as
// the masquerading of a CNI.
package conntrack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// limitCeiling is the most that MaxPerCore can lead to.
const limitCeiling = 1 << 20

// Settings is what KubeProxyConfiguration calls conntrack, with kube-proxy's
// meaning. The zero value leaves everything as it is.
type Settings struct {
	// MaxPerCore times the number of cores, but not less than Min, is how many
	// connections the kernel may track. A product above 1,048,576 counts as
	// that, whatever Min is. The limit is set even where it was higher. Unless
	// MaxPerCore is positive the limit stays as it is and Min means nothing.
	MaxPerCore int32
	Min        int32

	// How long the kernel keeps a connection without traffic, in whole seconds.
	// The rest of a second is cut off; zero and less leave the timeout as it is.
	TCPEstablishedTimeout time.Duration
	TCPCloseWaitTimeout   time.Duration
	UDPTimeout            time.Duration // no answer yet
	UDPStreamTimeout      time.Duration // traffic in both directions

	// TCPBeLiberal accepts TCP segments outside of the window. False leaves it
	// as it is.
	TCPBeLiberal bool
}

// Change is a setting of the kernel that was changed.
type Change struct {
	Name     string // as sysctl(8) has it, e.g. net.netfilter.nf_conntrack_max
	Old, New int
}

// Apply makes the kernel's settings those of s on a machine with this many
// cores. It writes only what differs, so it can be called again, as it should
// be when nf_conntrack was not loaded: Apply loads no module. Timeouts belong to
// the network namespace of the calling thread; the limit is the machine's, and
// its hash table is enlarged to a quarter of the limit, never made smaller.
//
// A setting that cannot be applied does not keep the others from it. All that
// fail for the same common reason (the module is not loaded, /proc/sys is
// read-only, the namespace may not) are one problem, which says what to do.
func Apply(s Settings, cores int) (changes []Change, problems []error) {
	return apply(writable("/proc/sys", "/proc/1/root/proc/sys"), s, cores)
}

// writable returns own, the directory of settings, unless it is read-only, as it is
// in containers that are not privileged, and node is not: the same one where PID 1
// has it. Whichever it is, settings of a network namespace are those of the caller's.
func writable(own, node string) string {
	if readOnly, err := isReadOnly(own); err != nil || !readOnly {
		return own
	}
	if readOnly, err := isReadOnly(node); err != nil || readOnly {
		return own
	}
	return node
}

func isReadOnly(dir string) (bool, error) {
	var fs unix.Statfs_t
	err := unix.Statfs(dir, &fs)
	return fs.Flags&unix.ST_RDONLY != 0, err
}

// cause is why settings of the kernel cannot be written, and what helps.
type cause struct {
	err    error
	remedy string
}

// causes are those that concern more than one setting.
var causes = []cause{
	{fs.ErrNotExist, "nf_conntrack is not loaded, or this kernel does not have them: modprobe nf_conntrack on the node"},
	{unix.EROFS, "/proc/sys is read-only here: the container needs hostPID and CAP_SYS_PTRACE to reach the node's, or set them there with sysctl -w"},
	{fs.ErrPermission, "a node that is itself a container cannot: set them on its host with sysctl -w; " +
		"conntrack.maxPerCore 0 leaves the limit as it is"},
}

// apply is Apply on the settings below the directory sys.
func apply(sys string, s Settings, cores int) (changes []Change, problems []error) {
	wanted, problems := s.sysctls(cores)
	failed := make([][]string, len(causes)) // for each cause
	for _, want := range wanted {
		change, err := want.set(sys)
		cause := slices.IndexFunc(causes, func(c cause) bool { return errors.Is(err, c.err) })
		switch {
		case cause >= 0:
			failed[cause] = append(failed[cause], want.String())
		case err != nil:
			problems = append(problems, fmt.Errorf("set %s: %w", want, err))
		case change.Old != change.New:
			changes = append(changes, change)
		}
	}
	for i, names := range failed {
		if len(names) > 0 {
			problems = append(problems, fmt.Errorf("set %s: %w (%s)", strings.Join(names, " "), causes[i].err, causes[i].remedy))
		}
	}
	return changes, problems
}

// sysctl is what a setting of the kernel shall be.
type sysctl struct {
	name    string // without what all have in common
	value   int
	atLeast bool // a higher value is fine
}

// sysctls returns what s wants of the kernel, and what is wrong with s.
func (s Settings) sysctls(cores int) (wanted []sysctl, problems []error) {
	if limit := s.limit(cores); limit > 0 {
		wanted = append(wanted,
			sysctl{name: "max", value: limit},
			// A writable name of what kube-proxy sets as the module's hashsize.
			sysctl{name: "buckets", value: limit / 4, atLeast: true})
	}
	for _, timeout := range []struct {
		name  string
		value time.Duration
	}{
		{"tcp_timeout_established", s.TCPEstablishedTimeout},
		{"tcp_timeout_close_wait", s.TCPCloseWaitTimeout},
		{"udp_timeout", s.UDPTimeout},
		{"udp_timeout_stream", s.UDPStreamTimeout},
	} {
		want := sysctl{name: timeout.name, value: int(timeout.value / time.Second)}
		switch {
		case want.value > 0:
			wanted = append(wanted, want)
		case timeout.value > 0:
			// The kernel would take 0 and forget connections at once.
			problems = append(problems, fmt.Errorf("set %s: %s is less than a second; the timeout stays as it is",
				want.fullName(), timeout.value))
		}
	}
	if s.TCPBeLiberal {
		wanted = append(wanted, sysctl{name: "tcp_be_liberal", value: 1})
	}
	return wanted, problems
}

// limit returns how many connections the kernel may track, 0 to leave that.
func (s Settings) limit(cores int) int {
	if s.MaxPerCore <= 0 {
		return 0
	}
	scaled := int(s.MaxPerCore) * max(cores, 1)
	if scaled > limitCeiling {
		return limitCeiling
	}
	return max(scaled, int(s.Min))
}

func (c sysctl) fullName() string { return "net.netfilter.nf_conntrack_" + c.name }

// String returns what sysctl -w takes.
func (c sysctl) String() string { return fmt.Sprintf("%s=%d", c.fullName(), c.value) }

// set writes the setting below the directory sys if it is not as wanted. Old and
// New of the change are equal when nothing was written.
func (c sysctl) set(sys string) (Change, error) {
	path := filepath.Join(sys, "net/netfilter/nf_conntrack_"+c.name)
	content, err := os.ReadFile(path)
	if err != nil {
		return Change{}, err
	}
	old, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return Change{}, fmt.Errorf("read it: %w", err)
	}
	change := Change{Name: c.fullName(), Old: old, New: old}
	if old == c.value || c.atLeast && old > c.value {
		return change, nil
	}
	if err := write(path, strconv.Itoa(c.value)); err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w (too large: the longest timeout of a kernel is between 24 and 248 days)", err)
		}
		return Change{}, err
	}
	change.New = c.value
	return change, nil
}

// write writes to a file that is there.
func write(path, value string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(value)
	return errors.Join(err, file.Close())
}

// Cores returns the number of processors the machine has online, as kube-proxy
// counts them. Those this process may run on can be fewer (a container with
// processors of its own), and the limit is everybody's.
func Cores() int {
	online, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return runtime.NumCPU()
	}
	n, err := countCores(string(online))
	if err != nil {
		return runtime.NumCPU()
	}
	return n
}

// countCores returns how many numbers a list like 0-3,8 has.
func countCores(list string) (int, error) {
	n := 0
	for part := range strings.SplitSeq(strings.TrimSpace(list), ",") {
		low, high, isRange := strings.Cut(part, "-")
		if !isRange {
			high = low
		}
		first, err := strconv.Atoi(low)
		if err != nil {
			return 0, err
		}
		last, err := strconv.Atoi(high)
		if err != nil {
			return 0, err
		}
		n += last - first + 1
	}
	return n, nil
}
