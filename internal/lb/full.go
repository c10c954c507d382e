// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package lb

// FullError says that a table had no room for a row.
type FullError struct {
	Table string // as the datapath calls it
	Err   error  // what it was about, and what to do if the table cannot grow
}

// Error implements error.
func (e *FullError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *FullError) Unwrap() error { return e.Err }
