// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// outsideWait is how long clients outside wait for an answer. Nobody takes longer
// who answers at all.
const outsideWait = 300 * time.Millisecond

// outside is a machine that is not part of the cluster: it is behind a router, which
// the node has a link to, and reaches the node and nothing else. No program of ours
// sees its sockets, which is why it must not make any while other tests do.
type outside struct {
	*dialer
	addrs []netip.Addr // its own, IPv4 first
}

// connectOutside gives a node an uplink, its addresses and a machine that knows it by
// them, until the test ends. That machine and its router are one namespace.
func connectOutside(t *testing.T, node *sandbox.Namespace) *outside {
	t.Helper()
	network, err := sandbox.NewNetwork("fairlead-test")
	if err != nil {
		t.Fatal(err)
	}
	cgroup, err := sandbox.NewCgroup("fairlead-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(network.Close(), cgroup.Close()); err != nil {
			t.Error(err)
		}
	})
	ns, err := network.AddNamespace("outside")
	if err != nil {
		t.Fatal(err)
	}
	o := &outside{addrs: []netip.Addr{netip.MustParseAddr("198.51.100.10"), netip.MustParseAddr("2001:db8:51::10")}}
	if err := errors.Join(
		node.Configure(fmt.Sprintf(`
			link add uplink type veth peer name eth0 netns %s
			link set uplink up
			addr add %s/24 dev uplink
			addr add %s/64 dev uplink nodad
			route add 198.51.100.0/24 via 192.0.2.2
			route add 2001:db8:51::/64 via 2001:db8:2::2`, ns.Name(), nodeAddrs[0], nodeAddrs[1])),
		ns.Configure(fmt.Sprintf(`
			link set eth0 up
			addr add 192.0.2.2/24 dev eth0
			addr add 2001:db8:2::2/64 dev eth0 nodad
			addr add %[3]s dev eth0
			addr add %[4]s dev eth0 nodad
			route add %[1]s dev eth0 src %[3]s
			route add %[2]s dev eth0 src %[4]s`, nodeAddrs[0], nodeAddrs[1], o.addrs[0], o.addrs[1])),
	); err != nil {
		t.Fatal(err)
	}
	o.dialer = newDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		return dialFrom(ctx, ns, cgroup, network, addr)
	})
	o.http.Timeout = outsideWait
	return o
}

// abroad is held while this process is in another cgroup than its own.
var abroad sync.Mutex

// dialFrom dials with a socket that belongs to a namespace and a cgroup. This process
// is in the cgroup only while the socket is made: http.Client may go on to dial when
// nobody waits for it any more.
func dialFrom(ctx context.Context, ns *sandbox.Namespace, cgroup *sandbox.Cgroup, network, addr string) (net.Conn, error) {
	abroad.Lock()
	leave, err := cgroup.Enter()
	if err != nil {
		abroad.Unlock()
		return nil, err
	}
	home := sync.OnceValue(func() error {
		defer abroad.Unlock()
		return leave()
	})
	var conn net.Conn
	err = ns.Do(func() (err error) {
		d := net.Dialer{Control: func(string, string, syscall.RawConn) error { return home() }}
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, errors.Join(err, home())
}

// ask sends a datagram from a new socket and returns the name of the Pod that answered
// to the machine's own address.
func (o *outside) ask(addr string) (pod string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), outsideWait)
	defer cancel()
	conn, err := o.dial(ctx, "udp", addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(outsideWait)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, "who is there?"); err != nil {
		return "", err
	}
	answer := make([]byte, 1500)
	n, err := conn.Read(answer)
	if err != nil {
		return "", err
	}
	pod, client, _ := strings.Cut(strings.TrimSpace(string(answer[:n])), " ")
	if client != conn.LocalAddr().String() {
		err = fmt.Errorf("%s saw the client %s as %s", pod, conn.LocalAddr(), client)
	}
	return pod, err
}

// wantDropped fails the test unless connections to addr come to have no answer.
func (o *outside) wantDropped(t *testing.T, addr string) {
	t.Helper()
	wantFailures(t, func(addr string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), outsideWait/3)
		defer cancel()
		conn, err := o.dial(ctx, "tcp", addr)
		if err != nil {
			if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
				err = os.ErrDeadlineExceeded
			}
			return "", err
		}
		return conn.RemoteAddr().String(), conn.Close()
	}, addr, os.ErrDeadlineExceeded)
}

// A machine outside of the cluster reaches the Service by the node's address, over TCP
// and UDP, as long as somebody serves it, and is told when nobody does.
func testOutsideNodePort(t *testing.T, c *cluster) {
	s := c.scenario(t, "outside-node-port")
	s.apply(t, example("simple-server.yaml"))
	datagrams := s.expose(t, "datagrams", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeNodePort
		spec.Selector = map[string]string{"app": "simple-server"}
		spec.Ports[0].Protocol, spec.Ports[0].TargetPort = corev1.ProtocolUDP, intstr.FromInt32(8090)
	})
	tcp, udp := netip.AddrPortFrom(nodeAddrs[0], 30000).String(), nodePorts(datagrams)[0]

	for _, replicas := range []int{3, 0, 2} {
		s.scale(t, "replicasets", "simple-server", replicas)
		pods := s.wantPods(t, "app=simple-server", replicas)
		if replicas == 0 {
			s.outside.wantRefused(t, tcp)
			wantFailures(t, s.outside.ask, udp, unix.ECONNREFUSED)
			continue
		}
		s.outside.wantAnsweredBy(t, tcp, pods...)
		wantAnswers(t, s.outside.ask, udp, pods...)
	}
	s.deleteService(t, "simple-server-nodeport")
	s.outside.wantRefused(t, tcp) // by the node itself: nobody listens there
}

// With externalTrafficPolicy Local the machine reaches this node's pods alone, and
// nobody when there are none: whoever sent it here is to try another node.
func testOutsideLocal(t *testing.T, c *cluster) {
	s := c.scenario(t, "outside-local")
	service := s.expose(t, "web", func(spec *corev1.ServiceSpec) {
		spec.Type = corev1.ServiceTypeNodePort
		spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
	})
	near, far := s.runPod(t, "near", nodeName), s.runPod(t, "far", distantName)
	policy := func(p corev1.ServiceExternalTrafficPolicy) {
		s.updateService(t, "web", func(service *corev1.Service) { service.Spec.ExternalTrafficPolicy = p })
	}
	each := func(want func(t *testing.T, addr string)) {
		t.Helper()
		for _, addr := range nodePorts(service) {
			want(t, addr)
		}
	}
	answeredBy := func(pods ...string) func(*testing.T, string) {
		return func(t *testing.T, addr string) { s.outside.wantAnsweredBy(t, addr, pods...) }
	}

	each(answeredBy(near, far))
	policy(corev1.ServiceExternalTrafficPolicyLocal)
	each(answeredBy(near))
	connection := s.outside.connect(t, nodePorts(service)[0])
	connection.wantAnsweredBy(t, near)
	s.setReady(t, near, false)
	each(s.outside.wantDropped)
	connection.wantAnsweredBy(t, near)
	s.wantAnsweredBy(t, nodePorts(service)[0], far) // clients on the node are not outside
	policy(corev1.ServiceExternalTrafficPolicyCluster)
	each(answeredBy(far))
	s.setReady(t, far, false)
	each(s.outside.wantRefused)
}
