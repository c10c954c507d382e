// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package flows ends the flows of the packet path. Programs begin them and note
// what they see; nobody in the kernel says that one is over. The Sweeper does: for
// each flow that has been silent for too long, and at once for each UDP flow whose
// backend has gone, since nobody else tells its client.
package flows
