// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package metrics

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// SLIs are the results of health checks as every Kubernetes component shows them
// at /metrics/slis (KEP-3466): a page of its own, small enough to be scraped often.
type SLIs struct {
	registry *prometheus.Registry
	last     *prometheus.GaugeVec
	total    *prometheus.CounterVec
}

// NewSLIs returns SLIs without results.
func NewSLIs() *SLIs {
	s := &SLIs{
		registry: prometheus.NewRegistry(),
		last: gauges("kubernetes_healthcheck",
			stable+"This metric records the result of a single healthcheck.", "name", "type"),
		total: counters("kubernetes_healthchecks_total",
			stable+"This metric records the results of all healthcheck.", "name", "type", "status"),
	}
	s.registry.MustRegister(s.last, s.total)
	return s
}

// Observe records a result of the check name, one of those asked for at the path
// kind, "healthz" say.
func (s *SLIs) Observe(name, kind string, ok bool) {
	result, status := 0.0, "error"
	if ok {
		result, status = 1, "success"
	}
	s.last.WithLabelValues(name, kind).Set(result)
	s.total.WithLabelValues(name, kind, status).Inc()
}

// Healthz is /healthz as kube-proxy has it beside its metrics. It says no more
// than that the process answers; it is not the /healthz of load balancers.
func (s *SLIs) Healthz(w http.ResponseWriter, _ *http.Request) {
	s.Observe("ping", "healthz", true)
	plain(w, "ok")
}

// Handler serves the results, and forgets them on DELETE.
func (s *SLIs) Handler() http.Handler {
	page := promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodDelete {
			s.last.Reset()
			s.total.Reset()
			plain(w, "metrics reset\n")
			return
		}
		page.ServeHTTP(w, r)
	})
}

func plain(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	// The client may be gone; there is nobody to tell.
	_, _ = w.Write([]byte(text))
}
