// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/google/licenseclassifier/v2/assets"
)

const (
	// ourPath is the module that the binary is made of.
	ourPath = "github.com/fairlead-lb/fairlead"
	// ourLicence is that of the Go code and that of the BPF programs.
	ourLicence = "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"
	// standardLibrary is the name that scanners know Go's own packages by.
	standardLibrary = "std"
)

// module is something that is linked into a binary.
type module struct {
	path, version string
	licences      []string // SPDX identifiers
	texts         []text
}

// text is a licence, or a notice that must go where the code goes.
type text struct {
	path    string // from the module's root
	content []byte
}

// modulesOf returns what a binary says it is made of, without our own module and
// with the standard library, sorted by path. The texts are those beside and above
// the packages in use.
func (r release) modulesOf(binary, arch string) ([]module, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	texts, err := r.textsOf(arch)
	if err != nil {
		return nil, err
	}
	goVersion, _, _ := strings.Cut(info.GoVersion, " ") // an experiment may follow
	modules := []module{{path: standardLibrary, version: goVersion}}
	for _, dep := range info.Deps {
		modules = append(modules, moduleOf(dep))
	}
	slices.SortFunc(modules, func(a, b module) int { return strings.Compare(a.path, b.path) })
	for i := range modules {
		m := &modules[i]
		m.texts = texts[m.path]
		if m.licences, err = classify(m.texts); err != nil {
			return nil, fmt.Errorf("licence of %s: %w", m.path, err)
		}
	}
	return modules, nil
}

func moduleOf(dep *debug.Module) module {
	if dep.Replace != nil {
		dep = dep.Replace
	}
	return module{path: dep.Path, version: dep.Version}
}

// listed is a package as go list describes it.
type listed struct {
	Dir      string
	Standard bool
	Module   *struct {
		Path, Dir string
		Replace   *struct{ Path string }
	}
}

// textsOf returns the texts that go with the packages of the command, by module.
func (r release) textsOf(arch string) (map[string][]text, error) {
	cmd := exec.Command("go", "list", "-deps", "-json=Dir,Standard,Module", "./cmd/fairlead")
	cmd.Dir = r.root
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	files := map[string]map[string]bool{} // names by module
	texts := map[string][]text{}
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return texts, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		path, root := p.home()
		dir := p.Dir
		if p.Module == nil {
			// Go's code has one licence. That of BoringSSL lies below it, which is
			// linked only where somebody asks for it.
			dir = root
		}
		if files[path] == nil {
			files[path] = map[string]bool{}
		}
		found, err := textsAbove(dir, root, files[path])
		if err != nil {
			return nil, err
		}
		texts[path] = append(texts[path], found...)
	}
}

// home returns the module of a package and its directory.
func (p listed) home() (path, root string) {
	switch {
	case p.Module == nil: // the standard library: GOROOT/src/…
		root, _, _ = strings.Cut(p.Dir, string(filepath.Separator)+"src"+string(filepath.Separator))
		return standardLibrary, root
	case p.Module.Replace != nil:
		return p.Module.Replace.Path, p.Module.Dir
	default:
		return p.Module.Path, p.Module.Dir
	}
}

var isText = regexp.MustCompile(`(?i)^(licen[cs]e|copying|copyright|notice|patents)([.-].*)?$`)

// textsAbove returns the texts in dir and above it up to root, without those that
// have been seen.
func textsAbove(dir, root string, seen map[string]bool) ([]text, error) {
	var texts []text
	for ; strings.HasPrefix(dir+string(filepath.Separator), root+string(filepath.Separator)); dir = filepath.Dir(dir) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			file := filepath.Join(dir, e.Name())
			if !e.Type().IsRegular() || !isText.MatchString(e.Name()) || filepath.Ext(file) == ".go" || seen[file] {
				continue
			}
			seen[file] = true
			content, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			path, err := filepath.Rel(root, file)
			if err != nil {
				return nil, err
			}
			texts = append(texts, text{filepath.ToSlash(path), content})
		}
	}
	return texts, nil
}

var classifier = sync.OnceValues(assets.DefaultClassifier)

// classify returns the licences that the texts are, sorted. None is an error:
// what nobody may use must not be passed on.
func classify(texts []text) ([]string, error) {
	known, err := classifier()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, t := range texts {
		for _, match := range known.Match(t.content).Matches {
			if match.MatchType == "License" {
				found = append(found, match.Name)
			}
		}
	}
	if len(found) == 0 {
		return nil, errors.New("not found")
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}
