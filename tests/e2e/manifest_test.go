// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"os"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// testManifestAccepted asks the API server about the DaemonSet without making it: it
// refuses some security contexts, such as no escalation together with certain
// capabilities.
func testManifestAccepted(t *testing.T, c *cluster) {
	text, err := os.ReadFile("../../manifests/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(text, &set); err != nil {
		t.Fatal(err)
	}
	got, err := c.client.AppsV1().DaemonSets(set.Namespace).Create(t.Context(), &set, metav1.CreateOptions{
		DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict,
	})
	if err != nil {
		t.Fatal(err)
	}
	if given := got.Spec.Template.Spec.Containers[0].SecurityContext; given.Privileged == nil || *given.Privileged {
		t.Errorf("the security context became %+v", given)
	}
}
