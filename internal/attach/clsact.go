// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// clsact attaches by filters of clsact qdiscs, which every kernel has that we
// support. The kernel keeps filters as long as their device.
type clsact struct {
	dir    string
	others []string          // directories of other versions
	events *nl.NetlinkSocket // on which the kernel tells of changes to filters and qdiscs
}

// maxEvents bounds how many messages are read at once before all devices are
// looked at instead.
const maxEvents = 10_000

// filterHook is our filter in a place. Where it is exactly the kernel is asked
// each time, so that nobody else's filter is taken for it.
type filterHook struct {
	way *clsact
	at  place
}

func (h *filterHook) update(prog *ebpf.Program) error { return h.way.put(h.at, prog) }

func (h *filterHook) detach() error { return h.way.remove(h.at) }

func (h *filterHook) close() error { return nil }

func parentOf(dir direction) uint32 {
	if dir == ingress {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

// name returns what our filters are called. Other versions, with other
// directories, have their own.
func (w *clsact) name(dir direction) string { return filterName(dir, w.dir) }

func filterName(dir direction, path string) string { return "fairlead_" + string(dir) + ":" + path }

func (w *clsact) adopt() (map[place]hook, error) {
	var qdiscs []netlink.Qdisc
	err := whole(func() (err error) {
		qdiscs, err = netlink.QdiscList(nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list qdiscs: %w", err)
	}
	found := map[place]hook{}
	var errs []error
	for _, q := range qdiscs {
		if q.Attrs().Parent != netlink.HANDLE_CLSACT {
			continue
		}
		for _, at := range placesOf(q.Attrs().LinkIndex) {
			filters, err := w.filters(at)
			errs = append(errs, err)
			if w.ours(filters, at) != nil {
				found[at] = &filterHook{w, at}
			}
		}
	}
	return found, errors.Join(errs...)
}

func (w *clsact) attach(at place, prog *ebpf.Program) (hook, error) {
	if err := w.addQdisc(at.index); err != nil {
		return nil, err
	}
	if err := w.inheritQdisc(at.index); err != nil {
		return nil, err
	}
	if err := w.put(at, prog); err != nil {
		return nil, err
	}
	return &filterHook{w, at}, nil
}

// put makes the program that of our filter in a place, which is added if there is
// none. Another version's becomes ours.
func (w *clsact) put(at place, prog *ebpf.Program) error {
	filters, err := w.filters(at)
	if err != nil {
		return err
	}
	filter := netlink.BpfFilter{Fd: prog.FD(), Name: w.name(at.dir), DirectAction: true}
	old := w.ours(filters, at)
	if old == nil {
		old = w.theirs(filters, at)
	}
	if old != nil {
		filter.FilterAttrs = old.FilterAttrs
		if err := netlink.FilterReplace(&filter); err != nil {
			return fmt.Errorf("replace filter: %w", err)
		}
		return nil
	}
	filter.FilterAttrs = netlink.FilterAttrs{
		LinkIndex: at.index, Parent: parentOf(at.dir), Protocol: unix.ETH_P_ALL,
		Handle: 1, Priority: freePriority(filters, at.dir),
	}
	err = netlink.FilterAdd(&filter)
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("add filter: %w (load the kernel module cls_bpf)", err)
	case err != nil:
		return fmt.Errorf("add filter: %w", err)
	}
	return nil
}

// freePriority returns the first priority at ingress and the last one at egress
// that no filter has.
func freePriority(filters []netlink.Filter, dir direction) uint16 {
	taken := map[uint16]bool{}
	for _, f := range filters {
		taken[f.Attrs().Priority] = true
	}
	for n := range uint16(math.MaxUint16) {
		priority := 1 + n
		if dir == egress {
			priority = math.MaxUint16 - n
		}
		if !taken[priority] {
			return priority
		}
	}
	return 0 // the kernel chooses, and will find none either
}

func device(index int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

// filters returns all filters of a place, none when there is no qdisc or no
// device.
func (w *clsact) filters(at place) ([]netlink.Filter, error) {
	var found []netlink.Filter
	err := whole(func() (err error) {
		found, err = netlink.FilterList(device(at.index), parentOf(at.dir))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	return found, nil
}

// ours returns our filter among those of a place, nil when it is not there.
func (w *clsact) ours(filters []netlink.Filter, at place) *netlink.BpfFilter {
	return named(filters, w.name(at.dir))
}

// theirs is ours for the filter of another version.
func (w *clsact) theirs(filters []netlink.Filter, at place) *netlink.BpfFilter {
	for _, dir := range w.others {
		if f := named(filters, filterName(at.dir, dir)); f != nil {
			return f
		}
	}
	return nil
}

func named(filters []netlink.Filter, name string) *netlink.BpfFilter {
	for _, f := range filters {
		if f, ok := f.(*netlink.BpfFilter); ok && f.Name == name {
			return f
		}
	}
	return nil
}

// remove takes our filter away, and then the qdisc if nobody needs it.
func (w *clsact) remove(at place) error {
	filters, err := w.filters(at)
	if err != nil {
		return err
	}
	if f := w.ours(filters, at); f != nil {
		if err := netlink.FilterDel(f); err != nil && !isGone(err) {
			return fmt.Errorf("remove filter: %w", err)
		}
	}
	return w.removeQdisc(at.index)
}

// isGone tells whether the kernel did not find what was to be removed: the device,
// the qdisc (EINVAL) or the filter.
func isGone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

func clsactOf(index int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

const qdiscSuffix = "-clsact"

// qdiscMark returns the directory that says that the device's qdisc is ours: it has
// no name of its own, and a BPF file system no files.
func (w *clsact) qdiscMark(index int) string {
	return filepath.Join(w.dir, strconv.Itoa(index)+qdiscSuffix)
}

// addQdisc gives the device a clsact qdisc if it has none.
func (w *clsact) addQdisc(index int) error {
	err := netlink.QdiscAdd(clsactOf(index))
	switch {
	case errors.Is(err, unix.EEXIST):
		return checkQdisc(index)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("add clsact qdisc: %w (load the kernel module sch_ingress)", err)
	case err != nil:
		return fmt.Errorf("add clsact qdisc: %w", err)
	}
	if err := os.MkdirAll(w.qdiscMark(index), 0o700); err != nil {
		return fmt.Errorf("mark qdisc as ours: %w", err)
	}
	return nil
}

// inheritQdisc makes the device's qdisc ours if it is another version's.
func (w *clsact) inheritQdisc(index int) error {
	for _, dir := range w.others {
		if _, err := os.Stat((&clsact{dir: dir}).qdiscMark(index)); err != nil {
			continue
		}
		if err := os.MkdirAll(w.qdiscMark(index), 0o700); err != nil {
			return fmt.Errorf("mark qdisc as ours: %w", err)
		}
	}
	return nil
}

// checkQdisc tells whether the qdisc in the place of a clsact qdisc is one. An
// ingress qdisc would take filters for egress and run them at ingress.
func checkQdisc(index int) error {
	// From Linux 6.8 on there is no answer without the echo, if nobody listens to
	// changes.
	request := nl.NewNetlinkRequest(unix.RTM_GETQDISC, unix.NLM_F_ECHO|unix.NLM_F_ACK)
	request.AddData(&nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: int32(index), Parent: netlink.HANDLE_CLSACT})
	answers, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWQDISC)
	if err != nil {
		return fmt.Errorf("look at qdisc: %w", err)
	}
	for _, answer := range answers {
		attrs, err := nl.ParseRouteAttr(answer[nl.SizeofTcMsg:])
		if err != nil {
			return fmt.Errorf("look at qdisc: %w", err)
		}
		for _, a := range attrs {
			if kind := unix.ByteSliceToString(a.Value); a.Attr.Type == nl.TCA_KIND && kind != "clsact" {
				return fmt.Errorf("its qdisc is of kind %s (whoever has made it must replace it with clsact)", kind)
			}
		}
	}
	return nil
}

// removeQdisc removes the device's clsact qdisc if it is ours and empty.
func (w *clsact) removeQdisc(index int) error {
	if _, err := os.Stat(w.qdiscMark(index)); err != nil {
		return nil
	}
	for _, at := range placesOf(index) {
		if filters, err := w.filters(at); err != nil || len(filters) > 0 {
			return err
		}
	}
	if err := netlink.QdiscDel(clsactOf(index)); err != nil && !isGone(err) {
		return fmt.Errorf("remove clsact qdisc: %w", err)
	}
	return os.Remove(w.qdiscMark(index))
}

// removeQdiscs forgets all qdiscs that are ours, and removes those that are empty.
func (w *clsact) removeQdiscs() error {
	entries, err := os.ReadDir(w.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		number, found := strings.CutSuffix(e.Name(), qdiscSuffix)
		index, err := strconv.Atoi(number)
		if !found || err != nil {
			continue
		}
		errs = append(errs, w.removeQdisc(index))
		if err := os.Remove(w.qdiscMark(index)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// inspect looks at the devices whose filters or qdiscs have changed since the last
// time. One with our name that somebody has put in its place it takes for ours.
func (w *clsact) inspect(hooks map[place]hook) (lost, replaced []place, err error) {
	changed, all, err := w.changes()
	errs := []error{err}
	for at := range hooks {
		if !all && !changed[at.index] {
			continue
		}
		filters, err := w.filters(at)
		errs = append(errs, err)
		if err == nil && w.ours(filters, at) == nil {
			lost = append(lost, at)
		}
	}
	return lost, nil, errors.Join(errs...)
}

// changes returns the devices of which the kernel has told since the last call,
// or all when it may have told of others.
func (w *clsact) changes() (changed map[int]bool, all bool, err error) {
	if w.events == nil {
		w.events, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_TC)
		if err != nil {
			return nil, true, fmt.Errorf("subscribe to filters: %w", err)
		}
		all = true
	}
	soon := unix.NsecToTimeval(1e6) // no less: a deadline that is over hides what is there
	if err := w.events.SetReceiveTimeout(&soon); err != nil {
		return nil, true, err
	}
	changed = map[int]bool{}
	for range maxEvents {
		messages, _, err := w.events.Receive()
		switch {
		case errors.Is(err, unix.EAGAIN):
			return changed, all, nil
		case errors.Is(err, unix.ENOBUFS): // some are lost; those that are left are read
			all = true
		case err != nil:
			return nil, true, errors.Join(fmt.Errorf("read changes of filters: %w", err), w.close())
		}
		for _, m := range messages {
			if len(m.Data) >= nl.SizeofTcMsg {
				changed[int(nl.DeserializeTcMsg(m.Data).Ifindex)] = true
			}
		}
	}
	return nil, true, nil
}

func (w *clsact) close() error {
	if w.events != nil {
		w.events.Close()
		w.events = nil
	}
	return nil
}
