// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package metrics

import (
	"encoding/json"
	"net/http"
)

// configzName is where kube-proxy's configuration is found at /configz.
const configzName = "kubeproxy.config.k8s.io"

// Configz serves the configuration in effect as kube-proxy does at /configz.
// config is encoded as JSON at each request and must not change any more; what
// cannot be encoded is answered with 500.
func Configz(config any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		text, err := json.Marshal(map[string]any{configzName: config})
		if err != nil {
			http.Error(w, "encode the configuration: "+err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		// The client may be gone; there is nobody to tell.
		_, _ = w.Write(text)
	})
}
