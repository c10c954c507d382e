// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRemoveSocket(t *testing.T) {
	listen := func(t *testing.T, path string) *net.UnixListener {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		return l
	}
	for _, test := range []struct {
		name    string
		make    func(t *testing.T, path string)
		removed bool
	}{
		{
			name: "one that a killed agent has left goes",
			make: func(t *testing.T, path string) {
				if err := listen(t, path).Close(); err != nil {
					t.Fatal(err)
				}
			},
			removed: true,
		},
		{
			name: "one that somebody listens on stays",
			make: func(t *testing.T, path string) {
				l := listen(t, path)
				t.Cleanup(func() { _ = l.Close() })
			},
		},
		{
			name: "another file stays",
			make: func(t *testing.T, path string) {
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "run", "agent.sock")
			if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			test.make(t, path)
			var out strings.Builder
			if err := removeSocket(&out, path); err != nil {
				t.Fatal(err)
			}
			want := ""
			if test.removed {
				want = "removed socket " + path + "\n"
			}
			if out.String() != want {
				t.Errorf("said %q, want %q", out.String(), want)
			}
			if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) != test.removed {
				t.Errorf("file afterwards: %v", err)
			}
			if _, err := os.Lstat(filepath.Dir(path)); errors.Is(err, fs.ErrNotExist) != test.removed {
				t.Errorf("directory afterwards: %v", err)
			}
		})
	}
	t.Run("none is no error", func(t *testing.T) {
		var out strings.Builder
		if err := removeSocket(&out, filepath.Join(t.TempDir(), "run", "agent.sock")); err != nil || out.Len() > 0 {
			t.Errorf("error %v, said %q", err, out.String())
		}
	})
}
