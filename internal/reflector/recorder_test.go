// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

var startNotice = Notice{Reason: "Starting", Action: "StartKubeProxy"}

// startRecorder runs a Recorder of node n1 that writes to url.
func startRecorder(t *testing.T, url string, log *zap.Logger) Recorder {
	t.Helper()
	r := newTestRecorder(t, url, log)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return r
}

func newTestRecorder(t *testing.T, url string, log *zap.Logger) Recorder {
	t.Helper()
	_, r, err := NewKubernetes(KubernetesOptions{Options: Options{NodeName: "n1"}, Kubeconfig: kubeconfig(t, url), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// written starts a server that answers as answer says, with what it was sent.
func written(t *testing.T, answer func(http.ResponseWriter)) (events <-chan eventsv1.Event, url string) {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := eventsv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	decoder := serializer.NewCodecFactory(scheme).UniversalDeserializer()
	all := make(chan eventsv1.Event, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var e eventsv1.Event
		body, err := io.ReadAll(r.Body)
		if err == nil {
			_, _, err = decoder.Decode(body, nil, &e)
		}
		if err != nil {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		if want := "/apis/events.k8s.io/v1/namespaces/" + e.Namespace + "/events"; r.Method != http.MethodPost || r.URL.Path != want {
			t.Errorf("%s %s, want POST %s", r.Method, r.URL.Path, want)
		}
		w.Header().Set("Content-Type", "application/json")
		answer(w)
		all <- e
	}))
	t.Cleanup(server.Close)
	return all, server.URL
}

func created(w http.ResponseWriter) {
	w.WriteHeader(http.StatusCreated)
	_, _ = w.Write([]byte(`{"kind":"Event","apiVersion":"events.k8s.io/v1"}`))
}

func nextEvent(t *testing.T, events <-chan eventsv1.Event) eventsv1.Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(15 * time.Second):
		t.Fatal("no event within 15 s")
		return eventsv1.Event{}
	}
}

func TestEventsAreWritten(t *testing.T) {
	events, url := written(t, created)
	r := startRecorder(t, url, zaptest.NewLogger(t))
	r.Node(startNotice)
	r.Service(webName, Notice{Warning: true, Reason: "FailedToStartServiceHealthcheck", Action: "Listen", Note: "port 31000 is taken"})
	want := []eventsv1.Event{{
		ObjectMeta:          metav1.ObjectMeta{Namespace: "default"},
		Type:                "Normal",
		Reason:              "Starting",
		Action:              "StartKubeProxy",
		ReportingController: "fairlead",
		ReportingInstance:   "fairlead-n1",
		Regarding:           corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "n1"},
	}, {
		ObjectMeta:          metav1.ObjectMeta{Namespace: "shop"},
		Type:                "Warning",
		Reason:              "FailedToStartServiceHealthcheck",
		Action:              "Listen",
		Note:                "port 31000 is taken",
		ReportingController: "fairlead",
		ReportingInstance:   "fairlead-n1",
		Regarding:           corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: "shop", Name: "web"},
	}}
	for _, w := range want {
		got := nextEvent(t, events)
		if !strings.HasPrefix(got.Name, w.Regarding.Name+".") || time.Since(got.EventTime.Time) > time.Minute {
			t.Errorf("name %q, time %v", got.Name, got.EventTime)
		}
		if diff := cmp.Diff(w, got, cmpopts.IgnoreFields(eventsv1.Event{}, "TypeMeta", "EventTime", "ObjectMeta.Name")); diff != "" {
			t.Errorf("event (-want +got):\n%s", diff)
		}
	}
}

func TestTheSameEventIsWrittenOnce(t *testing.T) {
	events, url := written(t, created)
	r := startRecorder(t, url, zaptest.NewLogger(t))
	r.Node(startNotice)
	r.Node(startNotice)
	r.Node(Notice{Reason: "Other", Action: "StartKubeProxy"})
	if got := nextEvent(t, events).Reason + " " + nextEvent(t, events).Reason; got != "Starting Other" {
		t.Errorf("events %q, want each once", got)
	}
}

func TestAnEventThatIsRefusedIsLoggedAndLost(t *testing.T) {
	forbidden := apierrors.NewForbidden(eventsv1.Resource("events"), "", &apiMessage{"not allowed"})
	core, logs := observer.New(zapcore.InfoLevel)
	events, url := written(t, func(w http.ResponseWriter) {
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(asStatus(forbidden))
	})
	r := startRecorder(t, url, zap.New(core))
	for range 3 { // what was not written is no repetition
		r.Node(startNotice)
	}
	for range 3 {
		nextEvent(t, events)
	}
	if n := logs.Len(); n != 1 {
		t.Errorf("%d lines in the log, want one for the first failure", n)
	}
}

func TestNotesNeverBlock(t *testing.T) {
	r := newTestRecorder(t, "http://127.0.0.1:1", zap.NewNop()) // not running: nothing is taken from the queue
	for range 10 * maxWaiting {
		r.Node(startNotice)
	}
	NoRecorder().Service(webName, startNotice)
	NoRecorder().Run(t.Context())
}

func TestEventsKeepTheBoundsOfTheAPI(t *testing.T) {
	long := strings.Repeat("a", 252) + "."
	e := newEvent(corev1.ObjectReference{Kind: "Node", Name: long}, Notice{Note: strings.Repeat("é", 600)}, long, time.Now())
	if len(e.Name) > 253 || len(e.ReportingInstance) > 128 || len(e.Note) > 1024 || !utf8.ValidString(e.Note) {
		t.Errorf("name of %d bytes, instance of %d, note of %d (valid: %v)",
			len(e.Name), len(e.ReportingInstance), len(e.Note), utf8.ValidString(e.Note))
	}
}
