// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package apiserver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	program "github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
	"github.com/fairlead-lb/fairlead/internal/testutil/controlplane"
)

// patience is how long anything may take. Most of it takes a second or two; the agent
// may pause for twenty between two tries.
const patience = 2 * time.Minute

const account = "fairlead"

// world is an API server, a proxy in front of it, and an agent that is configured to
// go by the proxy.
type world struct {
	*testing.T
	suite             testing.TB // what the agents end with
	control           *controlplane.ControlPlane
	client            kubernetes.Interface // an administrator
	proxy             *proxy
	options           testutil.AgentOptions
	agent             *testutil.Agent // the last one
	home              string          // the proxy's address
	tokenFile, caFile string
	remembered        string // the file where the agent keeps addresses
}

func newWorld(t *testing.T) *world {
	t.Helper()
	// A connection that is dead is found in two seconds, not in 45.
	t.Setenv("HTTP2_READ_IDLE_TIMEOUT_SECONDS", "1")
	t.Setenv("HTTP2_PING_TIMEOUT_SECONDS", "1")
	cgroup, node, dir := testutil.Cgroup(t), testutil.Node(t), t.TempDir()
	w := &world{
		T: t, suite: t, tokenFile: filepath.Join(dir, "token"), caFile: filepath.Join(dir, "ca.crt"),
		home: sandbox.GatewayIPv4.Addr().String() + ":7443",
	}
	w.control = controlplane.Start(t, controlplane.Options{
		Netns: node.Namespace(), Address: sandbox.GatewayIPv4.Addr(), WithoutControllers: true,
	})
	w.connect()
	w.proxy = newProxy(t, node.Namespace(), w.home, strings.TrimPrefix(w.control.URL(), "https://"))
	w.options = testutil.AgentOptions{
		Netns: node.Namespace(), CgroupRoot: cgroup.Path(), BPFRoot: testutil.BPFRoot(t), Unready: true,
		ExtraArgs: []string{"--packet-path=off"},
	}
	w.remembered = program.RememberedPath(w.options.BPFRoot)
	t.Cleanup(func() {
		_ = os.Remove(w.remembered)
		_ = os.Remove(program.SocketPath(w.options.BPFRoot)) // of an agent that was killed
	})
	_, err := w.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}}, metav1.CreateOptions{})
	w.check(err)
	w.allowAccount()
	w.newToken()
	w.writeCA()
	w.useKubeconfig(clientcmdapi.AuthInfo{TokenFile: w.tokenFile})
	return w
}

// connect makes the administrator's client anew.
func (w *world) connect() {
	w.Helper()
	var err error
	if w.client, err = kubernetes.NewForConfig(w.control.Config()); err != nil {
		w.Fatal(err)
	}
}

// check ends the test if something that has to work does not.
func (w *world) check(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// allowAccount lets the agent's account do everything, once it exists.
func (w *world) allowAccount() {
	w.Helper()
	_, err := w.client.RbacV1().ClusterRoleBindings().Create(w.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: account},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "default", Name: account}},
	}, metav1.CreateOptions{})
	w.check(err)
}

// newToken makes the agent's account anew, which ends what earlier tokens are good
// for, and writes its token.
func (w *world) newToken() {
	w.Helper()
	accounts := w.client.CoreV1().ServiceAccounts("default")
	_ = accounts.Delete(w.Context(), account, metav1.DeleteOptions{})
	_, err := accounts.Create(w.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: account}}, metav1.CreateOptions{})
	w.check(err)
	token, err := accounts.CreateToken(w.Context(), account, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	w.check(err)
	w.check(os.WriteFile(w.tokenFile, []byte(token.Status.Token), 0o600))
}

func (w *world) writeCA() {
	w.Helper()
	w.check(os.WriteFile(w.caFile, w.control.CA(), 0o600))
}

// useKubeconfig makes the next agent come as user, by the proxy.
func (w *world) useKubeconfig(user clientcmdapi.AuthInfo) {
	w.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: "https://" + w.home, CertificateAuthority: w.caFile}
	config.AuthInfos["u"] = &user
	config.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "c"
	w.options.Kubeconfig = filepath.Join(filepath.Dir(w.caFile), "kubeconfig")
	w.check(clientcmd.WriteToFile(*config, w.options.Kubeconfig))
}

// startAgent starts an agent that ends with the suite.
func (w *world) startAgent() {
	w.Helper()
	w.agent = testutil.StartAgent(w.suite, w.options)
}

func (w *world) killAgent() {
	w.Helper()
	w.check(w.agent.Kill(syscall.SIGKILL))
	_ = w.agent.Wait()
}

// restartServer ends the API server, has something happen, and starts it again.
func (w *world) restartServer(between func() error) {
	w.Helper()
	w.check(w.control.KillAPIServer())
	if between != nil {
		w.check(between())
	}
	w.check(w.control.StartAPIServer())
	w.connect()
}

func name(i int) string { return fmt.Sprintf("s%02d", i) }

// createService makes Service i, which leads nowhere.
func (w *world) createService(i int) {
	w.Helper()
	_, err := w.client.CoreV1().Services("default").Create(w.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name(i)},
		Spec:       corev1.ServiceSpec{ClusterIP: fmt.Sprintf("10.96.1.%d", i), Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	w.check(err)
}

// fill gives Service i an endpoint.
func (w *world) fill(i int) {
	w.Helper()
	port, protocol := int32(80), corev1.ProtocolTCP
	_, err := w.client.DiscoveryV1().EndpointSlices("default").Create(w.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name(i), Labels: map[string]string{discoveryv1.LabelServiceName: name(i)}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Port: &port, Protocol: &protocol}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{fmt.Sprintf("10.244.1.%d", i)}}},
	}, metav1.CreateOptions{})
	w.check(err)
}

// empty takes the endpoint of Service i away.
func (w *world) empty(i int) {
	w.Helper()
	w.check(w.client.DiscoveryV1().EndpointSlices("default").Delete(w.Context(), name(i), metav1.DeleteOptions{}))
}

// remove deletes Service i. Its EndpointSlice stays, as there is nobody to delete it.
func (w *world) remove(i int) {
	w.Helper()
	w.check(w.client.CoreV1().Services("default").Delete(w.Context(), name(i), metav1.DeleteOptions{}))
}

// serving returns which of the Services lead to an endpoint, as the kernel has it.
func (w *world) serving() (map[string]bool, error) {
	view, err := datapath.OpenView(w.options.BPFRoot)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	tables, err := view.Load()
	if err != nil {
		return nil, err
	}
	out := map[string]bool{}
	for id, sp := range tables.Names {
		if tables.Services[id].Sides[0].Count > 0 && sp.Service.Name != "kubernetes" {
			out[sp.Service.Name] = true
		}
	}
	return out, nil
}

// serves waits until exactly these Services lead to an endpoint.
func (w *world) serves(services ...int) {
	w.Helper()
	testutil.Eventually(w, patience, fmt.Sprintf("%d services served", len(services)), func() error {
		got, err := w.serving()
		if err != nil {
			return err
		}
		for _, i := range services {
			if !got[name(i)] {
				return fmt.Errorf("%s is not served", name(i))
			}
		}
		if len(got) != len(services) {
			return fmt.Errorf("%d are served", len(got))
		}
		return nil
	})
}

// logs waits until the agent's log has a text.
func (w *world) logs(text string) {
	w.Helper()
	testutil.Eventually(w, patience, "log: "+text, func() error {
		if !strings.Contains(w.agent.Logs(), text) {
			return fmt.Errorf("not in it")
		}
		return nil
	})
}

// metric returns the sum of a metric over its series.
func (w *world) metric(name string) float64 {
	w.Helper()
	n, err := w.agent.Metric(name)
	w.check(err)
	return n
}

// upTo returns the numbers from 1 to n, but those that are left out.
func upTo(n int, but ...int) (out []int) {
	skip := map[int]bool{}
	for _, i := range but {
		skip[i] = true
	}
	for i := 1; i <= n; i++ {
		if !skip[i] {
			out = append(out, i)
		}
	}
	return out
}
