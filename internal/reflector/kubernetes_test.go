// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// Paths of what is watched.
const (
	servicesPath = "/api/v1/services"
	slicesPath   = "/apis/discovery.k8s.io/v1/endpointslices"
	nodesPath    = "/api/v1/nodes"
	cidrsPath    = "/apis/networking.k8s.io/v1/servicecidrs"
)

var types = map[string]metav1.TypeMeta{
	servicesPath: {Kind: "Service", APIVersion: "v1"},
	slicesPath:   {Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"},
	nodesPath:    {Kind: "Node", APIVersion: "v1"},
	cidrsPath:    {Kind: "ServiceCIDR", APIVersion: "networking.k8s.io/v1"},
}

// api is as much of an API server as a Reflector needs: lists and watches, in
// JSON.
type api struct {
	streams bool // knows lists that are streamed (sendInitialEvents)

	mu      sync.Mutex
	objects map[string][]runtime.Object         // by path
	refuse  map[string]*apierrors.StatusError   // answer by path, "" for every path
	watches map[string]chan (chan<- watchEvent) // by path, one for each watch that starts
	asked   map[string]metav1.ListOptions       // selectors by path
	version string                              // of every list
	slow    time.Duration                       // before every answer about Services
	from    map[string][]string                 // versions that watches go on from, by path; "list" for those that list
}

type watchEvent struct {
	Type   watch.EventType `json:"type"`
	Object runtime.Object  `json:"object"`
}

func newAPI(t *testing.T, streams bool) (*api, string) {
	t.Helper()
	a := &api{
		streams: streams,
		objects: map[string][]runtime.Object{},
		refuse:  map[string]*apierrors.StatusError{},
		watches: map[string]chan (chan<- watchEvent){},
		asked:   map[string]metav1.ListOptions{},
		version: "7",
		from:    map[string][]string{},
	}
	for path := range types {
		a.watches[path] = make(chan (chan<- watchEvent), 10)
	}
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
	q, path := r.URL.Query(), r.URL.Path
	kind, known := types[path]
	a.mu.Lock()
	refuse, objects, version, slow := cmp.Or(a.refuse[""], a.refuse[path]), a.objects[path], a.version, a.slow
	a.asked[path] = metav1.ListOptions{LabelSelector: q.Get("labelSelector"), FieldSelector: q.Get("fieldSelector")}
	a.mu.Unlock()
	if path == servicesPath {
		time.Sleep(slow)
	}
	streamed := q.Get("sendInitialEvents") == "true"
	if streamed && !a.streams {
		refuse = apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("ListOptions").GroupKind(), "", nil)
	}
	switch {
	case refuse != nil:
		if seconds, ok := apierrors.SuggestsClientDelay(refuse); ok {
			w.Header().Set("Retry-After", strconv.Itoa(seconds))
		}
		w.WriteHeader(int(refuse.Status().Code))
		_ = json.NewEncoder(w).Encode(asStatus(refuse))
	case !known:
		http.NotFound(w, r)
	case q.Get("watch") == "":
		_ = json.NewEncoder(w).Encode(map[string]any{
			"kind": kind.Kind + "List", "apiVersion": kind.APIVersion,
			"metadata": map[string]string{"resourceVersion": version}, "items": objects,
		})
	case q.Get("timeoutSeconds") == "1": // only to see whether we may
		w.(http.Flusher).Flush()
	default:
		a.watch(w, r, objects, streamed)
	}
}

// watch streams the objects when asked to, then what comes over the channel
// that it hands to the test.
func (a *api) watch(w http.ResponseWriter, r *http.Request, objects []runtime.Object, streamed bool) {
	say := func(e watchEvent) {
		_ = json.NewEncoder(w).Encode(e)
		w.(http.Flusher).Flush()
	}
	w.(http.Flusher).Flush()
	if streamed {
		for _, o := range objects {
			say(watchEvent{watch.Added, typed(o)})
		}
		say(watchEvent{watch.Bookmark, &metav1.PartialObjectMetadata{
			TypeMeta: types[r.URL.Path],
			ObjectMeta: metav1.ObjectMeta{
				ResourceVersion: "7", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
			},
		}})
	}
	from := r.URL.Query().Get("resourceVersion")
	if streamed {
		from = "list " + from
	}
	a.set(func() { a.from[r.URL.Path] = append(a.from[r.URL.Path], from) })
	events := make(chan watchEvent)
	a.watches[r.URL.Path] <- events
	for {
		select {
		case e, open := <-events:
			if !open {
				return
			}
			say(e)
			if e.Type == watch.Error {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// watched returns what feeds the next watch of path.
func (a *api) watched(t *testing.T, path string) chan<- watchEvent {
	t.Helper()
	select {
	case events := <-a.watches[path]:
		return events
	case <-time.After(15 * time.Second):
		t.Fatalf("no watch of %s within 15 s", path)
		return nil
	}
}

// typed returns o with its kind, as an API server sends it in a watch.
func typed(o runtime.Object) runtime.Object {
	switch o := o.(type) {
	case *corev1.Service:
		o.TypeMeta, o.ResourceVersion = types[servicesPath], "8"
	case *discoveryv1.EndpointSlice:
		o.TypeMeta, o.ResourceVersion = types[slicesPath], "8"
	case *corev1.Node:
		o.TypeMeta, o.ResourceVersion = types[nodesPath], "8"
	case *networkingv1.ServiceCIDR:
		o.TypeMeta, o.ResourceVersion = types[cidrsPath], "8"
	}
	return o
}

func asStatus(err *apierrors.StatusError) *metav1.Status {
	status := err.Status()
	status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	return &status
}

// forget makes the server forget what a watch has seen: its client lists again.
func forget(watched chan<- watchEvent) {
	watched <- watchEvent{watch.Error, asStatus(apierrors.NewResourceExpired("too old"))}
}

func startKubernetes(t *testing.T, url string, log *zap.Logger) *heard {
	t.Helper()
	return start(t, newKubernetes(t, url, log))
}

func newKubernetes(t *testing.T, url string, log *zap.Logger) *kubernetes {
	t.Helper()
	source, _, err := NewKubernetes(KubernetesOptions{
		Options: Options{NodeName: "n1"}, Kubeconfig: kubeconfig(t, url), Version: "test", Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	return source.(*kubernetes)
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

// firstFour reads the first events of a source: one complete list of each kind,
// in any order.
func (h *heard) firstFour(want ...string) {
	h.t.Helper()
	var got []string
	for range 4 {
		got = append(got, summary(h.next()))
	}
	if diff := gocmp.Diff(want, got, cmpopts.SortSlices(strings.Compare)); diff != "" {
		h.t.Fatalf("first events (-want +got):\n%s", diff)
	}
}

func TestKubernetesSource(t *testing.T) {
	for name, streams := range map[string]bool{"lists that are streamed": true, "lists of older servers": false} {
		t.Run(name, func(t *testing.T) {
			a, url := newAPI(t, streams)
			a.objects[servicesPath] = []runtime.Object{service()}
			a.objects[slicesPath] = []runtime.Object{slice()}
			h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
			h.firstFour("services: shop/web=10.0.0.1", "slices: shop/web-1(1)", "no node", "cidrs:")

			services := a.watched(t, servicesPath)
			services <- watchEvent{watch.Added, typed(service(func(s *corev1.Service) { s.Name = "new" }))}
			h.expect("set shop/new=10.0.0.1")
			services <- watchEvent{watch.Bookmark, typed(&corev1.Service{})}
			services <- watchEvent{watch.Modified, typed(service(func(s *corev1.Service) {
				s.Name, s.Spec.Type = "new", corev1.ServiceTypeExternalName
			}))}
			h.expect("gone shop/new")
			services <- watchEvent{watch.Deleted, typed(service())}
			h.expect("gone shop/web")

			a.set(func() { a.objects[servicesPath] = []runtime.Object{service(serviceIPs(nil, "10.0.0.2"))} })
			forget(services)
			h.expect("services: shop/web=10.0.0.2")
		})
	}
}

func TestOnlyWhatConcernsUsIsAskedFor(t *testing.T) {
	a, url := newAPI(t, true)
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.firstFour("services:", "slices:", "no node", "cidrs:")
	want := map[string]metav1.ListOptions{
		servicesPath: {},
		slicesPath:   {LabelSelector: "!service.kubernetes.io/headless"},
		nodesPath:    {FieldSelector: "metadata.name=n1"},
		cidrsPath:    {},
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if diff := gocmp.Diff(want, a.asked); diff != "" {
		t.Errorf("selectors (-want +got):\n%s", diff)
	}
}

func TestOurNodeIsFollowed(t *testing.T) {
	a, url := newAPI(t, true)
	a.objects[nodesPath] = []runtime.Object{node()}
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.firstFour("services:", "slices:", "node zone=z1 [192.0.2.1] eligible=true", "cidrs:")

	nodes := a.watched(t, nodesPath)
	other := func(n *corev1.Node) { n.Name = "n2" } // from a server that knows no field selectors
	nodes <- watchEvent{watch.Added, typed(node(other))}
	nodes <- watchEvent{watch.Deleted, typed(node(other))}
	nodes <- watchEvent{watch.Modified, typed(node(func(n *corev1.Node) {
		n.Status.Images = []corev1.ContainerImage{{Names: []string{"what we do not read"}}}
	}))}
	nodes <- watchEvent{watch.Modified, typed(node(nodeLabel("topology.kubernetes.io/zone", "z2")))}
	h.expect("node zone=z2 [192.0.2.1] eligible=true")
	nodes <- watchEvent{watch.Deleted, typed(node(nodeLabel("topology.kubernetes.io/zone", "z2")))}
	h.expect("no node")
	nodes <- watchEvent{watch.Added, typed(node())}
	h.expect("node zone=z1 [192.0.2.1] eligible=true")

	// Listed again: what has not changed is no news, what has is.
	forget(nodes)
	nodes = a.watched(t, nodesPath)
	a.set(func() { a.objects[nodesPath] = nil })
	forget(nodes)
	h.expect("no node")
}

func TestServiceCIDRsAreFollowed(t *testing.T) {
	a, url := newAPI(t, true)
	a.objects[cidrsPath] = []runtime.Object{cidr("b", "10.96.0.0/16"), cidr("a", "fd00::/112", "10.0.0.0/16")}
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.firstFour("services:", "slices:", "no node", "cidrs: 10.0.0.0/16 10.96.0.0/16 fd00::/112")

	cidrs := a.watched(t, cidrsPath)
	cidrs <- watchEvent{watch.Added, typed(cidr("c", "10.96.0.0/16"))}   // a second time
	cidrs <- watchEvent{watch.Deleted, typed(cidr("b", "10.96.0.0/16"))} // still in c
	cidrs <- watchEvent{watch.Deleted, typed(cidr("a", "fd00::/112", "10.0.0.0/16"))}
	h.expect("cidrs: 10.96.0.0/16")
	a.set(func() { a.objects[cidrsPath] = []runtime.Object{cidr("d", "10.1.0.0/16")} })
	forget(cidrs)
	h.expect("cidrs: 10.1.0.0/16")
}

func TestServiceCIDRsMayBeMissing(t *testing.T) {
	absent := apierrors.NewGenericServerResponse(http.StatusNotFound, "list", networkingv1.Resource("servicecidrs"), "", "", 0, true)
	forbidden := apierrors.NewForbidden(networkingv1.Resource("servicecidrs"), "", &apiMessage{"not allowed"})
	tests := []struct {
		name   string
		refuse *apierrors.StatusError
		want   string
	}{
		{name: "a server before 1.33 does not have them", refuse: absent, want: "info api server does not have this resource: going on without"},
		{name: "a role may not allow them", refuse: forbidden, want: "warn api server keeps this resource from us: going on without"},
		{name: "a server may fail", refuse: apierrors.NewInternalError(errors.New("storage")),
			want: "warn api server fails to answer for this resource: going on without"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zapcore.InfoLevel)
			a, url := newAPI(t, true)
			a.refuse[cidrsPath] = tt.refuse
			k := newKubernetes(t, url, zap.New(core))
			k.askAgain, k.answerWithin = 10*time.Millisecond, 0
			h := start(t, k)
			h.firstFour("services:", "slices:", "no node", "cidrs:")

			a.set(func() {
				delete(a.refuse, cidrsPath)
				a.objects[cidrsPath] = []runtime.Object{cidr("a", "10.0.0.0/16")}
			})
			h.expect("cidrs: 10.0.0.0/16")
			var lines []string
			for _, l := range logs.All() {
				lines = append(lines, l.Level.String()+" "+l.Message)
			}
			if diff := gocmp.Diff([]string{tt.want}, lines); diff != "" {
				t.Errorf("log (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTriggersThatCount(t *testing.T) {
	a, url := newAPI(t, true)
	at := func(d time.Duration) string { return time.Now().Add(d).Format(time.RFC3339Nano) }
	fresh, later := at(time.Minute), at(2*time.Minute)
	a.objects[slicesPath] = []runtime.Object{
		slice(triggered(at(-time.Hour))),
		slice(triggered(fresh), func(s *discoveryv1.EndpointSlice) { s.Name = "web-2" }),
	}
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.firstFour("services:", "slices: shop/web-1(1) shop/web-2(1)@"+fresh, "no node", "cidrs:")

	slices := a.watched(t, slicesPath)
	slices <- watchEvent{watch.Modified, typed(slice(triggered(at(-time.Hour))))}
	slices <- watchEvent{watch.Modified, typed(slice(triggered(later)))}
	slices <- watchEvent{watch.Modified, typed(slice(triggered("yesterday")))}
	h.expect("set shop/web-1(1)", "set shop/web-1(1)@"+later, "set shop/web-1(1)")
	slices <- watchEvent{watch.Modified, typed(slice(triggered(later)))}
	h.expect("set shop/web-1(1)@" + later)

	// Listed again: only what is new since then counts.
	a.set(func() {
		a.objects[slicesPath][0] = slice(triggered(later))
		a.objects[slicesPath] = append(a.objects[slicesPath],
			slice(triggered(later), func(s *discoveryv1.EndpointSlice) { s.Name = "web-3" }))
	})
	forget(slices)
	h.expect("slices: shop/web-1(1) shop/web-2(1) shop/web-3(1)@" + later)
}

func triggered(at string) func(*discoveryv1.EndpointSlice) {
	return func(s *discoveryv1.EndpointSlice) {
		s.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: at}
	}
}

func TestASliceThatGoesNamesItsService(t *testing.T) {
	a, url := newAPI(t, true)
	a.objects[slicesPath] = []runtime.Object{slice()}
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.firstFour("services:", "slices: shop/web-1(1)", "no node", "cidrs:")
	slices := a.watched(t, slicesPath)
	slices <- watchEvent{watch.Deleted, typed(slice())}
	want := SliceGone{Name: lb.Name{Namespace: "shop", Name: "web-1"}, Service: "web", Family: lb.IPv4}
	if diff := gocmp.Diff(Event(want), h.next()); diff != "" {
		t.Errorf("event (-want +got):\n%s", diff)
	}
}

func TestWarningsAreSentOnce(t *testing.T) {
	a, url := newAPI(t, true)
	bad := func(s *corev1.Service) { s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "bad"}) }
	worse := func(s *corev1.Service) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "bad"}, corev1.ServicePort{Name: "worse"})
	}
	h := startKubernetes(t, url, zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel)))
	h.firstFour("services:", "slices:", "no node", "cidrs:")
	services := a.watched(t, servicesPath)
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
		path   string // every one when empty
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
			name:   "our Node must be allowed, too",
			path:   nodesPath,
			refuse: apierrors.NewForbidden(corev1.Resource("nodes"), "", &apiMessage{"not allowed"}),
			want:   []string{"list nodes", "not allowed", "bind a role that may list and watch services, nodes"},
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
			a.refuse[tt.path] = tt.refuse
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
	source, _, err := NewKubernetes(o)
	if err != nil {
		t.Fatal(err)
	}
	source.(*kubernetes).answerWithin = 0
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
			_, _, err := NewKubernetes(tt.o)
			checkLine(t, err, tt.want...)
		})
	}
}

func TestContactLogsTheFirstFailureTheFirstRefusalAndTheRecovery(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	c := &contact{log: zap.New(core), server: func() string { return "https://x" }, resource: "services"}
	away := apierrors.NewServiceUnavailable("away")

	c.outcome(nil)
	c.outcome(apierrors.NewResourceExpired("too old")) // not a failure
	c.outcome(away)
	c.outcome(away)
	c.outcome(apierrors.NewUnauthorized("token expired"))
	c.outcome(away)
	c.outcome(apierrors.NewUnauthorized("token expired"))
	c.outcome(nil)
	c.outcome(nil)

	var lines []string
	for _, l := range logs.All() {
		lines = append(lines, l.Level.String()+" "+l.Message)
	}
	want := []string{
		"warn api server does not answer: going on with what it said last",
		"warn api server refuses us, or is none that we trust: going on with what it said last",
		"info api server answers again",
	}
	if diff := gocmp.Diff(want, lines); diff != "" {
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
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("levels (-want +got):\n%s", diff)
	}
	quiet(log).With(logfield.Count(1)).Error("with fields")
	if l := logs.All()[logs.Len()-1]; l.Level != zapcore.DebugLevel {
		t.Errorf("level with fields = %v, want debug", l.Level)
	}
}
