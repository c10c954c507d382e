// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package testutil is what tests that need root, a kernel or a running agent
// have in common. Whatever it makes for a test it removes when the test ends.
package testutil
