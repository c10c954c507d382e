// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"encoding/json"
	"iter"
	"reflect"
	"slices"

	"k8s.io/kube-proxy/config/v1alpha1"
)

// ignored are the fields that mean nothing here, with the values (in JSON) that
// are their defaults besides zero. kubeadm writes most of them out.
var ignored = map[string][]string{
	// The client of the API server chooses its encodings itself.
	"clientConnection.acceptContentTypes": nil,
	"clientConnection.contentType":        {`"application/vnd.kubernetes.protobuf"`},

	"logging.flushFrequency":              {`"5s"`, `5000000000`},
	"logging.vmodule":                     nil,
	"logging.options.text.splitStream":    nil,
	"logging.options.text.infoBufferSize": nil,
	"logging.options.json.splitStream":    nil,
	"logging.options.json.infoBufferSize": nil,

	"showHiddenMetricsForVersion": nil,

	// Nothing is read anew by the clock: watches that break are made again.
	"configSyncPeriod": {`"15m0s"`},

	// That of the mode in use is honoured; see Config.SyncPeriod.
	"iptables.syncPeriod": {`"30s"`},
	"ipvs.syncPeriod":     {`"30s"`},
	"nftables.syncPeriod": {`"30s"`},

	// There are neither rules nor virtual servers to program.
	"iptables.masqueradeBit": {`14`},
	"iptables.minSyncPeriod": {`"1s"`},
	"ipvs.minSyncPeriod":     nil,
	"ipvs.scheduler":         nil,
	"ipvs.excludeCIDRs":      nil,
	"ipvs.strictARP":         nil,
	"ipvs.tcpTimeout":        nil,
	"ipvs.tcpFinTimeout":     nil,
	"ipvs.udpTimeout":        nil,
	"nftables.masqueradeBit": {`14`},
	"nftables.minSyncPeriod": {`"1s"`},

	"winkernel.networkName":           nil,
	"winkernel.sourceVip":             nil,
	"winkernel.enableDSR":             nil,
	"winkernel.rootHnsEndpointName":   nil,
	"winkernel.forwardHealthCheckVip": nil,
	"windowsRunAsService":             nil,

	"portRange": nil,
}

// retired are fields that v1alpha1 once had and that clusters which were
// upgraded still carry, with their defaults besides zero.
var retired = map[string][]string{
	"conntrack.max":     nil,
	"resourceContainer": {`"/kube-proxy"`},
	"udpIdleTimeout":    {`"250ms"`},
}

// isUnset tells whether a value in JSON is zero or one of the usual ones.
func isUnset(text string, usual []string) bool {
	switch text {
	case `null`, `false`, `0`, `""`, `"0"`, `"0s"`, `[]`, `{}`:
		return true
	}
	return slices.Contains(usual, text)
}

// meaningless warns once of everything that is set and has no effect.
func (p *parser) meaningless(in *v1alpha1.KubeProxyConfiguration) {
	for path, value := range leaves("", reflect.ValueOf(in).Elem()) {
		usual, ok := ignored[path]
		if !ok || path == syncPeriodPath(in.Mode) {
			continue
		}
		if text, err := json.Marshal(value.Interface()); err != nil || !isUnset(string(text), usual) {
			p.idle = append(p.idle, path)
		}
	}
	if len(p.idle) > 0 {
		p.warn("%s: no effect in Fairlead", list(p.idle))
	}
}

// leaves yields every field that holds a value rather than fields, with its
// path. A map is one value.
func leaves(path string, v reflect.Value) iter.Seq2[string, reflect.Value] {
	return func(yield func(string, reflect.Value) bool) {
		for name, field := range fields(v) {
			at := join(path, name)
			if field.Kind() != reflect.Struct || !isObject(field.Type()) {
				if !yield(at, field) {
					return
				}
				continue
			}
			for at, leaf := range leaves(at, field) {
				if !yield(at, leaf) {
					return
				}
			}
		}
	}
}
