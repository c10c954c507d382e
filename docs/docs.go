// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package docs holds the documents that tests read where there is no source tree.
package docs

import _ "embed"

// Kernels is kernels.md.
//
//go:embed kernels.md
var Kernels string
