// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package apiserver does to a real API server, and to the way to it, what happens to
// them over the years, and looks at what the real agent makes of it: what it puts
// into the kernel, and above all what it does not take out of it.
package apiserver
