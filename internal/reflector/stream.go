// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// Bounds on a server's silence. A connection that is dead is found by client-go,
// which pings it; these are for one that lives while nothing comes over it.
const (
	// answerWithin bounds the wait for the answer to a request: for a whole list,
	// or for a watch to begin. A server gives up after a minute itself.
	answerWithin = 2 * time.Minute
	// silentFor is how long a watch may say nothing. A server sends a bookmark
	// every minute.
	silentFor = 3 * time.Minute
	// awayFor is how long a server may be away before we list anew what we watch.
	// A control plane that is restored from a backup takes longer.
	awayFor = time.Minute
	// earlyBy is how much before its time a watch may end without arousing
	// suspicion.
	earlyBy = 10 * time.Second
)

// patience is how long we wait: the constants answerWithin, silentFor and awayFor,
// but in tests.
type patience struct{ answer, silent, away time.Duration }

// stream is how a Reflector lists and watches one resource. It adds what client-go
// does not do: it never waits for a server for ever, and it notices when the server
// is not the one, or not in the state, that it was when we last heard from it. To go
// on from a version that a server has told before it was restored from a backup
// would be to miss, silently and for ever, what happened since; the API has no error
// for that.
type stream struct {
	lists    *cache.ListWatch
	contact  *contact
	log      *zap.Logger
	resource string
	patience

	mu sync.Mutex
	// current makes the next list one of what the server has now, not of what it
	// has in some cache.
	current bool
	doubt   bool // the last watch ended before its time, or a request failed
	// restart ends the Reflector, so that another one lists at once. This one would
	// pause first, for as long as it was used to while the server was away.
	restart func()
}

// reflected returns what the Reflector is to use.
func (s *stream) reflected() *cache.ListWatch {
	return &cache.ListWatch{ListWithContextFunc: s.list, WatchFuncWithContext: s.watch}
}

// list returns a whole list, or a page of one.
func (s *stream) list(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.answer, errSilent)
	defer cancel()
	if o.Continue == "" {
		if err := s.goesOn(ctx, &o); err != nil {
			return nil, err
		}
	}
	list, err := s.lists.ListWithContext(ctx, o)
	s.outcome(ctx, err)
	return list, err
}

// watch begins a watch, which may begin with a whole list.
func (s *stream) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	lists := o.SendInitialEvents != nil && *o.SendInitialEvents
	ctx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(s.answer, func() { cancel(errSilent) })
	w, err := s.begin(ctx, o, lists)
	if err == nil && !late.Stop() {
		w.Stop()
		err = errSilent
	}
	if err != nil {
		late.Stop()
		cancel(nil)
		return nil, err
	}
	var due time.Duration
	if o.TimeoutSeconds != nil {
		due = time.Duration(*o.TimeoutSeconds) * time.Second
	}
	return s.follow(ctx, w, func() { cancel(nil) }, due), nil
}

// begin opens a watch that goes on from the version in o.
func (s *stream) begin(ctx context.Context, o metav1.ListOptions, lists bool) (watch.Interface, error) {
	version := o.ResourceVersion
	if err := s.goesOn(ctx, &o); err != nil {
		return nil, err
	}
	if !lists && o.ResourceVersion != version {
		s.mu.Lock()
		restart := s.restart
		s.mu.Unlock()
		restart()
		return nil, apierrors.NewResourceExpired("the server may have been another when it told version " + version)
	}
	w, err := s.lists.WatchWithContext(ctx, o)
	if err != nil {
		s.outcome(ctx, err)
	}
	return w, err
}

// errSilent is why a request is given up, and errClosed what becomes of one that
// client-go does not want to say why it failed.
var (
	errSilent = errors.New("the server does not answer in time")
	errClosed = errors.New("the server closes the connection")
)

// outcome takes note of how a request ended that was made with ctx.
func (s *stream) outcome(ctx context.Context, err error) {
	switch {
	case err == nil || ctx.Err() == nil:
		s.contact.outcome(err)
	case errors.Is(context.Cause(ctx), errSilent):
		s.contact.outcome(errSilent)
	default: // we are leaving
	}
	if err != nil && !isProtocol(err) {
		s.mu.Lock()
		s.doubt = true
		s.mu.Unlock()
	}
}

// round begins a round with a Reflector that restart ends.
func (s *stream) round(restart func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.restart = restart
}

// refresh makes the next list one of what the server has now.
func (s *stream) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = true
}

// listed takes note that all of a list has arrived, after which it does not matter
// what was before.
func (s *stream) listed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current, s.doubt = false, false
}

// goesOn takes the version away from o if it has none that this server can go on
// from. It asks the server when there is reason for doubt.
func (s *stream) goesOn(ctx context.Context, o *metav1.ListOptions) error {
	s.mu.Lock()
	current, doubt := s.current, s.doubt
	s.mu.Unlock()
	switch version := o.ResourceVersion; {
	case current:
	case version == "" || version == "0" || !doubt:
		return nil
	case s.contact.away() >= s.away:
	default:
		behind, err := s.behind(ctx, version)
		if err != nil {
			s.outcome(ctx, err)
			return err
		}
		s.mu.Lock()
		s.doubt = false
		s.mu.Unlock()
		if !behind {
			return nil
		}
	}
	s.refresh()
	o.ResourceVersion = ""
	return nil
}

// behind tells whether the server has not reached version yet, though a server has
// told it.
func (s *stream) behind(ctx context.Context, version string) (bool, error) {
	list, err := s.lists.ListWithContext(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return false, err
	}
	m, err := meta.ListAccessor(list)
	if err != nil {
		return false, fmt.Errorf("read the version of a list: %w", err)
	}
	now := m.GetResourceVersion()
	order, err := resourceversion.CompareResourceVersion(now, version)
	if err != nil || order >= 0 { // versions need not be numbers before 1.35
		return false, nil
	}
	s.log.Warn("api server is behind what it said before, as one that was restored from a backup: listing anew",
		logfield.Resource(s.resource), logfield.Reason("version "+now+" after "+version))
	return true, nil
}

// follow passes on what w, a watch made with ctx, says until it ends or falls silent.
// due is when the server is to end it.
func (s *stream) follow(ctx context.Context, w watch.Interface, cancel func(), due time.Duration) watch.Interface {
	out := make(chan watch.Event)
	proxy := watch.NewProxyWatcher(out)
	go func() {
		defer close(out)
		defer cancel()
		defer w.Stop()
		begun := time.Now()
		s.pass(ctx, w, out, proxy.StopChan())
		if time.Since(begun) < due-earlyBy {
			s.mu.Lock()
			s.doubt = true
			s.mu.Unlock()
		}
	}()
	return proxy
}

// pass passes on events until from ends or falls silent, or stop is closed. The
// server answers once the watch says something or has lasted for a moment: client-go
// hides many failures behind a watch that just ends.
func (s *stream) pass(ctx context.Context, from watch.Interface, to chan<- watch.Event, stop <-chan struct{}) {
	silence, begun := time.NewTimer(s.silent), time.NewTimer(time.Second)
	defer silence.Stop()
	defer begun.Stop()
	answered := false
	answer := func(err error) {
		if !answered {
			answered = true
			s.outcome(ctx, err)
		}
	}
	for {
		select {
		case e, ok := <-from.ResultChan():
			if !ok {
				answer(errClosed)
				return
			}
			answer(nil)
			select {
			case to <- e:
			case <-stop:
				return
			}
			silence.Reset(s.silent)
		case <-begun.C:
			answer(nil)
		case <-silence.C:
			s.log.Info("api server says nothing: watching anew", logfield.Resource(s.resource))
			return
		case <-stop:
			return
		}
	}
}
