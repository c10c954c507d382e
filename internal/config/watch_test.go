// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// TestWatch runs in a bubble whose clock moves when nothing else does: seconds
// pass at once.
func TestWatch(t *testing.T) {
	tests := []struct {
		name   string
		change func(t *testing.T, dir string)
		want   bool
	}{
		{name: "nothing", change: func(*testing.T, string) {}},
		{name: "written anew with what it held", change: func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "config.conf"), "one")
		}},
		{name: "gone", change: func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "config.conf")); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "other content in place", want: true, change: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "config.conf"), "two")
		}},
		{name: "another file renamed over it", want: true, change: func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "config.conf"), "two")
		}},
		{name: "gone, and back with other content", want: true, change: func(t *testing.T, dir string) {
			path := filepath.Join(dir, "config.conf")
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * lookEvery)
			write(t, path, "two")
		}},
		{name: "half written when looked at, and then as before", change: func(t *testing.T, dir string) {
			path := filepath.Join(dir, "config.conf")
			write(t, path, "o")
			time.Sleep(lookEvery)
			write(t, path, "one")
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(dir, "config.conf"), "one")
			watchWhile(t, filepath.Join(dir, "config.conf"), func(t *testing.T) { tt.change(t, dir) }, tt.want)
		})
	}
}

func TestWatchVolumeOfConfigMap(t *testing.T) {
	for text, want := range map[string]bool{"one": false, "two": true} {
		t.Run("new version with "+text, func(t *testing.T) {
			dir := t.TempDir()
			publish(t, dir, "..2026_01_01", "one")
			link(t, "..data/config.conf", filepath.Join(dir, "config.conf"))
			watchWhile(t, filepath.Join(dir, "config.conf"), func(t *testing.T) {
				publish(t, dir, "..2026_01_02", text)
				if err := os.RemoveAll(filepath.Join(dir, "..2026_01_01")); err != nil {
					t.Fatal(err)
				}
			}, want)
		})
	}
}

func TestWatchNeedsTheFile(t *testing.T) {
	if _, err := Watch(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("watches a file that does not exist")
	}
}

func TestWatchLeavesPipesAlone(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if _, err := w.WriteString("one"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("/proc/self/fd", strconv.Itoa(int(r.Fd())))
	watchWhile(t, path, func(*testing.T) {}, false)
	if data, err := os.ReadFile(path); err != nil || string(data) != "one" {
		t.Errorf("after Watch the pipe holds %q, %v", data, err)
	}
}

// watchWhile watches a file during a change and checks whether it is reported.
func watchWhile(t *testing.T, path string, change func(*testing.T), want bool) {
	synctest.Test(t, func(t *testing.T) {
		changed, err := Watch(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * lookEvery / 2)
		select {
		case <-changed:
			t.Fatal("reported before it happened")
		default:
		}
		change(t)
		select {
		case <-changed:
			if !want {
				t.Error("reported what is no change")
			}
		case <-time.After(3 * lookEvery):
			if want {
				t.Error("not reported")
			}
		}
	})
}

// publish makes a version of a ConfigMap's volume the current one, as kubelet
// does.
func publish(t *testing.T, dir, version, text string) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, version, "config.conf"), text)
	link(t, version, filepath.Join(dir, "..data_tmp"))
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

// replace renames a new file over another, as editors do.
func replace(t *testing.T, path, text string) {
	t.Helper()
	write(t, path+".new", text)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
