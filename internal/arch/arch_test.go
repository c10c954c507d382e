// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package arch holds the law of which package may import which. It has no code,
// only the test that keeps the law.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/fairlead-lb/fairlead/"

// all stands for every package of ours.
const all = "*"

// ours says for each package which packages of ours it may import. What a
// package cannot import it cannot reach through others either, so this also
// bounds where the libraries below can get to. Tests may import what they like.
var ours = map[string][]string{
	"internal/lb":         {},
	"internal/logfield":   {"internal/lb"},
	"internal/reflector":  {"internal/lb", "internal/logfield"},
	"internal/reconciler": {"internal/lb"},
	"internal/datapath":   {"internal/lb", "internal/logfield"},
	"internal/attach":     {},
	"internal/config":     {},
	"internal/conntrack":  {},
	"internal/sockets":    {"internal/lb", "internal/datapath"},
	"internal/flows":      {"internal/lb", "internal/datapath"},
	"internal/inspect":    {"internal/lb", "internal/datapath"},
	"internal/health":     {"internal/lb", "internal/logfield"},
	"internal/metrics":    {"internal/lb", "internal/logfield"},
	"internal/privileges": {},
	"internal/probe":      {},
	"internal/sandbox":    {},
	"internal/agent":      {all},
	"cmd/fairlead":        {all},

	"internal/testutil":              {all},
	"internal/testutil/controlplane": {all},
	"internal/testutil/packet":       {},
}

// libraries says who may import what lies outside the module; the other
// packages may not. A path stands for the packages below it as well.
var libraries = map[string][]string{
	"k8s.io": {"internal/config", "internal/reflector", "internal/testutil", "internal/testutil/controlplane"},
	// Everything that speaks to an API server.
	"k8s.io/client-go": {"internal/reflector", "internal/testutil", "internal/testutil/controlplane"},

	"github.com/vishvananda/netlink": {
		"internal/attach", "internal/probe", "internal/sockets", "internal/sandbox", "internal/testutil",
	},
}

// never says what single packages may not import although others may.
var never = map[string][]string{
	"internal/lb":         {"github.com", "go.uber.org", "sigs.k8s.io", "os", "log", "math/rand", "crypto/rand"},
	"internal/reflector":  {"github.com/cilium/ebpf"},
	"internal/reconciler": {"github.com/cilium/ebpf", "os"},
}

func TestImports(t *testing.T) {
	for _, p := range list(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		allowed, ok := ours[name]
		if !ok {
			t.Errorf("%s: say in this test what it may import", name)
		}
		for _, path := range p.Imports {
			if own, ok := strings.CutPrefix(path, module); ok {
				if !slices.Contains(allowed, own) && !slices.Contains(allowed, all) {
					t.Errorf("%s may not import %s", name, own)
				}
				continue
			}
			for library, users := range libraries {
				if within(path, library) && !slices.Contains(users, name) {
					t.Errorf("%s may not import %s: only %v may", name, path, users)
				}
			}
			for _, banned := range never[name] {
				if within(path, banned) {
					t.Errorf("%s may not import %s", name, path)
				}
			}
		}
	}
}

// within tells whether an import path is root or below it.
func within(path, root string) bool {
	return path == root || strings.HasPrefix(path, root+"/")
}

type pkg struct {
	ImportPath string
	Imports    []string // of the package proper, not of its tests
	GoFiles    []string // without tests
}

// list returns the packages that are part of a program or can become it.
func list(t *testing.T) []pkg {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,GoFiles", module+"cmd/...", module+"internal/...")
	out, err := cmd.Output()
	if err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			t.Fatalf("go list: %v\n%s", err, failed.Stderr)
		}
		t.Fatal(err)
	}
	var packages []pkg
	decoder := json.NewDecoder(bytes.NewReader(out))
	for {
		var p pkg
		if err := decoder.Decode(&p); err == io.EOF {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		if len(p.GoFiles) > 0 {
			packages = append(packages, p)
		}
	}
}
