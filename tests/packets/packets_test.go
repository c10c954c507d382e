// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package packets

import "testing"

// TestPrograms shares one world: to load the programs takes longer than most cases.
// Each test leaves the tables as it found them; flows are forgotten before each case.
func TestPrograms(t *testing.T) {
	w := newWorld(t, nil)
	for _, tc := range []struct {
		name string
		test func(*testing.T, *world)
	}{
		{"rewrites", testRewrites},
		{"errors", testErrors},
		{"errors of others", testErrorsOfOthers},
		{"errors about unusual packets", testErrorsAboutUnusual},
		{"headers", testHeaders},
		{"trailer", testTrailer},
		{"short packets", testShort},
		{"not ours", testNotOurs},
		{"fragments", testFragments},
		{"flows", testFlows},
		{"verdicts", testVerdicts},
		{"sides", testSides},
		{"source ranges", testSources},
		{"affinities", testAffinities},
		{"hops", testHops},
		{"sizes", testSizes},
		{"no route", testNoRoute},
		{"policy Local", testPolicyLocal},
		{"hostile", testHostile},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, w) })
	}
}
