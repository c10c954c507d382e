// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// A backend answers every line of a connection and every datagram with its
// Service, its own name and what it was sent: "SERVICE BACKEND TEXT". So a client
// knows whether it has reached the right Service, and that the answer is its own.

// serve starts the part of a backend that belongs to one Service. It listens on one
// address and ends with the test.
func serve(t *testing.T, ns *sandbox.Namespace, at netip.AddrPort, service, backend string) {
	t.Helper()
	l, err := ns.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go acceptAll(l, service, backend)
	c, err := ns.ListenPacket("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go answerDatagrams(c, service, backend)
}

func acceptAll(l net.Listener, service, backend string) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			go answerLines(conn, service, backend)
		}
	}
}

// silentFor is how long a connection may say nothing before its backend closes it:
// its client may have vanished.
const silentFor = 2 * time.Minute

func answerLines(conn net.Conn, service, backend string) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	for {
		if err := conn.SetDeadline(time.Now().Add(silentFor)); err != nil {
			return
		}
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(conn, "%s %s %s", service, backend, line); err != nil {
			return
		}
	}
}

// answerDatagrams runs until c is closed.
func answerDatagrams(c net.PacketConn, service, backend string) {
	buf := make([]byte, 2048)
	for {
		n, client, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo(fmt.Appendf(nil, "%s %s %s", service, backend, buf[:n]), client)
		}
	}
}

// errNotMine is the error of an answer to another question, a late one say.
var errNotMine = errors.New("the answer to something else")

// checkAnswer returns which backend has answered. The error says that it is one of
// another Service, or that this is no answer to text.
func checkAnswer(answer, service, text string) (backend string, err error) {
	words := strings.Fields(answer)
	switch {
	case len(words) != 3:
		return "", fmt.Errorf("%q is no answer", answer)
	case words[2] != text:
		return "", errNotMine
	case words[0] != service:
		return "", fmt.Errorf("%s was asked and %s answered", service, words[0])
	}
	return words[1], nil
}
