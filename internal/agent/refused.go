// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"maps"
	"slices"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// sayRefused tells, once, of Services that ask for addresses and ports which nobody
// gets. problems are those that have changed.
func (a *agent) sayRefused(problems map[lb.Name]lb.Problem) {
	a.metrics.RefusedFrontends.Set(float64(a.store.Refused()))
	news := 0
	for _, name := range slices.SortedFunc(maps.Keys(problems), lb.Name.Compare) {
		why := a.store.WhyRefused(name)
		if why == a.refused[name] {
			continue
		}
		if why == "" {
			delete(a.refused, name)
			continue
		}
		a.refused[name] = why
		if news++; news <= logAtOnce {
			a.log.Warn("service asks for what no Service gets; it is served at its other addresses",
				logfield.Service(name), logfield.Reason(why))
		}
		a.recorder.Service(name, reflector.Notice{
			Warning: true, Reason: "FrontendRefused", Action: "ProgramService", Note: why,
		})
	}
	if news > logAtOnce {
		a.log.Warn("more services ask for what no Service gets; fairlead inspect services says why", logfield.Count(news-logAtOnce))
	}
}
