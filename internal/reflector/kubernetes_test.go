// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// api is as much of an API server as a Reflector needs: lists and watches of
// two resources, in JSON.
type api struct {
	streams bool // knows lists that are streamed (sendInitialEvents)

	mu       sync.Mutex
	services []corev1.Service
	slices   []discoveryv1.EndpointSlice
	refuse   *apierrors.StatusError // answer to everything, when not nil

	watchers chan chan<- watchEvent // one for each watch of services that starts
	selector chan string            // of each request for slices
}

type watchEvent struct {
	Type   watch.EventType `json:"type"`
	Object runtime.Object  `json:"object"`
}

func newAPI(t *testing.T, streams bool) (*api, string) {
	t.Helper()
	a := &api{streams: streams, watchers: make(chan chan<- watchEvent, 10), selector: make(chan string, 100)}
	server := httptest.NewServer(a)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return a, server.URL
}

func (a *api) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	a.mu.Lock()
	refuse, list := a.refuse, a.list(r.URL.Path)
	a.mu.Unlock()
	q := r.URL.Query()
	streamed := q.Get("sendInitialEvents") == "true"
	if streamed && !a.streams {
		refuse = apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("ListOptions").GroupKind(), "", nil)
	}
	switch {
	case refuse != nil:
		w.WriteHeader(int(refuse.Status().Code))
		status := refuse.Status()
		status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
		_ = json.NewEncoder(w).Encode(&status)
		return
	case list == nil:
		http.NotFound(w, r)
		return
	case strings.HasSuffix(r.URL.Path, "/endpointslices"):
		a.selector <- q.Get("labelSelector")
	}
	switch {
	case q.Get("watch") == "":
		_ = json.NewEncoder(w).Encode(list)
	case q.Get("timeoutSeconds") == "1": // only to see whether we may
		w.(http.Flusher).Flush()
	default:
		a.watch(w, r, list, streamed)
	}
}

func (a *api) list(path string) runtime.Object {
	meta := metav1.ListMeta{ResourceVersion: "7"}
	switch path {
	case "/api/v1/services":
		return &corev1.ServiceList{TypeMeta: metav1.TypeMeta{Kind: "ServiceList", APIVersion: "v1"}, ListMeta: meta, Items: a.services}
	case "/apis/discovery.k8s.io/v1/endpointslices":
		return &discoveryv1.EndpointSliceList{
			TypeMeta: metav1.TypeMeta{Kind: "EndpointSliceList", APIVersion: "discovery.k8s.io/v1"}, ListMeta: meta, Items: a.slices,
		}
	default:
		return nil
	}
}

// watch streams the list when asked to, then what comes over the channel that
// it hands to the test.
func (a *api) watch(w http.ResponseWriter, r *http.Request, list runtime.Object, streamed bool) {
	say := func(e watchEvent) {
		_ = json.NewEncoder(w).Encode(e)
		w.(http.Flusher).Flush()
	}
	w.(http.Flusher).Flush()
	events := make(chan watchEvent)
	end := metav1.ObjectMeta{ResourceVersion: "7", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
	switch list := list.(type) {
	case *corev1.ServiceList:
		for i := range list.Items {
			if streamed {
				say(watchEvent{watch.Added, typed(&list.Items[i])})
			}
		}
		if streamed {
			say(watchEvent{watch.Bookmark, typed(&corev1.Service{ObjectMeta: end})})
		}
		a.watchers <- events
	case *discoveryv1.EndpointSliceList:
		if streamed {
			for i := range list.Items {
				say(watchEvent{watch.Added, typed(&list.Items[i])})
			}
			say(watchEvent{watch.Bookmark, typed(&discoveryv1.EndpointSlice{ObjectMeta: end})})
		}
	}
	for {
		select {
		case e := <-events:
			say(e)
			if e.Type == watch.Error {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// typed returns o with its kind, as an API server sends it in a watch.
func typed(o runtime.Object) runtime.Object {
	switch o := o.(type) {
	case *corev1.Service:
		o.TypeMeta = metav1.TypeMeta{Kind: "Service", APIVersion: "v1"}
		o.ResourceVersion = "8"
	case *discoveryv1.EndpointSlice:
		o.TypeMeta = metav1.TypeMeta{Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"}
	}
	return o
}

func startKubernetes(t *testing.T, url string, log *zap.Logger) *heard {
	t.Helper()
	source, err := NewKubernetes(KubernetesOptions{Kubeconfig: kubeconfig(t, url), Version: "test", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return start(t, source)
}

// kubeconfig returns the path of a file that leads to url.
func kubeconfig(t *testing.T, url string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{apiVersion: v1, kind: Config, current-context: here,
contexts: [{name: here, context: {cluster: here, user: me}}],
clusters: [{name: here, cluster: {server: "` + url + `"}}],
users: [{name: me, user: {token: secret}}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKubernetesSource(t *testing.T) {
	for name, streams := range map[string]bool{"lists that are streamed": true, "lists of older servers": false} {
		t.Run(name, func(t *testing.T) {
			a, url := newAPI(t, streams)
			a.services, a.slices = []corev1.Service{*service()}, []discoveryv1.EndpointSlice{*slice()}
			h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))

			got := []string{summary(h.next()), summary(h.next())}
			want := []string{"services: shop/web=10.0.0.1", "slices: shop/web-1(1)"}
			if diff := cmp.Diff(want, got, cmpopts.SortSlices(strings.Compare)); diff != "" {
				t.Fatalf("first lists (-want +got):\n%s", diff)
			}
			if got, want := <-a.selector, "!service.kubernetes.io/headless"; got != want {
				t.Errorf("label selector of slices = %q, want %q", got, want)
			}

			services := <-a.watchers
			services <- watchEvent{watch.Added, typed(service(func(s *corev1.Service) { s.Name = "new" }))}
			h.expect("set shop/new=10.0.0.1")
			services <- watchEvent{watch.Bookmark, typed(&corev1.Service{})}
			services <- watchEvent{watch.Modified, typed(service(func(s *corev1.Service) {
				s.Name, s.Spec.Type = "new", corev1.ServiceTypeExternalName
			}))}
			h.expect("gone shop/new")
			services <- watchEvent{watch.Deleted, typed(service())}
			h.expect("gone shop/web")

			// The server has forgotten what we saw last: everything is listed again.
			a.set(func() { a.services = []corev1.Service{*service(serviceIPs(nil, "10.0.0.2"))} })
			expired := apierrors.NewResourceExpired("too old").Status()
			expired.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
			services <- watchEvent{watch.Error, &expired}
			h.expect("services: shop/web=10.0.0.2")
		})
	}
}

func TestWarningsAreSentOnce(t *testing.T) {
	a, url := newAPI(t, true)
	bad := func(s *corev1.Service) { s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "bad"}) }
	worse := func(s *corev1.Service) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "bad"}, corev1.ServicePort{Name: "worse"})
	}
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.next()
	h.next()
	services := <-a.watchers
	services <- watchEvent{watch.Added, typed(service(bad))}
	h.expect("set shop/web=10.0.0.1", `warning: web: port "bad" left out: number 0 is not between 1 and 65535`)
	services <- watchEvent{watch.Modified, typed(service(bad))}
	h.expect("set shop/web=10.0.0.1")
	services <- watchEvent{watch.Modified, typed(service(worse))}
	h.expect("set shop/web=10.0.0.1", `warning: web: port "worse" left out: number 0 is not between 1 and 65535`)
	services <- watchEvent{watch.Modified, typed(service())}
	h.expect("set shop/web=10.0.0.1")
	services <- watchEvent{watch.Modified, typed(service(bad))}
	h.expect("set shop/web=10.0.0.1", `warning: web: port "bad" left out: number 0 is not between 1 and 65535`)
}

func TestRefusalIsExplained(t *testing.T) {
	tests := []struct {
		name   string
		refuse *apierrors.StatusError
		want   []string
	}{
		{
			name: "forbidden names resource and verb",
			refuse: apierrors.NewForbidden(corev1.Resource("services"), "",
				&apiMessage{`User "me" cannot list resource "services" in API group "" at the cluster scope`}),
			want: []string{`cannot list resource "services"`, "bind a role"},
		},
		{
			name:   "unauthorized names the context",
			refuse: apierrors.NewUnauthorized("Unauthorized"),
			want:   []string{"does not accept the credentials", `context "here" of kubeconfig`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, url := newAPI(t, true)
			a.refuse = tt.refuse
			checkRun(t, KubernetesOptions{Kubeconfig: kubeconfig(t, url)}, append(tt.want, url)...)
		})
	}
}

type apiMessage struct{ text string }

func (m *apiMessage) Error() string { return m.text }

func TestUntrustedCertificateIsExplained(t *testing.T) {
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = zap.NewStdLog(zap.NewNop())
	server.StartTLS()
	defer server.Close()
	checkRun(t, KubernetesOptions{Kubeconfig: kubeconfig(t, server.URL)}, "certificate", "certificate-authority in context \"here\"")
}

func TestTheWrongSchemeIsExplained(t *testing.T) {
	_, url := newAPI(t, true)
	wrong := strings.Replace(url, "http://", "https://", 1)
	checkRun(t, KubernetesOptions{Kubeconfig: kubeconfig(t, url), APIServer: wrong}, wrong, "needs http://")
}

// checkRun expects Run to fail with one line that contains every part.
func checkRun(t *testing.T, o KubernetesOptions, parts ...string) {
	t.Helper()
	o.Log = zaptest.NewLogger(t)
	source, err := NewKubernetes(o)
	if err != nil {
		t.Fatal(err)
	}
	checkLine(t, source.Run(t.Context(), make(chan Event)), parts...)
}

func checkLine(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	t.Log(err)
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q lacks %q", err, part)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error of more than one line: %q", err)
	}
}

func TestConfigurationErrorsAreExplained(t *testing.T) {
	write := func(text string) string {
		path := filepath.Join(t.TempDir(), "kubeconfig")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	missing := filepath.Join(t.TempDir(), "none")
	noContext := write("{apiVersion: v1, kind: Config}")
	wrongContext := write("{apiVersion: v1, kind: Config, current-context: gone}")
	tests := []struct {
		name string
		o    KubernetesOptions
		want []string
	}{
		{name: "a kubeconfig that is not there", o: KubernetesOptions{Kubeconfig: missing}, want: []string{missing, "no such file"}},
		{name: "a kubeconfig that is none", o: KubernetesOptions{Kubeconfig: write("]")}, want: []string{"read kubeconfig"}},
		{name: "no current context", o: KubernetesOptions{Kubeconfig: noContext}, want: []string{noContext, "no current-context"}},
		{name: "a current context that is not there", o: KubernetesOptions{Kubeconfig: wrongContext}, want: []string{wrongContext, `"gone"`}},
		{name: "neither kubeconfig nor pod", want: []string{"--kubeconfig"}},
		{
			name: "an address that is none",
			o:    KubernetesOptions{Kubeconfig: kubeconfig(t, "http://127.0.0.1"), APIServer: "http://bad host"},
			want: []string{"http://bad host"},
		},
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewKubernetes(tt.o)
			checkLine(t, err, tt.want...)
		})
	}
}

func TestContactLogsTheFirstFailureAndTheRecovery(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	c := &contact{log: zap.New(core), server: "https://x", resource: "services"}
	away := apierrors.NewServiceUnavailable("away")
	over, cancel := context.WithCancel(t.Context())
	cancel()

	c.outcome(t.Context(), nil)
	c.outcome(t.Context(), apierrors.NewResourceExpired("too old")) // not a failure
	c.outcome(t.Context(), away)
	c.outcome(t.Context(), away)
	c.outcome(over, context.Canceled) // not a failure
	c.outcome(t.Context(), nil)
	c.outcome(t.Context(), nil)

	var lines []string
	for _, l := range logs.All() {
		lines = append(lines, l.Level.String()+" "+l.Message)
	}
	want := []string{"warn api server does not answer: going on with what it said last", "info api server answers again"}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func TestClientGoLogsThroughZap(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	log := zap.New(core)
	logrLogger(quiet(log)).Error(nil, "retrying", "n", 1)
	logrLogger(log).Error(nil, "broken")
	want := map[string]zapcore.Level{"retrying": zapcore.DebugLevel, "broken": zapcore.ErrorLevel}
	got := map[string]zapcore.Level{}
	for _, l := range logs.All() {
		got[l.Message] = l.Level
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("levels (-want +got):\n%s", diff)
	}
	quiet(log).With(logfield.Count(1)).Error("with fields")
	if l := logs.All()[logs.Len()-1]; l.Level != zapcore.DebugLevel {
		t.Errorf("level with fields = %v, want debug", l.Level)
	}
}
