// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reconciler_test

import (
	"reflect"
	"slices"
	"testing"

	"github.com/fairlead-lb/fairlead/internal/reconciler"
)

// A method that no test lets fail would be one whose failure nobody has thought of.
func TestEveryMethodOfTheKernelFailsInSomeTest(t *testing.T) {
	var all []string
	for method := range reflect.TypeFor[reconciler.Kernel]().Methods() {
		all = append(all, method.Name)
	}
	failing := slices.Sorted(slices.Values(failingOps))
	if slices.Sort(all); !slices.Equal(all, failing) {
		t.Errorf("Kernel has %v, tests let %v fail", all, failing)
	}
}
