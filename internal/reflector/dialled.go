// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"net/netip"
	"strconv"

	"k8s.io/client-go/rest"
)

// ServerAddress returns where the API server that o describes is dialled, when that
// is an IP address; ok is false for a host name.
func ServerAddress(o KubernetesOptions) (at netip.AddrPort, ok bool, err error) {
	server, err := newServer(o)
	if err != nil {
		return at, false, err
	}
	url, _, err := rest.DefaultServerUrlFor(server.config)
	if err != nil {
		return at, false, nil // whoever dials says what is wrong with it
	}
	addr, err := netip.ParseAddr(url.Hostname())
	if err != nil {
		return at, false, nil
	}
	port := uint64(443)
	if url.Scheme == "http" {
		port = 80
	}
	if url.Port() != "" {
		if port, err = strconv.ParseUint(url.Port(), 10, 16); err != nil {
			return at, false, nil
		}
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), true, nil
}
