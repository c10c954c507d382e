// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// ca signs the certificates of servers.
type ca struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newCA(t *testing.T) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{t, cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// certificate returns one that is valid for the names, which may be addresses.
func (c *ca) certificate(names ...string) tls.Certificate {
	c.t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, c.key.Public(), c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: c.key}
}

// machine is an API server at an address.
type machine struct {
	server *httptest.Server
	tokens chan string // that it was sent
}

func newMachine(t *testing.T, cert tls.Certificate) *machine {
	t.Helper()
	m := &machine{tokens: make(chan string, 100)}
	m.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.tokens <- r.Header.Get("Authorization")
	}))
	m.server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	m.server.Config.ErrorLog = zap.NewStdLog(zap.NewNop())
	m.server.EnableHTTP2 = true
	m.server.StartTLS()
	t.Cleanup(m.server.Close)
	return m
}

func (m *machine) address() netip.AddrPort {
	return netip.MustParseAddrPort(m.server.Listener.Addr().String())
}

// nobody returns an address where nothing listens.
func nobody(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// routeTo returns a route whose configured address is host:port, with the authority in
// a file and a token.
func routeTo(t *testing.T, hostPort string, authority []byte, remembered ...netip.AddrPort) (r *route, caFile string) {
	t.Helper()
	dir := t.TempDir()
	caFile = filepath.Join(dir, "ca.crt")
	config := filepath.Join(dir, "kubeconfig")
	text := `{apiVersion: v1, kind: Config, current-context: here,
contexts: [{name: here, context: {cluster: here, user: me}}],
clusters: [{name: here, cluster: {server: "https://` + hostPort + `", certificate-authority: ` + caFile + `}}],
users: [{name: me, user: {token: secret}}]}`
	for path, text := range map[string][]byte{caFile: authority, config: []byte(text)} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	o := KubernetesOptions{Kubeconfig: config, Log: zaptest.NewLogger(t), Remembered: filepath.Join(dir, "remembered")}
	if err := remember(o.Remembered, remembered); err != nil {
		t.Fatal(err)
	}
	s, err := newServer(o)
	if err != nil {
		t.Fatal(err)
	}
	if r, err = newRoute(s, o); err != nil {
		t.Fatal(err)
	}
	return r, caFile
}

// get sends a request by r.
func get(t *testing.T, r *route, method string) error {
	t.Helper()
	var body *bytes.Reader
	req := httptest.NewRequest(method, "https://anywhere/api", nil)
	if method == http.MethodPost {
		body = bytes.NewReader([]byte("{}"))
		req = httptest.NewRequest(method, "https://anywhere/api", body)
	} else {
		req.Body = nil
	}
	req.RequestURI = ""
	resp, err := r.RoundTrip(req.WithContext(t.Context()))
	if err == nil {
		_ = resp.Body.Close()
	}
	return err
}

func TestAddressesThatAreRemembered(t *testing.T) {
	authority, stranger := newCA(t), newCA(t)
	for _, tt := range []struct {
		name string
		cert tls.Certificate
		ok   bool
	}{
		{"a certificate for the address", authority.certificate("127.0.0.1"), true},
		{"a certificate for the name in every cluster", authority.certificate("kubernetes.default.svc"), true},
		{"a certificate for the configured host", authority.certificate("localhost"), true},
		{"a certificate for somebody else", authority.certificate("elsewhere.example"), false},
		{"a certificate by somebody else", stranger.certificate("127.0.0.1", "kubernetes.default.svc", "localhost"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, tt.cert)
			_, port, _ := net.SplitHostPort(nobody(t))
			r, _ := routeTo(t, "localhost:"+port, authority.pem, m.address())
			err := get(t, r, http.MethodGet)
			if (err == nil) != tt.ok {
				t.Errorf("%v, want success: %v", err, tt.ok)
			}
			if sent := len(m.tokens); (sent > 0) != tt.ok {
				t.Errorf("credentials were sent %d times", sent)
			}
			if base, configured := r.address(); configured == tt.ok || tt.ok != strings.Contains(base, m.address().String()) {
				t.Errorf("in use: %s", base)
			}
		})
	}
}

func TestTheConfiguredAddressIsPreferred(t *testing.T) {
	authority := newCA(t)
	cert := authority.certificate("127.0.0.1")
	other := newMachine(t, cert)
	at := nobody(t)
	r, _ := routeTo(t, at, authority.pem, other.address())
	if err := get(t, r, http.MethodPost); err == nil {
		t.Error("something with a body was sent twice")
	}
	if err := get(t, r, http.MethodGet); err != nil {
		t.Fatal(err)
	}
	if err := get(t, r, http.MethodPost); err != nil {
		t.Errorf("what has a body does not follow: %v", err)
	}

	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { r.run(ctx, 10*time.Millisecond) })
	defer running.Wait()
	defer stop()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	home := &http.Server{
		Handler:   http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
	}
	go func() { _ = home.ServeTLS(l, "", "") }()
	defer home.Close()
	deadline := time.Now().Add(30 * time.Second)
	for {
		if _, configured := r.address(); configured {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the configured address is not used again")
		}
		time.Sleep(5 * time.Millisecond)
	}
	before := asked.Load()
	if err := get(t, r, http.MethodGet); err != nil || asked.Load() != before+1 {
		t.Errorf("%v, asked %d times", err, asked.Load()-before)
	}
}

func TestAnAuthorityThatIsReplacedOnDiskIsUsedAtOnce(t *testing.T) {
	before, after := newCA(t), newCA(t)
	m := newMachine(t, after.certificate("127.0.0.1"))
	r, file := routeTo(t, m.address().String(), before.pem)
	if err := get(t, r, http.MethodGet); !isCertificate(err) {
		t.Fatalf("%v, want a refusal of the certificate", err)
	}
	if len(m.tokens) != 0 {
		t.Error("credentials were sent to who cannot be verified")
	}
	if err := os.WriteFile(file, after.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := get(t, r, http.MethodGet); err != nil {
		t.Error(err)
	}
}

func TestAddressesAreLearnedFromTheServersOwnSlice(t *testing.T) {
	slice := func(name string, ready bool, addrs ...string) lb.Slice {
		s := lb.Slice{Name: lb.Name{Namespace: "default", Name: name}, Service: "kubernetes", Ports: []lb.SlicePort{{Name: "https", Protocol: lb.TCP, Number: 6443}}}
		for _, a := range addrs {
			s.Endpoints = append(s.Endpoints, lb.Endpoint{Addr: netip.MustParseAddr(a), Ready: ready})
		}
		return s
	}
	r, _ := routeTo(t, "127.0.0.1:1", newCA(t).pem)
	for _, tt := range []struct {
		name  string
		event Event
		want  []string
	}{
		{"a change", SliceSet{Slice: slice("kubernetes", true, "192.0.2.2", "192.0.2.1")}, []string{"192.0.2.1:6443", "192.0.2.2:6443"}},
		{"none ready: the last ones count", SliceSet{Slice: slice("kubernetes", false, "192.0.2.3")}, []string{"192.0.2.1:6443", "192.0.2.2:6443"}},
		{"gone: the last ones count", SliceGone{Name: servers}, []string{"192.0.2.1:6443", "192.0.2.2:6443"}},
		{"a slice that somebody else has added", SliceSet{Slice: slice("mine", true, "192.0.2.66")}, []string{"192.0.2.1:6443", "192.0.2.2:6443"}},
		{"a list", SlicesReplaced{Slices: []lb.Slice{slice("a", true, "192.0.2.66"), slice("kubernetes", true, "2001:db8::1")}}, []string{"[2001:db8::1]:6443"}},
	} {
		r.heard(tt.event)
		got, err := recall(r.options.Remembered)
		var text []string
		for _, a := range got {
			text = append(text, a.String())
		}
		if diff := gocmp.Diff(tt.want, text); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", tt.name, err, diff)
		}
	}
	info, err := os.Stat(r.options.Remembered)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: want a file for root alone", info.Mode(), err)
	}
}

func TestRecallPassesOverWhatIsNoAddress(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if got, err := recall(path); got != nil || err != nil {
		t.Errorf("%v, %v of no file", got, err)
	}
	if err := os.WriteFile(path, []byte("x\n\n192.0.2.1:6443\nevil.example:1\n"+strings.Repeat("192.0.2.1:1\n", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := recall(path)
	if err != nil || len(got) != maxRemembered || !slices.Contains(got, netip.MustParseAddrPort("192.0.2.1:6443")) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestNoOtherAddressesWithoutVerification(t *testing.T) {
	for name, change := range map[string]func(*server){
		"plain HTTP":         func(s *server) { s.config.Host = strings.Replace(s.config.Host, "https", "http", 1) },
		"no verification":    func(s *server) { s.config.Insecure, s.config.CAFile = true, "" },
		"a path, so a proxy": func(s *server) { s.config.Host += "/k8s/clusters/c1" },
	} {
		r, _ := routeTo(t, "127.0.0.1:1", newCA(t).pem, netip.MustParseAddrPort("127.0.0.1:2"))
		if len(r.others) == 0 {
			t.Fatal("no others at all")
		}
		s := r.server
		change(&s)
		if err := r.adopt(s); err != nil {
			t.Fatal(err)
		}
		r.setOthers(r.remembered)
		if len(r.others) != 0 {
			t.Errorf("%s: %d other addresses", name, len(r.others))
		}
	}
}
