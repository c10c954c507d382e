// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// tcx attaches by links (Linux 6.6), which are pinned and so outlive us.
type tcx struct {
	dir    string
	others []string // directories of other versions
}

// tcxHook is a link of ours that is pinned, or is to be.
type tcxHook struct {
	link link.Link
	pin  string
	prog *ebpf.Program  // what we have put in it, nil for nothing
	id   ebpf.ProgramID // of prog, 0 when it is not known
}

func (h *tcxHook) update(prog *ebpf.Program) error {
	if err := h.link.Update(prog); err != nil {
		return err
	}
	h.holds(prog)
	return nil
}

// holds notes that our program is in the link.
func (h *tcxHook) holds(prog *ebpf.Program) {
	h.prog, h.id = prog, 0
	if info, err := prog.Info(); err == nil {
		h.id, _ = info.ID()
	}
}

func (h *tcxHook) close() error { return h.link.Close() }

func (h *tcxHook) detach() error {
	// A link whose device is gone has nothing to detach from; its pin goes all
	// the same.
	_ = h.link.Detach()
	err := os.Remove(h.pin)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, h.link.Close())
}

// device returns the index of the device that the link is on: 0 when that is gone
// or somebody has detached the link by force.
func (h *tcxHook) device() (index int, attach ebpf.AttachType, prog ebpf.ProgramID, err error) {
	info, err := h.link.Info()
	if err != nil {
		return 0, 0, 0, err
	}
	extra := info.TCX()
	if extra == nil {
		return 0, 0, 0, errors.New("not a tcx link")
	}
	return int(extra.Ifindex), ebpf.AttachType(extra.AttachType), info.Program, nil
}

// pinOf returns the name of the pin for a place.
func pinOf(at place) string { return fmt.Sprintf("%d-%s", at.index, at.dir) }

// placeOf is the opposite of pinOf.
func placeOf(pin string) (at place, ok bool) {
	number, dir, _ := strings.Cut(pin, "-")
	index, err := strconv.Atoi(number)
	at = place{index, direction(dir)}
	return at, err == nil && (at.dir == ingress || at.dir == egress)
}

func attachType(dir direction) ebpf.AttachType {
	if dir == ingress {
		return ebpf.AttachTCXIngress
	}
	return ebpf.AttachTCXEgress
}

func (w *tcx) adopt() (map[place]hook, error) {
	entries, err := os.ReadDir(w.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list pinned tc links: %w", err)
	}
	found := map[place]hook{}
	var errs []error
	for _, e := range entries {
		at, ok := placeOf(e.Name())
		if !ok {
			continue
		}
		h, err := w.load(at)
		if err != nil {
			errs = append(errs, err)
		} else if h != nil {
			found[at] = h
		}
	}
	return found, errors.Join(errs...)
}

// load returns the hook that is pinned for a place, nil when there is none. One
// that is not on that device any more, which may be gone or in another
// namespace, is taken away.
func (w *tcx) load(at place) (*tcxHook, error) {
	pin := filepath.Join(w.dir, pinOf(at))
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	h := &tcxHook{link: l, pin: pin}
	index, attach, _, err := h.device()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look at pinned link %s: %w", pin, err), l.Close())
	}
	if index != at.index || attach != attachType(at.dir) {
		return nil, h.detach()
	}
	return h, nil
}

func (w *tcx) attach(at place, prog *ebpf.Program) (hook, error) {
	if h, err := w.takeOver(at, prog); h != nil || err != nil {
		return h, err
	}
	if h, err := w.inherit(at, prog); h != nil || err != nil {
		return h, err
	}
	anchor := link.Head()
	if at.dir == egress {
		anchor = link.Tail()
	}
	l, err := link.AttachTCX(link.TCXOptions{
		Interface: at.index, Program: prog, Attach: attachType(at.dir), Anchor: anchor,
	})
	if err != nil {
		return nil, err
	}
	pin := filepath.Join(w.dir, pinOf(at))
	if err := l.Pin(pin); err != nil {
		_ = l.Close() // detaches
		if errors.Is(err, fs.ErrExist) {
			return w.takeOver(at, prog)
		}
		return nil, fmt.Errorf("pin link %s: %w", pin, err)
	}
	h := &tcxHook{link: l, pin: pin}
	h.holds(prog)
	return h, nil
}

// takeOver puts the program on the link that another process has pinned for the
// place. It returns nil when there is none.
func (w *tcx) takeOver(at place, prog *ebpf.Program) (hook, error) {
	h, err := w.load(at)
	if h == nil || err != nil {
		return nil, err
	}
	if err := h.update(prog); err != nil {
		return nil, errors.Join(err, h.close())
	}
	return h, nil
}

// inherit puts the program on the link that another version has pinned for the place,
// and moves the pin. It returns nil when there is none.
func (w *tcx) inherit(at place, prog *ebpf.Program) (hook, error) {
	for _, dir := range w.others {
		h, err := (&tcx{dir: dir}).load(at)
		if err != nil {
			return nil, err
		}
		if h == nil {
			continue
		}
		pin := filepath.Join(w.dir, pinOf(at))
		err = h.update(prog)
		if err == nil {
			err = os.Rename(h.pin, pin)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("take over link %s: %w", h.pin, err), h.close())
		}
		h.pin = pin
		return h, nil
	}
	return nil, nil
}

// inspect asks each link where it is: nobody tells when one is detached. Pins that
// somebody has removed are made again.
func (w *tcx) inspect(hooks map[place]hook) (lost, replaced []place, err error) {
	pinned, err := w.pins()
	errs := []error{err}
	for at, h := range hooks {
		h := h.(*tcxHook)
		index, _, prog, err := h.device()
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("look at link %s: %w", h.pin, err))
		case index == 0:
			lost = append(lost, at)
		case h.id != 0 && prog != h.id:
			replaced = append(replaced, at)
			errs = append(errs, h.update(h.prog))
		case pinned != nil && !pinned[pinOf(at)]:
			errs = append(errs, h.link.Unpin(), h.link.Pin(h.pin))
		}
	}
	return lost, replaced, errors.Join(errs...)
}

// pins returns the names of what is in the directory, which it makes if it is
// missing.
func (w *tcx) pins() (map[string]bool, error) {
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for tc links: %w", err)
	}
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		return nil, fmt.Errorf("list pinned tc links: %w", err)
	}
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name()] = true
	}
	return names, nil
}

func (w *tcx) close() error { return nil }
