// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap/zaptest"
)

// A process that may open no more files, say, is told by nobody that it may again.
func TestFileThatCannotBeReadIsTriedAgain(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "web.yaml")
	link := filepath.Join(dir, "web.yaml")
	if err := os.WriteFile(link, []byte(serviceYAML("web", "10.0.0.1")), 0o600); err != nil {
		t.Fatal(err)
	}
	source, err := NewFile(dir, Options{NodeName: "node"}, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	h := start(t, source)
	h.first("services: default/web=10.0.0.1", "slices:")

	// Links that lead to each other cannot be read.
	for _, l := range [][2]string{{elsewhere, link + ".new"}, {link, elsewhere}} {
		if err := os.Symlink(l[0], l[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	if got := summary(h.next()); !strings.Contains(got, "too many levels of symbolic links") {
		t.Fatalf("got %q, want a warning about the links", got)
	}
	// Nothing changes in the directory that is watched.
	aside := elsewhere + ".new"
	if err := os.WriteFile(aside, []byte(serviceYAML("web", "10.0.0.2")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(aside, elsewhere); err != nil {
		t.Fatal(err)
	}
	if got := summary(h.next()); !strings.Contains(got, "10.0.0.2") {
		t.Errorf("got %q, want what the file says now", got)
	}
}
