// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/licenseclassifier/v2/assets"
)

// published returns a licence's text as its authors have it.
func published(t *testing.T, file string) []byte {
	t.Helper()
	content, err := assets.ReadLicenseFile("License/" + file)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestCheck(t *testing.T) {
	known, err := assets.DefaultClassifier()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		texts   []text
		want    []string
		failure string
	}{
		{name: "one", texts: []text{{"LICENSE", published(t, "MIT/pristine.txt")}}, want: []string{"MIT"}},
		{
			name:  "two, and a notice",
			texts: []text{{"LICENSE", published(t, "Apache-2.0/pristine.txt")}, {"NOTICE", []byte("by us")}, {"a/LICENSE", published(t, "ISC/license.txt")}},
			want:  []string{"Apache-2.0", "ISC"},
		},
		{name: "none", failure: "has no licence"},
		{name: "a notice alone", texts: []text{{"NOTICE", []byte("by us")}}, failure: "has no licence"},
		{name: "not allowed", texts: []text{{"COPYING", published(t, "GPL-2.0/license.txt")}}, failure: "COPYING is GPL-2.0, which is none of"},
		{
			name:    "not allowed in a part of it",
			texts:   []text{{"LICENSE", published(t, "MIT/pristine.txt")}, {"a/LICENSE", published(t, "AGPL-3.0/license.txt")}},
			failure: "a/LICENSE is AGPL-3.0",
		},
		{name: "not known", texts: []text{{"LICENSE", []byte("Do as you like.")}}, failure: "no licence that is known"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := (&module{path: "m", texts: tt.texts}).check(known)
			if tt.failure != "" {
				if err == nil || !strings.Contains(err.Error(), tt.failure) {
					t.Errorf("%v, error %v; want one with %q", got, err, tt.failure)
				}
				return
			}
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("%v, error %v; want %v", got, err, tt.want)
			}
		})
	}
}

func TestTextsOfPackagesAreFoundAndWrittenOnce(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"LICENSE": "one", "a/b/COPYING.txt": "two", "a/b/licence.go": "code", "c/LICENSE": "not linked", "a/LICENCE-MIT": "one",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	found, err := texts(root, map[string]bool{filepath.Join(root, "a/b"): true})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "out")
	if err := writeTexts(file, []*module{{path: "m", version: "v1", texts: found}}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	rule := strings.Repeat("=", 80)
	want := "\n" + rule + "\nm v1: LICENSE\nm v1: a/LICENCE-MIT\n\none\n\n" + rule + "\nm v1: a/b/COPYING.txt\n\ntwo\n"
	if _, rest, _ := strings.Cut(string(got), "name.\n"); rest != want {
		t.Errorf("written:\n%s\nwant:\n%s", rest, want)
	}
}
