// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Server is a small server in a namespace. It runs until it is closed.
type Server struct {
	closer io.Closer
	addr   net.Addr
	done   chan struct{}
}

// Addr returns the address the server listens on.
func (s *Server) Addr() netip.AddrPort {
	addr, _ := netip.ParseAddrPort(s.addr.String())
	return addr
}

// Close ends the server and its connections and waits for it.
func (s *Server) Close() error {
	err := s.closer.Close()
	<-s.done
	return err
}

// ServeHTTP starts an HTTP server on addr in the namespace. It answers every
// request with a line that holds its name, a blank and the client's address.
func ServeHTTP(ns *Namespace, addr, name string) (*Server, error) {
	l, err := ns.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("start http server %s: %w", name, err)
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = fmt.Fprintf(w, "%s %s\n", name, r.RemoteAddr)
		}),
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	return &Server{closer: server, addr: l.Addr(), done: done}, nil
}

// ServeUDPEcho starts a UDP server on addr in the namespace. It answers every
// datagram with a line that holds its name, a blank and the client's address.
// On 0.0.0.0 it serves IPv4 alone.
func ServeUDPEcho(ns *Namespace, addr, name string) (*Server, error) {
	network := "udp"
	if at, err := netip.ParseAddrPort(addr); err == nil && at.Addr().Is4() {
		network = "udp4" // or package net makes a socket for both families
	}
	c, err := ns.ListenPacket(network, addr)
	if err != nil {
		return nil, fmt.Errorf("start udp server %s: %w", name, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		answerDatagrams(c, name)
	}()
	return &Server{closer: c, addr: c.LocalAddr(), done: done}, nil
}

// answerDatagrams runs until c is closed. An error of one datagram, such as a
// client that is gone, is no reason to stop.
func answerDatagrams(c net.PacketConn, name string) {
	buf := make([]byte, 64<<10)
	for {
		_, client, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo(fmt.Appendf(nil, "%s %s\n", name, client), client)
		}
	}
}
