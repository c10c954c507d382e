// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/fairlead-lb/fairlead/internal/attach"
	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// prefix begins the name of everything the benchmark makes.
const prefix = "fairlead-bench"

var clientAddr = netip.MustParseAddr("10.244.0.100")

// podAddrs are the addresses of the pod that serves: each Service has them all
// as endpoints, so that both sides talk to one server and a connection through
// a Service still means a choice among ten.
func podAddrs() []netip.Addr {
	addrs := make([]netip.Addr, 10)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{10, 244, 0, byte(10 + i)})
	}
	return addrs
}

// withPort returns where all of addrs listen on a port.
func withPort(addrs []netip.Addr, port uint16) []netip.AddrPort {
	out := make([]netip.AddrPort, len(addrs))
	for i, addr := range addrs {
		out[i] = netip.AddrPortFrom(addr, port)
	}
	return out
}

// vip is the ClusterIP of a Service.
func vip(service int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 96, byte(service >> 8), byte(service)})
}

// cluster is what is measured: a client and a server behind one node, and maps
// and programs twice, with few Services and with many. The zero value can be
// built and must be closed even when that fails.
type cluster struct {
	// plain is a cgroup without programs.
	plain       *sandbox.Cgroup
	few, many   *installation
	client      *remote
	programming []programming // of few and of many

	// Nodes that clients outside reach: one with our packet path, or none, and one
	// with the rules of kube-proxy, nil where there is none to compare with.
	routed, nftables *lane
	// empty has programs for routed that do nothing.
	empty *installation

	dir     string
	closers []func() error // in the order in which things were made
}

// installation is what an agent would leave in the kernel: maps with Services
// in them, programs, and the cgroup whose sockets they serve.
type installation struct {
	cgroup   *sandbox.Cgroup
	datapath *datapath.Datapath
	// devices are those of the node whose packet path this is. attach puts it on some
	// of them and takes it from the others.
	devices []attach.Device
	attach  func([]attach.Device) error
}

// Target lists of the client.
const (
	toPod       = iota // the pod's addresses
	toService          // one Service
	toAnyOfFew         // each Service of few in turn
	toAnyOfMany        // each Service of many in turn, in no order
)

func (c *cluster) build(ctx context.Context, few, many int) error {
	dir, err := sandbox.TempDir(prefix)
	if err != nil {
		return err
	}
	c.dir = dir
	c.onClose(func() error { return os.RemoveAll(dir) })
	bpffs := filepath.Join(dir, "bpf")
	unmount, err := sandbox.MountBPFFS(bpffs)
	if err != nil {
		return err
	}
	c.onClose(unmount)
	if c.plain, err = c.newCgroup(); err != nil {
		return err
	}
	if c.routed, err = c.newLane(ctx, many); err != nil {
		return fmt.Errorf("make a node: %w", err)
	}
	if c.few, err = c.install(bpffs, few); err != nil {
		return fmt.Errorf("install %d Services: %w", few, err)
	}
	if c.many, err = c.install(bpffs, many); err != nil {
		return fmt.Errorf("install %d Services: %w", many, err)
	}
	if c.empty, err = c.addEmpty(filepath.Join(bpffs, "empty"), c.routed); err != nil {
		return err
	}
	return c.startChildren(ctx, few, many)
}

// install fills maps of their own with Services and attaches programs to a
// cgroup of their own.
func (c *cluster) install(bpffs string, services int) (*installation, error) {
	cgroup, err := c.newCgroup()
	if err != nil {
		return nil, err
	}
	target, err := attach.OpenCgroup(cgroup.Path())
	if err != nil {
		return nil, err
	}
	root := filepath.Join(bpffs, strconv.Itoa(services))
	d, err := datapath.Open(datapath.Config{Root: root, CgroupID: target.ID, PacketPath: true})
	if err != nil {
		return nil, err
	}
	c.onClose(d.Close)
	took, err := program(d.Tables, services)
	if err != nil {
		return nil, err
	}
	c.programming = append(c.programming, took)
	c.onClose(func() error { return attach.DetachAll(filepath.Dir(datapath.LinkPath(root, "any"))) })
	for _, hook := range attach.Hooks() {
		if err := attach.Attach(target, hook, d.Program(hook.Program), datapath.LinkPath(root, hook.Name)); err != nil {
			return nil, err
		}
	}
	in := &installation{cgroup: cgroup, datapath: d}
	return in, c.addPath(in, root, c.routed)
}

// startChildren makes the pods and starts client and server in them. The server
// stays outside of the cgroups, so no program sees its sockets.
func (c *cluster) startChildren(ctx context.Context, few, many int) error {
	node, err := sandbox.NewNode(prefix)
	if err != nil {
		return err
	}
	c.onClose(node.Close)
	serverPod, err := node.AddPod("server", podAddrs()...)
	if err != nil {
		return err
	}
	clientPod, err := node.AddPod("client", clientAddr)
	if err != nil {
		return err
	}
	server, err := startServer(ctx, serverPod)
	if err != nil {
		return err
	}
	c.onClose(server.stop)
	targets := make([][]netip.AddrPort, toAnyOfMany+1)
	targets[toPod] = withPort(podAddrs(), port)
	targets[toService] = withPort([]netip.Addr{vip(0)}, port)
	targets[toAnyOfFew] = withPort(vips(few), port)
	targets[toAnyOfMany] = withPort(vips(many), port)
	if c.client, err = startClient(ctx, clientPod, targets); err != nil {
		return err
	}
	c.onClose(c.client.stop)
	return nil
}

func (c *cluster) newCgroup() (*sandbox.Cgroup, error) {
	cgroup, err := sandbox.NewCgroup(prefix)
	if err != nil {
		return nil, err
	}
	c.onClose(cgroup.Close)
	return cgroup, nil
}

// enter moves the client into a cgroup. The sockets it makes from then on
// belong there; nothing else about the process changes.
func (c *cluster) enter(cgroup *sandbox.Cgroup) error {
	file := filepath.Join(cgroup.Path(), "cgroup.procs")
	if err := os.WriteFile(file, []byte(strconv.Itoa(c.client.pid())), 0); err != nil {
		return fmt.Errorf("move the client to another cgroup: %w", err)
	}
	return nil
}

func (c *cluster) onClose(f func() error) { c.closers = append(c.closers, f) }

// close removes everything, the newest first.
func (c *cluster) close() error {
	var errs []error
	for i := len(c.closers) - 1; i >= 0; i-- {
		errs = append(errs, c.closers[i]())
	}
	return errors.Join(errs...)
}
