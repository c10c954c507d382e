// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

func newTestNetwork(t *testing.T, names ...string) (n *Network, namespaces []*Namespace) {
	t.Helper()
	requireRoot(t)
	n, err := NewNetwork(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, name := range names {
		ns, err := n.AddNamespace(name)
		if err != nil {
			t.Fatal(err)
		}
		namespaces = append(namespaces, ns)
	}
	return n, namespaces
}

// eventuallyAnswers waits until a server that listens on addr in one namespace
// answers the other.
func eventuallyAnswers(t *testing.T, server, client *Namespace, addr string) {
	t.Helper()
	var http *Server
	err := poll(func() (bool, error) {
		var err error
		http, err = ServeHTTP(server, addr, "web")
		return err == nil, nil // until the address may be used
	})
	if err != nil {
		t.Fatal(err)
	}
	defer http.Close()
	if answer, local := ask(t, client, "tcp", addr); answer != "web "+local {
		t.Errorf("%s answers %q, want %q", addr, answer, "web "+local)
	}
}

func TestNamespacesAreConnectedByConfigure(t *testing.T) {
	n, ns := newTestNetwork(t, "a", "b")
	a, b := ns[0], ns[1]
	for _, err := range []error{
		a.Configure(`
			link add eth0 type veth peer name eth0 netns ` + b.Name() + `
			addr add 192.0.2.1/24 dev eth0
			addr add 2001:db8::1/64 dev eth0 nodad

			link set eth0 up`),
		b.Configure("addr add 192.0.2.2/24 dev eth0\naddr add 2001:db8::2/64 dev eth0 nodad\nlink set eth0 up"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	eventuallyAnswers(t, b, a, "192.0.2.2:80")
	eventuallyAnswers(t, b, a, "[2001:db8::2]:80")

	err := a.Configure("link set eth0 mtu 1400\nlink set eth9 up\nlink set eth0 mtu 1300")
	if err == nil || !strings.Contains(err.Error(), "eth9") || !strings.Contains(err.Error(), a.Name()) {
		t.Errorf("the error %v does not say what failed and where", err)
	}
	if err := a.Configure("rule add from 2001:db8::/64 lookup 100", "-6"); err != nil {
		t.Errorf("with an option: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.Path()); err == nil {
		t.Error("the name of a namespace of a closed network is still there")
	}
}

func TestSysctlsAreOfTheNamespace(t *testing.T) {
	_, ns := newTestNetwork(t, "a", "b")
	if err := ns[0].SetSysctl("ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"1\n", "0\n"} {
		err := ns[i].Do(func() error {
			got, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
			if err == nil && string(got) != want {
				err = fmt.Errorf("ip_forward is %q, want %q", got, want)
			}
			return err
		})
		if err != nil {
			t.Errorf("%s: %v", ns[i].Name(), err)
		}
	}
}

func TestL3LinkCarriesPacketsUntilItIsClosed(t *testing.T) {
	_, ns := newTestNetwork(t, "a", "b")
	a, b := ns[0], ns[1]
	l, err := ConnectL3(a, "tun0", b, "tun1")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		a.Configure("addr add 192.0.2.1 peer 192.0.2.2 dev tun0\nlink set tun0 up"),
		b.Configure("addr add 192.0.2.2 peer 192.0.2.1 dev tun1\nlink set tun1 up"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	eventuallyAnswers(t, b, a, "192.0.2.2:80")

	done := make(chan error, 1)
	go func() { done <- l.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the link cannot be closed")
	}
	if err := a.Configure("link set tun0 up"); err == nil {
		t.Error("the link is still there")
	}
	if _, err := ConnectL3(a, "tun0", b, "a name that no link can have"); err == nil {
		t.Error("a link with an impossible name was made")
	}
	if err := a.Configure("link set tun0 up"); err == nil {
		t.Error("the other end of a link that could not be made is still there")
	}
}
