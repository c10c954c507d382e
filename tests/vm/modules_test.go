// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package vm

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// modules are what the tests use of the kernel and Debian does not build in.
var modules = []string{
	"virtio_pci", "virtio_net",
	"veth", "bridge", "dummy", "ifb", "vxlan", "tun",
	"inet_diag", "tcp_diag", "udp_diag",
	"sch_ingress", "cls_bpf", "nf_tables", "nf_conntrack", "sctp",
}

// module is a kernel module ready for insmod.
type module struct {
	name  string
	image []byte
}

// loadModules returns the named modules and what they depend on, each after its
// dependencies, from dir, the modules directory of a kernel package. Names that
// are built into that kernel are left out. Nothing is read from modules.dep: it
// is made when a kernel is installed.
func loadModules(dir string, names []string) ([]module, error) {
	l := moduleLoader{files: make(map[string]string), done: make(map[string]bool)}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	for file := range strings.FieldsSeq(string(builtin)) {
		l.done[moduleName(file)] = true
	}
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(p string, _ fs.DirEntry, err error) error {
		if strings.Contains(filepath.Base(p), ".ko") {
			l.files[moduleName(p)] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := l.load(name); err != nil {
			return nil, err
		}
	}
	return l.loaded, nil
}

// moduleLoader gathers modules in the order in which they can be loaded.
type moduleLoader struct {
	files  map[string]string // by module name
	done   map[string]bool   // built in or in loaded
	loaded []module
}

// load appends a module after what it depends on.
func (l *moduleLoader) load(name string) error {
	if l.done[name] {
		return nil
	}
	l.done[name] = true
	file, ok := l.files[name]
	if !ok {
		return fmt.Errorf("kernel has no module %s", name)
	}
	image, err := readModule(file)
	if err != nil {
		return err
	}
	depends, err := moduleDepends(image)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, d := range depends {
		if err := l.load(d); err != nil {
			return fmt.Errorf("load %s for %s: %w", d, name, err)
		}
	}
	l.loaded = append(l.loaded, module{name: name, image: image})
	return nil
}

// moduleName returns the name the kernel knows a module's file by.
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModule returns a module's file, uncompressed.
func readModule(file string) ([]byte, error) {
	if !strings.HasSuffix(file, ".xz") {
		return os.ReadFile(file)
	}
	out, err := exec.Command("xz", "-dc", file).Output()
	if err != nil {
		return nil, fmt.Errorf("xz -dc %s: %w", file, err)
	}
	return out, nil
}

// moduleDepends returns the names of the modules that must be loaded before
// this one, as the kernel's build noted them in the module itself.
func moduleDepends(image []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var depends []string
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			for name := range strings.SplitSeq(list, ",") {
				depends = append(depends, moduleName(name))
			}
		}
	}
	return depends, nil
}
