// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

func TestTallyCountsAndDraws(t *testing.T) {
	var got tally
	for range 3 {
		got.add("pod-1", nil)
	}
	got.add("pod-2", nil)
	if got.failures() != "none failed" {
		t.Errorf("failures: %q", got.failures())
	}
	want := "  pod-1 10.244.0.11    3 " + strings.Repeat("█", 36) + "\n" +
		"  pod-2 10.244.0.12    1 " + strings.Repeat("█", 12) + "\n"
	if got.bars() != want {
		t.Errorf("bars:\n%swant:\n%s", got.bars(), want)
	}
	got.add("", errors.New("first"))
	got.add("", errors.New("second"))
	if got.total() != 6 {
		t.Errorf("total %d, want 6 with the failed ones", got.total())
	}
	if want := "2 FAILED, the first with: first"; got.failures() != want {
		t.Errorf("failures: %q, want %q", got.failures(), want)
	}
}

func TestIsSpread(t *testing.T) {
	full := slices.Repeat([]string{"pod-1", "pod-3"}, demoWindow/2)
	for _, test := range []struct {
		name    string
		answers []string
		pods    []string
		want    bool
	}{
		{"each pod answers and no other", full, []string{"pod-1", "pod-3"}, true},
		{"a pod has not answered yet", full, []string{"pod-1", "pod-2", "pod-3"}, false},
		{"a pod that is gone still answers", full, []string{"pod-1"}, false},
		{"too few answers to tell", full[1:], []string{"pod-1", "pod-3"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := isSpread(test.answers, test.pods); got != test.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestDemoManifestsAreYAML(t *testing.T) {
	for name, data := range map[string][]byte{
		"service": demoService, "slice": demoSlice([]string{"pod-1", "pod-3"}), "empty slice": demoSlice(nil),
	} {
		if err := yaml.UnmarshalStrict(data, &map[string]any{}); err != nil {
			t.Errorf("%s: %v\n%s", name, err, data)
		}
	}
}

func TestDemo(t *testing.T) {
	testutil.RequireRoot(t)
	program := testutil.BuildBinary(t)
	start := time.Now()
	out, err := exec.CommandContext(t.Context(), program, "demo").CombinedOutput()
	if err != nil {
		t.Fatalf("demo: %v\n%s", err, out)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("took %s, want less than 10s", took)
	}
	if n := strings.Count(string(out), "300 requests to http://10.96.0.80, none failed"); n != len(demoSteps) {
		t.Errorf("300 requests succeeded %d times, want %d", n, len(demoSteps))
	}
	// The lines of each step name its pods and no other.
	pictures := strings.Split(string(out), "300 requests to")[1:]
	for i, step := range demoSteps[:len(pictures)] {
		picture, _, _ := strings.Cut(pictures[i], "\n\n")
		if got := regexp.MustCompile(`pod-\d`).FindAllString(picture, -1); !slices.Equal(got, step.pods) {
			t.Errorf("%s: answers from %v, want %v", step.title, got, step.pods)
		}
	}
	if !bytes.Contains(out, []byte("default/simpleservice")) {
		t.Error("inspect does not show the Service")
	}
	assertDemoGone(t)
	if t.Failed() {
		t.Logf("output:\n%s", out)
	}
}

func TestDemoCleansUpWhenInterrupted(t *testing.T) {
	testutil.RequireRoot(t)
	program := testutil.BuildBinary(t)
	for _, when := range []string{"A node, three pods", "has one pod", "under load"} {
		t.Run("at "+when, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, program, "demo")
			out := &interrupter{at: when, cmd: cmd}
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Run(); err == nil || cmd.ProcessState.ExitCode() != 1 {
				t.Errorf("ended with %v, want exit status 1", err)
			}
			if !strings.Contains(out.text.String(), "interrupted") {
				t.Errorf("does not say that it was interrupted:\n%s", &out.text)
			}
			assertDemoGone(t)
		})
	}
}

// interrupter sends a command SIGINT as soon as it has written certain words.
// Standard output and standard error are the same writer, so os/exec calls
// Write from one goroutine.
type interrupter struct {
	at   string
	cmd  *exec.Cmd
	text bytes.Buffer
	done bool
}

func (i *interrupter) Write(p []byte) (int, error) {
	i.text.Write(p)
	if !i.done && strings.Contains(i.text.String(), i.at) {
		i.done = true
		_ = i.cmd.Process.Signal(syscall.SIGINT)
	}
	return len(p), nil
}

// assertDemoGone fails the test when a demo has left something on the machine.
func assertDemoGone(t *testing.T) {
	t.Helper()
	cgroups, err := sandbox.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/run/netns", os.TempDir(), cgroups} {
		if left, _ := filepath.Glob(filepath.Join(dir, demoPrefix+"-*")); left != nil {
			t.Errorf("left behind: %v", left)
		}
	}
}
