// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// What init.sh writes on lines of their own.
const (
	markUp     = "fairlead-vm: up"
	markDone   = "fairlead-vm: done"
	markFailed = "fairlead-vm: failed: " // reason
	markBegin  = "fairlead-vm: begin "   // package
	markEnd    = "fairlead-vm: end "     // package, exit code
)

// transcript is what a machine's user space wrote, sorted by package.
type transcript struct {
	output  map[string]*strings.Builder // of test binaries, by package
	exit    map[string]string           // codes of those that ended
	current *strings.Builder            // of the running binary, or nil
	done    bool
	failure string
}

// add takes the next line.
func (l *transcript) add(line string) {
	if l.output == nil {
		l.output = make(map[string]*strings.Builder)
		l.exit = make(map[string]string)
	}
	if pkg, ok := strings.CutPrefix(line, markBegin); ok {
		l.current = new(strings.Builder)
		l.output[pkg] = l.current
	} else if end, ok := strings.CutPrefix(line, markEnd); ok {
		pkg, code, _ := strings.Cut(end, " ")
		l.exit[pkg] = code
		l.current = nil
	} else if reason, ok := strings.CutPrefix(line, markFailed); ok {
		l.failure = reason
	} else if line == markDone {
		l.done = true
	} else if l.current != nil {
		l.current.WriteString(line + "\n")
	}
}

// end returns nil when the machine said that all is done.
func (l *transcript) end() error {
	switch {
	case l.failure != "":
		return fmt.Errorf("machine cannot run tests: %s", l.failure)
	case !l.done:
		return errors.New("machine went off before all was done")
	}
	return nil
}

// report shows the tests of a package as subtests of t, and fails t when the
// package did not run to its end or ran no test.
func (l *transcript) report(t *testing.T, pkg string) {
	output, ok := l.output[pkg]
	if !ok {
		t.Fatal("was not started")
	}
	results, err := parseResults(output.String())
	if err != nil {
		t.Fatal(err)
	}
	if len(results) == 0 {
		t.Error("no test ran")
	}
	for _, r := range results {
		t.Run(r.name, func(t *testing.T) {
			switch r.action {
			case "pass":
			case "skip":
				t.Skip(r.output.String())
			case "fail":
				t.Error(r.output.String())
			default:
				t.Errorf("did not end\n%s", r.output.String())
			}
		})
	}
	if code, ok := l.exit[pkg]; !ok {
		t.Error("machine ended before the tests did")
	} else if code != "0" && !t.Failed() {
		t.Errorf("exit code %s\n%s", code, output)
	}
}

// result is one test of a machine.
type result struct {
	name   string
	action string // "pass", "fail", "skip", or "" when it did not end
	output strings.Builder
}

// parseResults returns the tests named in what a test binary wrote with
// -test.v=test2json, in the order in which they began.
func parseResults(text string) ([]*result, error) {
	cmd := exec.Command("go", "tool", "test2json")
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("test2json: %w", err)
	}
	var results []*result
	byName := make(map[string]*result)
	events := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var event struct{ Action, Test, Output string }
		if err := events.Decode(&event); errors.Is(err, io.EOF) {
			return results, nil
		} else if err != nil {
			return nil, fmt.Errorf("test2json: %w", err)
		}
		if event.Test == "" {
			continue
		}
		r := byName[event.Test]
		if r == nil {
			r = &result{name: event.Test}
			byName[event.Test] = r
			results = append(results, r)
		}
		switch event.Action {
		case "output":
			r.output.WriteString(event.Output)
		case "pass", "fail", "skip":
			r.action = event.Action
		}
	}
}
