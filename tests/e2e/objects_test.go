// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/util/retry"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

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

// killPod deletes a Pod without giving it time to end.
func (s *scenario) killPod(t *testing.T, name string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // it has ended when the test cleans up
	err := s.client.CoreV1().Pods(s.namespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Fatalf("kill pod %s: %v", name, err)
	}
}

// serverLabels are the labels of the Pods of runPod.
var serverLabels = map[string]string{"app": "server"}

// serverPort is the port of the Services of expose. Pods of runPod serve its target.
var serverPort = corev1.ServicePort{Port: 80, TargetPort: intstr.FromInt32(8080)}

// runPod creates a Pod on a Node, waits until it is ready and returns its name,
// which no other namespace has. When it is deleted it goes on serving until it is
// killed, as it is at the latest when the test ends.
func (s *scenario) runPod(t *testing.T, name, node string) string {
	t.Helper()
	tenMinutes := int64(600)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: s.namespace + "-" + name, Labels: serverLabels},
		Spec: corev1.PodSpec{
			NodeName:                      node,
			TerminationGracePeriodSeconds: &tenMinutes,
			Containers: []corev1.Container{{
				Name: "server", Image: "server", Ports: []corev1.ContainerPort{{ContainerPort: serverPort.TargetPort.IntVal}},
			}},
		},
	}
	s.create(t, pod)
	t.Cleanup(func() { s.killPod(t, pod.Name) })
	testutil.Eventually(t, settleTimeout, "pod "+pod.Name+" is ready", func() error {
		have, err := s.client.CoreV1().Pods(s.namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
		if err == nil && !isReady(have) {
			err = errors.New("it is not")
		}
		return err
	})
	return pod.Name
}

// expose creates a Service with port 80 for the Pods of runPod, changed as the test
// needs it, and returns what the API server has made of it.
func (s *scenario) expose(t *testing.T, name string, change func(*corev1.ServiceSpec)) *corev1.Service {
	t.Helper()
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			Selector: serverLabels,
			Ports:    []corev1.ServicePort{serverPort},
		},
	}
	if change != nil {
		change(&service.Spec)
	}
	s.create(t, service)
	return s.service(t, name)
}

// setIngress gives a Service load-balancer addresses, as a cloud's controller does.
func (s *scenario) setIngress(t *testing.T, name string, ingress ...corev1.LoadBalancerIngress) {
	t.Helper()
	services := s.client.CoreV1().Services(s.namespace)
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		service, err := services.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		service.Status.LoadBalancer.Ingress = ingress
		_, err = services.UpdateStatus(t.Context(), service, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		t.Fatalf("set the load-balancer addresses of service %s: %v", name, err)
	}
}

// updateNode changes our Node.
func (c *cluster) updateNode(t *testing.T, change func(*corev1.Node)) {
	t.Helper()
	nodes := c.client.CoreV1().Nodes()
	ctx := context.WithoutCancel(t.Context()) // it has ended when the test cleans up
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		node, err := nodes.Get(ctx, nodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(node)
		_, err = nodes.Update(ctx, node, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		t.Fatalf("update node %s: %v", nodeName, err)
	}
}

// nodePorts returns where the first port of a Service is reached at the node, IPv4
// first.
func nodePorts(service *corev1.Service) []string {
	var out []string
	for _, addr := range nodeAddrs {
		out = append(out, netip.AddrPortFrom(addr, uint16(service.Spec.Ports[0].NodePort)).String())
	}
	return out
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

// scale sets the number of replicas of a controller of the given resource.
func (s *scenario) scale(t *testing.T, resource, name string, replicas int) {
	t.Helper()
	s.patch(t, resource, name, fmt.Sprintf(`{"spec":{"replicas":%d}}`, replicas))
}

// patch changes an object of one of the resources the examples have.
func (s *scenario) patch(t *testing.T, resource, name, patch string) {
	t.Helper()
	group := s.client.AppsV1().RESTClient()
	if resource == "replicationcontrollers" {
		group = s.client.CoreV1().RESTClient()
	}
	err := group.Patch(types.StrategicMergePatchType).Namespace(s.namespace).
		Resource(resource).Name(name).Body([]byte(patch)).Do(t.Context()).Error()
	if err != nil {
		t.Fatalf("patch %s %s: %v", resource, name, err)
	}
}

// create creates an object in the test's namespace.
func (s *scenario) create(t *testing.T, object runtime.Object) {
	t.Helper()
	if err := create(t.Context(), s.client, s.namespace, object); err != nil {
		t.Fatal(err)
	}
}

// wantReplacement waits until the Pod lost has a successor and returns the
// names of the ready Pods.
func (s *scenario) wantReplacement(t *testing.T, label string, pods []string, lost string) []string {
	t.Helper()
	var names []string
	testutil.Eventually(t, settleTimeout, "a new pod in the place of "+lost, func() error {
		names = s.wantPods(t, label, len(pods))
		if slices.Contains(names, lost) {
			return fmt.Errorf("pod %s is still ready", lost)
		}
		return nil
	})
	return names
}

// wantObjects waits until only n Pods with a label exist, ready or not.
func (s *scenario) wantObjects(t *testing.T, label string, n int) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, fmt.Sprintf("%d pods with %s", n, label), func() error {
		pods, err := s.client.CoreV1().Pods(s.namespace).List(context.Background(), metav1.ListOptions{LabelSelector: label})
		if err != nil {
			return err
		}
		if len(pods.Items) != n {
			return fmt.Errorf("there are %d", len(pods.Items))
		}
		return nil
	})
}

// wantNoOthers waits until all Pods there are, are in one namespace.
func (c *cluster) wantNoOthers(t *testing.T, namespace string) {
	t.Helper()
	testutil.Eventually(t, settleTimeout, "the pods of other tests are gone", func() error {
		pods, err := c.client.CoreV1().Pods(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for i := range pods.Items {
			if pod := &pods.Items[i]; pod.Namespace != namespace {
				return fmt.Errorf("%s/%s is still there", pod.Namespace, pod.Name)
			}
		}
		return nil
	})
}

// setReady makes a Pod pass or fail its readiness probe.
func (s *scenario) setReady(t *testing.T, pod string, ready bool) {
	t.Helper()
	err := patchStatus(t.Context(), s.client, s.namespace, pod, corev1.PodStatus{
		Conditions: []corev1.PodCondition{readyCondition(ready)},
	})
	if err != nil {
		t.Fatalf("set pod %s ready=%v: %v", pod, ready, err)
	}
}

// crash makes a Pod fail: its controller replaces it, and the kubelet takes it
// off the network as soon as it hears of it.
func (s *scenario) crash(t *testing.T, pod string) {
	t.Helper()
	err := patchStatus(t.Context(), s.client, s.namespace, pod, corev1.PodStatus{
		Phase:      corev1.PodFailed,
		Conditions: []corev1.PodCondition{readyCondition(false)},
	})
	if err != nil {
		t.Fatalf("crash pod %s: %v", pod, err)
	}
}
