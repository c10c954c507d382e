// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
	"github.com/fairlead-lb/fairlead/internal/testutil/controlplane"
)

// cluster is a node with a control plane, a kubelet, an agent and a client pod.
// All tests of TestKubernetes share one.
type cluster struct {
	*dialer            // the client pod
	process *dialer    // processes of the node
	outside *outside   // a machine that is not part of the cluster
	suite   testing.TB // what the cluster ends with
	node    *sandbox.Node
	control *controlplane.ControlPlane
	client  kubernetes.Interface // an administrator
	account rbacv1.Subject       // whose rights the agent has
	options testutil.AgentOptions
	agent   *testutil.Agent
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
	c.outside = connectOutside(t, c.node.Namespace())
	clientPod, err := c.node.AddPod("client", podAddrs(clientHost)...)
	if err != nil {
		t.Fatal(err)
	}
	limitRoutes(t, clientPod)
	c.dialer, c.process = newDialer(clientPod.Dial), newDialer(c.node.Namespace().Dial)
	c.account = agentAccount(t, c.client)
	c.options = testutil.AgentOptions{
		Netns:      c.node.Namespace(),
		CgroupRoot: cgroup.Path(),
		BPFRoot:    testutil.BPFRoot(t),
		Kubeconfig: c.control.TokenKubeconfig(t, accountToken(t, c.client, c.account)),
		NodeName:   nodeName,
		Unready:    true,
	}
	remembered := agent.RememberedPath(c.options.BPFRoot)
	t.Cleanup(func() { _ = os.Remove(remembered) })
	c.startAgent(t)
	return c
}

// limitRoutes leaves a pod with the routes to its neighbours and to the node, which is
// all that connections need whose destination is changed before they are routed. What
// the agent leaves untouched fails at once then. The node would tell the pod the
// same, but only once in a second.
func limitRoutes(t *testing.T, pod *sandbox.Namespace) {
	t.Helper()
	for i, gateway := range []netip.Prefix{sandbox.GatewayIPv4, sandbox.GatewayIPv6} {
		if err := pod.Configure(fmt.Sprintf("route replace %s via %s\nroute delete default via %[2]s", nodeAddrs[i], gateway.Addr())); err != nil {
			t.Fatal(err)
		}
	}
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
	case *corev1.Pod:
		_, err = client.CoreV1().Pods(namespace).Create(ctx, o, metav1.CreateOptions{})
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
