// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// noticed bounds the wait for what the agent does about somebody else. It takes a
// second, on a machine with nothing else to do.
const noticed = 30 * time.Second

// foreign returns somebody else's program for connect4, which lets clients through
// or refuses them.
func foreign(t *testing.T, lets int32) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, lets), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = prog.Close() })
	return prog
}

// attachForeign puts somebody else's program on connect4 of the cluster's cgroup.
func (c *cluster) attachForeign(prog *ebpf.Program) link.Link {
	c.t.Helper()
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path: c.cgroup.Path(), Attach: ebpf.AttachCGroupInet4Connect, Program: prog,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = l.Close() })
	return l
}

// pinnedLink opens the link of a hook.
func (c *cluster) pinnedLink(hook string) link.Link {
	c.t.Helper()
	l, err := link.LoadPinnedLink(datapath.LinkPath(c.bpfRoot, hook), nil)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = l.Close() })
	return l
}

// pinnedIDs returns the IDs of the pinned maps, by name.
func (c *cluster) pinnedIDs() (map[string]ebpf.MapID, error) {
	ids := map[string]ebpf.MapID{}
	for _, one := range []string{"frontends", "origins"} { // a table, and state
		dir := filepath.Dir(datapath.MapPath(c.bpfRoot, one))
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !e.Type().IsRegular() {
				continue
			}
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, e.Name()), &ebpf.LoadPinOptions{ReadOnly: true})
			if err != nil {
				return nil, err
			}
			info, err := m.Info()
			_ = m.Close()
			if err != nil {
				return nil, err
			}
			ids[e.Name()], _ = info.ID()
		}
	}
	return ids, nil
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// removePins unlinks what is pinned in a directory.
func removePins(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
	}
	return err
}

// What somebody else takes from the socket path is back soon, and clients keep what
// they have.
func TestWhatSomebodyTakesFromTheSocketPathIsBack(t *testing.T) {
	c := newCluster(t)
	for _, last := range []int{11, 12, 13} {
		c.backend(last)
	}
	c.service("web", 10, 11, 12, 13)
	c.manifests("kept.yaml", service("kept", 20, "sessionAffinity: ClientIP, ports: [{name: web, port: 80}]"),
		slice("kept", endpoint(11, ""), endpoint(12, ""), endpoint(13, "")))
	agent := c.start()
	c.answers(vip(10, 80), 11, 12, 13)
	affine, err := c.get(vip(20, 80))
	must(t, err)
	conn := c.dialUDP(vip(10, 53))
	connected, err := exchange(conn)
	must(t, err)
	ids, err := c.pinnedIDs()
	must(t, err)
	links := filepath.Dir(datapath.LinkPath(c.bpfRoot, "connect4"))
	hooks := 8.0

	for _, tt := range []struct {
		name  string
		do    func(t *testing.T) error
		fault string // the label of the metric
		n     float64
		says  string
	}{
		{"a hook is detached", func(*testing.T) error { return c.pinnedLink("connect4").Detach() },
			"detached", 1, "somebody has detached hooks"},
		{"another program is put into our link", func(t *testing.T) error {
			return c.pinnedLink("connect4").Update(foreign(t, 1))
		}, "replaced", 1, "somebody has replaced programs on hooks"},
		{"a pin leads to another link", func(t *testing.T) error {
			l := c.attachForeign(foreign(t, 1))
			pin := datapath.LinkPath(c.bpfRoot, "getpeername4")
			return errors.Join(os.Remove(pin), l.Pin(pin), l.Close())
		}, "unpinned", 1, "somebody has removed or replaced pins of hooks"},
		{"all pins of hooks are removed", func(*testing.T) error { return removePins(links) },
			"unpinned", hooks, "somebody has removed or replaced pins of hooks"},
		{"a map's pin is removed", func(*testing.T) error {
			return os.Remove(datapath.MapPath(c.bpfRoot, "origins"))
		}, "map_unpinned", 1, "somebody has removed or replaced pins of maps"},
		{"all is removed, with the directories", func(*testing.T) error { return os.RemoveAll(c.bpfRoot) },
			"map_unpinned", float64(len(ids)), "somebody has removed or replaced pins of maps"},
		{"an empty BPF file system is in the place of ours", func(t *testing.T) error {
			dir := filepath.Dir(c.bpfRoot)
			must(t, unix.Unmount(dir, unix.MNT_DETACH))
			_, err := sandbox.MountBPFFS(dir) // BPFRoot unmounts whatever is there
			return err
		}, "map_unpinned", float64(len(ids)), "somebody has removed or replaced pins of maps"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := metric(t, agent, "fairlead_attachments_restored_total", `fault="`+tt.fault+`"`)
			must(t, tt.do(t))
			testutil.Eventually(t, noticed, "counted", func() error {
				n := metric(t, agent, "fairlead_attachments_restored_total", `fault="`+tt.fault+`"`) - before
				if n < tt.n {
					return fmt.Errorf("the metric has grown by %v, want %v", n, tt.n)
				}
				return nil
			})
			testutil.Eventually(t, noticed, "pinned as before", func() error {
				now, err := c.pinnedIDs()
				if err != nil {
					return err
				}
				if fmt.Sprint(now) != fmt.Sprint(ids) {
					return fmt.Errorf("maps are %v, want %v", now, ids)
				}
				if n := c.attached(); n != 1 {
					return fmt.Errorf("%d programs on connect4", n)
				}
				return nil
			})
			says(t, agent.Logs, tt.says)
			c.answers(vip(10, 80), 11, 12, 13)
			if name, err := c.get(vip(20, 80)); err != nil || name != affine {
				t.Errorf("a client with an affinity for %s is answered by %q, %v", affine, name, err)
			}
			if name, err := exchange(conn); err != nil || name != connected {
				t.Errorf("a socket connected to %s is answered by %q, %v", connected, name, err)
			}
		})
	}

	// No second agent can have the place of the first, and the next one finds all.
	options := c.options()
	options.Unready = true
	second := testutil.StartAgent(t, options)
	if err := second.Wait(); err == nil || !strings.Contains(second.Logs(), "a running fairlead agent") {
		t.Errorf("a second agent ended with %v: %s", err, second.Logs())
	}
	must(t, agent.Kill(syscall.SIGKILL))
	_ = agent.Wait()
	if n := metric(t, c.start(), "fairlead_table_writes_total"); n != 0 {
		t.Errorf("%v rows were written after a restart, want 0", n)
	}
	c.answers(vip(10, 80), 11, 12, 13)
}

// An agent whose BPF file system is gone goes on, says so once and mends it later.
func TestServingGoesOnWithoutABPFFileSystem(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.service("web", 10, 11)
	agent := c.start()
	c.answers(vip(10, 80), 11)
	dir := filepath.Dir(c.bpfRoot)
	must(t, unix.Unmount(dir, unix.MNT_DETACH))
	says(t, agent.Logs, "not on a BPF file system")
	c.answers(vip(10, 80), 11)
	c.backend(12)
	c.service("web", 10, 11, 12)
	c.answers(vip(10, 80), 11, 12)
	_, err := sandbox.MountBPFFS(dir)
	must(t, err)
	says(t, agent.Logs, "hooks and pins are as they should be at last")
	if got := c.frontends(); got["10.96.0.10:80/TCP"] != 2 {
		t.Errorf("inspect shows %v", got)
	}
}

// When the directory of the cgroup is removed and made anew the hooks follow, and so
// do the searches for sockets.
func TestHooksFollowTheCgroup(t *testing.T) {
	c := newQuietCluster(t)
	c.backend(11)
	c.service("web", 10, 11)
	agent := c.start()
	testutil.Eventually(t, noticed, "the cgroup is removed and made anew", func() error {
		if err := unix.Rmdir(c.cgroup.Path()); err != nil { // the agent's probe may be in it
			return err
		}
		return os.Mkdir(c.cgroup.Path(), 0o755)
	})
	testutil.Eventually(t, noticed, "the hooks are on it", func() error {
		if n := c.attached(); n != 1 {
			return fmt.Errorf("%d programs on connect4", n)
		}
		return nil
	})
	says(t, agent.Logs, "the cgroup to attach to has become another one")
	testutil.Eventually(t, noticed, "status knows", func() error {
		out, err := c.fairlead("status", "--bpf-root", c.bpfRoot, "--cgroup-root", c.cgroup.Path())
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if n := metric(t, agent, "fairlead_attachments_restored_total", `fault="cgroup_changed"`); n != 1 {
		t.Errorf("the metric is %v, want 1", n)
	}
	leave, err := c.cgroup.Enter()
	must(t, err)
	defer func() { must(t, leave()) }()
	c.answers(vip(10, 80), 11)
	early := blocked(c.dialUDP(vip(20, 53)).Read)
	c.service("late", 20, 11)
	select {
	case err := <-early:
		if !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("a socket connected before its Service got %v, want ECONNABORTED", err)
		}
	case <-time.After(noticed):
		t.Error("a socket connected before its Service was not ended")
	}
}

// zeroWord changes the first word of an array's only value that is not zero.
func zeroWord(t *testing.T, m *ebpf.Map) func() error {
	t.Helper()
	was := make([]byte, m.ValueSize())
	must(t, m.Lookup(uint32(0), was))
	first := slices.IndexFunc(was, func(b byte) bool { return b != 0 })
	if first < 0 {
		t.Fatal("nothing is set")
	}
	now := slices.Clone(was)
	clear(now[first/8*8 : first/8*8+8])
	must(t, m.Put(uint32(0), now))
	return func() error {
		if err := m.Lookup(uint32(0), now); err != nil || !slices.Equal(now, was) {
			return fmt.Errorf("the word of byte %d is %x, want %x: %w", first, now[first/8*8:][:8], was[first/8*8:][:8], err)
		}
		return nil
	}
}

// forgetName deletes a name. Its service may come back under another ID.
func forgetName(t *testing.T, m *ebpf.Map) func() error {
	deleteOne(t, m)
	return func() error { return nil }
}

// otherBackend changes the address in the first slot.
func otherBackend(t *testing.T, m *ebpf.Map) func() error {
	t.Helper()
	for i := range m.MaxEntries() {
		was := make([]byte, m.ValueSize())
		must(t, m.Lookup(i, was))
		if binary.NativeEndian.Uint64(was[8:]) == 0 {
			continue
		}
		now := append([]byte{}, was...)
		now[15]++
		must(t, m.Put(i, now))
		return func() error { return nil } // it may come back in another slot
	}
	t.Fatal("there is no slot")
	return nil
}

// What cannot be told from the total is told by table, and the log names the rows.
func TestRowsThatSomebodyChangesAreNamed(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.fillTables()
	agent := c.start("--repair-interval=200ms", "--cluster-cidr=10.244.0.0/16")
	for _, tt := range []struct {
		table  string
		damage damage
		names  string // in the log
	}{
		{"frontends", deleteOne, `"rows": ["`},
		{"slots", otherBackend, "for 10.244.0."},
		{"members", deleteOne, "of test/lb:"},
		{"source_ranges", deleteOne, "/24 of test/lb:"},
		{"names", forgetName, "test/lb:"},
		{"node_addresses", deleteOne, `"rows": ["`},
		{"service_cidrs", deleteOne, "10.96.0.0/16"},
		{"cluster_cidrs", deleteOne, `"count": 1`},
		{"frontend_gate", zeroWord, `"count": 1`},
		{"devices", deleteOne, `"count": 1`},
	} {
		t.Run(tt.table, func(t *testing.T) {
			label := `table="` + tt.table + `"`
			before := metric(t, agent, "fairlead_repaired_rows_total", label)
			undone := tt.damage(t, c.pinnedMap(tt.table))
			testutil.Eventually(t, noticed, "repaired and counted", func() error {
				if n := metric(t, agent, "fairlead_repaired_rows_total", label) - before; n != 1 {
					return fmt.Errorf("the metric has grown by %v, want 1", n)
				}
				return undone()
			})
			testutil.Eventually(t, noticed, "named in the log", func() error {
				for line := range strings.Lines(agent.Logs()) {
					if strings.Contains(line, "rows were missing or wrong") &&
						strings.Contains(line, `"table": "`+tt.table+`"`) && strings.Contains(line, tt.names) {
						return nil
					}
				}
				return errNotYet
			})
		})
	}
}

// healthz returns the code and the problem that /healthz and /livez give.
func (c *cluster) healthz(path string) (code int, problem string, err error) {
	got, err := fetch(c.node.Namespace(), testutil.HealthzAddress+path)
	if err != nil {
		return 0, "", err
	}
	var body struct{ Problem string }
	err = json.Unmarshal([]byte(got.body), &body)
	return got.code, body.Problem, err
}

// moveAgent moves the agent into the cluster's cgroup.
func (c *cluster) moveAgent() {
	c.t.Helper()
	out, err := c.fairlead("status", "-o", "json", "--bpf-root", c.bpfRoot)
	must(c.t, err)
	var status struct{ Agent struct{ PID int } }
	must(c.t, json.Unmarshal([]byte(out), &status),
		os.WriteFile(filepath.Join(c.cgroup.Path(), "cgroup.procs"), []byte(strconv.Itoa(status.Agent.PID)), 0))
}

func TestHealthzTellsWhenConnectionsAreNotTranslated(t *testing.T) {
	for _, tt := range []struct {
		name   string
		inside bool
	}{
		{"by the agent itself, in a cgroup below the hooks'", true},
		{"by a process in a cgroup made for it, where the agent is elsewhere", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newQuietCluster(t)
			agent := c.start()
			if tt.inside {
				c.moveAgent()
			}
			c.service("web", 10, 11)
			wantStatus := func(want string) {
				t.Helper()
				testutil.Eventually(t, noticed, "status", func() error {
					out, _ := c.fairlead("status", "--bpf-root", c.bpfRoot)
					if !strings.Contains(out, want) {
						return fmt.Errorf("no %q in %s", want, out)
					}
					return nil
				})
			}
			wantStatus("a connection was translated")
			if n := metric(t, agent, "fairlead_probe_failures_total"); n != 0 {
				t.Errorf("%v probes have failed", n)
			}

			somebody := c.attachForeign(foreign(t, 0))
			testutil.Eventually(t, noticed, "healthz says why", func() error {
				code, problem, err := c.healthz("/healthz")
				if err != nil || code != http.StatusServiceUnavailable || !strings.Contains(problem, "10.96.0.10:80") ||
					!strings.Contains(problem, "operation not permitted") {
					return fmt.Errorf("%d, %q, %w", code, problem, err)
				}
				return nil
			})
			if code, problem, err := c.healthz("/livez"); err != nil || code != http.StatusOK || problem != "" {
				t.Errorf("livez: %d, %q, %v", code, problem, err)
			}
			if n := metric(t, agent, "fairlead_probe_failures_total"); n == 0 {
				t.Error("no failure is counted")
			}
			wantStatus("self-probe: a connection to 10.96.0.10:80 was not translated")

			must(t, somebody.Close())
			testutil.Eventually(t, noticed, "healthy again", func() error {
				code, problem, err := c.healthz("/healthz")
				if err != nil || code != http.StatusOK || problem != "" {
					return fmt.Errorf("%d, %q, %w", code, problem, err)
				}
				return nil
			})
			for _, want := range []string{"connections to Services are not translated", "connections to Services are translated again"} {
				saysOnce(t, agent.Logs, want)
			}
		})
	}
}
