// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// The Nodes of the API. Only the first has an agent, and that is where the
// scheduler puts Pods. The others are a fiction of the API: their Pods, too, are
// behind the one bridge there is.
const (
	nodeName      = "node-1" // in zoneName
	neighbourName = "node-2" // in zoneName
	distantName   = "node-3" // in distantZone

	zoneName    = "north"
	distantZone = "south"
)

// nodeAddrs are the node's own addresses, IPv4 first: those by which the outside knows
// it.
var nodeAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:2::1")}

const (
	// podGrace is how long a deleted pod goes on serving, as a container does that
	// ends with care: long enough for the news to arrive everywhere.
	podGrace = 2 * time.Second
	// defaultGraceSeconds is what the API server gives a Pod that does not say how
	// long it may take to end.
	defaultGraceSeconds = 30
)

// Pods have these host numbers in the node's networks, in turn. There are few
// of them, so that addresses are used again as in real clusters: a connection
// sent to a Pod that is gone reaches another one and is noticed.
const (
	clientHost   = 2
	firstPodHost = 10
	lastPodHost  = 40
)

// kubelet runs the Pods of all Nodes, and stands in for the scheduler.
type kubelet struct {
	client kubernetes.Interface
	node   *sandbox.Node
	pods   listers.PodLister
	queue  workqueue.TypedRateLimitingInterface[cache.ObjectName]

	// The rest belongs to the goroutine of run.
	running  map[cache.ObjectName]*runningPod
	lastHost int
}

// runningPod is what the node has of a Pod.
type runningPod struct {
	uid     types.UID
	host    int
	netns   *sandbox.Namespace
	addrs   []netip.Addr
	servers []*sandbox.Server
	stopAt  time.Time // zero while the Pod is not deleted
}

// startKubelet registers the Nodes and runs the Pods of the cluster until the test
// ends.
func startKubelet(t *testing.T, client kubernetes.Interface, node *sandbox.Node) *kubelet {
	t.Helper()
	k := &kubelet{
		client:   client,
		node:     node,
		queue:    workqueue.NewTypedRateLimitingQueue(podBackoff()),
		running:  map[cache.ObjectName]*runningPod{},
		lastHost: lastPodHost,
	}
	for name, zone := range map[string]string{nodeName: zoneName, neighbourName: zoneName, distantName: distantZone} {
		if err := registerNode(t.Context(), client, name, zone); err != nil {
			t.Fatal(err)
		}
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	informer := factory.Core().V1().Pods().Informer()
	k.pods = factory.Core().V1().Pods().Lister()
	enqueue := func(object any) {
		if name, err := cache.DeletionHandlingObjectToName(object); err == nil {
			k.queue.Add(name)
		}
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    enqueue,
		UpdateFunc: func(_, object any) { enqueue(object) },
		DeleteFunc: enqueue,
	}); err != nil {
		t.Fatalf("watch pods: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { k.run(ctx, t) })
	t.Cleanup(func() {
		cancel()
		k.queue.ShutDown()
		done.Wait()
		factory.Shutdown()
	})
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		t.Fatal("the kubelet's list of pods was not synced")
	}
	return k
}

func podBackoff() workqueue.TypedRateLimiter[cache.ObjectName] {
	return workqueue.NewTypedItemExponentialFailureRateLimiter[cache.ObjectName](20*time.Millisecond, time.Second)
}

// registerNode creates a Node object. Ours has the node's addresses; the others
// need none.
func registerNode(ctx context.Context, client kubernetes.Interface, name, zone string) error {
	object := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: name, Labels: map[string]string{corev1.LabelTopologyZone: zone},
	}}
	object, err := client.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create node: %w", err)
	}
	if name != nodeName {
		return nil
	}
	for _, addr := range nodeAddrs {
		object.Status.Addresses = append(object.Status.Addresses,
			corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: addr.String()})
	}
	if _, err := client.CoreV1().Nodes().UpdateStatus(ctx, object, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("update status of node: %w", err)
	}
	return nil
}

// run handles one Pod after the other until the queue is shut down. What fails
// is tried again, and logged the first time: the API server may be away.
func (k *kubelet) run(ctx context.Context, t *testing.T) {
	for {
		name, shutdown := k.queue.Get()
		if shutdown {
			return
		}
		if err := k.sync(ctx, name); err != nil && ctx.Err() == nil {
			if k.queue.NumRequeues(name) == 0 {
				t.Logf("kubelet: pod %s: %v", name, err)
			}
			k.queue.AddRateLimited(name)
		} else {
			k.queue.Forget(name)
		}
		k.queue.Done(name)
	}
}

// sync takes a Pod one step further.
func (k *kubelet) sync(ctx context.Context, name cache.ObjectName) error {
	pod, err := k.pods.Pods(name.Namespace).Get(name.Name)
	if apierrors.IsNotFound(err) {
		return k.stop(name)
	}
	if err != nil {
		return err
	}
	if running := k.running[name]; running != nil && running.uid != pod.UID {
		if err := k.stop(name); err != nil {
			return err
		}
	}
	switch {
	case pod.DeletionTimestamp != nil:
		return k.terminate(ctx, name, pod)
	case pod.Spec.NodeName == "":
		return k.bind(ctx, pod)
	case pod.Status.Phase == corev1.PodFailed:
		return k.stop(name)
	case pod.Status.Phase == corev1.PodPending:
		return k.start(ctx, name, pod)
	default:
		return nil
	}
}

// bind does the scheduler's work.
func (k *kubelet) bind(ctx context.Context, pod *corev1.Pod) error {
	binding := &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Name: pod.Name, UID: pod.UID},
		Target:     corev1.ObjectReference{Kind: "Node", Name: nodeName},
	}
	err := k.client.CoreV1().Pods(pod.Namespace).Bind(ctx, binding, metav1.CreateOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil // bound or deleted already; the news is on its way
	}
	return err
}

// start gives a Pod its namespace and servers and reports it as ready. When the
// report fails the Pod goes on running and the next call reports it again.
func (k *kubelet) start(ctx context.Context, name cache.ObjectName, pod *corev1.Pod) error {
	if k.running[name] == nil {
		if err := k.launch(name, pod); err != nil {
			return errors.Join(err, k.stop(name))
		}
	}
	status := corev1.PodStatus{
		Phase:      corev1.PodRunning,
		Conditions: []corev1.PodCondition{readyCondition(true)},
	}
	for _, addr := range k.running[name].addrs {
		status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: addr.String()})
	}
	status.PodIP = status.PodIPs[0].IP
	return patchStatus(ctx, k.client, pod.Namespace, pod.Name, status)
}

// launch makes a Pod's namespace with servers, named after the Pod, for HTTP and for
// datagrams on each of its container ports.
func (k *kubelet) launch(name cache.ObjectName, pod *corev1.Pod) error {
	host, err := k.freeHost()
	if err != nil {
		return err
	}
	running := &runningPod{uid: pod.UID, host: host, addrs: podAddrs(host)}
	running.netns, err = k.node.AddPod(fmt.Sprintf("pod%d", host), running.addrs...)
	if err != nil {
		return err
	}
	k.running[name] = running
	for _, container := range pod.Spec.Containers {
		for _, port := range container.Ports {
			for _, serve := range []func(*sandbox.Namespace, string, string) (*sandbox.Server, error){
				sandbox.ServeHTTP, sandbox.ServeUDPEcho,
			} {
				server, err := serve(running.netns, fmt.Sprintf(":%d", port.ContainerPort), pod.Name)
				if err != nil {
					return err
				}
				running.servers = append(running.servers, server)
			}
		}
	}
	return nil
}

// freeHost returns the next host number no Pod has.
func (k *kubelet) freeHost() (int, error) {
	taken := map[int]bool{}
	for _, running := range k.running {
		taken[running.host] = true
	}
	for range lastPodHost - firstPodHost + 1 {
		k.lastHost++
		if k.lastHost > lastPodHost {
			k.lastHost = firstPodHost
		}
		if !taken[k.lastHost] {
			return k.lastHost, nil
		}
	}
	return 0, errors.New("every address of the node is taken")
}

// podAddrs returns the addresses with the given number in the node's networks.
func podAddrs(host int) []netip.Addr {
	v4 := sandbox.GatewayIPv4.Addr().As4()
	v4[3] = byte(host)
	v6 := sandbox.GatewayIPv6.Addr().As16()
	v6[15] = byte(host)
	return []netip.Addr{netip.AddrFrom4(v4), netip.AddrFrom16(v6)}
}

// grace returns how long a deleted Pod goes on serving. One that asks for a time of
// its own takes all of it.
func grace(pod *corev1.Pod) time.Duration {
	if s := pod.Spec.TerminationGracePeriodSeconds; s != nil && *s != defaultGraceSeconds {
		return time.Duration(*s) * time.Second
	}
	return podGrace
}

// terminate ends a deleted Pod when its time is over and then lets its object go.
func (k *kubelet) terminate(ctx context.Context, name cache.ObjectName, pod *corev1.Pod) error {
	if running := k.running[name]; running != nil {
		if running.stopAt.IsZero() {
			running.stopAt = time.Now().Add(grace(pod))
		}
		if left := time.Until(running.stopAt); left > 0 {
			k.queue.AddAfter(name, left)
			return nil
		}
		if err := k.stop(name); err != nil {
			return err
		}
	}
	err := k.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: new(int64),
		Preconditions:      metav1.NewUIDPreconditions(string(pod.UID)),
	})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}

// stop takes a Pod off the network, if it runs.
func (k *kubelet) stop(name cache.ObjectName) error {
	running := k.running[name]
	if running == nil {
		return nil
	}
	var errs []error
	for _, server := range running.servers {
		errs = append(errs, server.Close())
	}
	running.servers = nil
	if err := errors.Join(append(errs, k.node.RemovePod(running.netns))...); err != nil {
		return err
	}
	delete(k.running, name)
	return nil
}

// readyCondition says that a Pod became ready or unready now.
func readyCondition(ready bool) corev1.PodCondition {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	return corev1.PodCondition{Type: corev1.PodReady, Status: status, LastTransitionTime: metav1.Now()}
}

// patchStatus changes the given parts of a Pod's status.
func patchStatus(ctx context.Context, client kubernetes.Interface, namespace, name string, status corev1.PodStatus) error {
	patch, err := json.Marshal(map[string]corev1.PodStatus{"status": status})
	if err != nil {
		return err
	}
	_, err = client.CoreV1().Pods(namespace).Patch(ctx, name, types.StrategicMergePatchType, patch,
		metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
