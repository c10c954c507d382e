// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// A backend tells everyone who it is and whom it sees:
//
//	TCP   the first line that is sent is a command. "hello" is answered with a
//	      line "NAME CLIENT"; "echo" with that line and then with all that follows;
//	      "send N" with the line and N bytes of content; "take N" with the line,
//	      and after N bytes of content with "complete".
//	UDP   every datagram is answered with the line and the datagram.

// serve starts a backend that runs until the test ends. It listens on the addresses
// of its host and no other.
func serve(t *testing.T, h *host, port uint16) {
	t.Helper()
	for _, f := range families {
		addr := netip.AddrPortFrom(h.addrs[f], port).String()
		l, err := h.ns.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go acceptAll(l, h.name)
		c, err := h.ns.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.(*net.UDPConn).SetReadBuffer(4 << 20)
		go answerDatagrams(c, h.name)
	}
}

func acceptAll(l net.Listener, name string) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			go func() {
				defer conn.Close()
				_ = answer(conn, name)
			}()
		}
	}
}

// answer serves one TCP connection.
func answer(conn net.Conn, name string) error {
	// A connection whose client has vanished must not stay for ever.
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return err
	}
	in := bufio.NewReader(conn)
	line, err := in.ReadString('\n')
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "%s %s\n", name, conn.RemoteAddr()); err != nil {
		return err
	}
	command, argument, _ := strings.Cut(strings.TrimSpace(line), " ")
	size, _ := strconv.ParseInt(argument, 10, 64)
	switch command {
	case "echo":
		// Not from socket to socket, for which the kernel needs a pipe's two files.
		_, err = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{in})
	case "send":
		_, err = io.Copy(conn, content(size))
	case "take":
		answer := complete
		if _, err := io.Copy(&comparer{}, io.LimitReader(in, size)); err != nil {
			answer = err.Error()
		}
		_, err = io.WriteString(conn, answer+"\n")
	}
	return err
}

// complete is what a backend says of content that has come as it should.
const complete = "complete"

// answerDatagrams runs until c is closed.
func answerDatagrams(c net.PacketConn, name string) {
	buf := make([]byte, 64<<10)
	for {
		n, client, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo(append(fmt.Appendf(nil, "%s %s\n", name, client), buf[:n]...), client)
		}
	}
}

// block is what content repeats. Its length has no factor in common with that of
// anything on the way, so that no part of content can stand for another.
var block = func() []byte {
	b := make([]byte, 524287) // a prime
	_, _ = rand.NewChaCha8([32]byte{}).Read(b)
	return b
}()

// repeated is content without an end.
type repeated struct{ at int }

func (r *repeated) Read(p []byte) (int, error) {
	n := copy(p, block[r.at:])
	r.at = (r.at + n) % len(block)
	return n, nil
}

// content returns size bytes that are always the same.
func content(size int64) io.Reader { return io.LimitReader(&repeated{}, size) }

// comparer is written to by who should have content. It says where that begins to
// differ.
type comparer struct{ written int }

func (c *comparer) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		want := block[c.written%len(block):]
		got := p[done:min(len(p), done+len(want))]
		if !bytes.Equal(got, want[:len(got)]) {
			return done, fmt.Errorf("content differs within %d bytes from %d on", len(got), c.written)
		}
		done += len(got)
		c.written += len(got)
	}
	return len(p), nil
}

// reply is who answered, and as whom it saw the client.
type reply struct {
	name   string
	client netip.AddrPort
}

func parseReply(line string) (reply, error) {
	name, client, found := strings.Cut(strings.TrimSpace(line), " ")
	if !found {
		return reply{}, fmt.Errorf("%q is no answer", line)
	}
	at, err := netip.ParseAddrPort(client)
	return reply{name: name, client: at}, err
}

// conn is a connection to a backend that has answered.
type conn struct {
	net.Conn
	in *bufio.Reader
	reply
}

// open makes a TCP connection and gives the backend a command. The caller must
// close the connection, whose deadline is timeout from now.
func open(from *sandbox.Namespace, to netip.AddrPort, command string, timeout time.Duration) (*conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	opened, err := begin(c, command, timeout)
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("%s to %s: %w", command, to, err)
	}
	return opened, nil
}

// begin is open for a connection that is made already.
func begin(c net.Conn, command string, timeout time.Duration) (*conn, error) {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, command+"\n"); err != nil {
		return nil, err
	}
	opened := &conn{Conn: c, in: bufio.NewReader(c)}
	line, err := opened.in.ReadString('\n')
	if err != nil {
		return nil, err
	}
	opened.reply, err = parseReply(line)
	return opened, err
}

// echo sends a line over a connection opened with "echo" and waits for it.
func (c *conn) echo(timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	const text = "are you there?\n"
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	line, err := c.in.ReadString('\n')
	if err == nil && line != text {
		err = fmt.Errorf("sent %q, got %q", text, line)
	}
	return err
}

// ask makes a connection or sends a datagram and returns who has answered.
func ask(from *sandbox.Namespace, network string, to netip.AddrPort, timeout time.Duration) (reply, error) {
	if network == "udp" {
		c, err := dialUDP(from, to)
		if err != nil {
			return reply{}, err
		}
		defer c.Close()
		return exchange(c, 16, timeout)
	}
	c, err := open(from, to, "hello", timeout)
	if err != nil {
		return reply{}, err
	}
	defer c.Close()
	// The end of the connection belongs to it.
	if rest, err := io.ReadAll(c.in); err != nil || len(rest) > 0 {
		return reply{}, fmt.Errorf("read end of connection to %s: %d bytes, %w", to, len(rest), err)
	}
	return c.reply, nil
}

// dialUDP returns a connected socket.
func dialUDP(from *sandbox.Namespace, to netip.AddrPort) (net.Conn, error) {
	return from.Dial(context.Background(), "udp", to.String())
}

// exchange sends a datagram of some size on a connected socket and returns who has
// answered with the same content.
func exchange(c net.Conn, size int, timeout time.Duration) (reply, error) {
	sent, err := io.ReadAll(content(int64(size)))
	if err != nil {
		return reply{}, err
	}
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return reply{}, err
	}
	if _, err := c.Write(sent); err != nil {
		return reply{}, err
	}
	buf := make([]byte, 64<<10)
	n, err := c.Read(buf)
	if err != nil {
		return reply{}, err
	}
	line, rest, _ := bytes.Cut(buf[:n], []byte("\n"))
	if !bytes.Equal(rest, sent) {
		return reply{}, fmt.Errorf("%d bytes came back from %s, not the %d that were sent", len(rest), c.RemoteAddr(), size)
	}
	return parseReply(string(line))
}

// transfer moves content in one direction; whoever gets it compares it. progress is
// called, when it is not nil, after each MiB.
func transfer(from *sandbox.Namespace, to netip.AddrPort, command string, size int64, progress func(done int64)) (reply, error) {
	c, err := open(from, to, fmt.Sprintf("%s %d", command, size), time.Minute)
	if err != nil {
		return reply{}, err
	}
	defer c.Close()
	source, sink := io.Reader(c.in), io.Writer(&comparer{})
	if command == "take" {
		source, sink = content(size), c
	}
	for done := int64(0); done < size; {
		n, err := io.CopyN(sink, source, min(1<<20, size-done))
		if err != nil {
			return c.reply, fmt.Errorf("%s %d bytes, after %d: %w", command, size, done, err)
		}
		done += n
		if progress != nil {
			progress(done)
		}
	}
	if command == "take" {
		answer, err := c.in.ReadString('\n')
		if err != nil || answer != complete+"\n" {
			return c.reply, fmt.Errorf("the backend says %q, %w", answer, errors.Join(err))
		}
	}
	return c.reply, nil
}

// isTimeout tells whether nothing has come back at all.
func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}
