// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/privileges"
)

// Lack is a capability that an agent does not have, and what falls away for it.
type Lack struct {
	Capability string `json:"capability"` // as in capabilities(7)
	Without    string `json:"without"`
}

// lacksOf is what others are told; it is never nil.
func lacksOf(missing []privileges.Capability) []Lack {
	out := []Lack{}
	for _, c := range missing {
		out = append(out, Lack{c.Name, c.Without})
	}
	return out
}

func explainLacks(missing []privileges.Capability, log *zap.Logger) {
	for _, c := range missing {
		log.Warn("a capability is missing; what needs it is off", logfield.Capability(c.Name), logfield.Reason(c.Without))
	}
}

// cannotEnter tells whether network namespaces cannot be entered.
func cannotEnter(missing []privileges.Capability) bool {
	return slices.ContainsFunc(missing, func(c privileges.Capability) bool { return c.Name == privileges.SysAdmin })
}

func (a *agent) answerLacks(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	// The client may be gone; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(a.lacks)
}

// AskLacks asks the agent that listens on socket which capabilities it could use
// and does not have. The error is like that of AskExplain.
func AskLacks(ctx context.Context, socket string) ([]Lack, error) {
	var lacks []Lack
	err := askAgent(ctx, socket, "/lacks", &lacks)
	return lacks, err
}
