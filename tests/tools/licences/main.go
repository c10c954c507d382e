// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Licences checks that everything linked into a program may be given away with it,
// and collects the texts that have to go with it.
//
//	licences [-o FILE] PACKAGE
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	classifier "github.com/google/licenseclassifier/v2"
	"github.com/google/licenseclassifier/v2/assets"
)

// allowed are licences, by their SPDX names, that ask for no more than to be told
// along with the program. Others, even good ones, are for people to decide. What runs
// in the kernel is our own and has licences of its own: see bpf/LICENSE.
var allowed = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT"}

// platforms are those the program is built for: each may link other packages.
var platforms = []string{"amd64", "arm64"}

func main() {
	out := flag.String("o", "", "`FILE` to write all licences to")
	flag.Parse()
	if flag.NArg() != 1 {
		_, _ = fmt.Fprintln(os.Stderr, "usage: licences [-o FILE] PACKAGE")
		os.Exit(2)
	}
	if err := run(flag.Arg(0), *out); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "licences:", err)
		os.Exit(1)
	}
}

// run checks what a package is linked from and writes the texts to out, unless that
// is empty.
func run(pkg, out string) error {
	modules, err := linked(pkg)
	if err != nil {
		return err
	}
	known, err := assets.DefaultClassifier()
	if err != nil {
		return fmt.Errorf("load licences: %w", err)
	}
	count := map[string]int{}
	var errs []error
	for _, m := range modules {
		names, err := m.check(known)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m, err))
		}
		for _, name := range names {
			count[name]++
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Printf("%d modules are linked into %s: %v\n", len(modules), pkg, count)
	if out == "" {
		return nil
	}
	return writeTexts(out, modules)
}

// module is what a program is linked from in part, with its files that may hold
// licences: those in the directories of the packages that are linked, and above.
type module struct {
	path, version string
	texts         []text
}

type text struct {
	name    string // relative to the module
	content []byte
}

func (m *module) String() string { return strings.TrimSpace(m.path + " " + m.version) }

// linked returns the modules outside of ours that a package is linked from, Go's own
// library first, the others by path.
func linked(pkg string) ([]*module, error) {
	dirs := map[string]map[string]bool{} // of each module's directory, those of its packages
	modules := map[string]*module{}      // by directory
	for _, arch := range platforms {
		packages, err := list(pkg, arch)
		if err != nil {
			return nil, err
		}
		for _, p := range packages {
			if p.Module == nil || p.Module.Main {
				continue
			}
			if dirs[p.Module.Dir] == nil {
				dirs[p.Module.Dir] = map[string]bool{}
				modules[p.Module.Dir] = &module{path: p.Module.Path, version: p.Module.Version}
			}
			dirs[p.Module.Dir][p.Dir] = true
		}
	}
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("find Go: %w", err)
	}
	std := &module{path: "Go's standard library"}
	if std.texts, err = texts(strings.TrimSpace(string(goroot)), nil); err != nil {
		return nil, err
	}
	out := []*module{std}
	for root, m := range modules {
		if m.texts, err = texts(root, dirs[root]); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	slices.SortFunc(out[1:], func(a, b *module) int { return strings.Compare(a.path, b.path) })
	return out, nil
}

type listed struct {
	Dir    string
	Module *struct {
		Path, Version, Dir string
		Main               bool
	}
}

// list returns all packages that one is linked from.
func list(pkg, arch string) ([]listed, error) {
	cmd := exec.Command("go", "list", "-deps", "-json=Dir,Module", pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	cmd.Stderr = os.Stderr
	data, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list what %s is linked from: %w", pkg, err)
	}
	var out []listed
	for decoder := json.NewDecoder(bytes.NewReader(data)); ; {
		var p listed
		if err := decoder.Decode(&p); err == io.EOF {
			return out, nil
		} else if err != nil {
			return nil, fmt.Errorf("list what %s is linked from: %w", pkg, err)
		}
		out = append(out, p)
	}
}

var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice)([.-].*)?$`)

// texts reads the files of a module that may hold licences, sorted by name.
func texts(root string, packages map[string]bool) ([]text, error) {
	look := map[string]bool{root: true}
	for dir := range packages {
		for ; len(dir) > len(root); dir = filepath.Dir(dir) {
			look[dir] = true
		}
	}
	var out []text
	for dir := range look {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !e.Type().IsRegular() || !licenceFile.MatchString(e.Name()) || strings.HasSuffix(e.Name(), ".go") {
				continue
			}
			path := filepath.Join(dir, e.Name())
			content, err := os.ReadFile(path)
			if err != nil {
				return nil, err
			}
			name, err := filepath.Rel(root, path)
			if err != nil {
				return nil, err
			}
			out = append(out, text{name, content})
		}
	}
	slices.SortFunc(out, func(a, b text) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

// check returns the licences of a module. It fails when there are none, or one that
// is not allowed, or a text that nobody knows.
func (m *module) check(known *classifier.Classifier) ([]string, error) {
	var names []string
	for _, t := range m.texts {
		matches := known.Match(t.content).Matches
		found := 0
		for _, match := range matches {
			if match.MatchType != "License" {
				continue
			}
			found++
			if !slices.Contains(allowed, match.Name) {
				return nil, fmt.Errorf("%s is %s, which is none of %s", t.name, match.Name, strings.Join(allowed, ", "))
			}
			if !slices.Contains(names, match.Name) {
				names = append(names, match.Name)
			}
		}
		notice := strings.HasPrefix(strings.ToLower(filepath.Base(t.name)), "notice")
		if found == 0 && !notice {
			return nil, fmt.Errorf("%s is no licence that is known", t.name)
		}
	}
	if len(names) == 0 {
		return nil, errors.New("has no licence")
	}
	return names, nil
}

// writeTexts writes every text once, below the names of those that have it.
func writeTexts(file string, modules []*module) error {
	var order []string // of the texts
	heads := map[string][]string{}
	for _, m := range modules {
		for _, t := range m.texts {
			content := string(bytes.TrimSpace(t.content))
			if heads[content] == nil {
				order = append(order, content)
			}
			heads[content] = append(heads[content], fmt.Sprintf("%s: %s", m, t.name))
		}
	}
	var b bytes.Buffer
	b.WriteString("Fairlead is linked from what follows, each under the licence below its name.\n")
	for _, content := range order {
		fmt.Fprintf(&b, "\n%s\n%s\n\n%s\n", strings.Repeat("=", 80), strings.Join(heads[content], "\n"), content)
	}
	return os.WriteFile(file, b.Bytes(), 0o644)
}
