// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// What a test process becomes when its first argument says so: the one that starts a
// node and passes signals on, the node's PID 1, the process of a container there.
const (
	asStarter   = "as-starter"
	asNode      = "as-node"
	asContainer = "as-container"
)

func TestMain(m *testing.M) {
	if len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	var err error
	switch os.Args[1] {
	case asStarter:
		err = startNode(os.Args[2:])
	case asNode:
		err = becomeNode(os.Args[2:])
	case asContainer:
		err = becomeContainer(os.Args[2], os.Args[3], os.Args[4:])
	default:
		os.Exit(m.Run())
	}
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		os.Exit(ended.ExitCode())
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(125)
	}
}

// inContainer returns the options of an agent in a container as a runtime makes one
// that is not privileged: with these capabilities, as the API spells them, a
// read-only root and /proc/sys, and no way to more; as manifests/daemonset.yaml has
// it, with the PID namespace of its node. The node has a PID 1 of its own here, since
// that of the machine may be none of our business.
func (c *cluster) inContainer(capabilities []corev1.Capability) testutil.AgentOptions {
	c.t.Helper()
	self, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	var names []string
	for _, name := range capabilities {
		names = append(names, string(name))
	}
	volumes := []string{"/run/fairlead", filepath.Dir(c.bpfRoot)}
	if err := os.MkdirAll(volumes[0], 0o700); err != nil {
		c.t.Fatal(err)
	}
	options := c.options()
	options.Through = []string{self, asStarter, strings.Join(names, ","), strings.Join(volumes, ",")}
	return options
}

// startNode runs a node of its own until it ends.
func startNode(args []string) error {
	cmd := exec.Command("/proc/self/exe", append([]string{asNode}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	return run(cmd)
}

// becomeNode is PID 1. It runs a container until that ends.
func becomeNode(args []string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("mount /: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return run(exec.Command("/proc/self/exe", append([]string{asContainer}, args...)...))
}

// run runs a command that ends with this process and gets its SIGTERM.
func run(cmd *exec.Cmd) error {
	runtime.LockOSThread() // on whose end the kernel would kill the command
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM)
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended
		}
	}()
	return cmd.Wait()
}

// becomeContainer returns only when it fails. Lists have commas between their parts.
func becomeContainer(capabilities, volumes string, command []string) error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("mount /: %w", err)
	}
	for _, dir := range append(strings.Split(volumes, ","), "/proc/sys") {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	for _, dir := range []string{"/proc/sys", "/"} {
		if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", dir, err)
		}
	}
	given := strings.Split(capabilities, ",")
	for number, name := range capabilityNames {
		if slices.Contains(given, name) {
			continue
		}
		// Older kernels have fewer.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(number), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("drop %s: %w", name, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return unix.Exec(command[0], command, os.Environ())
}

// capabilityNames are all capabilities by number, spelled as the API does.
var capabilityNames = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
	"SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
	"SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
	"MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
	"CHECKPOINT_RESTORE",
}

// manifestCapabilities are those that the DaemonSet gives the agent.
func manifestCapabilities(t *testing.T) []corev1.Capability {
	t.Helper()
	text, err := os.ReadFile("../../manifests/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(text, &set); err != nil {
		t.Fatal(err)
	}
	given := set.Spec.Template.Spec.Containers[0].SecurityContext.Capabilities
	if given == nil || len(given.Add) == 0 || !slices.Equal(given.Drop, []corev1.Capability{"ALL"}) {
		t.Fatalf("the DaemonSet gives the capabilities %+v; want all dropped and some added", given)
	}
	return given.Add
}
