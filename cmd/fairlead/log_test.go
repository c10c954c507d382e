// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"bufio"
	"io"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
)

func TestALogThatNobodyReadsHoldsNobodyUp(t *testing.T) {
	r, to := io.Pipe()
	w := newLogWriter(to)
	log, err := newLoggerTo(w, "info", "json")
	if err != nil {
		t.Fatal(err)
	}
	const more = 100
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range linesKept + more {
			log.Info("line", zap.Int("number", i))
		}
		_ = log.Sync()
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("whoever writes to the log waits for its reader")
	}

	in := bufio.NewScanner(r)
	read := 0
	for in.Scan() {
		if strings.Contains(in.Text(), "lines of this log were lost") {
			break
		}
		read++
	}
	// One line may be on its way already.
	if read < linesKept || read > linesKept+1 {
		t.Errorf("%d lines were kept, want %d", read, linesKept)
	}
	if !strings.Contains(in.Text(), `"count":`) {
		t.Errorf("%q does not say how many", in.Text())
	}
	log.Info("the last one")
	if !in.Scan() || !strings.Contains(in.Text(), "the last one") {
		t.Errorf("after that %q is written", in.Text())
	}
}

func TestSyncWaitsForWhatWasLogged(t *testing.T) {
	var text strings.Builder
	w := newLogWriter(&text)
	log, err := newLoggerTo(w, "info", "console")
	if err != nil {
		t.Fatal(err)
	}
	log.Info("good bye")
	if err := log.Sync(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text.String(), "good bye") {
		t.Errorf("after Sync only %q is written", text.String())
	}
}
