// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"

	"github.com/fairlead-lb/fairlead/internal/logfield"
)

const (
	// dialTimeout is for each address: a second and a third SYN are sent by then.
	dialTimeout = 5 * time.Second
	// lookHome is how often the configured address is tried while another is used.
	lookHome = 30 * time.Second
	// moveAfter is how long an address may take connections and end them before
	// others are tried. One that takes none is left at once.
	moveAfter = 10 * time.Second
)

// inClusterName is in the certificate of every API server.
const inClusterName = "kubernetes.default.svc"

// route is the way to the API server: its configured address or, while it cannot be
// reached there, one of those that API servers had the last time we heard of them.
// At any address the certificate must be as the configuration wants it, and be valid
// for the configured host, for the server's name in every cluster, or for the address
// itself; nothing is sent to who has no such certificate. An address with a path, or
// one without verification, has no others.
//
// When credentials or authorities have changed on disk, a refusal makes the route use
// the new ones.
type route struct {
	options KubernetesOptions
	log     *zap.Logger

	mu         sync.Mutex
	server     server
	files      []byte // what the files contained that server refers to
	configured *hop
	others     []*hop
	remembered []netip.AddrPort
	used       *hop
	failing    time.Time // since when used has not answered; zero while it does
}

// hop is a server at one address.
type hop struct {
	base url.URL // scheme and host
	http.RoundTripper
}

// newRoute returns the route to a server.
func newRoute(s server, o KubernetesOptions) (*route, error) {
	r := &route{options: o, log: o.Log}
	if r.log == nil {
		r.log = zap.NewNop()
	}
	if err := r.adopt(s); err != nil {
		return nil, err
	}
	remembered, err := recall(o.Remembered)
	if err != nil {
		r.log.Warn("addresses that API servers had cannot be had", logfield.Error(err))
	}
	r.setOthers(remembered)
	return r, nil
}

// adopt makes s the server that r leads to.
func (r *route) adopt(s server) error {
	base, _, err := rest.DefaultServerUrlFor(s.config)
	if err != nil {
		return fmt.Errorf("use API server %q from %s: %w", s.config.Host, s.origin, cause(err))
	}
	configured, err := newHop(s, *base, s.config.ServerName)
	if err != nil {
		return err
	}
	r.server, r.files, r.configured, r.used, r.failing = s, s.files(), configured, configured, time.Time{}
	return nil
}

func newHop(s server, base url.URL, name string) (*hop, error) {
	config := rest.CopyConfig(s.config)
	config.Host, config.ServerName = base.String(), name
	// A function of its own gives it a transport of its own: client-go goes on for
	// minutes with one that has read authorities which have changed since.
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}
	config.Dial = dialer.DialContext
	transport, err := rest.TransportFor(config)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", s.origin, cause(err))
	}
	return &hop{url.URL{Scheme: base.Scheme, Host: base.Host}, transport}, nil
}

// files returns what the files contain that s refers to.
func (s server) files() []byte {
	var all []byte
	for _, path := range []string{s.config.CAFile, s.config.CertFile, s.config.KeyFile} {
		text, _ := os.ReadFile(path) // nothing, if it cannot be read
		all = append(append(all, text...), 0)
	}
	return all
}

// setOthers makes addresses those that are tried when the configured one fails.
func (r *route) setOthers(addresses []netip.AddrPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remembered, r.others = addresses, nil
	home, _, err := rest.DefaultServerUrlFor(r.server.config)
	if err != nil || home.Scheme != "https" || r.server.config.Insecure || home.Path != "" && home.Path != "/" {
		return
	}
	name := r.server.config.ServerName
	if name == "" {
		name = home.Hostname()
	}
	for _, address := range addresses {
		for _, name := range distinct([]string{name, inClusterName, address.Addr().String()}) {
			h, err := newHop(r.server, url.URL{Scheme: home.Scheme, Host: address.String()}, name)
			if err == nil { // it worked for the configured address
				r.others = append(r.others, h)
			}
		}
	}
}

// heard takes note of the addresses that API servers have, if e tells them.
func (r *route) heard(e Event) {
	addresses := addressesIn(e)
	r.mu.Lock()
	same := len(addresses) == 0 || slices.Equal(addresses, r.remembered)
	r.mu.Unlock()
	if same {
		return
	}
	r.setOthers(addresses)
	if err := remember(r.options.Remembered, addresses); err != nil {
		r.log.Warn("addresses of API servers are not remembered: after a restart only the configured one is known", logfield.Error(err))
	}
}

// origin returns where address and credentials come from.
func (r *route) origin() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.server.origin
}

// address returns where requests go.
func (r *route) address() (base string, configured bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.used.base.String(), r.used == r.configured
}

// RoundTrip implements http.RoundTripper. A request without a body is tried at
// several addresses.
func (r *route) RoundTrip(req *http.Request) (*http.Response, error) {
	r.mu.Lock()
	used := r.used
	r.mu.Unlock()
	resp, err := used.send(req)
	if err == nil && resp.StatusCode != http.StatusUnauthorized {
		r.answered(used)
		return resp, nil
	}
	if err == nil {
		r.renew() // for the next request
		return resp, nil
	}
	if isCertificate(err) && req.Body == nil {
		if renewed := r.renew(); renewed != nil {
			if resp, err := renewed.send(req); err == nil {
				return resp, nil
			}
		}
	}
	if req.Body != nil || req.Context().Err() != nil || !r.leaves(used, err) {
		return nil, err
	}
	if resp := r.tryOthers(req, used); resp != nil {
		return resp, nil
	}
	return nil, err
}

// send sends a request that may be for another address.
func (h *hop) send(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.URL.Scheme, req.URL.Host, req.Host = h.base.Scheme, h.base.Host, ""
	return h.RoundTripper.RoundTrip(req)
}

func (r *route) answered(h *hop) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h == r.used {
		r.failing = time.Time{}
	}
}

// leaves tells whether a failure at h is a reason to try other addresses.
func (r *route) leaves(h *hop, err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h != r.used {
		return false // somebody else has found a better one; it is for the next try
	}
	if r.failing.IsZero() {
		r.failing = time.Now()
	}
	var op *net.OpError
	noConnection := errors.As(err, &op) && op.Op == "dial"
	return noConnection || isCertificate(err) || time.Since(r.failing) >= moveAfter
}

// tryOthers sends the request to the addresses other than that of failed. It returns
// nil when none answers.
func (r *route) tryOthers(req *http.Request, failed *hop) *http.Response {
	r.mu.Lock()
	all := append([]*hop{r.configured}, r.others...)
	r.mu.Unlock()
	dead := failed.base.Host
	for _, h := range all {
		if h == failed || h.base.Host == dead && h != r.configured {
			continue
		}
		resp, err := h.send(req)
		if err == nil {
			r.use(h)
			return resp
		}
		if req.Context().Err() != nil {
			return nil
		}
		var name x509.HostnameError
		if dead = ""; !errors.As(err, &name) {
			dead = h.base.Host // its other names are of no use
		}
	}
	return nil
}

// use makes h the address that requests go to.
func (r *route) use(h *hop) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h == r.used {
		return
	}
	r.used, r.failing = h, time.Time{}
	if h == r.configured {
		r.log.Info("api server is reached at its configured address again", logfield.Server(h.base.String()))
	} else {
		r.log.Warn("api server is not reached at its configured address: using one that it had when we last heard of it",
			logfield.Server(h.base.String()))
	}
}

// renew reads configuration, credentials and authorities again. It returns the
// configured address if they have changed, else nil. What is being written at this
// moment is read the next time.
func (r *route) renew() *hop {
	s, err := newServer(r.options)
	if err != nil {
		return nil
	}
	r.mu.Lock()
	same := reflect.DeepEqual(s.config, r.server.config) && slices.Equal(s.files(), r.files)
	if !same {
		err = r.adopt(s)
	}
	remembered, configured := r.remembered, r.configured
	r.mu.Unlock()
	if same || err != nil {
		return nil
	}
	r.setOthers(remembered)
	r.log.Info("credentials or authorities have changed: using the new ones", logfield.Server(configured.base.String()))
	return configured
}

// run looks after the configured address while another one is used, until ctx ends.
func (r *route) run(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r.mu.Lock()
		home, away := r.configured, r.used != r.configured
		r.mu.Unlock()
		if away && home.answers(ctx) {
			r.use(home)
		}
	}
}

// answers tells whether an API server answers at h.
func (h *hop) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.base.String()+"/version", nil)
	if err != nil {
		return false
	}
	resp, err := h.send(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16)) // so that the connection can be used again
	_ = resp.Body.Close()
	return resp.StatusCode < http.StatusInternalServerError
}

var _ utilnet.RoundTripperWrapper = (*route)(nil)

// WrappedRoundTripper implements what client-go wants of a transport around another.
func (r *route) WrappedRoundTripper() http.RoundTripper {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.used.RoundTripper
}
