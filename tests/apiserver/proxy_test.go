// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package apiserver

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// proxy passes TCP connections on, until it does not.
type proxy struct {
	t        *testing.T
	ns       *sandbox.Namespace
	at, to   string
	listener net.Listener

	mu    sync.Mutex
	conns map[net.Conn]bool // true for those that are stalled
}

// newProxy returns a proxy between two addresses of ns. It is not open yet.
func newProxy(t *testing.T, ns *sandbox.Namespace, at, to string) *proxy {
	t.Helper()
	p := &proxy{t: t, ns: ns, at: at, to: to, conns: map[net.Conn]bool{}}
	t.Cleanup(p.close)
	return p
}

// open begins to take connections.
func (p *proxy) open() {
	p.t.Helper()
	l, err := p.ns.Listen("tcp", p.at)
	if err != nil {
		p.t.Fatal(err)
	}
	p.listener = l
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(conn)
		}
	}()
}

// close ends all connections and takes no more.
func (p *proxy) close() {
	if p.listener != nil {
		_ = p.listener.Close()
	}
	p.listener = nil
	p.cut()
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		_ = conn.Close()
	}
	clear(p.conns)
}

// stall lets nothing pass any more over the connections there are, which stay open.
func (p *proxy) stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		p.conns[conn] = true
	}
}

func (p *proxy) serve(client net.Conn) {
	server, err := p.ns.Dial(context.Background(), "tcp", p.to)
	if err != nil {
		_ = client.Close()
		return
	}
	p.mu.Lock()
	p.conns[client], p.conns[server] = false, false
	p.mu.Unlock()
	go p.copy(client, server)
	p.copy(server, client)
}

func (p *proxy) copy(to, from net.Conn) {
	buffer := make([]byte, 1<<15)
	for {
		n, err := from.Read(buffer)
		p.mu.Lock()
		stalled := p.conns[from]
		p.mu.Unlock()
		if stalled {
			_, _ = io.Copy(io.Discard, from) // until somebody ends it
			return
		}
		if _, werr := to.Write(buffer[:n]); err != nil || werr != nil {
			_ = to.Close()
			_ = from.Close()
			return
		}
	}
}
