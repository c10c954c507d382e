// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Where things are in the image.
const (
	binDir      = "usr/local/bin"
	licencesDir = "usr/share/licenses/fairlead"
)

type file struct {
	content []byte
	mode    int64
}

// layer returns all there is in the image: the binary, and the licences that must
// go where it goes.
func (r release) layer(binary []byte, modules []module) (v1.Layer, error) {
	ours, err := os.ReadFile(filepath.Join(r.root, "LICENSE"))
	if err != nil {
		return nil, err
	}
	files := map[string]file{
		path.Join(binDir, "fairlead"):     {binary, 0o755},
		path.Join(licencesDir, "LICENSE"): {ours, 0o644},
	}
	for _, m := range modules {
		for _, t := range m.texts {
			files[path.Join(licencesDir, m.path, t.path)] = file{t.content, 0o644}
		}
	}
	packed, err := r.pack(files)
	if err != nil {
		return nil, fmt.Errorf("pack files: %w", err)
	}
	return tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed)), nil },
		tarball.WithMediaType(types.OCILayer),
		tarball.WithCompressionLevel(gzip.BestCompression),
	)
}

// pack returns a tar archive of files by their paths, sorted, with the directories
// above them. Everything is root's and of the same age.
func (r release) pack(files map[string]file) ([]byte, error) {
	headers := map[string]*tar.Header{}
	for name, f := range files {
		headers[name] = &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: f.mode, Size: int64(len(f.content))}
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			headers[dir] = &tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}
		}
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		headers[name].ModTime = r.created
		if err := w.WriteHeader(headers[name]); err != nil {
			return nil, err
		}
		if _, err := w.Write(files[name].content); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}

// writeArchive writes the files of a directory to a tar archive.
func writeArchive(archive, dir string) (err error) {
	out, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := out.Close(); err == nil {
			err = closeErr
		}
	}()
	w := tar.NewWriter(out)
	// In lexical order.
	err = filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		header := tar.Header{
			Typeflag: tar.TypeReg, Name: filepath.ToSlash(rel), Mode: 0o644,
			Size: int64(len(content)), ModTime: time.Unix(0, 0),
		}
		if err := w.WriteHeader(&header); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	if err != nil {
		return err
	}
	return w.Close()
}
