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
	"k8s.io/apimachinery/pkg/watch"
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
	// Version is ours; the server sees it in the user agent.
	Version string
	Log     *zap.Logger
}

// kubernetes is the source that watches an API server.
type kubernetes struct {
	options   KubernetesOptions
	server    server
	resources []resource
	// These are the constants askAgain and startTimeout, but in tests.
	askAgain, answerWithin time.Duration
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
// ServiceCIDRs of an API server, and our own Node. It only reads the
// configuration; the server is met by Run. The error says in one line what is
// wrong with the configuration.
func NewKubernetes(o KubernetesOptions) (Source, error) {
	server, err := newServer(o)
	if err != nil {
		return nil, err
	}
	k, err := watching(server, o)
	if err != nil {
		return nil, err
	}
	return k, nil
}

// watching returns a source that watches server.
func watching(server server, o KubernetesOptions) (*kubernetes, error) {
	client, err := server.clients(corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme)
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
	return &kubernetes{options: o, server: server, askAgain: askAgain, answerWithin: startTimeout, resources: []resource{{
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

// Run implements Source. It returns an error when the server cannot be reached
// within startTimeout, or refuses us.
func (k *kubernetes) Run(ctx context.Context, events chan<- Event) error {
	if err := k.meet(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	// The Reflectors report each failed try. Those are for debugging: contact
	// logs the first failure and the recovery.
	ctx = klog.NewContext(ctx, logrLogger(quiet(k.options.Log)))
	var running sync.WaitGroup
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

// reflect lists and watches r until ctx ends.
func (k *kubernetes) reflect(ctx context.Context, r resource, events chan<- Event) {
	c := &contact{
		log:      k.options.Log,
		server:   k.server.config.Host,
		resource: r.name,
	}
	s := &store{
		ctx:     ctx,
		events:  events,
		options: k.options.Options,
		digest:  r.digest,
		said:    map[lb.Name][]Warning{},
	}
	logger := klog.FromContext(ctx)
	cache.NewReflectorWithOptions(observed(r.client, c), r.example, s, cache.ReflectorOptions{
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

// observed is lw with c told about every outcome. The Reflector has no hook for
// failures of its own.
func observed(lw *cache.ListWatch, c *contact) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := lw.ListWithContext(ctx, o)
			c.outcome(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := lw.WatchWithContext(ctx, o)
			c.outcome(ctx, err)
			return w, err
		},
	}
}
