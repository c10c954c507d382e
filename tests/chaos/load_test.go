// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
)

// Clients are processes of their own: the pods' one is in the cgroup that agents
// serve, that of the clients outside is not, or its sockets would be served too.

// patience is how long an answer may take: longer than TCP's first repetitions, so
// that a busy machine fails nothing. Datagrams are never sent twice: they tell of the
// shortest gap.
const patience = 10 * time.Second

// target is an address that a Service is to answer at.
type target struct {
	At      netip.AddrPort
	Service string
}

// task is what one client does, again and again.
type task struct {
	Do      string // a key of kinds
	Netns   string // the path of its namespace
	Targets []target
	Every   time.Duration
}

// kinds are the clients there are. Each returns one step, after it has prepared
// what the step needs.
var kinds = map[string]func(*client) (step func() error, err error){
	"connect":   (*client).connects,
	"exchange":  (*client).exchanges,
	"datagrams": (*client).sends,
	"keep TCP":  (*client).keepsTCP,
	"keep UDP":  (*client).keepsUDP,
	"move UDP":  (*client).movesUDP,
	"affinity":  (*client).keepsBackend,
}

// client is a task that runs, on a thread in its namespace.
type client struct {
	task
	next  int // counts targets and texts
	steps atomic.Int64
	tally *tally
}

// tally is what all clients of a process have done.
type tally struct {
	mu sync.Mutex
	counts
	failing map[*client]bool // whose last step has failed
}

// counts say what has become of connections and exchanges.
type counts struct {
	Tried, Failed int64
	// Moved counts UDP sockets that were ended with their backend and went on with
	// another one, as they are meant to.
	Moved   int64
	Slowest time.Duration
	Errors  []string // the first ones
}

// errorsKept is how many errors a process keeps.
const errorsKept = 40

func (t *tally) note(c *client, took time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Tried++
	t.Slowest = max(t.Slowest, took)
	if err == nil {
		delete(t.failing, c)
		return
	}
	t.Failed++
	// The first of each client: one that has lost its connection fails for ever.
	if len(t.Errors) < errorsKept && !t.failing[c] {
		t.Errors = append(t.Errors, err.Error())
	}
	t.failing[c] = true
}

func (t *tally) moved() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Moved++
}

// take returns what was counted since it was called last.
func (t *tally) take() counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.counts
	t.counts = counts{}
	return c
}

// beClients is main for a process of clients: it is given its tasks, then answers
// every line with counts, after each client has begun and ended a step since.
func beClients() error {
	in := json.NewDecoder(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	var tasks []task
	if err := in.Decode(&tasks); err != nil {
		return err
	}
	all := &tally{failing: map[*client]bool{}}
	clients := make([]*client, len(tasks))
	ready := make(chan error, len(tasks))
	for i, task := range tasks {
		clients[i] = &client{task: task, tally: all, next: i}
		go clients[i].run(ready)
	}
	for range tasks {
		if err := <-ready; err != nil {
			return err
		}
	}
	for {
		if err := out.Encode(all.take()); err != nil {
			return err
		}
		var question string
		if err := in.Decode(&question); err != nil {
			return nil // the test is over
		}
		awaitSteps(clients, 2)
	}
}

// awaitSteps returns when each client has ended n more steps. A step takes a few
// times patience at most.
func awaitSteps(clients []*client, n int64) {
	want := make([]int64, len(clients))
	for i, c := range clients {
		want[i] = c.steps.Load() + n
	}
	for i, c := range clients {
		for c.steps.Load() < want[i] {
			time.Sleep(time.Millisecond)
		}
	}
}

// run does the task until the process ends.
func (c *client) run(ready chan<- error) {
	step, err := c.prepare()
	if err != nil {
		err = fmt.Errorf("client that is to %s: %w", c.Do, err)
	}
	ready <- err
	if err != nil {
		return
	}
	tick := time.NewTicker(c.Every)
	defer tick.Stop()
	for {
		<-tick.C
		start := time.Now()
		err := step()
		if err != nil {
			err = fmt.Errorf("%s, %s to %s: %w", start.Format("15:04:05.000"), c.Do, c.last().At, err)
		}
		c.tally.note(c, time.Since(start), err)
		c.steps.Add(1)
	}
}

// prepare moves the goroutine, for good, to a thread in the client's namespace, and
// gets its first step.
func (c *client) prepare() (func() error, error) {
	kind, known := kinds[c.Do]
	if !known || len(c.Targets) == 0 {
		return nil, errors.New("unknown, or without targets")
	}
	runtime.LockOSThread()
	ns, err := os.Open(c.Netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	return kind(c)
}

// target returns the next target, and last the one before.
func (c *client) target() target { c.next++; return c.last() }

func (c *client) last() target { return c.Targets[c.next%len(c.Targets)] }

// text returns what was never asked before.
func (c *client) text() string { return fmt.Sprintf("%p-%d", c, time.Now().UnixNano()) }

func (c *client) dial(network string, to target) (net.Conn, error) {
	dialer := net.Dialer{Timeout: patience}
	return dialer.DialContext(context.Background(), network, to.At.String())
}

// connects makes a connection, asks once and closes it.
func (c *client) connects() (func() error, error) {
	return func() error {
		_, err := c.connectOnce(c.target())
		return err
	}, nil
}

func (c *client) connectOnce(to target) (backend string, err error) {
	conn, err := c.dial("tcp", to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	if backend, err = c.askLine(conn, in, to.Service); err != nil {
		return "", err
	}
	// The end of the connection belongs to it.
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
		return "", fmt.Errorf("read end of connection: %d bytes, %w", len(rest), err)
	}
	return backend, nil
}

// askLine asks once on a connection.
func (c *client) askLine(conn net.Conn, in *bufio.Reader, service string) (backend string, err error) {
	text := c.text()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, text+"\n"); err != nil {
		return "", err
	}
	line, err := in.ReadString('\n')
	if err != nil {
		return "", err
	}
	return checkAnswer(line, service, text)
}

// exchanges sends a datagram from a new connected socket.
func (c *client) exchanges() (func() error, error) {
	return func() error {
		to := c.target()
		conn, err := c.dial("udp", to)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = c.askDatagram(conn, to.Service)
		if !isEnded(err) {
			return err
		}
		again, err := c.dial("udp", to)
		if err != nil {
			return err
		}
		defer again.Close()
		c.tally.moved()
		_, err = c.askDatagram(again, to.Service)
		return err
	}, nil
}

// isEnded tells whether a UDP socket was ended since its backend has gone.
func isEnded(err error) bool {
	return errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EDESTADDRREQ)
}

// askDatagram asks once on a connected UDP socket.
func (c *client) askDatagram(conn net.Conn, service string) (backend string, err error) {
	text := c.text()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return "", err
	}
	buf := make([]byte, 2048)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return "", err
		}
		if backend, err = checkAnswer(string(buf[:n]), service, text); !errors.Is(err, errNotMine) {
			return backend, err
		}
	}
}

// sends sends datagrams to many Services from one socket that is not connected.
func (c *client) sends() (func() error, error) {
	network := "udp4"
	if c.Targets[0].At.Addr().Is6() {
		network = "udp6"
	}
	conn, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 2048)
	return func() error {
		to, text := c.target(), c.text()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := conn.WriteToUDPAddrPort([]byte(text), to.At); err != nil {
			return err
		}
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return err
			}
			if _, err = checkAnswer(string(buf[:n]), to.Service, text); errors.Is(err, errNotMine) {
				continue
			}
			if from != to.At {
				return errors.Join(err, fmt.Errorf("answered by %s", from))
			}
			return err
		}
	}, nil
}

// keepsTCP uses a connection that is there from the beginning.
func (c *client) keepsTCP() (func() error, error) {
	to := c.last()
	conn, err := c.dial("tcp", to)
	if err != nil {
		return nil, err
	}
	in := bufio.NewReader(conn)
	var first string
	return func() error { return c.same(&first, func() (string, error) { return c.askLine(conn, in, to.Service) }) }, nil
}

// keepsUDP uses a connected socket that is there from the beginning, and whose
// backend stays.
func (c *client) keepsUDP() (func() error, error) {
	to := c.last()
	conn, err := c.dial("udp", to)
	if err != nil {
		return nil, err
	}
	var first string
	return func() error { return c.same(&first, func() (string, error) { return c.askDatagram(conn, to.Service) }) }, nil
}

// movesUDP is keepsUDP for a Service whose backends go: their sockets are ended, and
// whoever connects again reaches another at once.
func (c *client) movesUDP() (func() error, error) {
	to := c.last()
	conn, err := c.dial("udp", to)
	if err != nil {
		return nil, err
	}
	return func() error {
		_, err := c.askDatagram(conn, to.Service)
		if !isEnded(err) {
			return err
		}
		_ = conn.Close()
		if conn, err = c.dial("udp", to); err != nil {
			return err
		}
		c.tally.moved()
		_, err = c.askDatagram(conn, to.Service)
		return err
	}, nil
}

// keepsBackend connects again and again and must be given the backend of the first
// time.
func (c *client) keepsBackend() (func() error, error) {
	var first string
	return func() error { return c.same(&first, func() (string, error) { return c.connectOnce(c.last()) }) }, nil
}

// same tells whether ask returns what it did the first time.
func (c *client) same(first *string, ask func() (string, error)) error {
	got, err := ask()
	if err != nil {
		return err
	}
	if *first == "" {
		*first = got
	}
	if got != *first {
		return fmt.Errorf("answered by %s after %s", got, *first)
	}
	return nil
}

// load is all clients, as the test sees them.
type load struct{ processes []*clients }

// clients is a process of them.
type clients struct {
	cmd *sandbox.Cmd
	in  *json.Encoder
	out *json.Decoder
}

// childVariable says what a process is that was started from the test's executable.
const childVariable = "FAIRLEAD_CHAOS_CHILD"

// start starts a process of clients, in cgroup unless that is nil, and returns when
// all of them are ready. It ends with the test.
func (l *load) start(t *testing.T, ns *sandbox.Namespace, cgroup *os.File, tasks []task) {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &clients{cmd: ns.Command(context.Background(), path)}
	c.cmd.Env = append(os.Environ(), childVariable+"=clients")
	c.cmd.Stderr = os.Stderr
	if cgroup != nil {
		c.cmd.SysProcAttr.UseCgroupFD, c.cmd.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
	}
	in, inErr := c.cmd.StdinPipe()
	out, outErr := c.cmd.StdoutPipe()
	if err := cmp.Or(inErr, outErr, c.cmd.Start()); err != nil {
		t.Fatalf("start clients: %v", err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := c.cmd.Wait(); err != nil {
			t.Errorf("clients: %v", err)
		}
	})
	c.in, c.out = json.NewEncoder(in), json.NewDecoder(out)
	if err := c.in.Encode(tasks); err != nil {
		t.Fatalf("start clients: %v", err)
	}
	var none counts
	if err := c.out.Decode(&none); err != nil {
		t.Fatalf("start clients: %v", err)
	}
	l.processes = append(l.processes, c)
}

// take returns what has been done since the last time, with all that was under way
// when it was called.
func (l *load) take(t *testing.T) counts {
	t.Helper()
	for _, c := range l.processes { // all at once: each takes a while
		if err := c.in.Encode("take"); err != nil {
			t.Fatalf("ask clients: %v", err)
		}
	}
	var sum counts
	for _, c := range l.processes {
		var got counts
		if err := c.out.Decode(&got); err != nil {
			t.Fatalf("ask clients: %v", err)
		}
		sum.Tried += got.Tried
		sum.Failed += got.Failed
		sum.Moved += got.Moved
		sum.Slowest = max(sum.Slowest, got.Slowest)
		sum.Errors = append(sum.Errors, got.Errors...)
	}
	slices.SortFunc(sum.Errors, strings.Compare) // by time
	return sum
}
