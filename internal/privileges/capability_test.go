// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package privileges

import (
	"cmp"
	"os"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestDocumentedTable compares the table of SECURITY.md with what the agent does.
func TestDocumentedTable(t *testing.T) {
	text, err := os.ReadFile("../../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "| `CAP_") {
			got = append(got, strings.TrimSpace(line))
		}
	}
	for _, c := range Needed() {
		kind, without := "optional", cmp.Or(c.Without, "such ports cannot be had, and the agent says so when it is to listen there")
		if c.Required {
			kind, without = "required", "the agent does not start"
		}
		want = append(want, "| "+strings.Join([]string{"`" + c.Name + "`", kind, c.For, without}, " | ")+" |")
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("the table of SECURITY.md (-want +got):\n%s", diff)
	}
}

func TestMissing(t *testing.T) {
	all := kept()
	without := func(numbers ...int) (s set) {
		s = all
		for _, n := range numbers {
			s &^= 1 << n
		}
		return s
	}
	for _, tt := range []struct {
		name      string
		effective set
		lacks     []string
		failure   string // part of the error
	}{
		{name: "everything", effective: ^set(0)},
		{name: "what is needed", effective: all},
		{name: "no low ports are told when they are asked for", effective: without(unix.CAP_NET_BIND_SERVICE)},
		{name: "one optional", effective: without(unix.CAP_SYS_PTRACE), lacks: []string{"CAP_SYS_PTRACE"}},
		{
			name: "both optional", effective: without(unix.CAP_SYS_PTRACE, unix.CAP_SYS_ADMIN),
			lacks: []string{"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"},
		},
		{name: "CAP_SYS_ADMIN stands in", effective: without(unix.CAP_BPF, unix.CAP_PERFMON)},
		{name: "but not for networks", effective: without(unix.CAP_NET_ADMIN), failure: "without CAP_NET_ADMIN (for "},
		{name: "one required", effective: without(unix.CAP_PERFMON, unix.CAP_SYS_ADMIN), failure: "without CAP_PERFMON (for "},
		{name: "all missing are named", effective: 0, failure: "; CAP_NET_ADMIN (for "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lacks, err := missing(tt.effective)
			if tt.failure != "" {
				if err == nil || !strings.Contains(err.Error(), tt.failure) || strings.Contains(err.Error(), "\n") {
					t.Fatalf("error %v, want one line with %q", err, tt.failure)
				}
				return
			}
			var names []string
			for _, c := range lacks {
				names = append(names, c.Name)
			}
			if err != nil || !slices.Equal(names, tt.lacks) {
				t.Errorf("%v, error %v; want %v", names, err, tt.lacks)
			}
		})
	}
}

func TestWhatIsLeftToGiveUp(t *testing.T) {
	some := set(1<<unix.CAP_BPF | 1<<unix.CAP_NET_ADMIN)
	chown, setpcap := set(1<<unix.CAP_CHOWN), set(1<<unix.CAP_SETPCAP)
	for _, tt := range []struct {
		name  string
		state state
		want  bool // nothing is left
	}{
		{"a container with just enough", state{effective: some, permitted: some, bounding: some, noNewPrivs: true}, true},
		{"more could be had by executing a program", state{effective: some, permitted: some, bounding: some}, false},
		{"effective", state{effective: some | chown, permitted: some | chown, bounding: some, noNewPrivs: true}, false},
		{"permitted", state{effective: some, permitted: some | chown, bounding: some, noNewPrivs: true}, false},
		{"inheritable", state{effective: some, permitted: some, inheritable: chown, bounding: some, noNewPrivs: true}, false},
		{"ambient", state{effective: some, permitted: some, ambient: chown, bounding: some, noNewPrivs: true}, false},
		{"root", state{effective: ^set(0), permitted: ^set(0), bounding: ^set(0)}, false},
		{"a bounding set that may be changed", state{permitted: some | setpcap, bounding: some | chown, noNewPrivs: true}, false},
		{"a bounding set that may not", state{effective: some, permitted: some, bounding: ^set(0), noNewPrivs: true}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.state.reduced(); got != tt.want {
				t.Errorf("reduced is %v, want %v", got, tt.want)
			}
		})
	}
}
