// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bytes"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-lb/fairlead/internal/privileges"
)

const manifestDir = "../../manifests"

// manifests are the objects that `kubectl apply -k manifests/` makes.
type manifests struct {
	account   corev1.ServiceAccount
	role      rbacv1.ClusterRole
	binding   rbacv1.ClusterRoleBinding
	config    corev1.ConfigMap
	daemonSet appsv1.DaemonSet
}

// readManifests decodes what kustomization.yaml names. A field that the API does
// not have fails the test.
func readManifests(t *testing.T) manifests {
	t.Helper()
	var kustomization struct {
		metav1.TypeMeta `json:",inline"`
		Resources       []string `json:"resources"`
		Images          []struct {
			Name    string `json:"name"`
			NewName string `json:"newName"`
			NewTag  string `json:"newTag"`
		} `json:"images"`
	}
	decode(t, "kustomization.yaml", readFile(t, "kustomization.yaml"), &kustomization)
	files, err := filepath.Glob(filepath.Join(manifestDir, "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for i, file := range files {
		files[i] = filepath.Base(file)
	}
	listed := append([]string{"kustomization.yaml"}, kustomization.Resources...)
	slices.Sort(listed)
	if diff := cmp.Diff(files, listed); diff != "" {
		t.Errorf("resources of kustomization.yaml (-there +listed):\n%s", diff)
	}

	var m manifests
	into := map[string]any{
		"ServiceAccount": &m.account, "ClusterRole": &m.role, "ClusterRoleBinding": &m.binding,
		"ConfigMap": &m.config, "DaemonSet": &m.daemonSet,
	}
	for _, file := range kustomization.Resources {
		for _, document := range bytes.Split(readFile(t, file), []byte("\n---\n")) {
			var kind metav1.TypeMeta
			if err := yaml.Unmarshal(document, &kind); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			object, known := into[kind.Kind]
			if !known {
				t.Fatalf("%s: a second or unknown %s", file, kind.Kind)
			}
			delete(into, kind.Kind)
			decode(t, file, document, object)
		}
	}
	if len(into) > 0 {
		t.Fatalf("missing: %v", slices.Sorted(maps.Keys(into)))
	}
	if image := m.container().Image; len(kustomization.Images) != 1 || kustomization.Images[0].Name != image {
		t.Errorf("the image %q of the DaemonSet is not the one that kustomization.yaml replaces", image)
	}
	return m
}

func (m *manifests) container() *corev1.Container {
	return &m.daemonSet.Spec.Template.Spec.Containers[0]
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(manifestDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func decode(t *testing.T, name string, data []byte, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict(data, into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func TestManifestsStartTheAgentAsItIs(t *testing.T) {
	m := readManifests(t)
	c := m.container()
	if diff := cmp.Diff([]string{"fairlead", "agent"}, c.Command); diff != "" {
		t.Fatalf("command (-want +got):\n%s", diff)
	}
	args := slices.Clone(c.Args)
	for i, arg := range args {
		args[i] = regexp.MustCompile(`\$\((\w+)\)`).ReplaceAllStringFunc(arg, func(ref string) string {
			return m.value(t, strings.Trim(ref, "$()"))
		})
	}
	cmd := newAgentCommand()
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatalf("args %q: %v", args, err)
	}
	if rest := cmd.Flags().Args(); len(rest) > 0 {
		t.Errorf("args %q: %q are no flags", args, rest)
	}
	_, port, _ := strings.Cut(cmd.Flag("healthz-bind-address").Value.String(), ":")
	for path, probe := range map[string]*corev1.Probe{"/healthz": c.ReadinessProbe, "/livez": c.LivenessProbe} {
		if probe.HTTPGet == nil || probe.HTTPGet.Path != path || probe.HTTPGet.Port.String() != port {
			t.Errorf("probe %+v, want one of %s on port %s, where the agent listens", probe.HTTPGet, path, port)
		}
	}
	root := cmd.Flag("bpf-root").Value.String()
	if mount := c.VolumeMounts[0]; filepath.Dir(root) != mount.MountPath {
		t.Errorf("the agent pins at %s, and %s is mounted", root, mount.MountPath)
	}
	m.value(t, "NODE_NAME")
	for name, addr := range map[string]string{
		"default": newAgentCommand().Flag("metrics-bind-address").Value.String(),
		"here":    cmd.Flag("metrics-bind-address").Value.String(),
	} {
		if ap, err := netip.ParseAddrPort(addr); err != nil || !ap.Addr().IsLoopback() {
			t.Errorf("metrics are served at %s (%s), where others can ask", addr, name)
		}
	}
}

// value returns what the container finds in an environment variable, "" for a
// field of its Pod.
func (m *manifests) value(t *testing.T, name string) string {
	t.Helper()
	env := m.container().Env
	i := slices.IndexFunc(env, func(e corev1.EnvVar) bool { return e.Name == name })
	if i < 0 {
		t.Fatalf("no environment variable %s", name)
	}
	from := env[i].ValueFrom
	if from.FieldRef != nil {
		return ""
	}
	ref := from.ConfigMapKeyRef
	value, found := m.config.Data[ref.Key]
	if ref.Name != m.config.Name || !found {
		t.Errorf("%s comes from key %s of ConfigMap %s, which is not there", name, ref.Key, ref.Name)
	}
	return value
}

// wantedCapabilities are those whose want is told, spelled as the API does.
func wantedCapabilities() []corev1.Capability {
	var names []corev1.Capability
	for _, c := range privileges.Needed() {
		if c.Required || c.Without != "" {
			names = append(names, corev1.Capability(strings.TrimPrefix(c.Name, "CAP_")))
		}
	}
	return names
}

func TestManifestsFitTogether(t *testing.T) {
	m := readManifests(t)
	spec := m.daemonSet.Spec.Template.Spec
	if spec.ServiceAccountName != m.account.Name {
		t.Errorf("the DaemonSet runs as %q, the account is %q", spec.ServiceAccountName, m.account.Name)
	}
	if m.binding.RoleRef.Kind != "ClusterRole" || m.binding.RoleRef.Name != m.role.Name {
		t.Errorf("the binding is to %+v, the role is %q", m.binding.RoleRef, m.role.Name)
	}
	want := []rbacv1.Subject{{Kind: "ServiceAccount", Name: m.account.Name, Namespace: m.account.Namespace}}
	if diff := cmp.Diff(want, m.binding.Subjects); diff != "" {
		t.Errorf("subjects (-want +got):\n%s", diff)
	}
	for _, namespace := range []string{m.account.Namespace, m.config.Namespace, m.daemonSet.Namespace} {
		if namespace != "kube-system" {
			t.Errorf("something is in namespace %q", namespace)
		}
	}
	if !spec.HostNetwork || !spec.HostPID {
		t.Error("the agent needs the node's network and PID namespace")
	}
	if diff := cmp.Diff(m.daemonSet.Spec.Selector.MatchLabels, m.daemonSet.Spec.Template.Labels); diff != "" {
		t.Errorf("labels (-selector +template):\n%s", diff)
	}
}

func TestManifestsGiveLeastRights(t *testing.T) {
	m := readManifests(t)
	no, yes, root := false, true, int64(0)
	// tests/agent shows that the agent works with these.
	context := &corev1.SecurityContext{
		RunAsUser: &root, RunAsGroup: &root,
		Privileged: &no, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
		Capabilities:    &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: wantedCapabilities()},
		SeccompProfile:  &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		AppArmorProfile: &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeUnconfined},
		SELinuxOptions:  &corev1.SELinuxOptions{Type: "spc_t"},
	}
	if diff := cmp.Diff(context, m.container().SecurityContext); diff != "" {
		t.Errorf("security context (-want +got):\n%s", diff)
	}
	if m.account.AutomountServiceAccountToken == nil || *m.account.AutomountServiceAccountToken {
		t.Error("every pod that names the account gets its token")
	}
	want := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"services", "nodes"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"servicecidrs"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{"events.k8s.io"}, Resources: []string{"events"}, Verbs: []string{"create"}},
	}
	if diff := cmp.Diff(want, m.role.Rules); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
}
