// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const (
	repository = "../.."
	built      = "v0.0.0-test"
	epoch      = "1700000000"
	revision   = "0123456789abcdef0123456789abcdef01234567"
)

var platforms = []string{"linux/amd64", "linux/arm64"}

// TestImage builds the image twice, from copies of the source tree at different
// paths, of different ages and under different umasks, and looks at what is in it.
func TestImage(t *testing.T) {
	if testing.Short() {
		t.Skip("builds for two architectures; not with -short")
	}
	first := makeImage(t, "first", "022", time.Now())
	second := makeImage(t, "a/longer/path", "077", time.Unix(1e9, 0))
	t.Run("is the same wherever and whenever it is built", func(t *testing.T) { wantSame(t, first, second) })

	index, err := imageIndex(filepath.Join(first, "image"))
	must(t, err)
	must(t, validate.Index(index))
	manifest, err := index.IndexManifest()
	must(t, err)
	var found []string
	images := map[string]v1.Image{}
	for _, m := range manifest.Manifests {
		found = append(found, m.Platform.String())
		images[m.Platform.String()], err = index.Image(m.Digest)
		must(t, err)
	}
	if want := append(slices.Clone(platforms), "unknown/unknown", "unknown/unknown"); !slices.Equal(found, want) {
		t.Fatalf("platforms are %q, want %q", found, want)
	}
	for i, platform := range platforms {
		t.Run(platform, func(t *testing.T) {
			arch := path.Base(platform)
			root := extract(t, images[platform])
			t.Run("holds the binary and licences", func(t *testing.T) { wantFiles(t, root) })
			t.Run("says what it is", func(t *testing.T) { wantConfig(t, images[platform], arch) })
			t.Run("is static", func(t *testing.T) { wantStatic(t, filepath.Join(root, binDir, "fairlead"), arch) })
			sbom, err := os.ReadFile(filepath.Join(first, "fairlead-"+built+".linux-"+arch+".cdx.json"))
			must(t, err)
			t.Run("SBOM names all modules", func(t *testing.T) { wantModules(t, sbom, filepath.Join(root, binDir, "fairlead")) })
			t.Run("SBOM refers to it", func(t *testing.T) {
				attached, err := index.Image(manifest.Manifests[len(platforms)+i].Digest)
				must(t, err)
				wantAttached(t, attached, sbom, manifest.Manifests[i].Digest)
			})
			if arch == runtime.GOARCH {
				t.Run("runs with nothing else", func(t *testing.T) { wantRuns(t, root) })
			}
		})
	}
}

// makeImage copies the source tree below a directory of its own, gives all files a
// time, runs make image with a umask and returns the directory of what it made.
func makeImage(t *testing.T, dir, umask string, changed time.Time) string {
	t.Helper()
	list := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = repository
	names, err := list.Output()
	must(t, err)
	dir = filepath.Join(t.TempDir(), dir)
	for name := range strings.SplitSeq(strings.TrimRight(string(names), "\x00"), "\x00") {
		info, err := os.Lstat(filepath.Join(repository, name))
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue
		}
		must(t, err)
		content, err := os.ReadFile(filepath.Join(repository, name))
		must(t, err)
		to := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(to), 0o755))
		must(t, os.WriteFile(to, content, info.Mode().Perm()))
		must(t, os.Chtimes(to, changed, changed))
	}
	start := time.Now()
	build := exec.Command("sh", "-c", `umask "$0" && exec make image VERSION="$1" REVISION="$2" SOURCE_DATE_EPOCH="$3"`,
		umask, built, revision, epoch)
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("make image: %v\n%s", err, out)
	}
	t.Logf("make image took %.1f s", time.Since(start).Seconds())
	return filepath.Join(dir, "bin")
}

// wantSame compares all files below two directories.
func wantSame(t *testing.T, a, b string) {
	one, other := readTree(t, a), readTree(t, b)
	for name := range other {
		if _, ok := one[name]; !ok {
			t.Errorf("%s was made once only", name)
		}
	}
	for name, content := range one {
		if !bytes.Equal(content, other[name]) {
			t.Errorf("%s differs", name)
		}
	}
}

func readTree(t *testing.T, root string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	must(t, filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		files[strings.TrimPrefix(name, root+"/")] = content
		return err
	}))
	return files
}

// imageIndex returns the one image of a layout.
func imageIndex(dir string) (v1.ImageIndex, error) {
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	manifest, err := top.IndexManifest()
	if err != nil {
		return nil, err
	}
	// skopeo and podman take an archive without a name only when there is one.
	if len(manifest.Manifests) != 1 {
		return nil, errors.New("layout has not one image")
	}
	return top.ImageIndex(manifest.Manifests[0].Digest)
}

// extract writes the files of an image to a directory.
func extract(t *testing.T, image v1.Image) string {
	t.Helper()
	root := t.TempDir()
	packed := mutate.Extract(image)
	defer packed.Close()
	for r := tar.NewReader(packed); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return root
		}
		must(t, err)
		if header.Uid != 0 || header.Gid != 0 || header.Mode&0o022 != 0 {
			t.Errorf("%s belongs to %d:%d and has mode %o", header.Name, header.Uid, header.Gid, header.Mode)
		}
		to := filepath.Join(root, header.Name)
		switch header.Typeflag {
		case tar.TypeDir:
			must(t, os.MkdirAll(to, 0o755))
		case tar.TypeReg:
			content, err := io.ReadAll(r)
			must(t, err)
			must(t, os.WriteFile(to, content, fs.FileMode(header.Mode)))
		default:
			t.Errorf("%s is of type %c", header.Name, header.Typeflag)
		}
	}
}

func wantFiles(t *testing.T, root string) {
	files := readTree(t, root)
	for _, name := range []string{
		binDir + "/fairlead",
		licencesDir + "/LICENSE",
		licencesDir + "/std/LICENSE",
		licencesDir + "/github.com/cilium/ebpf/LICENSE",
	} {
		if len(files[name]) == 0 {
			t.Errorf("%s is missing", name)
		}
	}
	for name, content := range files {
		if strings.HasPrefix(name, licencesDir+"/") {
			if bytes.HasPrefix(content, []byte("#!")) || bytes.HasPrefix(content, []byte("\x7fELF")) {
				t.Errorf("%s is a program", name)
			}
		} else if name != binDir+"/fairlead" {
			t.Errorf("%s is in the image", name)
		}
	}
}

func wantConfig(t *testing.T, image v1.Image, arch string) {
	config, err := image.ConfigFile()
	must(t, err)
	if config.OS != "linux" || config.Architecture != arch {
		t.Errorf("is for %s/%s", config.OS, config.Architecture)
	}
	if want := []string{"/usr/local/bin/fairlead"}; !slices.Equal(config.Config.Entrypoint, want) || config.Config.Cmd != nil {
		t.Errorf("runs %q %q, want %q", config.Config.Entrypoint, config.Config.Cmd, want)
	}
	// The manifests name the command without its directory.
	if !slices.Contains(config.Config.Env, "PATH=/usr/local/bin") {
		t.Errorf("environment is %q", config.Config.Env)
	}
	manifest, err := image.Manifest()
	must(t, err)
	for key, want := range map[string]string{
		"title": "fairlead", "source": "https://github.com/fairlead-lb/fairlead", "version": built, "revision": revision,
		"licenses": ourLicence, "created": "2023-11-14T22:13:20Z",
	} {
		if got := manifest.Annotations["org.opencontainers.image."+key]; got != want {
			t.Errorf("annotation %s is %q, want %q", key, got, want)
		}
	}
	if !maps.Equal(config.Config.Labels, manifest.Annotations) {
		t.Errorf("labels are %v", config.Config.Labels)
	}
}

func wantStatic(t *testing.T, binary, arch string) {
	f, err := elf.Open(binary)
	must(t, err)
	defer f.Close()
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]
	if f.Machine != machine || f.Type != elf.ET_EXEC {
		t.Errorf("binary is %v %v, want ET_EXEC %v", f.Type, f.Machine, machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("binary has %v: it is not static", p.Type)
		}
	}
}

func wantModules(t *testing.T, sbom []byte, binary string) {
	var bom cyclonedx.BOM
	must(t, cyclonedx.NewBOMDecoder(bytes.NewReader(sbom), cyclonedx.BOMFileFormatJSON).Decode(&bom))
	if c := bom.Metadata.Component; c.Name != ourPath || c.Version != built {
		t.Errorf("describes %s %s", c.Name, c.Version)
	}
	named := map[string]bool{}
	for _, c := range *bom.Components {
		named[c.Name+" "+c.Version] = true
		if c.Licenses == nil || len(*c.Licenses) == 0 {
			t.Errorf("%s has no licence", c.Name)
		}
	}
	info, err := buildinfo.ReadFile(binary)
	must(t, err)
	want := map[string]bool{"std " + info.GoVersion: true}
	for _, dep := range info.Deps {
		want[dep.Path+" "+dep.Version] = true
	}
	if !maps.Equal(named, want) {
		t.Errorf("names %v,\nwant %v", slices.Sorted(maps.Keys(named)), slices.Sorted(maps.Keys(want)))
	}
}

func wantAttached(t *testing.T, attached v1.Image, sbom []byte, subject v1.Hash) {
	raw, err := attached.RawManifest()
	must(t, err)
	var manifest v1.Manifest
	must(t, json.Unmarshal(raw, &manifest))
	if manifest.ArtifactType != sbomType || manifest.Subject == nil || manifest.Subject.Digest != subject {
		t.Errorf("is of type %q and refers to %v, want %v", manifest.ArtifactType, manifest.Subject, subject)
	}
	layers, err := attached.Layers()
	must(t, err)
	if len(layers) != 1 {
		t.Fatalf("has %d layers", len(layers))
	}
	content, err := layers[0].Compressed()
	must(t, err)
	defer content.Close()
	if got, err := io.ReadAll(content); err != nil || !bytes.Equal(got, sbom) {
		t.Errorf("is not the SBOM that lies beside the image (%v)", err)
	}
}

// wantRuns runs the binary where there is nothing but the image.
func wantRuns(t *testing.T, root string) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" || os.Getenv("FAIRLEAD_TEST_STRICT") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	cmd := exec.Command("/"+binDir+"/fairlead", "version")
	cmd.Dir = "/"
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "fairlead "+built+" ") {
		t.Errorf("fairlead version says %q (%v)", out, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
