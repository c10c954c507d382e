// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/datapath"
	"github.com/fairlead-lb/fairlead/internal/inspect"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

// DefaultBPFRoot is where maps and links are pinned unless something else is asked
// for.
const DefaultBPFRoot = "/sys/fs/bpf/fairlead"

const runDir = "/run/fairlead"

// SocketPath returns where the agent with this --bpf-root listens for questions
// unless it was told otherwise. Every root has a path of its own.
func SocketPath(bpfRoot string) string { return runPath("agent", ".sock", bpfRoot) }

// RememberedPath returns where the agent with this --bpf-root remembers the addresses
// of API servers.
func RememberedPath(bpfRoot string) string { return runPath("api-servers", "", bpfRoot) }

// runPath returns the path of a file that no agent with another --bpf-root uses.
func runPath(name, ext, bpfRoot string) string {
	if abs, err := filepath.Abs(bpfRoot); err == nil {
		bpfRoot = abs // fails only where there is no working directory
	}
	if bpfRoot == DefaultBPFRoot {
		return filepath.Join(runDir, name+ext)
	}
	sum := sha256.Sum256([]byte(bpfRoot))
	return filepath.Join(runDir, fmt.Sprintf("%s-%x%s", name, sum[:6], ext))
}

// ask is a question to the agent's goroutine.
type ask struct {
	query      lb.Query
	client     netip.Addr // invalid when nobody's affinity is asked about
	tables     lb.Tables  // what the kernel holds
	affinities []datapath.AffinityEntry
	answer     chan<- answer
}

type answer struct {
	explanation lb.Explanation
	err         error
}

// explain answers what a client gets, and compares it with the kernel.
func (a *agent) explain(q ask) answer {
	if !a.applied {
		return answer{err: errors.New("the agent has not synced with its source yet")}
	}
	// Processes on the node are asked about by any of its addresses.
	var node uint64
	if a.store.IsLocal(q.client) {
		node = a.state.NetnsCookie
	}
	e, err := a.store.Explain(q.query)
	var ports []lb.ServicePort
	for _, p := range e.Ports {
		ports = append(ports, p.Key())
	}
	differences := a.store.Compare(ports, q.tables)
	for i := range e.Ports {
		p := &e.Ports[i]
		p.Kernel = differences[p.Key()]
		p.Affinity = inspect.ClientAffinities(q.tables, q.affinities, p.Key(), q.client, node)
	}
	return answer{e, err}
}

// listenForQuestions answers on a Unix socket that only root can use, until ctx
// ends. An agent that cannot be asked serves all the same, and tries again.
func (a *agent) listenForQuestions(ctx context.Context, path string) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /explain", a.answerExplain)
	mux.HandleFunc("GET /packets", a.answerPackets)
	mux.HandleFunc("GET /lacks", a.answerLacks)
	mux.HandleFunc("GET /source", a.answerSource)
	mux.HandleFunc("GET /probe", a.answerProbe)
	log := a.log.With(logfield.Socket(path))
	failing := false
	for {
		l, err := listenUnix(path)
		if err == nil {
			failing = false
			err = a.serveOn(ctx, l, mux)
			_ = os.Remove(path) // the next agent puts its own there anyway
		}
		if ctx.Err() != nil {
			return
		}
		if !failing {
			log.Warn("fairlead explain cannot ask this agent; trying again", logfield.Error(err))
			failing = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(listenRetry):
		}
	}
}

// listenUnix makes the socket in place of one that nobody listens on any more. It
// is made beside its place, in a directory of its own, so that nobody else can
// connect before its mode says that nobody else may.
func listenUnix(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for the socket: %w", err)
	}
	if err := isFree(path); err != nil {
		return nil, err
	}
	private, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return nil, fmt.Errorf("make directory for the socket: %w", err)
	}
	defer os.RemoveAll(private)
	fresh := filepath.Join(private, "s")
	l, err := net.Listen("unix", fresh)
	if err != nil {
		return nil, err
	}
	// It has another name from here on; whoever serves removes it.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Rename(fresh, path)); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// isFree tells whether a socket can be put at path: nothing is there, or a socket
// that nobody listens on. The lock on the BPF root has kept a second agent away by
// now, so that is what one that was killed has left.
func isFree(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is no socket (give another --socket)", path)
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = conn.Close()
		return errors.New("another process listens there (give --socket)")
	}
	return nil
}

func (a *agent) answerExplain(w http.ResponseWriter, r *http.Request) {
	q, err := parseAsk(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var got answer
	// A change between reading the tables and asking looks like a difference.
	for try := 0; try < 3; try++ {
		if got, err = a.ask(r.Context(), q); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		if !slices.ContainsFunc(got.explanation.Ports, func(p lb.ExplainedPort) bool { return len(p.Kernel) > 0 }) {
			break
		}
	}
	if got.err != nil {
		http.Error(w, got.err.Error(), http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	// The client may be gone; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(got.explanation)
}

// packetState returns how the packet path is; it may be called from any goroutine.
func (a *agent) packetState() PacketState {
	if a.devices != nil {
		return a.devices.State()
	}
	return a.packets
}

func (a *agent) answerPackets(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	// The client may be gone; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(a.packetState())
}

// ask reads the kernel's tables and puts the question to the agent's goroutine.
func (a *agent) ask(ctx context.Context, q ask) (answer, error) {
	var err error
	if q.tables, err = a.datapath.Load(); err != nil {
		return answer{}, err
	}
	if q.client.IsValid() {
		if q.affinities, err = a.datapath.Affinities(); err != nil {
			return answer{}, err
		}
	}
	reply := make(chan answer, 1)
	q.answer = reply
	select {
	case a.asks <- q:
		return <-reply, nil
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
}

func queryValues(q lb.Query, client netip.Addr) url.Values {
	v := url.Values{}
	if q.VIP.IsValid() {
		v.Set("vip", q.VIP.String())
		v.Set("number", strconv.Itoa(int(q.Number)))
	} else {
		v.Set("namespace", q.Service.Namespace)
		v.Set("name", q.Service.Name)
		v.Set("port", q.Port)
	}
	if client.IsValid() {
		v.Set("client", client.String())
	}
	return v
}

func parseAsk(v url.Values) (ask, error) {
	q := ask{query: lb.Query{Service: lb.Name{Namespace: v.Get("namespace"), Name: v.Get("name")}, Port: v.Get("port")}}
	var err error
	if text := v.Get("vip"); text != "" {
		if q.query.VIP, err = netip.ParseAddr(text); err != nil {
			return q, fmt.Errorf("vip: %w", err)
		}
		n, err := strconv.ParseUint(v.Get("number"), 10, 16)
		if err != nil {
			return q, fmt.Errorf("number: %w", err)
		}
		q.query.Number = uint16(n)
	}
	if text := v.Get("client"); text != "" {
		if q.client, err = netip.ParseAddr(text); err != nil {
			return q, fmt.Errorf("client: %w", err)
		}
	}
	return q, nil
}

// AskExplain puts a question to the agent that listens on socket; client is valid
// when a client's affinity is asked about. The error says in one line that no
// agent answers there, or what the agent has against the question.
func AskExplain(ctx context.Context, socket string, q lb.Query, client netip.Addr) (lb.Explanation, error) {
	var e lb.Explanation
	err := askAgent(ctx, socket, "/explain?"+queryValues(q, client).Encode(), &e)
	return e, err
}

// AskPackets asks the agent that listens on socket about its packet path. The error
// is like that of AskExplain.
func AskPackets(ctx context.Context, socket string) (PacketState, error) {
	var s PacketState
	err := askAgent(ctx, socket, "/packets", &s)
	return s, err
}

// askAgent decodes what the agent answers.
func askAgent(ctx context.Context, socket, path string, into any) error {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	c := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: 30 * time.Second}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	response, err := c.Do(request)
	if err != nil {
		return askFailed(socket, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1024))
		return errors.New(strings.TrimSpace(string(text)))
	}
	if err := json.NewDecoder(response.Body).Decode(into); err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	return nil
}

func askFailed(socket string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("no agent answers at %s (is it running with this --bpf-root? or give --source file:DIR)", socket)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("ask the agent at %s: %w (run as root)", socket, errors.Unwrap(err))
	default:
		return fmt.Errorf("ask the agent at %s: %w", socket, err)
	}
}

// ReadStore fills store with what a source says, once it has said everything it
// has. Warnings are passed to warn. The error is the source's, or ctx's.
func ReadStore(ctx context.Context, src reflector.Source, store *lb.Store, warn func(reflector.Warning)) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	events := make(chan reflector.Event)
	ended := make(chan error, 1)
	go func() { ended <- src.Run(ctx, events) }()
	all := synced{addresses: true}
	for !all.complete() {
		select {
		case err := <-ended:
			if err == nil {
				err = ctx.Err()
			}
			return err
		case ev := <-events:
			switch ev := ev.(type) {
			case reflector.ServicesReplaced:
				all.services = true
				store.ReplaceServices(ev.Services)
			case reflector.SlicesReplaced:
				all.slices = true
				store.ReplaceSlices(ev.Slices)
			case reflector.NodeSet:
				all.node = true
				store.SetNode(ev.Node)
			case reflector.NodeGone:
				all.node = true
			case reflector.ServiceCIDRsReplaced:
				all.serviceCIDRs = true
				store.SetServiceCIDRs(ev.Prefixes)
			case reflector.Warning:
				warn(ev)
			}
		}
	}
	return nil
}
