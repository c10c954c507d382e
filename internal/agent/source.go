// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// SourceState is where an agent hears of Services.
type SourceState struct {
	// APIServer is the URL of the API server that is asked, "" when files are read.
	APIServer string `json:"apiServer"`
	// Configured tells whether that is the configured address. If not, that one
	// cannot be reached, and this is an address that API servers had.
	Configured bool `json:"configured"`
	// Holding tells that a list is not done yet that would take the last endpoints
	// of many Services at once.
	Holding bool `json:"holding"`
}

// answerSource says where Services come from.
func (a *agent) answerSource(w http.ResponseWriter, _ *http.Request) {
	s := SourceState{Holding: a.guard.holding.Load()}
	if remote, ok := a.source.(reflector.Remote); ok {
		s.APIServer, s.Configured = remote.Address()
	}
	w.Header().Set("Content-Type", "application/json")
	// The client may be gone; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(s)
}

// AskSource asks the agent that listens on socket where it hears of Services. The
// error is like that of AskExplain.
func AskSource(ctx context.Context, socket string) (SourceState, error) {
	var s SourceState
	err := askAgent(ctx, socket, "/source", &s)
	return s, err
}
