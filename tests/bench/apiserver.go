// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// apiAddress is where kube-proxy finds its API server, in its own namespace.
const apiAddress = "127.0.0.1:8001"

// kubeNode is the name of the Node that kube-proxy runs on.
const kubeNode = "node"

// apiServer answers the watches of a kube-proxy with objects that never change, so
// that ten thousand Services need no etcd.
type apiServer map[string][]any // objects by the last element of their path

// serveAPI serves the objects of a number of Services in a namespace, until the
// function it returns is called.
func serveAPI(ns *sandbox.Namespace, services int) (stop func() error, err error) {
	objects := apiServer{"nodes": {kubeNodeObject()}, "services": nil, "endpointslices": nil, "servicecidrs": nil}
	for i := range services {
		objects["services"] = append(objects["services"], serviceObject(i))
		objects["endpointslices"] = append(objects["endpointslices"], sliceObject(i))
	}
	listener, err := ns.Listen("tcp", apiAddress)
	if err != nil {
		return nil, fmt.Errorf("serve the API: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /api/v1/{resource}", objects)
	mux.Handle("GET /apis/{group}/{version}/{resource}", objects)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	return func() error {
		err := errors.Join(server.Close(), <-done)
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	}, nil
}

// ServeHTTP answers a watch that asks for what there is, which all of kube-proxy's
// do, and nothing else.
func (a apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	objects, known := a[r.PathValue("resource")]
	if !known || r.FormValue("sendInitialEvents") != "true" {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	events := json.NewEncoder(w)
	// A client that is gone takes no more; there is nothing to be done about it.
	for _, object := range objects {
		_ = events.Encode(map[string]any{"type": "ADDED", "object": object})
	}
	_ = events.Encode(map[string]any{"type": "BOOKMARK", "object": metav1.PartialObjectMetadata{
		TypeMeta: kinds[r.PathValue("resource")],
		ObjectMeta: metav1.ObjectMeta{
			ResourceVersion: "1", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
		},
	}})
	_ = http.NewResponseController(w).Flush()
	<-r.Context().Done()
}

// kinds are the types of what the API server has.
var kinds = map[string]metav1.TypeMeta{
	"nodes":          {APIVersion: "v1", Kind: "Node"},
	"services":       {APIVersion: "v1", Kind: "Service"},
	"endpointslices": {APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
	"servicecidrs":   {APIVersion: "networking.k8s.io/v1", Kind: "ServiceCIDR"},
}

func objectMeta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Namespace: "bench", UID: "1", ResourceVersion: "1"}
}

func kubeNodeObject() corev1.Node {
	node := corev1.Node{TypeMeta: kinds["nodes"], ObjectMeta: objectMeta(kubeNode)}
	node.Namespace = ""
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: nodeAddr.String()}}
	return node
}

// serviceObject is what the API would say of service(i).
func serviceObject(i int) corev1.Service {
	of := service(i)
	s := corev1.Service{TypeMeta: kinds["services"], ObjectMeta: objectMeta(of.Name.Name)}
	s.Spec = corev1.ServiceSpec{
		Type: corev1.ServiceTypeNodePort, ClusterIP: vip(i).String(), ClusterIPs: []string{vip(i).String()},
		IPFamilies:            []corev1.IPFamily{corev1.IPv4Protocol},
		SessionAffinity:       corev1.ServiceAffinityNone,
		ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyCluster,
		InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyCluster),
	}
	for _, p := range of.Ports {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{
			Name: p.Name, Protocol: corev1.Protocol(p.Protocol.String()), Port: int32(p.Number),
			NodePort: int32(p.NodePort), TargetPort: intstr.FromInt32(int32(p.Number)),
		})
	}
	return s
}

// sliceObject is what the API would say of slice(i).
func sliceObject(i int) discoveryv1.EndpointSlice {
	of := slice(i, podAddrs())
	s := discoveryv1.EndpointSlice{
		TypeMeta: kinds["endpointslices"], ObjectMeta: objectMeta(of.Name.Name + "-" + strconv.Itoa(i)),
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	s.Labels = map[string]string{
		discoveryv1.LabelServiceName: of.Name.Name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
	}
	for _, p := range of.Ports {
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{
			Name: new(p.Name), Protocol: new(corev1.Protocol(p.Protocol.String())), Port: new(int32(p.Number)),
		})
	}
	for _, e := range of.Endpoints {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{e.Addr.String()},
			Conditions: discoveryv1.EndpointConditions{Ready: new(true)},
			NodeName:   new(kubeNode),
		})
	}
	return s
}
