// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

func TestSocketPath(t *testing.T) {
	if got := SocketPath("/sys/fs/bpf/fairlead"); got != "/run/fairlead/agent.sock" {
		t.Errorf("of the default root: %s", got)
	}
	if got := SocketPath("/sys/fs/bpf/fairlead/"); got != "/run/fairlead/agent.sock" {
		t.Errorf("with a slash behind it: %s", got)
	}
	one, two := SocketPath("/bpf/one"), SocketPath("/bpf/two")
	if one == two || filepath.Dir(one) != "/run/fairlead" || one != SocketPath("/bpf/../bpf/one/") {
		t.Errorf("of two other roots: %s and %s", one, two)
	}
	// The kernel allows 107 bytes.
	if long := SocketPath("/" + strings.Repeat("a", 4000)); len(long) > 100 {
		t.Errorf("of a long root: %s", long)
	}
}

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "agent.sock")
	l, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]os.FileMode{path: os.ModeSocket | 0o600, filepath.Dir(path): os.ModeDir | 0o700} {
		if info, err := os.Stat(file); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v; want %v", file, info.Mode(), err, want)
		}
	}
	if _, err := listenUnix(path); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("while another listens: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if it had been killed
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	if l, err = listenUnix(path); err != nil {
		t.Fatalf("in place of a socket that nobody listens on: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestQuestionsArriveAsTheyWereAsked(t *testing.T) {
	addr := netip.MustParseAddr
	for _, want := range []ask{
		{query: lb.Query{Service: lb.Name{Namespace: "ns", Name: "web"}}},
		{query: lb.Query{Service: lb.Name{Namespace: "ns", Name: "web"}, Port: "http"}, client: addr("10.244.0.2")},
		{query: lb.Query{VIP: addr("10.96.0.1"), Number: 65535}},
		{query: lb.Query{VIP: addr("fd00::1"), Number: 80}, client: addr("fd00:244::2")},
	} {
		got, err := parseAsk(queryValues(want.query, want.client))
		if err != nil || got.query != want.query || got.client != want.client {
			t.Errorf("%+v became %+v, %v", want, got, err)
		}
	}
	for query, want := range map[string]string{
		"vip=here&number=80":        "vip: ",
		"vip=10.0.0.1":              "number: ",
		"vip=10.0.0.1&number=65536": "number: ",
		"name=web&client=me":        "client: ",
	} {
		r, err := http.NewRequest(http.MethodGet, "http://agent/explain?"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseAsk(r.URL.Query()); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, want an error that begins with %q", query, err, want)
		}
	}
}

func TestAskExplain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	about := func(name string) lb.Query { return lb.Query{Service: lb.Name{Namespace: "ns", Name: name}} }
	fails := func(name, want string) {
		t.Helper()
		_, err := AskExplain(t.Context(), path, about(name), netip.Addr{})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one line that says %q", name, err, want)
		}
	}
	fails("without a socket", "no agent answers at "+path)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fails("with a file in its place", "no agent answers at "+path)

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.FormValue("name") {
		case "known":
			_, _ = w.Write([]byte(`{"node": "a", "ports": []}`))
		case "garbled":
			_, _ = w.Write([]byte("nonsense"))
		default:
			http.Error(w, "no such Service", http.StatusNotFound)
		}
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	fails("unknown", "no such Service")
	fails("garbled", "read the agent's answer")
	got, err := AskExplain(t.Context(), path, about("known"), netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(lb.Explanation{Node: "a", Ports: []lb.ExplainedPort{}}, got, cmp.AllowUnexported(lb.ExplainedPort{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
