// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/util/retry"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
	"github.com/fairlead-lb/fairlead/internal/testutil/controlplane"
)

// nodeName is the name of the only Node.
const nodeName = "node-1"

// cluster is a node with a control plane, a kubelet, an agent and a client pod.
// All tests of TestKubernetes share one.
type cluster struct {
	suite     testing.TB // what the cluster ends with
	node      *sandbox.Node
	control   *controlplane.ControlPlane
	client    kubernetes.Interface // an administrator
	clientPod *sandbox.Namespace
	http      *http.Client   // whose sockets are the client pod's
	account   rbacv1.Subject // whose rights the agent has
	options   testutil.AgentOptions
	agent     *testutil.Agent
}

// startCluster makes a cluster that ends with the test. Its agent has no more
// rights than manifests/ give it.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	cgroup := testutil.Cgroup(t)
	c := &cluster{suite: t, node: testutil.Node(t)}
	c.control = controlplane.Start(t, controlplane.Options{
		Netns:   c.node.Namespace(),
		Address: sandbox.GatewayIPv4.Addr(),
	})
	var err error
	if c.client, err = kubernetes.NewForConfig(c.control.Config()); err != nil {
		t.Fatalf("make a client of the API server: %v", err)
	}
	startKubelet(t, c.client, c.node)
	if c.clientPod, err = c.node.AddPod("client", podAddrs(2)...); err != nil {
		t.Fatal(err)
	}
	c.http = &http.Client{
		Transport: &http.Transport{DialContext: c.clientPod.Dial, DisableKeepAlives: true},
		Timeout:   5 * time.Second,
	}
	c.account = agentAccount(t, c.client)
	c.options = testutil.AgentOptions{
		Netns:      c.node.Namespace(),
		CgroupRoot: cgroup.Path(),
		BPFRoot:    testutil.BPFRoot(t),
		Kubeconfig: c.control.TokenKubeconfig(t, accountToken(t, c.client, c.account)),
		NodeName:   nodeName,
		Unready:    true,
	}
	c.startAgent(t)
	return c
}

// startAgent starts the cluster's agent, which ends with the cluster, and waits
// until it is ready.
func (c *cluster) startAgent(t *testing.T) {
	t.Helper()
	c.agent = testutil.StartAgent(c.suite, c.options)
	c.agent.WaitReady(t)
}

// scenario is a test's own corner of the cluster.
type scenario struct {
	*cluster
	namespace string
}

// scenario makes a namespace for the test. At its end the Services are gone, so
// that NodePorts are free again; the rest of the namespace follows later.
func (c *cluster) scenario(t *testing.T, namespace string) *scenario {
	t.Helper()
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := c.client.CoreV1().Namespaces().Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
		t.Fatalf("create namespace %s: %v", namespace, err)
	}
	t.Cleanup(func() {
		ctx := context.Background() // the test's own has ended
		err := errors.Join(
			c.client.CoreV1().RESTClient().Delete().Namespace(namespace).Resource("services").Do(ctx).Error(),
			c.client.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{}),
		)
		if err != nil {
			t.Errorf("delete namespace %s: %v", namespace, err)
		}
	})
	return &scenario{cluster: c, namespace: namespace}
}

// apply creates the objects of a manifest in the test's namespace.
func (s *scenario) apply(t *testing.T, path string) {
	t.Helper()
	for _, object := range readManifest(t, path) {
		if err := create(t.Context(), s.client, s.namespace, object); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
}

// example returns the path of one of the examples users meet first.
func example(name string) string { return filepath.Join("testdata", "examples", name) }

// readManifest decodes every document of a YAML file.
func readManifest(t *testing.T, path string) []runtime.Object {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var objects []runtime.Object
	documents := yaml.NewDocumentDecoder(file)
	defer documents.Close()
	buffer := make([]byte, 1<<20)
	for {
		n, err := documents.Read(buffer)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("read %s: %v", path, err)
		}
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(buffer[:n], nil, nil)
		if err != nil {
			t.Fatalf("decode %s: %v", path, err)
		}
		objects = append(objects, object)
	}
}

// create creates an object, in the given namespace when objects of its kind
// have one.
func create(ctx context.Context, client kubernetes.Interface, namespace string, object runtime.Object) error {
	var err error
	switch o := object.(type) {
	case *appsv1.Deployment:
		_, err = client.AppsV1().Deployments(namespace).Create(ctx, o, metav1.CreateOptions{})
	case *appsv1.ReplicaSet:
		_, err = client.AppsV1().ReplicaSets(namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.Namespace:
		_, err = client.CoreV1().Namespaces().Create(ctx, o, metav1.CreateOptions{})
	case *corev1.ReplicationController:
		_, err = client.CoreV1().ReplicationControllers(namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.Service:
		_, err = client.CoreV1().Services(namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.ServiceAccount:
		_, err = client.CoreV1().ServiceAccounts(namespace).Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.ClusterRole:
		_, err = client.RbacV1().ClusterRoles().Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.ClusterRoleBinding:
		_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, o, metav1.CreateOptions{})
	default:
		err = errors.New("the test does not know this kind")
	}
	if err != nil {
		return fmt.Errorf("create %s: %w", object.GetObjectKind().GroupVersionKind().Kind, err)
	}
	return nil
}

// service returns a Service as the API server has it.
func (s *scenario) service(t *testing.T, name string) *corev1.Service {
	t.Helper()
	service, err := s.client.CoreV1().Services(s.namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("get service %s: %v", name, err)
	}
	return service
}

// address returns "ClusterIP:port" of a Service's first port.
func (s *scenario) address(t *testing.T, name string) string {
	t.Helper()
	return s.addresses(t, name)[0]
}

// addresses is address for every ClusterIP of the Service.
func (s *scenario) addresses(t *testing.T, name string) []string {
	t.Helper()
	service := s.service(t, name)
	var out []string
	for _, ip := range service.Spec.ClusterIPs {
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			t.Fatalf("service %s: %v", name, err)
		}
		out = append(out, netip.AddrPortFrom(addr, uint16(service.Spec.Ports[0].Port)).String())
	}
	if len(out) == 0 {
		t.Fatalf("service %s has no ClusterIP", name)
	}
	return out
}

// undefinedPort returns addr with a port its Service does not define.
func undefinedPort(addr string) string {
	defined := netip.MustParseAddrPort(addr)
	return netip.AddrPortFrom(defined.Addr(), defined.Port()+1).String()
}

// updateService changes a Service.
func (s *scenario) updateService(t *testing.T, name string, change func(*corev1.Service)) {
	t.Helper()
	services := s.client.CoreV1().Services(s.namespace)
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		service, err := services.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(service)
		_, err = services.Update(t.Context(), service, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		t.Fatalf("update service %s: %v", name, err)
	}
}

// deleteService deletes a Service.
func (s *scenario) deleteService(t *testing.T, name string) {
	t.Helper()
	if err := s.client.CoreV1().Services(s.namespace).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatalf("delete service %s: %v", name, err)
	}
}

// deletePod deletes a Pod as kubectl does.
func (s *scenario) deletePod(t *testing.T, name string) {
	t.Helper()
	if err := s.client.CoreV1().Pods(s.namespace).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatalf("delete pod %s: %v", name, err)
	}
}

// wantPods waits until exactly n Pods with a label are ready and not being
// deleted, and returns their names.
func (s *scenario) wantPods(t *testing.T, label string, n int) []string {
	t.Helper()
	var names []string
	testutil.Eventually(t, settleTimeout, fmt.Sprintf("%d ready pods with %s", n, label), func() error {
		pods, err := s.client.CoreV1().Pods(s.namespace).List(t.Context(), metav1.ListOptions{LabelSelector: label})
		if err != nil {
			return err
		}
		names = names[:0]
		for i := range pods.Items {
			if isReady(&pods.Items[i]) {
				names = append(names, pods.Items[i].Name)
			}
		}
		if len(names) != n {
			return fmt.Errorf("ready are %v", names)
		}
		return nil
	})
	slices.Sort(names)
	return names
}

func isReady(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && pod.Status.Phase == corev1.PodRunning &&
		slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
}
