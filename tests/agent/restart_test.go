// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// fillTables writes manifests that put rows into every table.
func (c *cluster) fillTables() {
	c.t.Helper()
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"), `apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/16]}
`)
	c.manifests("lb.yaml",
		loadBalancer("lb", 10, `externalTrafficPolicy: Local, healthCheckNodePort: 32000, sessionAffinity: ClientIP,
  loadBalancerSourceRanges: [10.244.0.0/24, 198.51.100.0/24], externalIPs: [198.51.100.7],
  ports: [{name: web, port: 80, nodePort: 30080}, {name: dns, port: 53, protocol: UDP, nodePort: 30053}]`, "203.0.113.10"),
		slice("lb", endpoint(11, "nodeName: node"), endpoint(12, "nodeName: other")))
}

func TestRestartWithEveryTableInUseWritesNothing(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.fillTables()
	first := c.start()
	for _, table := range []string{
		"frontends", "services", "slots", "members", "source_ranges", "node_addresses", "service_cidrs", "names",
	} {
		if n := metric(t, first, "fairlead_table_writes_total", `table="`+table+`"`); n == 0 {
			t.Errorf("nothing was written to %s: this test shows nothing about it", table)
		}
	}
	if err := first.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	if n := metric(t, c.start(), "fairlead_table_writes_total"); n != 0 {
		t.Errorf("%v rows were written after a restart with an unchanged cluster, want 0", n)
	}
}

// A damage does something to a map and returns a test of whether it is undone.
type damage func(t *testing.T, m *ebpf.Map) (undone func() error)

// deleteOne deletes some row.
func deleteOne(t *testing.T, m *ebpf.Map) func() error {
	t.Helper()
	key := make([]byte, m.KeySize())
	if err := m.NextKey(nil, key); err != nil {
		t.Fatal(err)
	}
	if err := m.Delete(key); err != nil {
		t.Fatal(err)
	}
	return func() error { return m.Lookup(key, make([]byte, m.ValueSize())) }
}

// flipWord changes a 64-bit word of the first service that has it.
func flipWord(word int) damage {
	return func(t *testing.T, m *ebpf.Map) func() error {
		t.Helper()
		was, value := make([]byte, m.ValueSize()), make([]byte, m.ValueSize())
		zero := make([]byte, 8)
		id := uint32(1)
		for ; id < 100; id++ {
			if err := m.Lookup(id, was); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(was[8*word:8*word+8], zero) {
				break
			}
		}
		copy(value, was)
		copy(value[8*word:], zero)
		if err := m.Put(id, value); err != nil {
			t.Fatal(err)
		}
		return func() error {
			if err := m.Lookup(id, value); err != nil {
				return err
			}
			// A range comes back with another generation.
			if bytes.Equal(value[8*word:8*word+8], zero) {
				return errNotYet
			}
			return nil
		}
	}
}

// everySource allows every client to use every service's load-balancer IPs.
func everySource(t *testing.T, m *ebpf.Map) func() error {
	key := make([]byte, m.KeySize())
	if err := m.Put(key, []byte{1}); err != nil {
		t.Fatal(err)
	}
	return func() error {
		if err := m.Lookup(key, new(uint8)); !errors.Is(err, ebpf.ErrKeyNotExist) {
			return errNotYet
		}
		return nil
	}
}

func TestDamageToEveryTableIsRepairedAndCounted(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.fillTables()
	agent := c.start("--repair-interval=200ms")
	for _, tt := range []struct {
		name, table string
		damage      damage
		more        bool // what hangs on the row counts as well
	}{
		{name: "a member", table: "members", damage: deleteOne},
		{name: "a source range", table: "source_ranges", damage: deleteOne},
		{name: "a node address", table: "node_addresses", damage: deleteOne},
		{name: "a service CIDR", table: "service_cidrs", damage: deleteOne},
		{name: "a stranger's source range for all services", table: "source_ranges", damage: everySource},
		{name: "the options of a service", table: "services", damage: flipWord(3)},
		{name: "its ClusterIP's backends", table: "services", damage: flipWord(0)},
		{name: "its inside backends", table: "services", damage: flipWord(1)},
		{name: "its outside backends", table: "services", damage: flipWord(2), more: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := metric(t, agent, "fairlead_repaired_rows_total")
			undone := tt.damage(t, c.pinnedMap(tt.table))
			testutil.Eventually(t, 10*time.Second, "repaired and counted", func() error {
				n := metric(t, agent, "fairlead_repaired_rows_total") - before
				if n < 1 || !tt.more && n != 1 {
					return fmt.Errorf("fairlead_repaired_rows_total has grown by %v, want 1", n)
				}
				return undone()
			})
		})
	}
	passes := repairs(t, agent)
	count := metric(t, agent, "fairlead_repaired_rows_total")
	testutil.Eventually(t, 10*time.Second, "more repair passes", func() error {
		if n := repairs(t, agent); n < passes+3 {
			return fmt.Errorf("%v passes", n)
		}
		return nil
	})
	if n := metric(t, agent, "fairlead_repaired_rows_total"); n != count {
		t.Errorf("%v rows were repaired when all damage was", n-count)
	}
}

// oldVersion leaves what an older build would: a map, and a program on a hook.
func (c *cluster) oldVersion(name string) (pin, mapPin string) {
	c.t.Helper()
	links, maps := filepath.Join(c.bpfRoot, name, "links"), filepath.Join(c.bpfRoot, name, "maps")
	for _, dir := range []string{links, maps} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			c.t.Fatal(err)
		}
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	defer prog.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path: c.cgroup.Path(), Attach: ebpf.AttachCGroupInet4Connect, Program: prog,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	defer l.Close()
	pin, mapPin = filepath.Join(links, "connect4"), filepath.Join(maps, "frontends")
	if err := l.Pin(pin); err != nil {
		c.t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		c.t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(mapPin); err != nil {
		c.t.Fatal(err)
	}
	return pin, mapPin
}

// attached returns how many programs are on the hook connect4.
func (c *cluster) attached() int {
	c.t.Helper()
	dir, err := os.Open(c.cgroup.Path())
	if err != nil {
		c.t.Fatal(err)
	}
	defer dir.Close()
	programs, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: ebpf.AttachCGroupInet4Connect})
	if err != nil {
		c.t.Fatal(err)
	}
	return len(programs.Programs)
}

func TestOtherVersionsAreTakenOverAndCanBeGoneBackTo(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.service("web", 10, 11)
	pin, mapPin := c.oldVersion("v1")
	newer, newerMap := c.oldVersion("v77")
	if n := c.attached(); n != 2 {
		t.Fatalf("%d programs are attached, want those of two versions", n)
	}
	agent := c.start()
	testutil.Eventually(t, 10*time.Second, "the other versions' links are gone", func() error {
		for _, p := range []string{pin, newer} {
			if _, err := os.Stat(p); !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s: %w", p, err)
			}
		}
		if n := c.attached(); n != 1 {
			return fmt.Errorf("%d programs are attached, want our own", n)
		}
		return nil
	})
	for _, p := range []string{mapPin, newerMap} {
		if _, err := os.Stat(p); err != nil {
			t.Errorf("another version's map is gone: %v", err)
		}
	}
	// The agent speaks of it once it is done, which is after we can see it.
	testutil.Eventually(t, 10*time.Second, "the agent's log says so", func() error {
		log := agent.Logs()
		took := strings.Index(log, "took over from another version")
		if took < 0 {
			return errors.New("not yet")
		}
		if synced := strings.Index(log, "synced"); synced < 0 || took < synced {
			t.Fatalf("the other versions were taken over before all was in our tables:\n%s", log)
		}
		return nil
	})
}
