// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

const semanticsFile = "docs/semantics.md"

// repository is the way from here to the top of the source tree.
const repository = "../.."

// proof is the one form in which a row names a test: package, function and
// perhaps the names of subtests.
var proof = regexp.MustCompile("^  - `(\\S+) ((?:Test|Fuzz)\\w+)(?:/([^`]+))?`$")

// admitted are the words by which a row says that nothing proves it.
var admitted = regexp.MustCompile(`\*\*(Not|No test) yet`)

// TestSemanticsNameTestsThatExist keeps the table of semantics from rotting: what
// a row names is in the test files, and every row names something or says why not.
func TestSemanticsNameTestsThatExist(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(repository, semanticsFile))
	if err != nil {
		t.Fatal(err)
	}
	tests := testFiles{}
	row, proofs := "", 0
	endRow := func() {
		if row != "" && proofs == 0 && !admitted.MatchString(row) {
			t.Errorf("%s: a row without a test that does not say why: %q", semanticsFile, row)
		}
		row, proofs = "", 0
	}
	for number, line := range strings.Split(string(text), "\n") {
		switch found := proof.FindStringSubmatch(line); {
		case found != nil:
			proofs++
			if problem := tests.missing(t, found[1], found[2], found[3]); problem != "" {
				t.Errorf("%s:%d: %s", semanticsFile, number+1, problem)
			}
		case strings.HasPrefix(line, "  - "):
			t.Errorf("%s:%d: %q does not name a test as `package Test/subtest`", semanticsFile, number+1, line)
		case strings.HasPrefix(line, "- "):
			endRow()
			row = line
		case strings.HasPrefix(line, "  ") && row != "":
			row += strings.TrimPrefix(line, " ")
		default:
			endRow()
		}
	}
	endRow()
}

// testFiles holds what the test files of each package have in them.
type testFiles map[string]testNames

// testNames are the strings in each top-level function of a package's test files,
// and under "" those outside of tests: tables that a test walks, helpers.
type testNames map[string]map[string]bool

// missing says what of a test is not there, "" when all of it is. The name of a
// subtest must be a string in the test itself or outside of tests.
func (f testFiles) missing(t *testing.T, pkg, test, subtests string) string {
	t.Helper()
	names, ok := f[pkg]
	if !ok {
		names = readTests(t, filepath.Join(repository, pkg))
		f[pkg] = names
	}
	if names[test] == nil {
		return pkg + " has no test " + test
	}
	if subtests == "" {
		return ""
	}
	for name := range strings.SplitSeq(subtests, "/") {
		if !names[test][name] && !names[""][name] {
			return pkg + ": " + test + " has no subtest " + strconv.Quote(name)
		}
	}
	return ""
}

// readTests reads the test files in a directory. One that is not there has none.
func readTests(t *testing.T, dir string) testNames {
	t.Helper()
	names := testNames{"": {}}
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			names.add(decl)
		}
	}
	return names
}

// add enters the strings of a declaration.
func (n testNames) add(decl ast.Decl) {
	into := n[""]
	if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil &&
		(strings.HasPrefix(f.Name.Name, "Test") || strings.HasPrefix(f.Name.Name, "Fuzz")) {
		into = map[string]bool{}
		n[f.Name.Name] = into
	}
	ast.Inspect(decl, func(node ast.Node) bool {
		if literal, ok := node.(*ast.BasicLit); ok && literal.Kind == token.STRING {
			if text, err := strconv.Unquote(literal.Value); err == nil {
				into[text] = true
			}
		}
		return true
	})
}
