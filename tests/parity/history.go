// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"encoding/json"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// nodeName is the node both sides work on.
const nodeName = "node-1"

// History is what happens to a cluster, in order.
type History []Step

// Step is one thing that happens: exactly one of the pointers is set. Objects
// are shared and never changed once they are in a history.
type Step struct {
	Service       *corev1.Service // created or changed
	Slice         *discoveryv1.EndpointSlice
	Node          *corev1.Node
	DeleteService *types.NamespacedName
	DeleteSlice   *types.NamespacedName
	// Quiet tells that nobody looks at the outcome before the next step, so that
	// both sides take the steps as one batch.
	Quiet bool
}

// String returns the history as kubectl-style YAML, one document for each step.
func (h History) String() string {
	var b strings.Builder
	for i, step := range h {
		fmt.Fprintf(&b, "--- # step %d: %s\n%s", i+1, step.title(), step.manifest())
	}
	return b.String()
}

func (s Step) title() string {
	title := "node"
	switch {
	case s.Service != nil:
		title = "set Service " + s.Service.Namespace + "/" + s.Service.Name
	case s.Slice != nil:
		title = "set EndpointSlice " + s.Slice.Namespace + "/" + s.Slice.Name
	case s.DeleteService != nil:
		title = "delete Service " + s.DeleteService.String()
	case s.DeleteSlice != nil:
		title = "delete EndpointSlice " + s.DeleteSlice.String()
	}
	if s.Quiet {
		title += " (in one batch with the next step)"
	}
	return title
}

// manifest returns the object of the step as YAML, "" for a deletion.
func (s Step) manifest() string {
	var object any
	switch {
	case s.Service != nil:
		o := *s.Service
		o.APIVersion, o.Kind = "v1", "Service"
		object = o
	case s.Slice != nil:
		o := *s.Slice
		o.APIVersion, o.Kind = "discovery.k8s.io/v1", "EndpointSlice"
		object = o
	case s.Node != nil:
		o := *s.Node
		o.APIVersion, o.Kind = "v1", "Node"
		object = o
	default:
		return ""
	}
	text, err := plain(object)
	if err != nil {
		return "# " + err.Error() + "\n"
	}
	return text
}

// plain returns object as YAML without the fields that only say that they are
// empty.
func plain(object any) (string, error) {
	text, err := json.Marshal(object)
	if err != nil {
		return "", fmt.Errorf("print object: %w", err)
	}
	var tree any
	if err := json.Unmarshal(text, &tree); err != nil {
		return "", fmt.Errorf("print object: %w", err)
	}
	prune(tree)
	out, err := yaml.Marshal(tree)
	if err != nil {
		return "", fmt.Errorf("print object: %w", err)
	}
	return string(out), nil
}

// unset are fields that mean nothing to a proxy and are printed although nobody
// set them.
var unset = map[string]bool{"targetPort": true, "nodeInfo": true, "daemonEndpoints": true}

// prune removes null, {} and unset fields from the maps in tree. An empty list
// stays.
func prune(tree any) {
	switch node := tree.(type) {
	case []any:
		for _, child := range node {
			prune(child)
		}
	case map[string]any:
		for key, child := range node {
			prune(child)
			m, isMap := child.(map[string]any)
			if child == nil || unset[key] || (isMap && len(m) == 0) {
				delete(node, key)
			}
		}
	}
}
