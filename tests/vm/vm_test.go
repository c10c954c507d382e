// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package vm

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// testPackage is a package that has its tests run on each kernel: those that run, a
// regular expression, matches. A package without tests fails.
type testPackage struct{ path, run string }

var packages = []testPackage{
	{"tests/vm/guest", ""},
	{"internal/sandbox", ""},
	// What kernels differ in; much of the rest loads programs again and again, and each
	// time takes an emulated processor ten seconds.
	{"internal/datapath", "^(TestVerifierHasAnEasyTime|TestPrograms|TestTables|TestTablesGrow|TestPinsAreKept|" +
		"TestMapsOutliveTheProcessThatMadeThem|TestHooksThatMayNotReadTheKernel|TestAnotherVersionAnswersAsLongAsItTranslates)$"},
	{"internal/attach", ""},
	{"internal/sockets", ""},
	{"tests/sockets", ""},
	{"tests/sctp", ""},
	{"tests/clock", ""},
}

// kernels are the series scripts/vm-kernels.sh fetches.
var kernels = []string{"6.1", "6.12"}

// limit is how long one kernel may take for all packages.
const limit = 40 * time.Minute

// repository is the root of the source tree.
const repository = "../.."

//go:embed init.sh
var initScript []byte

// TestKernels boots all kernels at once and shows each test that ran there as a subtest,
// named kernel/package/test. FAIRLEAD_VM_RUN selects tests in the machines as
// -run does.
func TestKernels(t *testing.T) {
	if testing.Short() {
		t.Skip("boots virtual machines; not with -short")
	}
	cache := kernelCache(t)
	binaries := t.TempDir()
	for _, p := range packages {
		buildTests(t, p.path, binaryIn(binaries, p.path))
	}
	accelerator := ""
	for _, series := range kernels {
		// Parallel subtests begin when this function has returned; what they share
		// is decided before.
		m := machine{
			kernel:      filepath.Join(cache, series, "vmlinuz"),
			console:     filepath.Join(t.TempDir(), "console"),
			initramfs:   filepath.Join(t.TempDir(), "initramfs"),
			environment: []string{"FAIRLEAD_TEST_STRICT=1", "FAIRLEAD_VM_KERNEL=" + series},
		}
		modules, err := loadModules(filepath.Join(cache, series, "modules"), modules)
		if err != nil {
			t.Fatal(err)
		}
		if accelerator == "" {
			writeInitramfs(t, m.initramfs, modules, nil, "")
			accelerator = chooseAccelerator(t.Context(), m)
		}
		if run := os.Getenv("FAIRLEAD_VM_RUN"); run != "" {
			m.environment = append(m.environment, "FAIRLEAD_VM_RUN="+run)
		}
		m.accelerator = accelerator
		writeInitramfs(t, m.initramfs, modules, packages, binaries)
		t.Run(series, func(t *testing.T) {
			t.Parallel()
			run(t, m)
		})
	}
}

// kernelCache returns the directory the kernels are in. The test is skipped, or
// fails where it must run, when something it needs is not there.
func kernelCache(t *testing.T) string {
	unavailable := t.Skipf
	if os.Getenv("CI") == "true" || os.Getenv("FAIRLEAD_TEST_STRICT") == "1" {
		unavailable = t.Fatalf
	}
	cache := os.Getenv("FAIRLEAD_CACHE")
	if cache == "" {
		cache = ".cache"
	}
	if !filepath.IsAbs(cache) {
		cache = filepath.Join(repository, cache)
	}
	cache = filepath.Join(cache, "kernels")
	for _, series := range kernels {
		if _, err := os.Stat(filepath.Join(cache, series, "vmlinuz")); err != nil {
			unavailable("no kernel %s (run scripts/vm-kernels.sh): %v", series, err)
		}
	}
	for _, program := range []string{"qemu-system-x86_64", "busybox", "ip", "xz"} {
		if _, err := exec.LookPath(program); err != nil {
			unavailable("%v (run scripts/setup.sh)", err)
		}
	}
	return cache
}

func binaryIn(dir, pkg string) string {
	return filepath.Join(dir, strings.ReplaceAll(pkg, "/", "-"))
}

// buildTests builds a package's tests as a static binary.
func buildTests(t *testing.T, pkg, binary string) {
	t.Helper()
	cmd := exec.Command("go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", binary, "./"+pkg)
	cmd.Dir = repository
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the tests of %s: %v\n%s", pkg, err, out)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("package %s has no tests", pkg)
	}
}

// writeInitramfs writes a root file system that loads the modules and runs the
// packages' test binaries from the directory binaries, to file.
func writeInitramfs(t *testing.T, file string, modules []module, packages []testPackage, binaries string) {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	ip, err := exec.LookPath("ip")
	if err != nil {
		t.Fatal(err)
	}
	var root initramfs
	add := func(err error) {
		if err != nil {
			t.Fatalf("write initramfs: %v", err)
		}
	}
	add(root.addFile("bin/busybox", busybox))
	add(root.addProgram("usr/sbin/ip", ip)) // busybox's own lacks most
	root.add("init", 0o755, initScript)
	root.add("etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	root.add("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	root.add("etc/group", 0o644, []byte("root:x:0:\n"))
	for i, m := range modules {
		root.add(fmt.Sprintf("modules/%03d-%s.ko", i, m.name), 0o644, m.image)
	}
	var list strings.Builder
	for _, p := range packages {
		fmt.Fprintln(&list, p.path, p.run)
		add(root.addFile(path.Join("tests", p.path, "test"), binaryIn(binaries, p.path)))
		add(root.addTree(path.Join("tests", p.path, "testdata"), filepath.Join(repository, p.path, "testdata")))
	}
	root.add("packages", 0o644, []byte(list.String()))
	add(os.WriteFile(file, root.finish(), 0o644))
}

// run boots the machine and reports what the tests in it said.
func run(t *testing.T, m machine) {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	start := time.Now()
	var log transcript
	err := m.boot(ctx, func(line string) {
		if strings.HasPrefix(line, markUp) {
			t.Logf("up after %.1f s with %s", time.Since(start).Seconds(), m.accelerator)
		}
		if testing.Verbose() {
			fmt.Printf("%s| %s\n", path.Base(t.Name()), strings.TrimPrefix(line, "\x16"))
		}
		log.add(line)
	})
	for _, p := range packages {
		t.Run(p.path, func(t *testing.T) { log.report(t, p.path) })
	}
	t.Logf("off after %.1f s", time.Since(start).Seconds())
	if err == nil {
		err = log.end()
	}
	if err != nil {
		console, _ := os.ReadFile(m.console)
		t.Errorf("%v\nkernel log:\n%s", err, console)
	}
}
