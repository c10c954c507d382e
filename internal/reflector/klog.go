// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"github.com/go-logr/logr"
	"github.com/go-logr/zapr"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
)

// RedirectKlog makes log receive what client-go logs in this process. Call it
// once, before NewKubernetes.
func RedirectKlog(log *zap.Logger) {
	klog.SetLoggerWithOptions(logrLogger(log), klog.ContextualLogger(true))
}

func logrLogger(log *zap.Logger) logr.Logger { return zapr.NewLogger(log) }

// quiet returns a logger that passes everything on at level debug.
func quiet(log *zap.Logger) *zap.Logger {
	return log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return debugCore{c} }))
}

// debugCore is a core that takes every entry for one of level debug, at most.
type debugCore struct{ zapcore.Core }

// With implements zapcore.Core.
func (c debugCore) With(fields []zapcore.Field) zapcore.Core {
	return debugCore{c.Core.With(fields)}
}

// Check implements zapcore.Core.
func (c debugCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	e.Level = min(e.Level, zapcore.DebugLevel)
	return c.Core.Check(e, ce)
}
