// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"

	netutils "k8s.io/utils/net"
)

// parseAddress reads an IP address as kube-proxy does, which allows for zeros
// before a number of an IPv4 address. The result is never ::ffff:a.b.c.d.
func parseAddress(s string) (netip.Addr, bool) {
	address, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(s))
	return address.Unmap(), ok
}

// parseListen reads an IP address with a port, which may be left out.
func parseListen(s string, port uint16) (netip.AddrPort, bool) {
	host, number, err := net.SplitHostPort(s)
	if err != nil {
		host, number = s, strconv.Itoa(int(port))
	}
	address, ok := parseAddress(host)
	n, err := strconv.ParseUint(number, 10, 16)
	return netip.AddrPortFrom(address, uint16(n)), ok && err == nil && n != 0
}

// parsePrefixes reads CIDRs and masks them. bad are those that are none.
func parsePrefixes(cidrs []string) (prefixes []netip.Prefix, bad []string) {
	for _, cidr := range cidrs {
		_, network, err := netutils.ParseCIDRSloppy(strings.TrimSpace(cidr))
		if err != nil {
			bad = append(bad, cidr)
			continue
		}
		address, ok := netip.AddrFromSlice(network.IP)
		ones, _ := network.Mask.Size()
		if !ok || address.Is4In6() {
			bad = append(bad, cidr)
			continue
		}
		prefixes = append(prefixes, netip.PrefixFrom(address, ones))
	}
	return prefixes, bad
}

// What a message shows of a file, at most.
const (
	maxShown = 20 // members of a list
	maxRunes = 80 // of a value
	// maxErrorRunes is for what a library has to say.
	maxErrorRunes = 300
)

// warn adds a warning. What comes from the file has to be made printable first.
func (p *parser) warn(format string, args ...any) {
	p.warnings = append(p.warnings, Warning(fmt.Sprintf(format, args...)))
}

// list shows the members of a list, quoted where they need it.
func list(members []string) string {
	shown := make([]string, 0, min(len(members), maxShown))
	for _, member := range members[:min(len(members), maxShown)] {
		shown = append(shown, printable(member))
	}
	text := strings.Join(shown, ", ")
	if more := len(members) - len(shown); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// printable returns a text that needs no quotes as it is, and any other quoted.
func printable(s string) string {
	if s == "" || strings.ContainsFunc(s, unprintable) {
		return quote(s)
	}
	return clip(s)
}

func unprintable(r rune) bool { return !unicode.IsGraphic(r) || r == unicode.ReplacementChar }

func quote(s string) string { return strconv.Quote(clip(s)) }

// clip shortens what is too long for a line.
func clip(s string) string { return clipTo(s, maxRunes) }

func clipTo(s string, most int) string {
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most]) + "…"
	}
	return s
}

// oneLine returns the text of an error on one printable line.
func oneLine(err error) string {
	lines := strings.Split(err.Error(), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimSpace(line)
	}
	drop := func(r rune) rune {
		if unprintable(r) {
			return unicode.ReplacementChar
		}
		return r
	}
	return strings.Map(drop, clipTo(strings.Join(lines, "; "), maxErrorRunes))
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
