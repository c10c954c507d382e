// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// Network is a number of namespaces without links: whoever makes them also
// connects them, with Configure and ConnectL3. Node is for those who want one
// node with a bridge.
type Network struct {
	base string

	mu         sync.Mutex
	namespaces []*Namespace
}

// NewNetwork returns a network without namespaces. Their names will begin with
// prefix, which must not be empty or contain a slash. The caller must close it.
func NewNetwork(prefix string) (*Network, error) {
	if prefix == "" || strings.Contains(prefix, "/") {
		return nil, fmt.Errorf("make network: %q is no prefix for file names", prefix)
	}
	return &Network{base: uniqueName(prefix)}, nil
}

// AddNamespace makes a namespace that has nothing but its loopback link. It is
// removed with the network.
func (n *Network) AddNamespace(name string) (*Namespace, error) {
	ns, err := newNamespace(n.base + "-" + name)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.namespaces = append(n.namespaces, ns)
	n.mu.Unlock()
	return ns, nil
}

// Close removes the network with all its namespaces.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, ns := range n.namespaces {
		errs = append(errs, ns.close())
	}
	n.namespaces = nil
	return errors.Join(errs...)
}

// Configure gives ip(8) of iproute2 commands to run in the namespace, such as
// "link set eth0 up", one in each line. Empty lines and indentation are allowed.
// It ends with the first command that fails; the error says which. Options, such
// as -6, hold for all commands.
func (ns *Namespace) Configure(commands string, options ...string) error {
	return ns.input(commands, "ip", append(options, "-batch", "-")...)
}

// Firewall gives nft(8) of nftables a ruleset to add to the namespace's.
func (ns *Namespace) Firewall(ruleset string) error {
	return ns.input(ruleset, "nft", "-f", "-")
}

// input runs a program in the namespace that reads what to do from its standard
// input.
func (ns *Namespace) input(text, name string, args ...string) error {
	cmd := ns.Command(context.Background(), name, args...)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("configure %s: %s: %w: %s\nin: %s", ns.name, name, err, strings.TrimSpace(string(out)), text)
	}
	return nil
}

// SetSysctl sets a key of sysctl(8) below net in the namespace. The separator is
// the slash, as in "ipv4/ip_forward".
func (ns *Namespace) SetSysctl(key, value string) error {
	return ns.Do(func() error { return writeSysctl(key, value) })
}
