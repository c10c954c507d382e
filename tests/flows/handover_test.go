// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// What the kernel's own NAT, kube-proxy's say, has begun before Fairlead is switched on
// goes on through it, new flows are Fairlead's, and a datagram for a backend that has gone
// is too.
func TestConnectionsOfTheKernelsNATGoOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t, routed)
	a1, a2 := endpoint{w.a1, w.a}, endpoint{w.a2, w.a}
	s := service{name: "handed-over", number: 20, endpoints: []endpoint{a1, a2}}
	w.services[s.name] = s
	to := s.nodePort(ipv4, w.a)
	if err := w.a.ns.Firewall(fmt.Sprintf(`
table ip before {
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		ip daddr %[1]s meta l4proto { tcp, udp } th dport %[2]d dnat to %[3]s:%[4]d
	}
}
`, to.Addr(), to.Port(), w.a2.addrs[ipv4], backendPort)); err != nil {
		t.Fatal(err)
	}

	connection, err := open(w.client.ns, to, "echo", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	sockets := make([]net.Conn, 12)
	for i := range sockets {
		if sockets[i], err = dialUDP(w.client.ns, to); err != nil {
			t.Fatal(err)
		}
		defer sockets[i].Close()
	}
	answeredBy := func(c net.Conn) string {
		t.Helper()
		got, err := exchange(c, 16, patience)
		if err != nil {
			t.Fatal(err)
		}
		return got.name
	}
	for i, c := range sockets {
		if name := answeredBy(c); name != w.a2.name {
			t.Fatalf("without Fairlead socket %d is answered by %s", i, name)
		}
	}

	w.start(t)
	seen := map[string]int{}
	testutil.Eventually(t, 10*time.Second, "new flows have both backends", func() error {
		got, err := ask(w.client.ns, "udp", to, patience)
		if err != nil {
			return err
		}
		seen[got.name]++
		if len(seen) < 2 {
			return fmt.Errorf("%v", seen)
		}
		return nil
	})
	for i, c := range sockets {
		if name := answeredBy(c); name != w.a2.name {
			t.Errorf("socket %d was %s's and is answered by %s", i, w.a2.name, name)
		}
	}
	if err := connection.echo(patience); err != nil {
		t.Errorf("the connection that was there: %v", err)
	}

	s.endpoints = []endpoint{a1}
	w.apply(t, s)
	testutil.Eventually(t, 10*time.Second, "the sockets whose backend has gone get the other", func() error {
		for i, c := range sockets {
			if name := answeredBy(c); name != w.a1.name {
				return fmt.Errorf("socket %d is answered by %s", i, name)
			}
		}
		return nil
	})
	if err := connection.echo(patience); err != nil {
		t.Errorf("the connection to the backend that left the Service: %v", err)
	}
}
