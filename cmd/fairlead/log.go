// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// newLogger returns a logger that writes to standard error and waits for nobody.
func newLogger(level, format string) (*zap.Logger, error) {
	return newLoggerTo(standardError(), level, format)
}

// standardError is what all loggers of the process write to.
var standardError = sync.OnceValue(func() *logWriter { return newLogWriter(os.Stderr) })

func newLoggerTo(w *logWriter, level, format string) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil || l > zapcore.ErrorLevel {
		return nil, fmt.Errorf("--log-level %q is none of debug, info, warn, error", level)
	}
	c := zap.NewProductionEncoderConfig()
	c.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	c.TimeKey = "time"
	c.EncodeDuration = zapcore.StringDurationEncoder
	var encoder zapcore.Encoder
	switch format {
	case "json":
		encoder = zapcore.NewJSONEncoder(c)
	case "console":
		c.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(c)
	default:
		return nil, fmt.Errorf("--log-format %q is neither json nor console", format)
	}
	// Nothing is sampled: every warning counts at 3 a.m.
	log := zap.New(zapcore.NewCore(encoder, w, l), zap.ErrorOutput(w))
	report := func(n int64) {
		log.Warn("lines of this log were lost: nobody took them in time", logfield.Count(int(n)))
	}
	w.report.Store(&report)
	return log, nil
}

const (
	// linesKept is how many lines wait for whoever reads the log.
	linesKept = 4096
	// syncWithin bounds the wait for the last lines at the end of a process.
	syncWithin = time.Second
)

// logWriter writes lines in the background. When whoever reads the log takes
// nothing, since the disk it keeps it on is full say, lines are lost and counted: an
// agent that waited for it would stop following the cluster. It ends with the
// process.
type logWriter struct {
	to    io.Writer
	lines chan logLine
	lost  atomic.Int64
	// report logs how many lines were lost.
	report atomic.Pointer[func(n int64)]
}

// logLine is a line, or the wish to know when all before it are written.
type logLine struct {
	text    []byte
	written chan<- struct{}
}

func newLogWriter(to io.Writer) *logWriter {
	w := &logWriter{to: to, lines: make(chan logLine, linesKept)}
	go w.run()
	return w
}

// Write implements zapcore.WriteSyncer.
func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- logLine{text: append([]byte(nil), line...)}: // zap uses line again
	default:
		w.lost.Add(1)
	}
	return len(line), nil
}

// Sync implements zapcore.WriteSyncer: it returns when all lines are written, or
// after a while.
func (w *logWriter) Sync() error {
	written := make(chan struct{})
	late := time.After(syncWithin)
	select {
	case w.lines <- logLine{written: written}:
	case <-late:
		return nil
	}
	select {
	case <-written:
	case <-late:
	}
	return nil
}

func (w *logWriter) run() {
	for line := range w.lines {
		if line.written != nil {
			close(line.written)
			continue
		}
		_, _ = w.to.Write(line.text) // there is nowhere else to say that it failed
		if report := w.report.Load(); report != nil && len(w.lines) < linesKept/2 {
			if n := w.lost.Swap(0); n > 0 {
				(*report)(n)
			}
		}
	}
}
