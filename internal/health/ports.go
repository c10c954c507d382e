// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package health

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// portRetry is the pause before a port that could not be opened is tried again.
// While a node moves from kube-proxy to us, kube-proxy still has the same ports.
const portRetry = 2 * time.Second

// ServiceHealth is what the health check node port of a Service answers.
type ServiceHealth struct {
	Name lb.Name
	Port uint16 // 1 to 65535
	// Family is the family of the addresses that answer this; the zero value
	// stands for both. kube-proxy keeps a count for each family.
	Family lb.Family
	// LocalEndpoints is the number of distinct addresses of ready endpoints on
	// this node.
	LocalEndpoints int
}

// PortReport tells that a health check node port cannot be opened at an address,
// or that this is over.
type PortReport struct {
	Service lb.Name
	Address netip.AddrPort
	// Err is nil when the port has been opened after all or is not wanted any
	// more.
	Err error
}

// Servers answers at the health check node ports of Services. Its methods may be
// called from any goroutine and do not wait for clients.
type Servers struct {
	healthy func() bool
	report  func(PortReport)

	serving sync.WaitGroup

	mu        sync.Mutex
	addresses []netip.Addr
	want      []ServiceHealth
	ports     map[portKey]*port
	retry     *time.Timer // nil when nothing is to be tried again
	closed    bool
}

// portKey names a listener. The Service is part of it so that a port that passes
// to another Service is closed: its clients asked about the first one.
type portKey struct {
	service lb.Name
	address netip.AddrPort
}

// port is one listener, open or wanted.
type port struct {
	portKey
	healthy func() bool
	local   atomic.Int64

	// The rest is guarded by Servers.mu.
	listener net.Listener // nil when closed
	server   *http.Server
	failed   bool  // cannot be opened and is to be tried again
	err      error // the last that was reported, nil when all is well
}

// NewServers returns Servers that listen on all addresses of the node and have no
// Services yet. healthy tells whether changes reach the kernel in time, as
// Tracker.Healthy does. report gets the first failure of a port, every change of
// its reason, and its end. It is called with a lock held: it may neither wait nor
// call back. Close ends the servers.
func NewServers(healthy func() bool, report func(PortReport)) *Servers {
	return &Servers{
		healthy: healthy, report: report,
		addresses: []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()},
		ports:     map[portKey]*port{},
	}
}

// Sync makes want the whole of what is answered. Ports that no Service wants any
// more are closed at once, with their connections. When several Services want one
// port, the first in want has it and the others are reported.
func (s *Servers) Sync(want []ServiceHealth) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want = slices.Clone(want)
	s.update()
}

// SetAddresses makes addresses the whole of where the ports are opened. The
// unspecified address of a family stands for all of that family; a family that is
// not named has no ports.
func (s *Servers) SetAddresses(addresses []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addresses = slices.Clone(addresses)
	s.update()
}

// Close closes every port and returns when all servers have ended.
func (s *Servers) Close() {
	s.mu.Lock()
	s.closed = true
	if s.retry != nil {
		s.retry.Stop()
	}
	for _, p := range s.ports {
		p.close()
	}
	clear(s.ports)
	s.mu.Unlock()
	s.serving.Wait()
}

// claim is what is wanted of a listener.
type claim struct {
	local int
	rival *lb.Name // the Service that has the port instead, nil when there is none
}

// claims returns a claim for each address of each Service that is wanted.
func (s *Servers) claims() map[portKey]claim {
	owners := map[netip.AddrPort]*lb.Name{}
	out := map[portKey]claim{}
	for i := range s.want {
		w := &s.want[i]
		for _, a := range s.addresses {
			if w.Family != 0 && w.Family != lb.FamilyOf(a) {
				continue
			}
			key := portKey{w.Name, netip.AddrPortFrom(a.Unmap(), w.Port)}
			c := claim{local: w.LocalEndpoints}
			if owner := owners[key.address]; owner == nil {
				owners[key.address] = &w.Name
			} else if *owner != w.Name {
				c.rival = owner
			} else {
				continue // said twice
			}
			out[key] = c
		}
	}
	return out
}

// update brings the listeners in line with want and addresses.
func (s *Servers) update() {
	if s.closed {
		return
	}
	claims := s.claims()
	// All that is to be closed goes first: its number may have a new owner.
	for key, p := range s.ports {
		c, wanted := claims[key]
		if !wanted || c.rival != nil {
			p.close()
		}
		if !wanted {
			s.note(p, nil)
			delete(s.ports, key)
		}
	}
	for key, c := range claims {
		p := s.ports[key]
		if p == nil {
			p = &port{portKey: key, healthy: s.healthy}
			s.ports[key] = p
		}
		p.local.Store(int64(c.local))
		switch {
		case c.rival != nil:
			s.note(p, fmt.Errorf("listen on %v: Service %v has this health check node port", key.address, c.rival))
		case p.listener == nil && !p.failed:
			s.open(p)
		}
	}
	s.schedule()
}

// schedule sees to it that ports that could not be opened are tried again.
func (s *Servers) schedule() {
	if s.retry != nil {
		return
	}
	for _, p := range s.ports {
		if p.failed {
			s.retry = time.AfterFunc(portRetry, s.tryAgain)
			return
		}
	}
}

func (s *Servers) tryAgain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.retry = nil
	for _, p := range s.ports {
		if p.failed {
			s.open(p)
		}
	}
	s.schedule()
}

// open listens and serves.
func (s *Servers) open(p *port) {
	network := "tcp4"
	if p.address.Addr().Is6() {
		network = "tcp6"
	}
	// Binding an address does not wait for anything, so no context ends it.
	var config net.ListenConfig
	l, err := config.Listen(context.Background(), network, p.address.String())
	if err != nil {
		s.fail(p, err) // names the operation and the address
		return
	}
	// Anybody who reaches the node can ask, so nobody may hold a connection for
	// nothing or make it log.
	server := &http.Server{
		Handler: p, ErrorLog: log.New(io.Discard, "", 0),
		ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
	}
	p.listener, p.server, p.failed = l, server, false
	s.note(p, nil)
	s.serving.Go(func() { s.serve(p, l, server) })
}

// serve answers on l until it is closed, on purpose or by a failure.
func (s *Servers) serve(p *port, l net.Listener, server *http.Server) {
	err := server.Serve(l)
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.listener != l {
		return // it was us
	}
	p.close()
	s.fail(p, fmt.Errorf("serve on %v: %w", p.address, err))
	s.schedule()
}

// fail notes that p could not be opened, or not be kept open.
func (s *Servers) fail(p *port, err error) {
	p.failed = true
	s.note(p, err)
}

// note reports what is new in err, nil when p is as it should be.
func (s *Servers) note(p *port, err error) {
	old := p.err
	p.err = err
	if err == nil && old == nil || err != nil && old != nil && err.Error() == old.Error() {
		return
	}
	s.report(PortReport{Service: p.service, Address: p.address, Err: err})
}

// close closes the listener, if it is open, and its connections.
func (p *port) close() {
	p.failed = false
	if p.listener == nil {
		return
	}
	// The listener itself and first: a server that has not come to serve yet does
	// not know it. Errors only say that something is closed already.
	_ = p.listener.Close()
	_ = p.server.Close()
	p.listener, p.server = nil, nil
}

// portBody is what kube-proxy answers.
type portBody struct {
	Service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"service"`
	LocalEndpoints      int64 `json:"localEndpoints"`
	ServiceProxyHealthy bool  `json:"serviceProxyHealthy"`
}

// ServeHTTP implements http.Handler: 200 when this node has endpoints of the
// Service and keeps up with changes, else 503, whatever is asked for.
func (p *port) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	b := portBody{LocalEndpoints: p.local.Load(), ServiceProxyHealthy: p.healthy()}
	b.Service.Namespace, b.Service.Name = p.service.Namespace, p.service.Name
	// Strings, numbers and booleans cannot fail to be encoded.
	text, _ := json.MarshalIndent(b, "", "\t")
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.FormatInt(b.LocalEndpoints, 10))
	send(w, statusCode(b.LocalEndpoints > 0 && b.ServiceProxyHealthy), text)
}
