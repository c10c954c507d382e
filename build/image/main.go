// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Image makes the OCI image of Fairlead from binaries that have been built, one
// for each architecture, and describes what is in them (SBOM). It needs no
// container engine, no base image and no network: what is not in the binaries it
// takes from the source tree and Go's module cache. `make image` runs it.
//
// The same binaries give the same image, bit for bit.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func main() {
	os.Exit(run())
}

func run() int {
	var r release
	flag.StringVar(&r.root, "root", ".", "root `directory` of the source tree")
	flag.StringVar(&r.version, "version", "", "`version` that the binaries were built with")
	flag.StringVar(&r.revision, "revision", "", "`commit` they were built from")
	out := flag.String("out", "bin", "`directory` for what is made")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: image [flags] ARCHITECTURE=BINARY…")
		flag.PrintDefaults()
	}
	flag.Parse()
	if err := r.make(*out, flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		return 1
	}
	return 0
}

// release is what all of the image has in common.
type release struct {
	root     string // of the source tree
	version  string
	revision string
	created  time.Time
}

// make writes below out
//
//	image/                               the image as an OCI layout
//	fairlead-VERSION.oci.tar             the same as an archive
//	fairlead-VERSION.linux-ARCH.cdx.json what is in the binary, for each one
//
// and says so on standard output. The time that it writes into them is
// SOURCE_DATE_EPOCH.
func (r release) make(out string, binaries []string) error {
	if r.version == "" || r.revision == "" || len(binaries) == 0 {
		return errors.New("needs -version, -revision and a binary (see -help)")
	}
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: want the seconds since 1970: %w", err)
	}
	r.created = time.Unix(epoch, 0).UTC()

	name := filepath.Join(out, "fairlead-"+r.version)
	var parts []part
	for _, arg := range binaries {
		arch, binary, _ := strings.Cut(arg, "=")
		p, err := r.part(v1.Platform{OS: "linux", Architecture: arch}, binary)
		if err != nil {
			return fmt.Errorf("image for linux/%s: %w", arch, err)
		}
		sbom := name + ".linux-" + arch + ".cdx.json"
		if err := os.WriteFile(sbom, p.sbom, 0o644); err != nil {
			return err
		}
		fmt.Println(sbom)
		parts = append(parts, p)
	}
	index, err := r.index(parts)
	if err != nil {
		return fmt.Errorf("make index: %w", err)
	}
	layout := filepath.Join(out, "image")
	if err := r.writeLayout(layout, index); err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	archive := name + ".oci.tar"
	if err := writeArchive(archive, layout); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	fmt.Printf("%s\n%s %s\n", archive, layout, digest)
	return nil
}
