// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package upgrade

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/datapath"
)

// otherABI is that of the other build.
const otherABI = datapath.ABI + 1

// buildOther returns a build that differs in the layout of frontends and slots, which
// programs of this one could not read, and so has another ABI.
func buildOther(t *testing.T) string {
	t.Helper()
	tree := copyTree(t)
	patch, err := filepath.Abs("testdata/layout.patch")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := run(tree, "git", "apply", "--whitespace=nowarn", patch); err != nil {
		t.Fatalf("testdata/layout.patch does not fit bpf/types.h any more; make it change struct frontend and struct slot again: %v\n%s", err, out)
	}
	replace(t, filepath.Join(tree, "internal/datapath/load.go"),
		fmt.Sprintf(`(?m)^const ABI = %d$`, datapath.ABI), fmt.Sprintf("const ABI = %d", otherABI))
	// The other processor's object is not needed.
	arch := strings.TrimSpace(must(t)(run(tree, "go", "env", "GOARCH")))
	replace(t, filepath.Join(tree, "internal/datapath/generate.go"), `-target [a-z0-9,]+`, "-target "+arch)
	must(t)(run(tree, "go", "generate", "./internal/datapath/generate.go"))
	path := filepath.Join(t.TempDir(), "fairlead")
	must(t)(run(tree, "go", "build", "-buildvcs=false", "-o", path, "./cmd/fairlead"))
	return path
}

// copyTree copies what a build needs of the module to a directory of its own.
func copyTree(t *testing.T) string {
	t.Helper()
	gomod := strings.TrimSpace(must(t)(run(".", "go", "env", "GOMOD")))
	from, to := filepath.Dir(gomod), t.TempDir()
	// Also what has not been committed.
	files := must(t)(run(from, "git", "ls-files", "--cached", "--others", "--exclude-standard", "go.mod", "go.sum", "bpf", "cmd", "internal"))
	for name := range strings.FieldsSeq(files) {
		data, err := os.ReadFile(filepath.Join(from, name))
		if os.IsNotExist(err) {
			continue // deleted and not committed
		}
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(to, name)), 0o700)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// replace changes the one match of a pattern in a file.
func replace(t *testing.T, path, pattern, with string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	re := regexp.MustCompile(pattern)
	if n := len(re.FindAll(data, -1)); n != 1 {
		t.Fatalf("%s has %d matches of %q, want one", filepath.Base(path), n, pattern)
	}
	if err := os.WriteFile(path, re.ReplaceAll(data, []byte(with)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// run runs a program in a directory and returns what it printed.
func run(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return string(out), err
}

// must returns what makes an error the end of the test.
func must(t *testing.T) func(string, error) string {
	return func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return out
	}
}
