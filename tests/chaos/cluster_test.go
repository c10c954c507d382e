// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// change gives a Service other endpoints and waits until the kernel has those that
// new connections may have.
func (w *world) change(name string, endpoints ...endpoint) {
	w.t.Helper()
	s := w.services[name]
	s.endpoints = endpoints
	w.services[name] = s
	w.apply(s)
	w.settled(name)
}

// settled waits until the kernel leads to the ready endpoints of a Service.
func (w *world) settled(name string) {
	w.t.Helper()
	s := w.services[name]
	var want []string
	for _, e := range s.endpoints {
		if e.conditions == "" {
			want = append(want, e.addrs[ipv4].String())
		}
	}
	slices.Sort(want)
	testutil.Eventually(w.t, 30*time.Second, "the kernel has the endpoints of "+name, func() error {
		got, err := w.backendsOf(s.vips("udp", ipv4)[0])
		if err != nil || !slices.Equal(got, want) {
			return errors.Join(err, fmt.Errorf("it has %v, want %v", got, want))
		}
		return nil
	})
}

// backendsOf returns what inspect says a frontend leads to, sorted.
func (w *world) backendsOf(vip netip.AddrPort) ([]string, error) {
	all, err := w.frontends()
	return all[vip], err
}

// frontends returns the backends of all frontends, sorted. Of two protocols at one
// port it is those of both.
func (w *world) frontends() (map[netip.AddrPort][]string, error) {
	out, err := exec.Command(testutil.BuildBinary(w.t), "inspect", "frontends", "-o", "json", "--bpf-root", w.bpfRoot).Output()
	if err != nil {
		return nil, fmt.Errorf("inspect: %w: %s", err, out)
	}
	var rows []struct {
		VIP      string
		Port     uint16
		Backends []struct{ Address string }
	}
	if err := json.Unmarshal(out, &rows); err != nil {
		return nil, err
	}
	all := map[netip.AddrPort][]string{}
	for _, r := range rows {
		vip, err := netip.ParseAddr(r.VIP)
		if err != nil {
			continue // a NodePort
		}
		at := netip.AddrPortFrom(vip, r.Port)
		for _, b := range r.Backends {
			all[at] = append(all[at], b.Address)
		}
	}
	for _, backends := range all {
		slices.Sort(backends)
	}
	return all, nil
}

// roll replaces all endpoints of a Service, one after the other, as a Deployment
// does: a new one is ready, then an old one drains, then it is gone.
func (w *world) roll(i int) {
	half := len(w.backends) / 2
	from, to := w.backends[:half], w.backends[half:]
	if i%2 == 1 {
		from, to = to, from
	}
	w.change(rolled, from...)
	current := slices.Clone(from)
	for n := range half {
		current = append(current, to[n])
		w.change(rolled, current...)
		drained := slices.Clone(current)
		drained[0] = drained[0].as(terminating)
		w.change(rolled, drained...)
		current = current[1:]
		w.change(rolled, current...)
	}
}

// scale gives a Service any number of endpoints but none.
func (w *world) scale(int) {
	endpoints := slices.Clone(w.backends)
	rand.Shuffle(len(endpoints), func(i, j int) { endpoints[i], endpoints[j] = endpoints[j], endpoints[i] })
	w.change(scaled, endpoints[:1+rand.N(len(endpoints))]...)
}

// flap makes all endpoints but one ready or not.
func (w *world) flap(i int) {
	endpoints := slices.Clone(w.backends)
	for n := range endpoints {
		if n != i%len(endpoints) && rand.N(2) == 0 {
			endpoints[n] = endpoints[n].as(notReady)
		}
	}
	w.change(flapping, endpoints...)
}

// freeze stops the agent while a Service changes. It has caught up soon after it
// goes on.
func (w *world) freeze(i int) {
	if err := w.agent.Kill(syscall.SIGSTOP); err != nil {
		w.t.Fatal(err)
	}
	s := w.services[scaled]
	for n := range 5 {
		s.endpoints = w.backends[:1+(i+n)%len(w.backends)]
		w.apply(s)
		time.Sleep(100 * time.Millisecond) // of a frozen agent's life
	}
	w.services[scaled] = s
	if err := w.agent.Kill(syscall.SIGCONT); err != nil {
		w.t.Fatal(err)
	}
	w.settled(scaled)
}

// loseManifests makes the directory the agent reads unreadable in all ways it can
// be, which changes nothing, and then changes something.
func (w *world) loseManifests(i int) {
	aside := w.dir + ".aside"
	rename := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			w.t.Fatal(err)
		}
	}
	// Half a file, and no YAML at all.
	name := filepath.Join(w.dir, steadyServices[0]+".yaml")
	whole, err := os.ReadFile(name)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, text := range []string{string(whole[:len(whole)/2]), "\x00{[", string(whole)} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			w.t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond) // in which it is read
	}
	// No directory, then an empty one, then one with all of it.
	rename(w.dir, aside)
	w.says("no such file or directory: going on with what was read before", 1+i)
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	time.Sleep(1200 * time.Millisecond) // in which it is looked at
	if err := os.Remove(w.dir); err != nil {
		w.t.Fatal(err)
	}
	rename(aside, w.dir)
	w.change(scaled, w.backends[:1+i%len(w.backends)]...)
}

// says waits until the agent's log holds something so many times.
func (w *world) says(text string, times int) {
	w.t.Helper()
	testutil.Eventually(w.t, 30*time.Second, fmt.Sprintf("%q in the log", text), func() error {
		if strings.Count(w.agent.Logs(), text) < times {
			return errNotYet
		}
		return nil
	})
}
