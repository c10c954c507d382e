// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestErrorsAreOneLine(t *testing.T) {
	err := errors.Join(errors.New("first"), errors.Join(errors.New("second"), errors.New("third\n")))
	if got, want := oneLine(err), "first; second; third"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDevVersion(t *testing.T) {
	for _, test := range []struct {
		name     string
		settings []debug.BuildSetting
		want     string
	}{
		{name: "nothing is known", want: "dev"},
		{
			name:     "a commit",
			settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.modified", Value: "false"}},
			want:     "dev-0123456789ab",
		},
		{
			name:     "a commit and changes",
			settings: []debug.BuildSetting{{Key: "vcs.modified", Value: "true"}, {Key: "vcs.revision", Value: "0123456789abcdef"}},
			want:     "dev-0123456789ab-dirty",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := devVersion(test.settings); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// Help is all that many users read.
func TestEveryCommandAndFlagIsDescribed(t *testing.T) {
	var check func(cmd *cobra.Command)
	check = func(cmd *cobra.Command) {
		if cmd.Short == "" || cmd.Long == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: short %q, long %q", cmd.CommandPath(), cmd.Short, cmd.Long)
		}
		for line := range strings.Lines(cmd.Long + "\n" + cmd.Example) {
			if len(strings.TrimRight(line, "\n")) > 80 {
				t.Errorf("%s: a line of help is longer than 80 columns: %q", cmd.CommandPath(), line)
			}
		}
		for _, sub := range cmd.Commands() {
			check(sub)
		}
	}
	check(newRootCommand())
}
