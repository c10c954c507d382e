// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package vm

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// initramfs collects files for the root file system of a test machine. It is
// written in the "newc" cpio format: see the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst.
type initramfs struct {
	buf  bytes.Buffer
	dirs map[string]bool
	ino  int
}

// Type bits of a cpio mode, as in stat(2).
const (
	cpioDir     = 0o040000
	cpioRegular = 0o100000
)

// add puts a regular file at name, which is relative to the root, and the
// directories above it that are not there yet.
func (r *initramfs) add(name string, perm fs.FileMode, data []byte) {
	r.addDir(path.Dir(name))
	r.entry(name, cpioRegular|uint32(perm.Perm()), data)
}

// addDir makes a directory and those above it.
func (r *initramfs) addDir(name string) {
	if name == "." || r.dirs[name] {
		return
	}
	r.addDir(path.Dir(name))
	if r.dirs == nil {
		r.dirs = make(map[string]bool)
	}
	r.dirs[name] = true
	r.entry(name, cpioDir|0o755, nil)
}

// addFile copies a file of the host to name with its permissions.
func (r *initramfs) addFile(name, from string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	r.add(name, info.Mode(), data)
	return nil
}

// addTree copies the regular files below the host's directory from to name. A
// directory that does not exist counts as empty.
func (r *initramfs) addTree(name, from string) error {
	return filepath.WalkDir(from, func(p string, entry fs.DirEntry, err error) error {
		if os.IsNotExist(err) && p == from {
			return nil
		}
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		below, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		return r.addFile(path.Join(name, filepath.ToSlash(below)), p)
	})
}

// addProgram copies a program of the host and the libraries it is linked with to
// where they are there, but for the program itself, which goes to name.
func (r *initramfs) addProgram(name, from string) error {
	if err := r.addFile(name, from); err != nil {
		return err
	}
	out, err := exec.Command("ldd", from).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", from, err)
	}
	// "libz.so.1 => /lib/libz.so.1 (0x7f2b)", and the loader without an arrow.
	for field := range strings.FieldsSeq(string(out)) {
		if filepath.IsAbs(field) {
			if err := r.addFile(strings.TrimPrefix(field, "/"), field); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish returns the archive. Nothing may be added afterwards.
func (r *initramfs) finish() []byte {
	r.entry("TRAILER!!!", 0, nil)
	return r.buf.Bytes()
}

// entry appends one member: a header of fixed-width hexadecimal fields, the
// name with its NUL, the data, the last two padded to 4 bytes.
func (r *initramfs) entry(name string, mode uint32, data []byte) {
	r.ino++
	fields := []int{
		r.ino, int(mode), 0, 0, // inode, mode, owner, group
		1, 0, len(data), // links, time, size
		0, 0, 0, 0, // device, and device number of a special file
		len(name) + 1, 0, // name size, checksum (unused)
	}
	r.buf.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(&r.buf, "%08X", f)
	}
	r.buf.WriteString(name)
	r.buf.WriteByte(0)
	r.pad()
	r.buf.Write(data)
	r.pad()
}

func (r *initramfs) pad() {
	for r.buf.Len()%4 != 0 {
		r.buf.WriteByte(0)
	}
}
