// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package metrics

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func ask(h http.Handler, method string) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(method, "/", http.NoBody))
	return rec
}

func TestSLIs(t *testing.T) {
	s := NewSLIs()
	healthz := http.HandlerFunc(s.Healthz)
	if rec := ask(healthz, http.MethodGet); rec.Code != 200 || rec.Body.String() != "ok" {
		t.Errorf("healthz: %d %q, want 200 ok", rec.Code, rec.Body)
	}
	ask(healthz, http.MethodGet)
	s.Observe("ping", "healthz", false)
	// As kube-proxy 1.36.3 prints it.
	want := `# HELP kubernetes_healthcheck [STABLE] This metric records the result of a single healthcheck.
# TYPE kubernetes_healthcheck gauge
kubernetes_healthcheck{name="ping",type="healthz"} 0
# HELP kubernetes_healthchecks_total [STABLE] This metric records the results of all healthcheck.
# TYPE kubernetes_healthchecks_total counter
kubernetes_healthchecks_total{name="ping",status="error",type="healthz"} 1
kubernetes_healthchecks_total{name="ping",status="success",type="healthz"} 2
`
	if diff := cmp.Diff(want, ask(s.Handler(), http.MethodGet).Body.String()); diff != "" {
		t.Errorf("-kube-proxy +ours:\n%s", diff)
	}
	if rec := ask(s.Handler(), http.MethodDelete); rec.Code != 200 {
		t.Errorf("DELETE: code %d", rec.Code)
	}
	if rec := ask(s.Handler(), http.MethodGet); rec.Code != 200 || rec.Body.Len() != 0 {
		t.Errorf("after DELETE: %d %s, want an empty page", rec.Code, rec.Body)
	}
}

func TestConfigz(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config any
		code   int
		body   string
	}{
		{"the configuration is found under kube-proxy's name", struct {
			Kind string `json:"kind"`
			Mode string `json:"mode"`
		}{"KubeProxyConfiguration", "ebpf"}, 200,
			`{"kubeproxy.config.k8s.io":{"kind":"KubeProxyConfiguration","mode":"ebpf"}}`},
		{"what is no JSON is an error", func() {}, 500,
			"encode the configuration: json: unsupported type: func()\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rec := ask(Configz(tt.config), http.MethodGet)
			if rec.Code != tt.code || rec.Body.String() != tt.body {
				t.Errorf("%d %s, want %d %s", rec.Code, rec.Body, tt.code, tt.body)
			}
			if got := rec.Header().Get("Content-Type"); tt.code == 200 && got != "application/json" {
				t.Errorf("content type %q", got)
			}
		})
	}
}
