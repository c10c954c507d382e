// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/health"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/metrics"
)

// listenRetry is the pause before an address that is taken is tried again. While
// a node moves from kube-proxy to us, kube-proxy still has the same ports.
const listenRetry = 2 * time.Second

// serve starts the servers for health and metrics; they end with ctx.
func serve(ctx context.Context, cfg Config, h *health.Tracker, m *metrics.Metrics, log *zap.Logger) {
	healthz := http.NewServeMux()
	healthz.HandleFunc("/healthz", h.Healthz)
	healthz.HandleFunc("/livez", h.Livez)
	go listen(ctx, cfg.HealthzAddress, "healthz", healthz, log)

	mux := http.NewServeMux()
	mux.Handle("/metrics", m.Handler())
	mux.HandleFunc("/healthz", h.Healthz)
	mux.HandleFunc("/livez", h.Livez)
	mux.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		// The client may be gone; there is nobody to tell.
		_, _ = w.Write([]byte("ebpf"))
	})
	go listen(ctx, cfg.MetricsAddress, "metrics", mux, log)
}

// listen serves on address until ctx ends. A listener that cannot be had is
// tried for again and again: Services matter more than being asked about them.
func listen(ctx context.Context, address, what string, handler http.Handler, log *zap.Logger) {
	if address == "" {
		return
	}
	log = log.With(logfield.Listener(what), logfield.Address(address))
	failing := false
	for {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", address)
		if err == nil {
			if failing {
				log.Info("listening at last")
			}
			failing = false
			err = serveOn(ctx, l, handler)
		}
		if ctx.Err() != nil {
			return
		}
		if !failing {
			log.Warn("cannot listen; trying again (does kube-proxy or another agent have the port?)", logfield.Error(err))
			failing = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(listenRetry):
		}
	}
}

// serveOn answers on l until ctx ends or l fails.
func serveOn(ctx context.Context, l net.Listener, handler http.Handler) error {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
