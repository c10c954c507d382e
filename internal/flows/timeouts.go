// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package flows

import (
	"cmp"
	"time"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Timeouts say how long a flow may be silent, in whole seconds. A zero keeps the
// default, which is that of the kernel's connection tracking or, where kube-proxy
// sets another one, kube-proxy's.
type Timeouts struct {
	TCPOpening     time.Duration // until both have answered: 1 minute
	TCPEstablished time.Duration // after that: 24 hours
	TCPCloseWait   time.Duration // when one side has closed it: 1 hour
	TCPClosed      time.Duration // when both have: 30 seconds
	TCPReset       time.Duration // after an RST: 10 seconds

	UDP       time.Duration // without an answer: 30 seconds
	UDPStream time.Duration // with one: 2 minutes

	SCTPOpening     time.Duration // until both have answered: 1 minute
	SCTPEstablished time.Duration // after that: 5 minutes
	SCTPClosed      time.Duration // after a SHUTDOWN or ABORT: 10 seconds
}

// withDefaults fills in the zeros.
func (t Timeouts) withDefaults() Timeouts {
	return Timeouts{
		TCPOpening:      cmp.Or(t.TCPOpening, time.Minute),
		TCPEstablished:  cmp.Or(t.TCPEstablished, 24*time.Hour),
		TCPCloseWait:    cmp.Or(t.TCPCloseWait, time.Hour),
		TCPClosed:       cmp.Or(t.TCPClosed, 30*time.Second),
		TCPReset:        cmp.Or(t.TCPReset, 10*time.Second),
		UDP:             cmp.Or(t.UDP, 30*time.Second),
		UDPStream:       cmp.Or(t.UDPStream, 2*time.Minute),
		SCTPOpening:     cmp.Or(t.SCTPOpening, time.Minute),
		SCTPEstablished: cmp.Or(t.SCTPEstablished, 5*time.Minute),
		SCTPClosed:      cmp.Or(t.SCTPClosed, 10*time.Second),
	}
}

// of returns the timeout of a flow in its state.
func (t *Timeouts) of(p lb.Protocol, s datapath.FlowState) time.Duration {
	switch p {
	case lb.UDP:
		if s.Has(datapath.FlowAnswered) {
			return t.UDPStream
		}
		return t.UDP
	case lb.SCTP:
		switch {
		case s&(datapath.FlowReset|datapath.FlowClosed) != 0:
			return t.SCTPClosed
		case s.Has(datapath.FlowEstablished):
			return t.SCTPEstablished
		}
		return t.SCTPOpening
	}
	switch {
	case s.Has(datapath.FlowReset):
		return t.TCPReset
	case s.Has(datapath.FlowClosed):
		return t.TCPClosed
	case !s.Has(datapath.FlowEstablished):
		return t.TCPOpening
	case s&datapath.FlowClosed != 0:
		return t.TCPCloseWait
	}
	return t.TCPEstablished
}
