// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package clock tests that nothing depends on what time it is. It sets the clock of
// the machine it runs on and so runs in one of tests/vm only.
package clock
