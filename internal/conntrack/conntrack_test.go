// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package conntrack

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

const prefix = "net.netfilter.nf_conntrack_"

// kubeProxys are kube-proxy's defaults.
var kubeProxys = Settings{
	MaxPerCore: 32768, Min: 131072,
	TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour,
}

// kernelDefaults is what a kernel has that nobody has changed.
func kernelDefaults() map[string]int {
	return map[string]int{
		"max": 65536, "buckets": 65536, "tcp_be_liberal": 0,
		"tcp_timeout_established": 432000, "tcp_timeout_close_wait": 60,
		"udp_timeout": 30, "udp_timeout_stream": 120,
	}
}

// tree writes the settings to a directory as /proc/sys has them.
func tree(t *testing.T, values map[string]int) (sys string) {
	t.Helper()
	sys = t.TempDir()
	dir := filepath.Join(sys, "net/netfilter")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, value := range values {
		content := strconv.Itoa(value) + "\n"
		if err := os.WriteFile(filepath.Join(dir, "nf_conntrack_"+name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return sys
}

// values reads the settings of a directory, by the names kernelDefaults has.
func values(t *testing.T, sys string) map[string]int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(sys, "net/netfilter/nf_conntrack_*"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		value, err := strconv.Atoi(strings.TrimSpace(string(content)))
		if err != nil {
			t.Fatal(err)
		}
		out[strings.TrimPrefix(filepath.Base(file), "nf_conntrack_")] = value
	}
	return out
}

// wantOne fails the test unless there is one problem, which is target and says
// every part.
func wantOne(t *testing.T, problems []error, target error, parts ...string) {
	t.Helper()
	if len(problems) != 1 {
		t.Fatalf("problems are %q, want one", problems)
	}
	if target != nil && !errors.Is(problems[0], target) {
		t.Errorf("problem %q is not %q", problems[0], target)
	}
	for _, part := range parts {
		if !strings.Contains(problems[0].Error(), part) {
			t.Errorf("problem %q does not say %q", problems[0], part)
		}
	}
}

func TestLimit(t *testing.T) {
	for _, tt := range []struct {
		name       string
		maxPerCore int32
		min        int32
		cores      int
		want       int
	}{
		{name: "nothing asked", cores: 4},
		{name: "min alone means nothing", min: 131072, cores: 4},
		{name: "negative means nothing", maxPerCore: -1, min: 131072, cores: 4},
		{name: "few cores: min", maxPerCore: 32768, min: 131072, cores: 2, want: 131072},
		{name: "many cores", maxPerCore: 32768, min: 131072, cores: 8, want: 262144},
		{name: "no min", maxPerCore: 1000, cores: 3, want: 3000},
		{name: "very many cores: ceiling", maxPerCore: 32768, min: 131072, cores: 64, want: 1048576},
		{name: "min may be above the ceiling", maxPerCore: 32768, min: 2097152, cores: 8, want: 2097152},
		{name: "unless the cores reach it", maxPerCore: 32768, min: 2097152, cores: 64, want: 1048576},
		{name: "more than 32 bits hold", maxPerCore: 1<<31 - 1, cores: 512, want: 1048576},
		{name: "no core known counts as one", maxPerCore: 1000, want: 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := (Settings{MaxPerCore: tt.maxPerCore, Min: tt.min}).limit(tt.cores); got != tt.want {
				t.Errorf("limit is %d, want %d", got, tt.want)
			}
		})
	}
}

func TestApplyWritesWhatDiffers(t *testing.T) {
	for _, tt := range []struct {
		name     string
		settings Settings
		before   map[string]int // other than kernelDefaults
		want     []Change
	}{
		{name: "nothing asked, nothing done"},
		{
			name:     "kube-proxy's defaults",
			settings: kubeProxys,
			want: []Change{
				{prefix + "max", 65536, 131072},
				{prefix + "tcp_timeout_established", 432000, 86400},
				{prefix + "tcp_timeout_close_wait", 60, 3600},
			},
		},
		{
			name:     "what is already so is left alone",
			settings: kubeProxys,
			before:   map[string]int{"max": 131072, "tcp_timeout_close_wait": 3600},
			want:     []Change{{prefix + "tcp_timeout_established", 432000, 86400}},
		},
		{
			name:     "a higher limit is lowered, a larger hash table is not",
			settings: Settings{MaxPerCore: 32768, Min: 131072},
			before:   map[string]int{"max": 1000000, "buckets": 250000},
			want:     []Change{{prefix + "max", 1000000, 131072}},
		},
		{
			name:     "the hash table is a quarter of the limit",
			settings: Settings{MaxPerCore: 262144},
			want:     []Change{{prefix + "max", 65536, 1048576}, {prefix + "buckets", 65536, 262144}},
		},
		{
			name:     "the hash table grows for a limit that was there",
			settings: Settings{MaxPerCore: 262144},
			before:   map[string]int{"max": 1048576},
			want:     []Change{{prefix + "buckets", 65536, 262144}},
		},
		{
			name:     "UDP and liberal TCP",
			settings: Settings{UDPTimeout: 10 * time.Second, UDPStreamTimeout: 5*time.Minute + 900*time.Millisecond, TCPBeLiberal: true},
			want: []Change{
				{prefix + "udp_timeout", 30, 10}, {prefix + "udp_timeout_stream", 120, 300}, {prefix + "tcp_be_liberal", 0, 1},
			},
		},
		{
			name:     "liberal TCP is not taken back",
			settings: Settings{},
			before:   map[string]int{"tcp_be_liberal": 1},
		},
		{
			name:     "negative timeouts leave things as they are",
			settings: Settings{TCPEstablishedTimeout: -time.Hour, UDPTimeout: -1},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := kernelDefaults()
			maps.Copy(want, tt.before)
			sys := tree(t, want)
			for _, c := range tt.want {
				want[strings.TrimPrefix(c.Name, prefix)] = c.New
			}
			changes, problems := apply(sys, tt.settings, 4)
			if diff := cmp.Diff(tt.want, changes); diff != "" || problems != nil {
				t.Errorf("problems %q; changes (-want +got):\n%s", problems, diff)
			}
			if diff := cmp.Diff(want, values(t, sys)); diff != "" {
				t.Errorf("afterwards (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTimeoutBelowASecondIsNotZero(t *testing.T) {
	sys := tree(t, kernelDefaults())
	changes, problems := apply(sys, Settings{UDPTimeout: 500 * time.Millisecond, UDPStreamTimeout: time.Minute}, 4)
	wantOne(t, problems, nil, prefix+"udp_timeout", "500ms", "stays as it is")
	if diff := cmp.Diff([]Change{{prefix + "udp_timeout_stream", 120, 60}}, changes); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
}

func TestMissingSettingsAreOneProblem(t *testing.T) {
	t.Run("nf_conntrack is not loaded", func(t *testing.T) {
		sys := tree(t, nil)
		changes, problems := apply(sys, kubeProxys, 4)
		wantOne(t, problems, fs.ErrNotExist, prefix+"max=131072", prefix+"tcp_timeout_established=86400", "not loaded")
		if got := values(t, sys); len(changes) != 0 || len(got) != 0 {
			t.Errorf("changes %v, and now there is %v", changes, got)
		}
	})
	t.Run("one is missing, the others are set", func(t *testing.T) {
		kernel := kernelDefaults()
		delete(kernel, "tcp_timeout_established")
		changes, problems := apply(tree(t, kernel), kubeProxys, 4)
		wantOne(t, problems, fs.ErrNotExist, "set "+prefix+"tcp_timeout_established=86400: ")
		if len(changes) != 2 {
			t.Errorf("changes are %v, want the limit and the other timeout", changes)
		}
	})
	t.Run("what nobody asks for is not missed", func(t *testing.T) {
		if _, problems := apply(tree(t, nil), Settings{}, 4); problems != nil {
			t.Errorf("problems are %q", problems)
		}
	})
}

func TestReadOnlySettings(t *testing.T) {
	testutil.RequireRoot(t)
	sys := tree(t, kernelDefaults())
	if _, problems := apply(sys, Settings{TCPCloseWaitTimeout: time.Hour}, 4); problems != nil {
		t.Fatal(problems)
	}
	if err := unix.Mount(sys, sys, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(sys, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", sys, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	changes, problems := apply(sys, kubeProxys, 4)
	wantOne(t, problems, unix.EROFS, prefix+"max=131072 "+prefix+"tcp_timeout_established=86400: ", "CAP_SYS_PTRACE", "sysctl -w")
	if len(changes) != 0 {
		t.Errorf("changes are %v", changes)
	}
	// That nothing is wrong also shows that nothing is written.
	if changes, problems := apply(sys, Settings{TCPCloseWaitTimeout: time.Hour}, 4); changes != nil || problems != nil {
		t.Errorf("what is already so: changes %v, problems %q", changes, problems)
	}
	node := tree(t, kernelDefaults())
	if got := writable(sys, node); got != node {
		t.Errorf("settings are written to %s, want %s, the node's, since ours are read-only", got, node)
	}
	for _, other := range []string{sys, filepath.Join(node, "missing")} {
		if got := writable(sys, other); got != sys {
			t.Errorf("settings are written to %s where the node's cannot be: want %s", got, sys)
		}
	}
	if got := writable(node, sys); got != node {
		t.Errorf("settings are written to %s, want %s, which is ours", got, node)
	}
}

func TestContentThatIsNoNumber(t *testing.T) {
	sys := tree(t, kernelDefaults())
	path := filepath.Join(sys, "net/netfilter/nf_conntrack_max")
	if err := os.WriteFile(path, []byte("many\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	changes, problems := apply(sys, kubeProxys, 4)
	wantOne(t, problems, nil, prefix+"max=131072", `"many"`)
	if len(changes) != 2 {
		t.Errorf("changes are %v, want the two timeouts", changes)
	}
}

// TestApplyInANamespace sets the kernel's own timeouts, in a network namespace
// whose timeouts concern nobody else.
func TestApplyInANamespace(t *testing.T) {
	const timeout = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"
	before, _ := os.ReadFile(timeout) // missing when the module is
	err := testutil.Node(t).Namespace().Do(func() error {
		settings := Settings{
			TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour,
			UDPTimeout: 41 * time.Second, UDPStreamTimeout: 241 * time.Second, TCPBeLiberal: true,
		}
		changes, problems := Apply(settings, 4)
		if _, err := os.Stat(timeout); errors.Is(err, fs.ErrNotExist) {
			wantOne(t, problems, fs.ErrNotExist, "not loaded")
			return nil
		}
		if len(changes) != 5 || problems != nil {
			t.Errorf("changes %v, problems %q; want five changes", changes, problems)
		}
		if got, err := os.ReadFile(timeout); string(got) != "41\n" || err != nil {
			t.Errorf("the timeout is %q, %v; want 41", got, err)
		}
		if changes, problems := Apply(settings, 4); changes != nil || problems != nil {
			t.Errorf("a second time: changes %v, problems %q", changes, problems)
		}

		_, problems = Apply(Settings{UDPTimeout: 10000 * 24 * time.Hour}, 4)
		wantOne(t, problems, unix.EINVAL, prefix+"udp_timeout=864000000", "too large")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(timeout); string(after) != string(before) {
		t.Errorf("outside of the namespace the timeout was %q and is %q", before, after)
	}
}

// TestLimitInANamespace asks for a limit where only the machine's first network
// namespace may set it, as on a node that is a container.
func TestLimitInANamespace(t *testing.T) {
	err := testutil.Node(t).Namespace().Do(func() error {
		const limit = "/proc/sys/net/netfilter/nf_conntrack_max"
		info, err := os.Stat(limit)
		if err != nil || info.Mode().Perm()&0o222 != 0 {
			t.Logf("this kernel's limit is missing or writable here: %v", err)
			return nil // before Linux 5.13 it would be changed for the whole machine
		}
		changes, problems := Apply(Settings{MaxPerCore: 1234, Min: 1234}, 1)
		wantOne(t, problems, fs.ErrPermission, prefix+"max=1234", "maxPerCore 0")
		if len(changes) != 0 {
			t.Errorf("changes are %v", changes)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestCountCores(t *testing.T) {
	for list, want := range map[string]int{"0\n": 1, "0-1\n": 2, "0-3,8\n": 5, "0,2,4-7\n": 6} {
		if got, err := countCores(list); got != want || err != nil {
			t.Errorf("%q has %d, %v; want %d", list, got, err, want)
		}
	}
	for _, list := range []string{"", "x", "0-", "1-x"} {
		if got, err := countCores(list); err == nil {
			t.Errorf("%q has %d, want an error", list, got)
		}
	}
	if Cores() < 1 {
		t.Errorf("this machine has %d cores", Cores())
	}
}
