// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package cli

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

func TestScripts(t *testing.T) {
	binary := testutil.BuildBinary(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			bin := filepath.Join(env.WorkDir, "bin")
			if err := os.Mkdir(bin, 0o755); err != nil {
				return err
			}
			env.Setenv("PATH", bin+string(os.PathListSeparator)+env.Getenv("PATH"))
			return os.Symlink(binary, filepath.Join(bin, "fairlead"))
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fails":        fails,
			"fails-nobody": failsAsNobody,
		},
		RequireExplicitExec: true,
	})
}

// fails runs fairlead as in "fails PATTERN ARGS...": it must print nothing but
// one line on standard error, which matches, and exit with 1. An agent may have
// logged before that.
func fails(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec("fairlead", args[1:]...)
	wantOneLine(ts, err, args[0], ts.ReadFile("stdout"), ts.ReadFile("stderr"))
}

// failsAsNobody is fails for a user without any privilege.
func failsAsNobody(ts *testscript.TestScript, _ bool, args []string) {
	// Nobody may not enter the test's directories, but may run a file that is
	// open.
	program, err := os.Open(filepath.Join(ts.Getenv("WORK"), "bin", "fairlead"))
	ts.Check(err)
	defer program.Close()
	var stdout, stderr bytes.Buffer
	cmd := exec.Cmd{
		Path: "/proc/self/fd/3", Args: append([]string{"fairlead"}, args[1:]...), Dir: "/", Env: []string{"PATH=/usr/bin:/bin"},
		ExtraFiles: []*os.File{program}, Stdout: &stdout, Stderr: &stderr,
	}
	if os.Geteuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	wantOneLine(ts, cmd.Run(), args[0], stdout.String(), stderr.String())
}

func wantOneLine(ts *testscript.TestScript, err error, pattern, stdout, stderr string) {
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		ts.Fatalf("ended with %v, want exit code 1; standard error:\n%s", err, stderr)
	}
	if stdout != "" {
		ts.Fatalf("standard output is not empty:\n%s", stdout)
	}
	for strings.HasPrefix(stderr, "{") {
		_, stderr, _ = strings.Cut(stderr, "\n")
	}
	line, rest, _ := strings.Cut(stderr, "\n")
	if !strings.HasPrefix(line, "fairlead: ") || rest != "" || !strings.HasSuffix(stderr, "\n") {
		ts.Fatalf("standard error is not one line of fairlead's:\n%s", stderr)
	}
	if !regexp.MustCompile(pattern).MatchString(line) {
		ts.Fatalf("%q does not match %q", line, pattern)
	}
}
