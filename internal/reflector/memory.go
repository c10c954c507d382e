// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// maxRemembered bounds the addresses that are remembered.
const maxRemembered = 16

// servers is the EndpointSlice in which API servers write their own addresses. Others
// of the same Service are nobody's word but their author's.
var servers = lb.Name{Namespace: "default", Name: "kubernetes"}

// addressesIn returns the addresses of API servers that an event tells, nil when it
// tells none.
func addressesIn(e Event) []netip.AddrPort {
	switch e := e.(type) {
	case SliceSet:
		if e.Slice.Name == servers {
			return serversOf(e.Slice)
		}
	case SlicesReplaced:
		if i := slices.IndexFunc(e.Slices, func(s lb.Slice) bool { return s.Name == servers }); i >= 0 {
			return serversOf(e.Slices[i])
		}
	}
	return nil
}

func serversOf(s lb.Slice) []netip.AddrPort {
	var out []netip.AddrPort
	for _, port := range s.Ports {
		for _, e := range s.Endpoints {
			if port.Name == "https" && port.Protocol == lb.TCP && e.Ready {
				out = append(out, netip.AddrPortFrom(e.Addr, port.Number))
			}
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out[:min(len(out), maxRemembered)]
}

// recall returns the addresses in the file at path, none when there is no such file.
// What is no address in it is passed over.
func recall(path string) ([]netip.AddrPort, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || path == "" {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the addresses of API servers: %w", err)
	}
	var out []netip.AddrPort
	for line := range strings.Lines(string(text)) {
		if a, err := netip.ParseAddrPort(strings.TrimSpace(line)); err == nil && len(out) < maxRemembered {
			out = append(out, a)
		}
	}
	return out, nil
}

// remember puts addresses into the file at path, in place of those that are there. It
// is for root alone, and nobody ever reads half of it.
func remember(path string, addresses []netip.AddrPort) error {
	if path == "" {
		return nil
	}
	var text strings.Builder
	for _, a := range addresses {
		fmt.Fprintln(&text, a)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("remember the addresses of API servers: %w", err)
	}
	file, err := os.CreateTemp(dir, ".new-") // mode 0600
	if err != nil {
		return fmt.Errorf("remember the addresses of API servers: %w", err)
	}
	_, err = file.WriteString(text.String())
	if err = errors.Join(err, file.Close()); err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("remember the addresses of API servers: %w", err), os.Remove(file.Name()))
	}
	return nil
}
