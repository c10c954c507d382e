// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

// Delta says what should be true of everything a batch of events touched. What
// it does not name has not changed.
type Delta struct {
	// Services holds the backends of each service port that changed, nil for
	// one that is gone.
	Services map[ServicePort]*Backends
	// Frontends holds the owner of each frontend that changed. The zero Owner
	// means that nobody has it any more.
	Frontends map[FrontendKey]Owner
	// Problems says what is wrong with each Service whose problem changed: a
	// frontend that another Service has, too many backends. "" means that
	// nothing is wrong any more.
	Problems map[Name]Problem
}

func newDelta() Delta {
	return Delta{
		Services:  map[ServicePort]*Backends{},
		Frontends: map[FrontendKey]Owner{},
		Problems:  map[Name]Problem{},
	}
}

// Backends are the backends of one service port.
type Backends struct {
	// Eligible may get new clients. Sorted, without duplicates.
	Eligible []Backend
	// Serving may keep the clients they have: every endpoint whose condition
	// serving holds, terminating or not, and so a superset of Eligible. Sorted,
	// without duplicates.
	Serving []Backend
}

// Owner is the service port a frontend leads to. For a wildcard frontend only
// Service.Service and Service.Family mean something.
type Owner struct {
	Service ServicePort
	Kind    FrontendKind
}

// Exists tells whether anybody owns the frontend.
func (o Owner) Exists() bool { return o.Kind != 0 }

// Empty tells whether the delta names nothing.
func (d Delta) Empty() bool {
	return len(d.Services) == 0 && len(d.Frontends) == 0 && len(d.Problems) == 0
}
