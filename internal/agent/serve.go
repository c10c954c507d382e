// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/metrics"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// listenRetry is the pause before an address that is taken is tried again. While
// a node moves from kube-proxy to us, kube-proxy still has the same ports.
const listenRetry = 2 * time.Second

// listener is an HTTP server at an address of its own.
type listener struct {
	what    string // its name in the log
	address string // empty for none
	handler http.Handler
	reason  string // of the Event that says it cannot listen, as kube-proxy has it
	// fail takes the error of a listener that must listen; nil for one that tries
	// again.
	fail     func(error)
	serve    func(context.Context, net.Listener, http.Handler) error
	recorder reflector.Recorder
	log      *zap.Logger
}

// serve starts the servers; they end with ctx. One that cannot listen and must is
// reported to ended.
func (a *agent) serve(ctx context.Context, cfg Config, ended chan<- error) {
	var fail func(error)
	if cfg.ListenOrFail {
		fail = func(err error) { ended <- err }
	}
	for _, l := range []listener{
		{what: "healthz", address: cfg.HealthzAddress, handler: a.healthMux(), reason: "FailedToStartProxierHealthcheck"},
		{what: "metrics", address: cfg.MetricsAddress, handler: a.metricsMux(cfg), reason: "FailedToStartMetricServer"},
	} {
		if l.address != "" {
			l.fail, l.recorder = fail, cfg.Recorder
			l.log = a.log.With(logfield.Listener(l.what), logfield.Address(l.address))
			l.serve = a.serveOn
			a.running.Go(func() { l.run(ctx) })
		}
	}
	if cfg.Socket != "" {
		a.running.Go(func() { a.listenForQuestions(ctx, cfg.Socket) })
	}
}

func (a *agent) healthMux() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", a.health.Healthz)
	mux.HandleFunc("/livez", a.health.Livez)
	return mux
}

func (a *agent) metricsMux(cfg Config) http.Handler {
	slis := metrics.NewSLIs()
	mux := http.NewServeMux()
	mux.Handle("/metrics", a.metrics.Handler())
	mux.Handle("/metrics/slis", slis.Handler())
	mux.HandleFunc("/healthz", slis.Healthz)
	mux.Handle("/configz", metrics.Configz(cfg.Configz))
	mux.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		// The client may be gone; there is nobody to tell.
		_, _ = w.Write([]byte("ebpf"))
	})
	if cfg.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// run serves until ctx ends. A listener that cannot be had is tried for again and
// again: Services matter more than being asked about them.
func (l listener) run(ctx context.Context) {
	failing := false
	for {
		var lc net.ListenConfig
		socket, err := lc.Listen(ctx, "tcp", l.address)
		if err == nil {
			if failing {
				l.log.Info("listening at last")
			}
			failing = false
			err = l.serve(ctx, socket, l.handler)
		}
		if ctx.Err() != nil {
			return
		}
		if l.fail != nil {
			l.fail(fmt.Errorf("listen for %s: %w (bindAddressHardFail is set)", l.what, err))
			return
		}
		if !failing {
			l.log.Warn("cannot listen; trying again (does kube-proxy or another agent have the port?)", logfield.Error(err))
			l.recorder.Node(reflector.Notice{Warning: true, Reason: l.reason, Action: "StartKubeProxy", Note: err.Error()})
			failing = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(listenRetry):
		}
	}
}

// Bounds on what clients may take: anybody who reaches the node reaches /healthz,
// and each idle connection costs a descriptor. There is none on writing, since a
// profile takes as long as it is asked to.
const (
	readWithin = 10 * time.Second
	idleWithin = 30 * time.Second
)

// serveOn answers on l until ctx ends or l fails. The agent does not leave before
// all answers have been given.
func (a *agent) serveOn(ctx context.Context, l net.Listener, handler http.Handler) error {
	// What clients do wrong is for debugging. It fails for levels that do not exist.
	errorLog, err := zap.NewStdLogAt(a.log, zap.DebugLevel)
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			a.answering.RLock()
			defer a.answering.RUnlock()
			if !a.left {
				handler.ServeHTTP(w, r)
			}
		}),
		ReadTimeout: readWithin, IdleTimeout: idleWithin,
		ErrorLog: errorLog,
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
