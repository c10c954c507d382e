// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// How changes in the directory are waited for.
const (
	// quietFor is how long nothing must happen before the files are read, so
	// that several writes to a file, or to several, are taken as one.
	quietFor = 50 * time.Millisecond
	// readWithin bounds the wait for quiet.
	readWithin = time.Second
	// lookEvery is the time between two looks at whether the directory is still
	// the one watched. A watch does not tell when the path starts to lead to
	// another directory (git-sync), or to lead to one again.
	lookEvery = time.Second
	// againAfter is the pause before the files are read again when that is asked
	// for: whoever replaces all of them takes a moment.
	againAfter = 2 * time.Second
)

// files is the source that reads manifests in a directory.
type files struct {
	dir     string
	options Options
	log     *zap.Logger

	watcher *fsnotify.Watcher // nil while the directory cannot be watched
	watched fs.FileInfo       // the directory watcher looks at

	read     map[string]version // by file name
	services ServicesReplaced   // as sent last
	slices   SlicesReplaced     // as sent last
	node     nodeDigest
	cidrs    *cidrDigest
	said     []Warning // warnings that were sent and are still true
	synced   bool      // something was sent
	troubled bool      // the directory could not be read when last tried

	ticket  atomic.Uint64 // of the last Refresh
	asked   chan struct{} // holds one while nobody has looked at the ticket
	answers uint64        // the ticket of what is read from now on
	told    uint64        // the ticket that was sent last
}

// version is what a file contained when it was read last.
type version struct {
	sum      [sha256.Size]byte
	manifest manifest
	unread   bool // it could not be read
}

// NewFile returns a source that reads the Services, EndpointSlices, ServiceCIDRs
// and our own Node in the files *.yaml, *.yml and *.json of a directory (not of
// those below it) and reads them again when they change. Each time it sends all
// there is of what has changed. It applies the API's defaults; other objects are
// passed over.
//
// The error says in one line why dir cannot be used.
func NewFile(dir string, o Options, log *zap.Logger) (Source, error) {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("directory of manifests %s does not exist (create it, or correct --source file:DIR)", dir)
	case err != nil:
		return nil, fmt.Errorf("look at directory of manifests: %w", err)
	case !info.IsDir():
		return nil, fmt.Errorf("%s is not a directory (--source file:DIR wants the directory that holds the manifests)", dir)
	}
	return &files{dir: dir, options: o, log: log, read: map[string]version{}, cidrs: newCIDRDigest(), asked: make(chan struct{}, 1)}, nil
}

// Refresh implements Refresher.
func (f *files) Refresh() (ticket uint64) {
	ticket = f.ticket.Add(1)
	select {
	case f.asked <- struct{}{}:
	default:
	}
	return ticket
}

// Run implements Source. It returns an error when the directory cannot be
// watched or read.
func (f *files) Run(ctx context.Context, events chan<- Event) error {
	if err := f.watch(); err != nil {
		return err
	}
	defer f.unwatch()
	if err := f.load(ctx, events); err != nil {
		return err
	}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var due <-chan time.Time // when to read; nil while nothing has happened
	var first time.Time      // when the first thing happened
	var again <-chan time.Time
	for {
		changed, lost := f.notifications()
		select {
		case <-ctx.Done():
			return nil
		case <-due:
			due, first = nil, time.Time{}
			f.reload(ctx, events)
			continue
		case <-look.C:
			f.look(ctx, events)
			continue
		case <-f.asked:
			again = time.After(againAfter)
			continue
		case <-again:
			again, f.answers = nil, f.ticket.Load()
			f.reload(ctx, events)
			continue
		case <-changed:
		case <-lost: // some notifications, since too many came at once
		}
		if first.IsZero() {
			first = time.Now()
		}
		due = time.After(min(quietFor, time.Until(first.Add(readWithin))))
	}
}

// notifications returns the watcher's channels, nil while there is no watcher.
func (f *files) notifications() (changed <-chan fsnotify.Event, lost <-chan error) {
	if f.watcher == nil {
		return nil, nil
	}
	return f.watcher.Events, f.watcher.Errors
}

// watch starts watching the directory that the path leads to now.
func (f *files) watch() error {
	f.unwatch()
	info, err := os.Stat(f.dir)
	if err != nil {
		return fmt.Errorf("watch directory of manifests: %w", err)
	}
	watcher, err := fsnotify.NewWatcher()
	if errors.Is(err, syscall.EMFILE) {
		err = fmt.Errorf("%w (raise the sysctl fs.inotify.max_user_instances or the limit of open files)", err)
	}
	if err != nil {
		return fmt.Errorf("watch directory of manifests %s: %w", f.dir, err)
	}
	if err := watcher.Add(f.dir); err != nil {
		if errors.Is(err, syscall.ENOSPC) {
			err = fmt.Errorf("%w (raise the sysctl fs.inotify.max_user_watches)", err)
		}
		return errors.Join(fmt.Errorf("watch directory of manifests %s: %w", f.dir, err), watcher.Close())
	}
	f.watcher, f.watched = watcher, info
	return nil
}

func (f *files) unwatch() {
	if f.watcher == nil {
		return
	}
	if err := f.watcher.Close(); err != nil {
		f.log.Debug("close file watcher", logfield.File(f.dir), logfield.Error(err))
	}
	f.watcher, f.watched = nil, nil
}

// look makes sure that the directory watched is the one the path leads to, and tries
// again what could not be read: nobody tells when it can be.
func (f *files) look(ctx context.Context, events chan<- Event) {
	info, err := os.Stat(f.dir)
	same := err == nil && f.watched != nil && os.SameFile(info, f.watched)
	switch {
	case err != nil:
		f.unwatch()
	case !same:
		err = f.watch()
	case !f.troubled && !f.anyUnread():
		return
	}
	if err != nil {
		f.inTrouble(ctx, events, err)
		return
	}
	f.reload(ctx, events)
}

// anyUnread tells whether a file could not be read when last tried.
func (f *files) anyUnread() bool {
	for _, v := range f.read {
		if v.unread {
			return true
		}
	}
	return false
}

// reload is load for a source that has started: trouble is a warning.
func (f *files) reload(ctx context.Context, events chan<- Event) {
	if err := f.load(ctx, events); err != nil {
		f.inTrouble(ctx, events, err)
	}
}

// inTrouble warns once that the directory cannot be read.
func (f *files) inTrouble(ctx context.Context, events chan<- Event, err error) {
	if !f.troubled {
		f.troubled = true
		send(ctx, events, Warning{Object: f.dir, Text: err.Error() + ": going on with what was read before"})
	}
}

// load reads the files and sends everything they say, if that is anything new.
// An error means that the directory could not be read; nothing has changed
// then.
func (f *files) load(ctx context.Context, events chan<- Event) error {
	names, err := f.names()
	if err != nil {
		return fmt.Errorf("read directory of manifests: %w", err)
	}
	if f.troubled {
		if len(names) == 0 {
			return nil // just made anew; what was in it will follow
		}
		f.troubled = false
		f.log.Info("directory of manifests is back", logfield.File(f.dir))
	}
	read := make(map[string]version, len(names))
	for _, name := range names {
		if v, ok := f.readFile(name); ok {
			read[name] = v
		}
	}
	f.read = read
	f.sendNew(ctx, events, names)
	return nil
}

// names returns the names of the manifests in the directory, sorted.
func (f *files) names() ([]string, error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") { // an editor's, or the ..data of a ConfigMap
			continue
		}
		switch filepath.Ext(name) {
		case ".yaml", ".yml", ".json":
			names = append(names, name)
		}
	}
	return names, nil
}

// readFile returns what a file says now. ok is false when it is no file, or has
// gone since the directory was listed. A file that cannot be read says what it
// said before.
func (f *files) readFile(name string) (v version, ok bool) {
	path := filepath.Join(f.dir, name)
	before := f.read[name]
	data, err := readRegular(path)
	if errors.Is(err, fs.ErrNotExist) {
		return version{}, false
	}
	if err != nil {
		m := manifest{path: path, broken: true, warnings: []Warning{{Object: path, Text: "left out: " + err.Error()}}}
		m.keep(before.manifest)
		return version{manifest: m, unread: true}, true
	}
	sum := sha256.Sum256(data)
	if sum == before.sum {
		return before, true
	}
	m := parseManifest(path, data, f.options)
	m.keep(before.manifest)
	f.log.Debug("file read", logfield.File(path), logfield.Count(len(m.objects)))
	for _, o := range m.passedOver {
		f.log.Debug("object passed over", logfield.File(path), logfield.Object(o))
	}
	return version{sum: sum, manifest: m}, true
}

// readRegular reads a file. Anything that is not a regular file in the end, such
// as a directory or a named pipe (which would make us wait), does not exist.
func readRegular(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fs.ErrNotExist
	}
	return os.ReadFile(path)
}

// sendNew sends what the files say together, and warnings not sent yet. A ticket that
// was not sent before is sent even if there is nothing new.
func (f *files) sendNew(ctx context.Context, events chan<- Event, names []string) {
	manifests := make([]manifest, 0, len(names))
	for _, name := range names {
		if v, ok := f.read[name]; ok {
			manifests = append(manifests, v.manifest)
		}
	}
	objects, warnings := merge(manifests)
	news := unsaid(f.said, warnings)
	f.said = warnings
	// First, so that whoever waits for the lists has heard them.
	send(ctx, events, news...)
	all := ServicesReplaced{Services: setIn(objects, func(e ServiceSet) lb.Service { return e.Service })}
	allSlices := SlicesReplaced{Slices: setIn(objects, func(e SliceSet) lb.Slice { return e.Slice })}
	if !f.synced || f.answers != f.told || !reflect.DeepEqual(all, f.services) || !reflect.DeepEqual(allSlices, f.slices) {
		f.services, f.slices, f.synced, f.told = all, allSlices, true, f.answers
		send(ctx, events, answering(all, f.told), answering(allSlices, f.told))
	}
	for _, e := range []Event{f.node.replaced(objects), f.cidrs.replaced(objects)} {
		if e != nil {
			send(ctx, events, e)
		}
	}
}

// merge puts together what several files say. When two give the same object,
// the first one wins and a warning says so.
func merge(manifests []manifest) (objects []converted, warnings []Warning) {
	first := map[identity]string{}
	for _, m := range manifests {
		warnings = append(warnings, m.warnings...)
		for _, o := range m.objects {
			if path, taken := first[o.identity()]; taken {
				warnings = append(warnings, Warning{
					Object: m.path,
					Text:   fmt.Sprintf("%s left out: already in %s", title(o.kind, o.name), path),
				})
				continue
			}
			first[o.identity()] = m.path
			objects = append(objects, o)
			warnings = append(warnings, o.warnings...)
		}
	}
	return objects, warnings
}
