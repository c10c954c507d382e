// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// rbacManifest is what a user applies to give the agent its rights.
var rbacManifest = filepath.Join("..", "..", "manifests", "rbac.yaml")

// agentAccount creates what rbacManifest holds and returns the account the
// agent's role is bound to.
func agentAccount(t *testing.T, client kubernetes.Interface) rbacv1.Subject {
	t.Helper()
	var account rbacv1.Subject
	for _, object := range readManifest(t, rbacManifest) {
		if binding, ok := object.(*rbacv1.ClusterRoleBinding); ok {
			account = binding.Subjects[0]
		}
		namespace := ""
		if o, ok := object.(metav1.Object); ok {
			namespace = o.GetNamespace()
		}
		if err := create(t.Context(), client, namespace, object); err != nil {
			t.Fatalf("%s: %v", rbacManifest, err)
		}
	}
	if account.Kind != rbacv1.ServiceAccountKind {
		t.Fatalf("%s binds no role to a ServiceAccount", rbacManifest)
	}
	return account
}

// accountToken returns a token of a service account, as a pod of it would have.
func accountToken(t *testing.T, client kubernetes.Interface, account rbacv1.Subject) string {
	t.Helper()
	hour := int64(time.Hour / time.Second)
	request := &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &hour},
	}
	request, err := client.CoreV1().ServiceAccounts(account.Namespace).
		CreateToken(t.Context(), account.Name, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("get a token of %s/%s: %v", account.Namespace, account.Name, err)
	}
	return request.Status.Token
}

// The agent of all tests runs with the rights of the manifests, so what it
// needs it has. What is left to show is that it can do no harm.
func testRights(t *testing.T, c *cluster) {
	for _, action := range []authorizationv1.ResourceAttributes{
		{Verb: "update", Resource: "services"},
		{Verb: "delete", Group: "discovery.k8s.io", Resource: "endpointslices"},
		{Verb: "list", Resource: "secrets"},
		{Verb: "list", Resource: "configmaps"},
		{Verb: "list", Resource: "pods"},
		{Verb: "create", Resource: "pods"},
		{Verb: "patch", Resource: "nodes"},
		{Verb: "escalate", Group: "rbac.authorization.k8s.io", Resource: "clusterroles"},
	} {
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User:               "system:serviceaccount:" + c.account.Namespace + ":" + c.account.Name,
			Groups:             []string{"system:serviceaccounts", "system:authenticated"},
			ResourceAttributes: &action,
		}}
		review, err := c.client.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if review.Status.Allowed {
			t.Errorf("the agent may %s %s", action.Verb, action.Resource)
		}
	}
}

func testAgentRestart(t *testing.T, c *cluster) {
	s := c.scenario(t, "agent-restart")
	s.apply(t, example("simpleservice.yaml"))
	addr := s.address(t, "simpleservice")
	pods := s.wantPods(t, "app=sise", 1)
	c.wantNoOthers(t, s.namespace) // whose links would go while the agent is away
	s.wantAnsweredBy(t, addr, pods...)
	if n := c.tableWrites(t); n == 0 {
		t.Error("the metric says that no table was ever written")
	}

	load := s.startLoad(addr)
	if err := c.agent.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// How it ended is known.
	_ = c.agent.Wait()
	load.wantMore(t, 200)
	c.startAgent(t)
	if n := c.tableWrites(t); n != 0 {
		t.Errorf("%v table writes in an unchanged cluster, want none", n)
	}
	s.scale(t, "replicationcontrollers", "rcsise", 2)
	s.wantAnsweredBy(t, addr, s.wantPods(t, "app=sise", 2)...)
	load.finish(t)
}

// tableWrites returns how many rows the agent has written since it started, without
// those about the node's devices: links of other tests' pods go when they go.
func (c *cluster) tableWrites(t *testing.T) float64 {
	t.Helper()
	return c.metric(t, "fairlead_table_writes_total", "") - c.metric(t, "fairlead_table_writes_total", `table="devices"`)
}

// TestAgentThatCannotStart shows what a user sees who made a mistake: one line
// that names it, and exit code 1. A server that is not there yet is none: see
// tests/apiserver.
func TestAgentThatCannotStart(t *testing.T) {
	node := testutil.Node(t)
	cgroup := testutil.Cgroup(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, test := range []struct {
		name       string
		kubeconfig string
		want       []string // parts of the message
	}{
		{
			name:       "kubeconfig does not exist",
			kubeconfig: filepath.Join(dir, "missing"),
			want:       []string{filepath.Join(dir, "missing")},
		},
		{
			name:       "kubeconfig is not YAML",
			kubeconfig: write("garbage", "{{{"),
			want:       []string{filepath.Join(dir, "garbage")},
		},
		{
			name:       "kubeconfig names no cluster",
			kubeconfig: write("empty", "apiVersion: v1\nkind: Config\n"),
			want:       []string{filepath.Join(dir, "empty")},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := testutil.StartAgent(t, testutil.AgentOptions{
				Netns:      node.Namespace(),
				CgroupRoot: cgroup.Path(),
				BPFRoot:    testutil.BPFRoot(t),
				Kubeconfig: test.kubeconfig,
				NodeName:   nodeName,
				ExtraArgs:  []string{"--log-level=error"},
				Unready:    true,
			})
			wantFailure(t, a, test.want)
		})
	}
}

// wantFailure fails the test unless the agent ends by itself with exit code 1
// after one line that holds all of want.
func wantFailure(t *testing.T, a *testutil.Agent, want []string) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- a.Wait() }()
	select {
	case err := <-ended:
		if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("the agent ended with %v, want exit code 1", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the agent still runs after a minute")
	}
	message := strings.TrimSpace(a.Logs())
	if message == "" || strings.Contains(message, "\n") {
		t.Errorf("want one line, got:\n%s", message)
	}
	for _, part := range want {
		if !strings.Contains(message, part) {
			t.Errorf("want a message with %q, got:\n%s", part, message)
		}
	}
}
