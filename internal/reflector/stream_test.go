// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// named returns a Service of that name.
func named(name string) *corev1.Service {
	return service(func(s *corev1.Service) { s.Name = name })
}

// askedFor returns from which versions watches of path have gone on.
func (a *api) askedFor(path string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.from[path])
}

func TestAWatchThatIsCutGoesOnWhereItWas(t *testing.T) {
	a, url := newAPI(t, true)
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.firstFour("services:", "slices:", "no node", "cidrs:")
	services := a.watched(t, servicesPath)
	services <- watchEvent{watch.Added, typed(named("a"))}
	h.expect("set shop/a=10.0.0.1")
	a.set(func() { a.version = "9" })
	close(services)
	services = a.watched(t, servicesPath)
	services <- watchEvent{watch.Added, typed(named("b"))}
	h.expect("set shop/b=10.0.0.1")
	if diff := gocmp.Diff([]string{"list ", "8"}, a.askedFor(servicesPath)); diff != "" {
		t.Errorf("watches (-want +got):\n%s", diff)
	}
}

// An API server whose etcd was restored from a backup keeps a watch waiting that goes
// on from a version it has not reached yet, and never tells what was undone.
func TestAServerThatWentBackIsListedAnew(t *testing.T) {
	for name, streams := range map[string]bool{"lists that are streamed": true, "lists of older servers": false} {
		t.Run(name, func(t *testing.T) {
			core, logs := observer.New(zapcore.WarnLevel)
			a, url := newAPI(t, streams)
			h := startKubernetes(t, url, zap.New(core))
			h.firstFour("services:", "slices:", "no node", "cidrs:")
			services := a.watched(t, servicesPath)
			services <- watchEvent{watch.Added, typed(named("later"))}
			h.expect("set shop/later=10.0.0.1")
			a.set(func() {
				a.version = "5"
				a.objects[servicesPath] = []runtime.Object{named("earlier")}
			})
			close(services)
			h.expect("services: shop/earlier=10.0.0.1")
			if n := logs.FilterMessageSnippet("is behind what it said before").Len(); n != 1 {
				t.Errorf("logged %d times, want once: %v", n, logs.All())
			}
		})
	}
}

func TestAServerThatWasAwayForLongIsListedAnew(t *testing.T) {
	a, url := newAPI(t, true)
	k := newKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel)))
	k.patience.away = time.Nanosecond
	h := start(t, k)
	h.firstFour("services:", "slices:", "no node", "cidrs:")
	services := a.watched(t, servicesPath)
	services <- watchEvent{watch.Added, typed(named("a"))}
	h.expect("set shop/a=10.0.0.1")
	a.set(func() {
		a.refuse[servicesPath] = apierrors.NewServiceUnavailable("away")
		a.version = "100"
	})
	close(services)
	time.AfterFunc(100*time.Millisecond, func() { a.set(func() { delete(a.refuse, servicesPath) }) })
	h.expect("services:")
}

func TestASilentWatchIsBegunAnew(t *testing.T) {
	a, url := newAPI(t, true)
	k := newKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel)))
	k.patience.silent = 1500 * time.Millisecond // client-go lists anew after less than a second
	h := start(t, k)
	h.firstFour("services:", "slices:", "no node", "cidrs:")
	a.watched(t, servicesPath)
	services := a.watched(t, servicesPath)
	services <- watchEvent{watch.Added, typed(named("a"))}
	h.expect("set shop/a=10.0.0.1")
}

func TestRefreshListsAnew(t *testing.T) {
	for name, streams := range map[string]bool{"lists that are streamed": true, "lists of older servers": false} {
		t.Run(name, func(t *testing.T) {
			a, url := newAPI(t, streams)
			a.objects[servicesPath] = []runtime.Object{named("a")}
			k := newKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel)))
			h := start(t, k)
			h.firstFour("services: shop/a=10.0.0.1", "slices:", "no node", "cidrs:")
			a.watched(t, servicesPath) <- watchEvent{watch.Bookmark, typed(&corev1.Service{})}
			for want := uint64(1); want <= 2; want++ {
				if got := k.Refresh(); got != want {
					t.Fatalf("ticket %d, want %d", got, want)
				}
				for seen := 0; seen < 2; {
					switch e := h.next().(type) {
					case ServicesReplaced:
						seen++
						if e.Ticket != want || len(e.Services) != 1 {
							t.Errorf("%d Services with ticket %d, want 1 with %d", len(e.Services), e.Ticket, want)
						}
					case SlicesReplaced:
						seen++
						if e.Ticket != want {
							t.Errorf("slices with ticket %d, want %d", e.Ticket, want)
						}
					}
				}
				a.watched(t, servicesPath)
			}
			for _, from := range a.askedFor(servicesPath) {
				if streams && from != "list " {
					t.Errorf("a list from version %q, want one of what there is now", from)
				}
			}
		})
	}
}

func TestAnAnswerThatDoesNotComeIsGivenUp(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		<-r.Context().Done()
	}))
	defer server.Close()
	k := newKubernetes(t, server.URL, zap.NewNop())
	core, logs := observer.New(zapcore.WarnLevel)
	s := &stream{
		lists: k.resources[0].client, log: zap.NewNop(), patience: patience{answer: 50 * time.Millisecond},
		restart: func() {}, contact: &contact{log: zap.New(core), server: func() string { return "" }},
	}
	if _, err := s.list(t.Context(), metav1.ListOptions{}); !errors.Is(err, errSilent) {
		t.Errorf("list: %v, want %v", err, errSilent)
	}
	if _, err := s.watch(t.Context(), metav1.ListOptions{}); !errors.Is(err, errSilent) {
		t.Errorf("watch: %v, want %v", err, errSilent)
	}
	if asked.Load() != 2 || logs.Len() != 1 {
		t.Errorf("asked %d times, logged %v", asked.Load(), logs.All())
	}
}

// client-go makes nothing of a connection that ends while a watch begins.
func TestAWatchThatEndsAtOnceIsAFailure(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	s := &stream{log: zap.NewNop(), patience: patience{silent: time.Minute}, contact: &contact{log: zap.New(core), server: func() string { return "" }}}
	for range s.follow(t.Context(), watch.NewEmptyWatch(), func() {}, 0).ResultChan() {
	}
	events := watch.NewFake()
	go events.Add(service())
	lives := s.follow(t.Context(), events, func() {}, 0)
	<-lives.ResultChan()
	lives.Stop()
	var got []string
	for _, l := range logs.All() {
		got = append(got, l.Message)
	}
	want := []string{"api server does not answer: going on with what it said last", "api server answers again"}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func TestAServerThatIsNotThereYetIsWaitedFor(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	a, url := newAPI(t, true)
	a.refuse[""] = apierrors.NewServiceUnavailable("starting")
	k := newKubernetes(t, url, zap.New(core))
	k.answerWithin = 0
	h := start(t, k)
	deadline := time.Now().Add(20 * time.Second)
	for logs.Len() == 0 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	a.set(func() { delete(a.refuse, "") })
	h.firstFour("services:", "slices:", "no node", "cidrs:")
	var got []string
	for _, l := range logs.All() {
		got = append(got, l.Message)
	}
	want := []string{"api server cannot be reached: trying again until it can", "api server answers at last"}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

// While an API server starts it refuses everybody.
func TestARefusalThatPassesIsWaitedFor(t *testing.T) {
	a, url := newAPI(t, true)
	a.refuse[servicesPath] = apierrors.NewForbidden(corev1.Resource("services"), "", &apiMessage{"not allowed"})
	k := newKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel)))
	k.answerWithin = time.Minute
	h := start(t, k)
	time.AfterFunc(100*time.Millisecond, func() { a.set(func() { delete(a.refuse, servicesPath) }) })
	h.firstFour("services:", "slices:", "no node", "cidrs:")
}

func TestAThrottlingServerIsGivenItsTime(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	a, url := newAPI(t, true)
	h := startKubernetes(t, url, zap.New(core))
	h.firstFour("services:", "slices:", "no node", "cidrs:")
	services := a.watched(t, servicesPath)
	services <- watchEvent{watch.Added, typed(named("a"))}
	h.expect("set shop/a=10.0.0.1")
	a.set(func() { a.refuse[servicesPath] = apierrors.NewTooManyRequests("too many", 1) })
	close(services)
	time.AfterFunc(500*time.Millisecond, func() { a.set(func() { delete(a.refuse, servicesPath) }) })
	a.set(func() { a.version = "9" })
	services = a.watched(t, servicesPath)
	services <- watchEvent{watch.Added, typed(named("b"))}
	h.expect("set shop/b=10.0.0.1")
	if logs.Len() != 0 {
		t.Errorf("log: %v", logs.All())
	}
}

func TestASlowServerIsMetAndFollowed(t *testing.T) {
	t.Parallel() // it mostly waits
	a, url := newAPI(t, true)
	a.set(func() {
		a.slow = 3500 * time.Millisecond
		a.objects[servicesPath] = []runtime.Object{named("a")}
	})
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel)))
	h.firstFour("services: shop/a=10.0.0.1", "slices:", "no node", "cidrs:")
}
