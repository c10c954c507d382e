// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package health

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

var (
	web = lb.Name{Namespace: "default", Name: "web"}
	api = lb.Name{Namespace: "default", Name: "api"}

	// Addresses of loopback that nobody else uses.
	here  = netip.MustParseAddr("127.83.0.1")
	there = netip.MustParseAddr("127.83.0.2")
)

// running returns Servers on addresses that are closed with the test, and the
// reports they make. A healthy of nil is always well.
func running(t *testing.T, healthy func() bool, addresses ...netip.Addr) (*Servers, <-chan PortReport) {
	reports := make(chan PortReport, 100)
	if healthy == nil {
		healthy = func() bool { return true }
	}
	s := NewServers(healthy, func(r PortReport) { reports <- r })
	if addresses != nil {
		s.SetAddresses(addresses)
	}
	t.Cleanup(s.Close)
	return s, reports
}

// freePort returns a port that nobody listens on at a.
func freePort(t *testing.T, a netip.Addr) uint16 {
	l := listen(t, netip.AddrPortFrom(a, 0))
	defer func() { _ = l.Close() }()
	return netip.MustParseAddrPort(l.Addr().String()).Port()
}

// listen takes an address for the test.
func listen(t *testing.T, at netip.AddrPort) net.Listener {
	t.Helper()
	var config net.ListenConfig
	l, err := config.Listen(t.Context(), "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// request asks over a connection of its own.
func request(t *testing.T, method string, a netip.Addr, port uint16, path string) (*http.Response, string, error) {
	client := http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true},
	}
	url := "http://" + netip.AddrPortFrom(a, port).String() + path
	req, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return res, string(body), err
}

// expect asks and wants an answer for a Service with local endpoints.
func expect(t *testing.T, a netip.Addr, port uint16, service lb.Name, local int) {
	t.Helper()
	res, body, err := request(t, http.MethodGet, a, port, "/")
	if err != nil {
		t.Error(err)
		return
	}
	if diff := cmp.Diff(portText(service, local, true), body); diff != "" {
		t.Errorf("port %d of %v: code %d, -want +got:\n%s", port, a, res.StatusCode, diff)
	}
}

// expectClosed wants nobody to listen.
func expectClosed(t *testing.T, a netip.Addr, port uint16) {
	t.Helper()
	if res, body, err := request(t, http.MethodGet, a, port, "/"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("port %d of %v: %v %s, error %v; want connection refused", port, a, res, body, err)
	}
}

// portText is the body as kube-proxy 1.36.3 writes it.
func portText(service lb.Name, local int, healthy bool) string {
	return fmt.Sprintf(`{
	"service": {
		"namespace": %q,
		"name": %q
	},
	"localEndpoints": %d,
	"serviceProxyHealthy": %v
}`, service.Namespace, service.Name, local, healthy)
}

func TestPortAnswers(t *testing.T) {
	for _, tt := range []struct {
		name         string
		local        int
		healthy      bool
		method, path string
		code         int
	}{
		{"endpoints here", 2, true, http.MethodGet, "/", 200},
		{"no endpoints here", 0, true, http.MethodGet, "/", 503},
		{"endpoints here and a sync that is stuck", 2, false, http.MethodGet, "/", 503},
		{"any path", 1, true, http.MethodGet, "/healthz/of?any=kind", 200},
		{"any method", 1, true, http.MethodPost, "/", 200},
		{"HEAD has no body", 1, true, http.MethodHead, "/", 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := running(t, func() bool { return tt.healthy }, here)
			port := freePort(t, here)
			s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: tt.local}})
			res, body, err := request(t, tt.method, here, port, tt.path)
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != tt.code {
				t.Errorf("code %d, want %d", res.StatusCode, tt.code)
			}
			want := portText(web, tt.local, tt.healthy)
			if tt.method == http.MethodHead {
				want = ""
			}
			if diff := cmp.Diff(want, body); diff != "" {
				t.Errorf("-kube-proxy +ours:\n%s", diff)
			}
			checkHeaders(t, res.Header)
			if got, want := res.Header.Get("X-Load-Balancing-Endpoint-Weight"), fmt.Sprint(tt.local); got != want {
				t.Errorf("weight %s, want %s", got, want)
			}
		})
	}
}

func TestPortsFollowTheServices(t *testing.T) {
	s, reports := running(t, nil, here)
	first, second := freePort(t, here), freePort(t, here)
	for first == second {
		second = freePort(t, here)
	}
	for _, step := range []struct {
		name   string
		want   []ServiceHealth
		check  map[uint16]ServiceHealth
		closed []uint16
	}{
		{"a Service comes", []ServiceHealth{{Name: web, Port: first, LocalEndpoints: 1}},
			map[uint16]ServiceHealth{first: {Name: web, LocalEndpoints: 1}}, []uint16{second}},
		{"its endpoints change", []ServiceHealth{{Name: web, Port: first, LocalEndpoints: 3}},
			map[uint16]ServiceHealth{first: {Name: web, LocalEndpoints: 3}}, nil},
		{"another comes", []ServiceHealth{{Name: web, Port: first}, {Name: api, Port: second, LocalEndpoints: 2}},
			map[uint16]ServiceHealth{first: {Name: web}, second: {Name: api, LocalEndpoints: 2}}, nil},
		{"its policy is not Local any more", []ServiceHealth{{Name: api, Port: second, LocalEndpoints: 2}},
			map[uint16]ServiceHealth{second: {Name: api, LocalEndpoints: 2}}, []uint16{first}},
		{"it is Local again, on the same number", []ServiceHealth{{Name: web, Port: first}, {Name: api, Port: second}},
			map[uint16]ServiceHealth{first: {Name: web}, second: {Name: api}}, nil},
		{"two exchange their numbers", []ServiceHealth{{Name: web, Port: second}, {Name: api, Port: first}},
			map[uint16]ServiceHealth{first: {Name: api}, second: {Name: web}}, nil},
		{"all go", nil, nil, []uint16{first, second}},
	} {
		t.Run(step.name, func(t *testing.T) {
			s.Sync(step.want)
			for port, h := range step.check {
				expect(t, here, port, h.Name, h.LocalEndpoints)
			}
			for _, port := range step.closed {
				expectClosed(t, here, port)
			}
		})
	}
	if len(reports) != 0 {
		t.Errorf("reported without a failure: %v", <-reports)
	}
}

func TestPortsFollowTheAddresses(t *testing.T) {
	s, _ := running(t, nil, here)
	port := freePort(t, here)
	want := []ServiceHealth{{Name: web, Port: port, LocalEndpoints: 1}}
	s.Sync(want)
	expect(t, here, port, web, 1)
	expectClosed(t, there, port)

	s.SetAddresses([]netip.Addr{here, there})
	expect(t, here, port, web, 1)
	expect(t, there, port, web, 1)

	s.SetAddresses([]netip.Addr{netip.AddrFrom16(there.As16())}) // ::ffff:127.83.0.2 is the same
	expectClosed(t, here, port)
	expect(t, there, port, web, 1)

	s.SetAddresses(nil)
	expectClosed(t, there, port)
}

func TestAllAddressesOfBothFamiliesByDefault(t *testing.T) {
	s, reports := running(t, nil)
	port := freePort(t, netip.IPv6Unspecified())
	s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: 1}})
	for _, a := range []netip.Addr{here, there, netip.IPv6Loopback()} {
		expect(t, a, port, web, 1)
	}
	s.Sync([]ServiceHealth{
		{Name: web, Port: port, Family: lb.IPv4, LocalEndpoints: 4},
		{Name: web, Port: port, Family: lb.IPv6, LocalEndpoints: 6},
	})
	expect(t, here, port, web, 4)
	expect(t, netip.IPv6Loopback(), port, web, 6)

	s.Sync([]ServiceHealth{{Name: web, Port: port, Family: lb.IPv6, LocalEndpoints: 6}})
	expectClosed(t, here, port)
	expect(t, netip.IPv6Loopback(), port, web, 6)
	if len(reports) != 0 {
		t.Errorf("reported without a failure: %v", <-reports)
	}
}

func TestClosingEndsConnections(t *testing.T) {
	s, _ := running(t, nil, here)
	port := freePort(t, here)
	s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: 1}})
	var dialer net.Dialer
	// One has been answered and may ask again, one never asks.
	var conns [2]net.Conn
	for i := range conns {
		conn, err := dialer.DialContext(t.Context(), "tcp", netip.AddrPortFrom(here, port).String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		conns[i] = conn
	}
	if _, err := io.WriteString(conns[0], "GET / HTTP/1.1\r\nHost: node\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(conns[0])
	res, err := http.ReadResponse(answers, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_ = res.Body.Close()
	if res.Close {
		t.Error("a connection is for one answer only")
	}

	s.Sync(nil)
	if _, err := answers.ReadByte(); !ended(err) {
		t.Errorf("the idle connection: %v, want its end", err)
	}
	if _, err := conns[1].Read(make([]byte, 1)); !ended(err) {
		t.Errorf("the silent connection: %v, want its end", err)
	}
}

// ended tells whether err says that the other side has closed.
func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
}

func TestTheFirstServiceHasThePort(t *testing.T) {
	s, reports := running(t, nil, here)
	port := freePort(t, here)
	w := ServiceHealth{Name: web, Port: port, LocalEndpoints: 1}
	a := ServiceHealth{Name: api, Port: port, LocalEndpoints: 2}
	at := netip.AddrPortFrom(here, port)

	s.Sync([]ServiceHealth{w, a})
	expect(t, here, port, web, 1)
	taken(t, reports, PortReport{Service: api, Address: at}, "Service default/web has this health check node port")

	s.Sync([]ServiceHealth{w, a})
	if len(reports) != 0 {
		t.Errorf("reported twice: %v", <-reports)
	}

	// An older Service turns up, and takes it.
	s.Sync([]ServiceHealth{a, w})
	expect(t, here, port, api, 2)
	got := map[lb.Name]bool{}
	for range 2 {
		r := <-reports
		got[r.Service] = r.Err == nil
	}
	if diff := cmp.Diff(map[lb.Name]bool{api: true, web: false}, got); diff != "" {
		t.Errorf("who is well now: -want +got:\n%s", diff)
	}

	s.Sync([]ServiceHealth{w})
	expect(t, here, port, web, 1)
	taken(t, reports, PortReport{Service: web, Address: at}, "")
}

// taken takes a report and compares it with want; its error contains text, or is
// nil when text is empty.
func taken(t *testing.T, reports <-chan PortReport, want PortReport, text string) {
	t.Helper()
	got := <-reports
	if got.Service != want.Service || got.Address != want.Address {
		t.Errorf("reported %v, want %v at %v", got, want.Service, want.Address)
	}
	if text == "" && got.Err != nil || text != "" && (got.Err == nil || !strings.Contains(got.Err.Error(), text)) {
		t.Errorf("reported %v, want an error with %q", got, text)
	}
}

// While nobody serves, no system call is under way and the bubble's clock runs.
func TestAPortThatIsTakenIsTriedAgain(t *testing.T) {
	port := freePort(t, here)
	at := netip.AddrPortFrom(here, port)
	other := listen(t, at)
	synctest.Test(t, func(t *testing.T) {
		s, reports := running(t, nil, here)
		s.Sync([]ServiceHealth{{Name: web, Port: port}})
		taken(t, reports, PortReport{Service: web, Address: at}, "address already in use")

		time.Sleep(time.Hour)
		s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: 7}})
		if len(reports) != 0 {
			t.Errorf("one failure is reported more than once: %v", <-reports)
		}

		_ = other.Close()
		free := time.Now()
		taken(t, reports, PortReport{Service: web, Address: at}, "")
		if took := time.Since(free); took > portRetry {
			t.Errorf("opened after %v, want %v at most", took, portRetry)
		}
		expect(t, here, port, web, 7)
	})
}

func TestAPortThatIsNotWantedAnyMoreHasNoProblem(t *testing.T) {
	port := freePort(t, here)
	at := netip.AddrPortFrom(here, port)
	other := listen(t, at)
	synctest.Test(t, func(t *testing.T) {
		s, reports := running(t, nil, here)
		s.Sync([]ServiceHealth{{Name: web, Port: port}})
		taken(t, reports, PortReport{Service: web, Address: at}, "address already in use")
		s.Sync(nil)
		taken(t, reports, PortReport{Service: web, Address: at}, "")
		_ = other.Close()
		time.Sleep(time.Hour)
		expectClosed(t, here, port)
	})
}

func TestAnAddressThatFailsDoesNotHinderTheOthers(t *testing.T) {
	port := freePort(t, here)
	listen(t, netip.AddrPortFrom(there, port))
	s, reports := running(t, nil, there, here)
	s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: 1}})
	expect(t, here, port, web, 1)
	taken(t, reports, PortReport{Service: web, Address: netip.AddrPortFrom(there, port)}, "address already in use")
}

func TestAListenerThatDiesIsReplaced(t *testing.T) {
	port := freePort(t, here)
	at := netip.AddrPortFrom(here, port)
	synctest.Test(t, func(t *testing.T) {
		s, reports := running(t, nil, here)
		s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: 1}})
		s.mu.Lock()
		_ = s.ports[portKey{web, at}].listener.Close()
		s.mu.Unlock()
		taken(t, reports, PortReport{Service: web, Address: at}, "serve on "+at.String())
		taken(t, reports, PortReport{Service: web, Address: at}, "")
		expect(t, here, port, web, 1)
	})
}

func TestCloseEndsAll(t *testing.T) {
	port, blocked := freePort(t, here), freePort(t, there)
	other := listen(t, netip.AddrPortFrom(there, blocked))
	synctest.Test(t, func(t *testing.T) {
		s, reports := running(t, nil, here, there)
		s.Sync([]ServiceHealth{{Name: web, Port: port}, {Name: api, Port: blocked}})
		taken(t, reports, PortReport{Service: api, Address: netip.AddrPortFrom(there, blocked)}, "in use")
		s.Close()
		_ = other.Close()
		time.Sleep(time.Hour)
		s.Sync([]ServiceHealth{{Name: web, Port: port}})
		s.SetAddresses([]netip.Addr{here})
		expectClosed(t, here, port)
		expectClosed(t, there, blocked)
		s.Close() // may be called again
	})
}

// For the race detector.
func TestPortsChangeWhileTheyAreAsked(t *testing.T) {
	var healthy atomic.Bool
	s, _ := running(t, healthy.Load, here)
	port := freePort(t, here)
	var askers sync.WaitGroup
	for range 2 {
		askers.Go(func() {
			for range 50 {
				// Refused or answered; it is closed half of the time.
				_, _, _ = request(t, http.MethodGet, here, port, "/")
			}
		})
	}
	changers := []func(int){
		func(i int) { s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: i}}) },
		func(int) { s.Sync(nil) },
		func(i int) { s.SetAddresses([]netip.Addr{here, there}[i%2 : i%2+1]) },
		func(i int) { healthy.Store(i%2 == 0) },
	}
	for i := range 100 {
		changers[i%len(changers)](i)
	}
	askers.Wait()
	healthy.Store(true)
	s.SetAddresses([]netip.Addr{here})
	s.Sync([]ServiceHealth{{Name: web, Port: port, LocalEndpoints: 9}})
	expect(t, here, port, web, 9)
}
