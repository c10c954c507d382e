// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler

import (
	"net/netip"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Kernel is the tables that programs read. Every write is visible to them at
// once. A write that returns an error has changed nothing, or may be repeated
// and undone as if it had changed nothing. Errors say which row of which table
// they are about.
//
// A write to a row that exists replaces it; deleting a row that does not exist
// succeeds.
type Kernel interface {
	SetFrontend(lb.FrontendKey, lb.Frontend) error
	DeleteFrontend(lb.FrontendKey) error
	// SetRange stores the range of one side in one piece: a reader sees the old
	// one or the new one.
	SetRange(lb.ServiceID, lb.Side, lb.Range) error
	// SetOptions stores what a row has beside its ranges in one piece. The
	// ranges of the row it is given mean nothing.
	SetOptions(lb.ServiceID, lb.ServiceRow) error
	// SetSlots writes backends to the slots from base on. It is never called
	// for slots that a reader could be looking at.
	SetSlots(base uint32, backends []lb.Backend) error
	SetMember(lb.Member) error
	DeleteMember(lb.Member) error
	SetSource(lb.Source) error
	DeleteSource(lb.Source) error
	SetNodeAddress(netip.Addr, lb.NodeAddress) error
	DeleteNodeAddress(netip.Addr) error
	SetServiceCIDR(netip.Prefix) error
	DeleteServiceCIDR(netip.Prefix) error
	SetName(lb.ServiceID, lb.ServicePort) error
	DeleteName(lb.ServiceID) error
	SetProblem(lb.Name, lb.Problem) error
	DeleteProblem(lb.Name) error
	// WaitReaders is a grace period: it returns nil once every program that
	// was running when it was called has ended.
	WaitReaders() error
}

// Limits are the sizes of the two tables in which the reconciler hands out
// numbers.
type Limits struct {
	Services int // service IDs are below it
	Slots    int
}

// Result says what an Apply, ApplyAll or Retry has done.
type Result struct {
	// Writes and Deletes count rows. Both are 0 when the kernel held what was
	// wanted.
	Writes, Deletes int
	// Failed holds each Service that is not in the kernel as it should be,
	// also from earlier calls, and why. Rows that belong to no Service, or to
	// none that is known, are under the zero Name.
	Failed map[lb.Name]error
	// Stranded tells that backends have stopped serving: sockets may hold one
	// that is gone. No program will give it to another socket.
	Stranded bool
	// Unremembered tells that backends have left a set that clients with an
	// affinity choose from, or that an affinity has ended: entries of clients
	// may name such a backend. No program uses them, but they would count again
	// if the backend came back.
	Unremembered bool
	// Answered holds the UDP frontends at which clients on this node get a
	// backend now and got none before: sockets may be connected to the address
	// itself. A NodePort's VIP is the unspecified address. Sorted.
	Answered []lb.FrontendKey
}
