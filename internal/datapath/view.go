// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// View reads the pinned maps, also when no agent runs.
type View struct{ *Tables }

// OpenView opens what is pinned below root for reading. The error wraps
// ErrNoDatapath when there is nothing. The caller closes the View.
func OpenView(root string) (*View, error) {
	spec, err := loadSpec()
	if err != nil {
		return nil, err
	}
	maps := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if !isPinned(name) {
			continue
		}
		// The kernel maps an array into memory only through a descriptor that
		// could write; newTables asks for memory that can be read alone.
		mapped := name == bpfMapServices || name == bpfMapSlots || name == mapGenerations
		m, err := ebpf.LoadPinnedMap(MapPath(root, name), &ebpf.LoadPinOptions{ReadOnly: !mapped})
		if err != nil {
			closeMaps(maps)
			if errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("%s: %w (%s)", filepath.Clean(root), ErrNoDatapath, whyNothing(root))
			} else if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
				err = fmt.Errorf("open pinned map %s: %w (run as root)", name, err)
			}
			return nil, err
		}
		maps[name] = m
	}
	t, err := newTables(maps, unix.PROT_READ)
	if err != nil {
		closeMaps(maps)
		return nil, err
	}
	return &View{t}, nil
}

// Close closes the maps.
func (v *View) Close() {
	v.unmap()
	closeMaps(v.maps)
}

func closeMaps(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		_ = m.Close()
	}
}

// AgentState is what an agent leaves for those who look at the maps.
type AgentState struct {
	Started  time.Time
	Synced   time.Time // last time all that could be written was; zero before that
	CgroupID uint64    // inode of the cgroup the hooks are on
	// NetnsCookie is the cookie of the node's network namespace.
	NetnsCookie uint64
	PID         int // in the agent's PID namespace
	Version     string
}

// SetAgentState records the state. It does not count as a write to the tables.
func (t *Tables) SetAgentState(s AgentState) error {
	row := bpfAgentState{
		Started: unixNano(s.Started), Synced: unixNano(s.Synced),
		CgroupId: s.CgroupID, NetnsCookie: s.NetnsCookie, Pid: uint32(s.PID),
	}
	copy(row.Version[:len(row.Version)-1], s.Version)
	if err := t.table(bpfMapAgent).Put(uint32(0), &row); err != nil {
		return fmt.Errorf("update agent state: %w", err)
	}
	return nil
}

// AgentState reads what SetAgentState recorded last; zero when nothing was.
func (t *Tables) AgentState() (AgentState, error) {
	var row bpfAgentState
	if err := t.table(bpfMapAgent).Lookup(uint32(0), &row); err != nil {
		return AgentState{}, fmt.Errorf("read agent state: %w", err)
	}
	return AgentState{
		Started: fromUnixNano(row.Started), Synced: fromUnixNano(row.Synced),
		CgroupID: row.CgroupId, NetnsCookie: row.NetnsCookie, PID: int(row.Pid), Version: decodeString(row.Version[:]),
	}, nil
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromUnixNano(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// Counter is one outcome and how often it came about since the maps were made.
type Counter struct {
	Name  string // as in bpf/types.h, lower case without its prefix: "connect_tcp_translate"
	Value uint64
}

// Counters reads all counters, summed over processors, in the order of
// bpf/types.h.
func (t *Tables) Counters() ([]Counter, error) {
	names, err := counterNames()
	if err != nil {
		return nil, err
	}
	out := make([]Counter, len(names))
	for i, name := range names {
		var perCPU []uint64
		if err := t.table(bpfMapCounters).Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", name, err)
		}
		out[i].Name = name
		for _, n := range perCPU {
			out[i].Value += n
		}
	}
	return out, nil
}

// counterNames returns the names of the counters by number; see readCounterNames.
var counterNames = sync.OnceValues(readCounterNames)

// readCounterNames takes the names from the object's type information, so that they
// are written down once, in bpf/types.h.
func readCounterNames() ([]string, error) {
	spec, err := loadBpf()
	if err != nil {
		return nil, err
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("counter", &enum); err != nil {
		return nil, fmt.Errorf("find enum counter: %w", err)
	}
	names := make([]string, len(enum.Values))
	for _, v := range enum.Values {
		names[v.Value] = strings.ToLower(strings.TrimPrefix(v.Name, "COUNTER_"))
	}
	return names, nil
}
