// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// retryAtLeastEvery bounds the pause between two tries to reach a server that
// is away. client-go's own bound of 30 s would leave a node with old endpoints
// for up to a minute after a control plane came back.
const retryAtLeastEvery = 10 * time.Second

// askAgain is how long to wait before asking again for an optional resource
// that the server does not have or keeps from us.
const askAgain = 10 * time.Minute

// KubernetesOptions configure a source that watches an API server.
type KubernetesOptions struct {
	Options
	// Kubeconfig is the path of a kubeconfig file. When it is empty the
	// credentials of the pod we run in are used.
	Kubeconfig string
	// APIServer is the URL to reach the API server at, in place of the one that
	// the kubeconfig or the pod's environment names. May be empty.
	APIServer string
	// QPS and Burst bound the requests per second and how many may exceed that
	// for a moment; 0 for client-go's own bounds, QPS below 0 for none.
	QPS   float32
	Burst int
	// Remembered is the path of a file for the addresses of API servers, which are
	// tried when the configured one cannot be reached. They are root's alone, as is
	// the file. Empty for none.
	Remembered string
	// Version is ours; the server sees it in the user agent.
	Version string
	Log     *zap.Logger
}

// kubernetes is the source that watches an API server.
type kubernetes struct {
	options   KubernetesOptions
	route     *route
	resources []resource
	// These are the constants askAgain and startTimeout, but in tests.
	askAgain, answerWithin time.Duration
	patience               patience

	mu        sync.Mutex
	ticket    uint64        // of the last Refresh
	refreshed chan struct{} // closed by the next one
}

// resource is one kind of objects that is listed and watched.
type resource struct {
	name    string // plural, with the API group when it has one
	example runtime.Object
	client  *cache.ListWatch
	digest  digest
	// optional allows a server not to have this resource, or to keep it from us.
	optional bool
}

// NewKubernetes returns a source that watches the Services, EndpointSlices and
// ServiceCIDRs of an API server, and our own Node, and a Recorder that writes to the
// same server. It only reads the configuration; the server is met by the source's
// Run. The error says in one line what is wrong with the configuration.
func NewKubernetes(o KubernetesOptions) (Source, Recorder, error) {
	server, err := newServer(o)
	if err != nil {
		return nil, nil, err
	}
	route, err := newRoute(server, o)
	if err != nil {
		return nil, nil, err
	}
	k, err := watching(route, o)
	if err != nil {
		return nil, nil, err
	}
	r, err := recording(route, o)
	if err != nil {
		return nil, nil, err
	}
	return k, r, nil
}

// watching returns a source that watches the server that route leads to.
func watching(route *route, o KubernetesOptions) (*kubernetes, error) {
	client, err := route.clients(corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme)
	if err != nil {
		return nil, err
	}
	core, err := client(corev1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	discovery, err := client(discoveryv1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	networking, err := client(networkingv1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	noHeadless := metav1.ListOptions{LabelSelector: "!" + corev1.IsHeadlessService}
	ourNode := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", o.NodeName).String()}
	return &kubernetes{options: o, route: route, askAgain: askAgain, answerWithin: startTimeout,
		patience: patience{answerWithin, silentFor, awayFor}, refreshed: make(chan struct{}), resources: []resource{{
			name:    "services",
			example: &corev1.Service{},
			client:  listWatch(core, "services", metav1.ListOptions{}),
			digest:  serviceDigest{},
		}, {
			name:    "endpointslices.discovery.k8s.io",
			example: &discoveryv1.EndpointSlice{},
			client:  listWatch(discovery, "endpointslices", noHeadless),
			digest:  newSliceDigest(time.Now()),
		}, {
			name:    "nodes",
			example: &corev1.Node{},
			client:  listWatch(core, "nodes", ourNode),
			digest:  &nodeDigest{},
		}, {
			name:     "servicecidrs.networking.k8s.io",
			example:  &networkingv1.ServiceCIDR{},
			client:   listWatch(networking, "servicecidrs", metav1.ListOptions{}),
			digest:   newCIDRDigest(),
			optional: true,
		}}}, nil
}

// listWatch lists and watches what matches the selectors in all namespaces.
func listWatch(client rest.Interface, resource string, selectors metav1.ListOptions) *cache.ListWatch {
	return cache.NewFilteredListWatchFromClient(client, resource, metav1.NamespaceAll, func(o *metav1.ListOptions) {
		o.LabelSelector, o.FieldSelector = selectors.LabelSelector, selectors.FieldSelector
	})
}

// Run implements Source. It returns an error when the server refuses us.
func (k *kubernetes) Run(ctx context.Context, events chan<- Event) error {
	if err := k.meet(ctx); err != nil {
		return err
	}
	// The Reflectors report each failed try. Those are for debugging: contact
	// logs the first failure and the recovery.
	ctx = klog.NewContext(ctx, logrLogger(quiet(k.options.Log)))
	var running sync.WaitGroup
	running.Go(func() { k.route.run(ctx, lookHome) })
	for _, r := range k.resources {
		running.Go(func() {
			if !r.optional || k.await(ctx, r, events) {
				k.reflect(ctx, r, events)
			}
		})
	}
	running.Wait()
	return nil
}

// Address implements Remote.
func (k *kubernetes) Address() (url string, configured bool) { return k.route.address() }

// address returns where the server is asked.
func (k *kubernetes) address() string {
	url, _ := k.Address()
	return url
}

// Refresh implements Refresher.
func (k *kubernetes) Refresh() (ticket uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	close(k.refreshed)
	k.refreshed = make(chan struct{})
	k.ticket++
	return k.ticket
}

// round returns a context that ends with ctx or at the next Refresh, and the ticket
// of the last one.
func (k *kubernetes) round(ctx context.Context) (round context.Context, end func(), ticket uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	round, cancel := context.WithCancel(ctx)
	refreshed := k.refreshed
	go func() {
		defer cancel()
		select {
		case <-refreshed:
		case <-round.Done():
		}
	}()
	return round, cancel, k.ticket
}

// reflect lists and watches r until ctx ends.
func (k *kubernetes) reflect(ctx context.Context, r resource, events chan<- Event) {
	lists := &stream{
		lists: r.client, resource: r.name, log: k.options.Log,
		contact:  &contact{log: k.options.Log, server: k.address, resource: r.name},
		patience: k.patience,
	}
	s := &store{
		ctx:     ctx,
		events:  events,
		options: k.options.Options,
		digest:  r.digest,
		said:    map[lb.Name][]Warning{},
		listed:  lists.listed,
		heard:   k.route.heard,
	}
	for ctx.Err() == nil {
		round, end, ticket := k.round(ctx)
		if ticket > s.ticket {
			s.ticket = ticket
			lists.refresh()
		}
		lists.round(end)
		k.run(round, r, lists.reflected(), s)
		end()
	}
}

// run runs client-go's Reflector until ctx ends.
func (k *kubernetes) run(ctx context.Context, r resource, lists *cache.ListWatch, s *store) {
	logger := klog.FromContext(ctx)
	cache.NewReflectorWithOptions(lists, r.example, s, cache.ReflectorOptions{
		Logger: &logger,
		Name:   r.name,
		Backoff: &wait.Backoff{
			Duration: 500 * time.Millisecond,
			Cap:      retryAtLeastEvery,
			Steps:    10,
			Factor:   2,
			Jitter:   1, // up to twice as long, so that nodes do not come back all at once
		},
	}).RunWithContext(ctx)
}
