// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

// Package logfield holds the names of all log fields, so that one thing has one
// name in every package and a log can be searched by it.
package logfield

import (
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// Service is the Service a line is about, as "namespace/name".
func Service(n lb.Name) zap.Field { return zap.Stringer("service", n) }

// Object is what a line is about in the words of its source: "Service ns/name",
// "EndpointSlice ns/name" or a file name.
func Object(s string) zap.Field { return zap.String("object", s) }

// Resource is the kind of objects a line is about, in the API's plural.
func Resource(s string) zap.Field { return zap.String("resource", s) }

// File is a file or directory.
func File(path string) zap.Field { return zap.String("file", path) }

// Server is the URL of the API server.
func Server(url string) zap.Field { return zap.String("server", url) }

// Address is a host and port we listen on or dial.
func Address(s string) zap.Field { return zap.String("address", s) }

// Capability is one of capabilities(7).
func Capability(name string) zap.Field { return zap.String("capability", name) }

// Reason says in words why something is as it is.
func Reason(s string) zap.Field { return zap.String("reason", s) }

// Writes is a number of map writes.
func Writes(n int) zap.Field { return zap.Int("writes", n) }

// Count is a number of whatever the message names.
func Count(n int) zap.Field { return zap.Int("count", n) }

// Took is how long something took.
func Took(d time.Duration) zap.Field { return zap.Duration("took", d) }

// Error is the failure a line reports.
func Error(err error) zap.Field { return zap.Error(err) }

// Node is the name of the node we run on.
func Node(name string) zap.Field { return zap.String("node", name) }

// Version is the version of Fairlead.
func Version(v string) zap.Field { return zap.String("version", v) }

// Cgroup is the cgroup whose processes are served.
func Cgroup(path string) zap.Field { return zap.String("cgroup", path) }

// NodeCgroup is the cgroup that everything on the node is below.
func NodeCgroup(path string) zap.Field { return zap.String("nodeCgroup", path) }

// CgroupID is the inode of the cgroup whose processes are served.
func CgroupID(id uint64) zap.Field { return zap.Uint64("cgroupID", id) }

// OldCgroupID is the inode of the cgroup whose processes were served before.
func OldCgroupID(id uint64) zap.Field { return zap.Uint64("oldCgroupID", id) }

// Hooks are hooks of the socket path, by name.
func Hooks(names []string) zap.Field { return zap.Strings("hooks", names) }

// Table is a table of the kernel.
func Table(name string) zap.Field { return zap.String("table", name) }

// Rows are rows of a table, in the words of inspect.
func Rows(names []string) zap.Field { return zap.Strings("rows", names) }

// Listener is which of our servers a line is about.
func Listener(name string) zap.Field { return zap.String("listener", name) }

// Maps are kernel maps, by name.
func Maps(names []string) zap.Field { return zap.Strings("maps", names) }

// Deletes is a number of rows deleted.
func Deletes(n int) zap.Field { return zap.Int("deletes", n) }

// Frontends is a number of frontends.
func Frontends(n int) zap.Field { return zap.Int("frontends", n) }

// Services is a number of services.
func Services(n int) zap.Field { return zap.Int("services", n) }

// Lost is a number of Services that would lead nowhere any more.
func Lost(n int) zap.Field { return zap.Int("lost", n) }

// BackendGone is a number of UDP sockets whose backend has gone.
func BackendGone(n int) zap.Field { return zap.Int("backendGone", n) }

// BackendCame is a number of UDP sockets whose VIP leads somewhere now.
func BackendCame(n int) zap.Field { return zap.Int("backendCame", n) }

// Sysctl is a setting of the kernel, as sysctl(8) names it.
func Sysctl(name string) zap.Field { return zap.String("sysctl", name) }

// Old is the value a setting had, New the one it has now.
func Old(n int) zap.Field { return zap.Int("old", n) }

// New is the value a setting has now.
func New(n int) zap.Field { return zap.Int("new", n) }

// Socket is the path of a Unix socket.
func Socket(path string) zap.Field { return zap.String("socket", path) }

// Devices are network devices, by name.
func Devices(names []string) zap.Field { return zap.Strings("devices", names) }

// Programs are programs on devices, such as "eth0 ingress".
func Programs(names []string) zap.Field { return zap.Strings("programs", names) }

// Silent is a number of flows that nothing came of for too long.
func Silent(n int) zap.Field { return zap.Int("silent", n) }
