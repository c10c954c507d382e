// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package testutil

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestMain lets this test binary stand in for the program under test.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		os.Exit(fakeAgent())
	}
	os.Exit(m.Run())
}

// fakeAgent behaves towards StartAgent as an agent does. It is ready the third
// time it is asked, and ends at once on SIGTERM.
func fakeAgent() int {
	fmt.Fprintln(os.Stderr, strings.Join(os.Args[1:], " "))
	if strings.Contains(strings.Join(os.Args, " "), "--fail") {
		return 1
	}
	var asked atomic.Int32
	http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = fmt.Fprintf(w, "asked %d times", asked.Load())
	})
	fmt.Fprintln(os.Stderr, http.ListenAndServe(HealthzAddress, nil))
	return 1
}

func TestEverythingIsRemovedWithTheTest(t *testing.T) {
	RequireRoot(t)
	var paths []string
	t.Run("test", func(t *testing.T) {
		node := Node(t)
		pod, err := node.AddPod("pod", netip.MustParseAddr("10.244.0.2"))
		if err != nil {
			t.Fatal(err)
		}
		cgroup := Cgroup(t)
		bpf := BPFRoot(t)
		if err := os.Mkdir(bpf, 0o700); err != nil {
			t.Fatal(err)
		}
		paths = []string{node.Namespace().Path(), pod.Path(), cgroup.Path(), bpf, filepath.Dir(bpf)}
		for _, path := range paths {
			if _, err := os.Stat(path); err != nil {
				t.Error(err)
			}
		}
	})
	for _, path := range paths {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind: %v", path, err)
		}
	}
}

func TestAgentLifeCycle(t *testing.T) {
	node := Node(t)
	t.Setenv("FAIRLEAD_BINARY", os.Args[0])
	options := AgentOptions{
		Netns: node.Namespace(), CgroupRoot: "/cgroup", BPFRoot: "/bpf", Source: "file:/dir",
		ExtraArgs: []string{"--log-level=debug"},
	}
	a := StartAgent(t, options)
	if body, err := a.Get(HealthzAddress, "/healthz"); err != nil || body != "asked 4 times" {
		t.Errorf("healthz: %q, %v; want to be asked for the fourth time", body, err)
	}
	if _, err := a.Get(HealthzAddress, "/nothing"); err == nil {
		t.Error("a page that is not there gives no error")
	}
	for _, arg := range []string{"--cgroup-root=/cgroup", "--bpf-root=/bpf", "--source=file:/dir", "--log-level=debug"} {
		if !strings.Contains(a.Logs(), arg) {
			t.Errorf("started without %s: %s", arg, a.Logs())
		}
	}
	if err := a.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("ended with %v, want signal: killed", err)
	}
	// Its successor can have the same addresses at once.
	StartAgent(t, options)
}

func TestAgentThatEndsAtOnceIsNoticed(t *testing.T) {
	node := Node(t)
	t.Setenv("FAIRLEAD_BINARY", os.Args[0])
	a := StartAgent(t, AgentOptions{Netns: node.Namespace(), ExtraArgs: []string{"--fail"}, Unready: true})
	if err := a.Wait(); err == nil || err.Error() != "exit status 1" {
		t.Errorf("ended with %v, want exit status 1", err)
	}
}

func TestEventuallyWaitsForSuccess(t *testing.T) {
	calls := 0
	Eventually(t, time.Minute, "third call", func() error {
		if calls++; calls < 3 {
			return errors.New("too early")
		}
		return nil
	})
	if calls != 3 {
		t.Errorf("%d calls, want 3", calls)
	}
}
