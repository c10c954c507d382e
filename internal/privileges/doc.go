// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package privileges knows which capabilities the agent needs, for what, and
// makes the process give up all others.
package privileges
