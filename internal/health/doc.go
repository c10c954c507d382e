// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package health answers load balancers and the kubelet as kube-proxy does. They
// ask the node, at /healthz and /livez, whether its Services are kept up to date,
// and at a Service's health check node port whether the node has endpoints of it
// (KEP-3836).
package health
