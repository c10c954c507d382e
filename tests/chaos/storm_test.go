// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-lb/fairlead/internal/agent"
	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reflector"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// stormAgent says how an agent in a process of this test's executable is set up. Its
// source is the files of the world, and storms at a signal.
type stormAgent struct {
	CgroupRoot, BPFRoot, Socket, Manifests string
	// Every and For are the pace of changes to one large slice, and for how long.
	Every, For time.Duration
	// Burst is how many events come at once after that.
	Burst int
}

const stormVariable = "FAIRLEAD_CHAOS_STORM"

// How large a storm is.
const (
	crowd         = 1000 // endpoints of the large slice
	burstServices = 1000
)

// beStorm is main for an agent with a source that storms.
func beStorm() error {
	var s stormAgent
	if err := json.Unmarshal([]byte(os.Getenv(stormVariable)), &s); err != nil {
		return err
	}
	log, err := zap.NewDevelopment()
	if err != nil {
		return err
	}
	files, err := reflector.NewFile(s.Manifests, reflector.Options{NodeName: "node"}, log)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return agent.Run(ctx, agent.Config{
		Source: stormSource{files, s, log}, NodeName: "node", NodeOptional: true,
		NodePorts: lb.NodePorts{Primary: true, Loopback: true}, Recorder: reflector.NoRecorder(),
		CgroupRoot: s.CgroupRoot, BPFRoot: s.BPFRoot, Socket: s.Socket,
		HealthzAddress: testutil.HealthzAddress, MetricsAddress: testutil.MetricsAddress,
		Packets:     agent.Packets{On: true, ClusterCIDRs: clusterCIDRs},
		RepairEvery: 5 * time.Minute, Version: "storm",
	}, log)
}

// stormSource is files with storms.
type stormSource struct {
	reflector.Source
	stormAgent
	log *zap.Logger
}

// Run implements reflector.Source.
func (s stormSource) Run(ctx context.Context, events chan<- reflector.Event) error {
	var storm sync.WaitGroup
	defer storm.Wait()
	begin := make(chan os.Signal, 1)
	signal.Notify(begin, syscall.SIGUSR1)
	send := func(e reflector.Event) {
		select {
		case events <- e:
		case <-ctx.Done():
		}
	}
	storm.Go(func() {
		for _, of := range []func(send func(reflector.Event)){s.quiet, s.changes, s.burst} {
			select {
			case <-begin:
			case <-ctx.Done():
				return
			}
			start := time.Now()
			of(send)
			s.log.Info("storm is over", zap.Duration("took", time.Since(start)))
		}
	})
	return s.Source.Run(ctx, events)
}

// quiet sends what storms will change.
func (s stormSource) quiet(send func(reflector.Event)) {
	send(reflector.ServiceSet{Service: stormService("crowd", crowdVIP)})
	send(reflector.SliceSet{Slice: stormSlice("crowd", 0, crowd)})
	for i := range burstServices {
		send(reflector.ServiceSet{Service: stormService(burstName(i), burstVIP(i))})
		send(reflector.SliceSet{Slice: stormSlice(burstName(i), i, 5)})
	}
}

// changes makes endpoints of the large slice come and go, in the end to lastCrowd.
func (s stormSource) changes(send func(reflector.Event)) {
	tick := time.NewTicker(s.Every)
	defer tick.Stop()
	for end := time.Now().Add(s.For); time.Now().Before(end); <-tick.C {
		slice := stormSlice("crowd", 0, crowd)
		rand.Shuffle(crowd, func(i, j int) {
			slice.Endpoints[i], slice.Endpoints[j] = slice.Endpoints[j], slice.Endpoints[i]
		})
		slice.Endpoints = slice.Endpoints[:crowd-rand.N(crowd/10)]
		send(reflector.SliceSet{Slice: slice})
	}
	send(reflector.SliceSet{Slice: stormSlice("crowd", 0, lastCrowd)})
}

const lastCrowd = 990

// burst changes many Services many times, as fast as it can. In the end each has one
// endpoint.
func (s stormSource) burst(send func(reflector.Event)) {
	rounds := max(1, s.Burst/burstServices)
	for round := range rounds {
		for i := range burstServices {
			endpoints := 1 + (rounds-1-round)%5
			send(reflector.SliceSet{Slice: stormSlice(burstName(i), i, endpoints)})
		}
	}
}

func stormService(name string, vip netip.Addr) lb.Service {
	return lb.Service{
		Name: lb.Name{Namespace: "storm", Name: name}, ClusterIPs: []netip.Addr{vip},
		Ports: []lb.Port{{Name: "web", Protocol: lb.TCP, Number: tcpPort}, {Name: "dns", Protocol: lb.UDP, Number: udpPort}},
	}
}

func stormSlice(service string, number, endpoints int) lb.Slice {
	s := lb.Slice{
		Name: lb.Name{Namespace: "storm", Name: service + "-1"}, Service: service, Family: lb.IPv4,
		Ports: []lb.SlicePort{{Name: "web", Protocol: lb.TCP, Number: 9000}, {Name: "dns", Protocol: lb.UDP, Number: 9000}},
	}
	for i := range endpoints {
		s.Endpoints = append(s.Endpoints, lb.Endpoint{Addr: stormAddr(number, i), Ready: true, Serving: true, Node: "other"})
	}
	return s
}

// stormAddr is the address of endpoint i of Service number.
func stormAddr(number, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(128 + i>>8 + number>>8<<3), byte(number), byte(i)})
}

var crowdVIP = netip.MustParseAddr("10.96.1.1")

func burstName(i int) string { return fmt.Sprintf("burst-%d", i) }

func burstVIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 96, byte(2 + i>>8), byte(i)}) }

// storm replaces the agent by one that is told more than anybody could follow. In
// the end the kernel has what was said last, and the agent is no larger.
func (w *world) storm(int) {
	w.agent.End(w.t, syscall.SIGKILL)
	s := stormAgent{
		CgroupRoot: w.cgroup.Path(), BPFRoot: w.bpfRoot, Socket: w.socket, Manifests: w.dir,
		Every: 10 * time.Millisecond, For: 3 * time.Second, Burst: 100_000,
	}
	if *long {
		s.For = 2 * time.Minute
	}
	w.agent = w.startStorm(s)
	w.blow(1)
	w.leadsTo(map[netip.Addr]int{crowdVIP: crowd, burstVIP(burstServices - 1): 5})
	before := w.metric("process_resident_memory_bytes")
	w.blow(2)
	w.leadsTo(map[netip.Addr]int{crowdVIP: lastCrowd})
	w.isNoLarger("changes to a slice with 1,000 endpoints", before)
	w.blow(3)
	want := map[netip.Addr]int{}
	for i := range burstServices {
		want[burstVIP(i)] = 1
	}
	w.leadsTo(want)
	w.isNoLarger("events in a burst", before)
	w.agent.End(w.t, syscall.SIGTERM)
	w.restart()
}

// startStorm starts an agent that storms at a signal.
func (w *world) startStorm(s stormAgent) *testutil.Agent {
	w.t.Helper()
	settings, err := json.Marshal(s)
	if err != nil {
		w.t.Fatal(err)
	}
	path, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	script := filepath.Join(w.t.TempDir(), "storm")
	writeScript(w.t, script, fmt.Sprintf("export %s=storm %s='%s'\nexec %s", childVariable, stormVariable, settings, path))
	return w.startAs(script, w.options())
}

// startAs starts an agent from another executable.
func (w *world) startAs(binary string, options testutil.AgentOptions) *testutil.Agent {
	w.t.Helper()
	const variable = "FAIRLEAD_BINARY"
	was, set := os.LookupEnv(variable)
	if err := os.Setenv(variable, binary); err != nil {
		w.t.Fatal(err)
	}
	defer func() {
		if set {
			_ = os.Setenv(variable, was)
		} else {
			_ = os.Unsetenv(variable)
		}
	}()
	return testutil.StartAgent(w.t, options)
}

func writeScript(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// blow begins the next part of a storm, the nth, and waits until it is over.
func (w *world) blow(nth int) {
	w.t.Helper()
	if err := w.agent.Kill(syscall.SIGUSR1); err != nil {
		w.t.Fatal(err)
	}
	testutil.Eventually(w.t, 5*time.Minute, "the storm is over", func() error {
		if strings.Count(w.agent.Logs(), "storm is over") < nth {
			return errNotYet
		}
		return nil
	})
}

// leadsTo waits until the UDP frontends of VIPs lead to the first endpoints, so many
// each.
func (w *world) leadsTo(want map[netip.Addr]int) {
	w.t.Helper()
	testutil.Eventually(w.t, time.Minute, "the kernel has what was said last", func() error {
		all, err := w.frontends()
		if err != nil {
			return err
		}
		for vip, n := range want {
			number := 0
			if vip != crowdVIP {
				b := vip.As4()
				number = int(b[2]-2)<<8 + int(b[3])
			}
			var endpoints []string
			for i := range n {
				endpoints = append(endpoints, stormAddr(number, i).String())
			}
			slices.Sort(endpoints)
			if got := all[netip.AddrPortFrom(vip, udpPort)]; !slices.Equal(got, endpoints) {
				return fmt.Errorf("%s leads to %d backends, want %d", vip, len(got), n)
			}
		}
		return nil
	})
}

// mayGrowBy is how much larger an agent may be after a storm: what its events and
// what they say take while they wait, and what the collector has not collected.
const mayGrowBy = 64 << 20

func (w *world) isNoLarger(after string, before float64) {
	w.t.Helper()
	now := w.metric("process_resident_memory_bytes")
	if now > before+mayGrowBy {
		w.t.Errorf("after %s the agent has %.0f MiB, before %.0f", after, now/(1<<20), before/(1<<20))
	}
	w.t.Logf("after %s the agent has %.0f MiB, before %.0f", after, now/(1<<20), before/(1<<20))
}
