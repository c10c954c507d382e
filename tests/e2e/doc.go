// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package e2e tests Fairlead the way its users meet it: against a real etcd,
// kube-apiserver and kube-controller-manager, with the real agent, and with
// connections from a pod that must arrive where the API says.
//
// Everything runs in one miniature node (package sandbox) without a way out.
// The control plane and the agent live in the node's network namespace. A small
// kubelet gives every Pod a namespace and an HTTP server; it is the only part
// of the cluster that is not the real one, besides the missing scheduler. The
// API has other Nodes, whose Pods are behind the same bridge: what they change is
// what the API says of an endpoint.
package e2e
