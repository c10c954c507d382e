// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/reflector"
)

func TestNothingIsWrittenBeforeEverythingHasArrived(t *testing.T) {
	arrivals := map[string]func(*agent){
		"Services":     func(a *agent) { a.take(reflector.ServicesReplaced{}) },
		"slices":       func(a *agent) { a.take(reflector.SlicesReplaced{}) },
		"the Node":     func(a *agent) { a.take(reflector.NodeGone{}) },
		"ServiceCIDRs": func(a *agent) { a.take(reflector.ServiceCIDRsReplaced{}) },
		"addresses":    func(a *agent) { a.addressesChanged(nil) },
	}
	for missing := range arrivals {
		a := idle()
		for name, arrive := range arrivals {
			if name != missing {
				arrive(a)
			}
		}
		// Without a datapath, an apply that does anything panics.
		a.apply(time.Now())
		if a.applied {
			t.Errorf("applied without %s", missing)
		}
		arrivals[missing](a)
		if !a.synced.complete() {
			t.Errorf("not complete when %s have come last", missing)
		}
	}
	for name, change := range map[string]reflector.Event{
		"a Service": reflector.ServiceSet{}, "a slice": reflector.SliceSet{}, "a warning": reflector.Warning{},
	} {
		a := idle()
		a.take(change)
		if a.synced != (synced{}) {
			t.Errorf("%s alone counts as all there is: %+v", name, a.synced)
		}
	}
}

func TestWhereNodePortsAre(t *testing.T) {
	named, local := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")
	given := netip.MustParseAddr("203.0.113.1")
	six := netip.MustParseAddr("2001:db8::1")
	node := reflector.NodeSet{Node: lb.Node{Addresses: []netip.Addr{named, six}, Eligible: true}}
	open := func(addresses ...netip.Addr) map[netip.Addr]lb.NodeAddress {
		out := map[netip.Addr]lb.NodeAddress{}
		for _, a := range addresses {
			out[a] = lb.NodeAddressOpen
		}
		return out
	}
	for _, tt := range []struct {
		name     string
		setup    func(*agent)
		events   []reflector.Event
		want     map[netip.Addr]lb.NodeAddress
		eligible bool
	}{
		{"at the Node's addresses", nil, []reflector.Event{node}, open(named, six), true},
		{"where they were when the Node is deleted", nil, []reflector.Event{node, reflector.NodeGone{}}, open(named, six), false},
		{"at all local addresses while the API server has no Node", nil, []reflector.Event{reflector.NodeGone{}}, open(local), false},
		{
			"at all local addresses while files have no Node", func(a *agent) { a.nodeOptional = true },
			[]reflector.Event{reflector.NodeGone{}}, open(local), true,
		},
		{
			"at the Node's addresses once files have one", func(a *agent) { a.nodeOptional = true },
			[]reflector.Event{reflector.NodeGone{}, node}, open(named, six), true,
		},
		{
			"at the address that was configured, in its family", func(a *agent) { a.nodeAddress = given },
			[]reflector.Event{node}, open(given, six), true,
		},
		{
			"at the address that was configured, also without a Node", func(a *agent) { a.nodeAddress = given },
			[]reflector.Event{reflector.NodeGone{}}, open(given), false,
		},
		{
			"in the ranges that were configured, with and without a Node",
			func(a *agent) {
				a.store.SetNodePorts(lb.NodePorts{CIDRs: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}})
			},
			[]reflector.Event{reflector.NodeGone{}, node}, open(local), true,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := idle()
			a.store.SetNodePorts(lb.NodePorts{Primary: true})
			if tt.setup != nil {
				tt.setup(a)
			}
			a.addressesChanged([]netip.Addr{local})
			for _, ev := range tt.events {
				a.take(ev)
			}
			if diff := cmp.Diff(tt.want, a.store.All().NodeAddresses, cmp.Comparer(func(x, y netip.Addr) bool { return x == y })); diff != "" {
				t.Errorf("node addresses (-want +got):\n%s", diff)
			}
			a.health.Applied()
			w := httptest.NewRecorder()
			a.health.Healthz(w, nil)
			if (w.Code == http.StatusOK) != tt.eligible {
				t.Errorf("/healthz says %d, want eligible %v", w.Code, tt.eligible)
			}
		})
	}
}

func TestProgrammingLatencyCountsChangesThatReachTheKernel(t *testing.T) {
	slice := lb.Slice{Name: lb.Name{Namespace: "ns", Name: "web-1"}, Service: "web", Family: lb.IPv4}
	set := reflector.SliceSet{Slice: slice, Trigger: time.Now().Add(time.Hour)}
	count := func(events ...reflector.Event) string {
		a := idle()
		for _, ev := range events {
			a.take(ev)
		}
		a.programmed()
		a.programmed() // once each
		w := httptest.NewRecorder()
		a.metrics.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		const name = `kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"} `
		_, rest, _ := strings.Cut(w.Body.String(), name)
		n, _, _ := strings.Cut(rest, "\n")
		return n
	}
	all := reflector.SlicesReplaced{Slices: []lb.Slice{slice}, Triggers: map[lb.Name]time.Time{slice.Name: set.Trigger}}
	untimed := set
	untimed.Trigger = time.Time{}
	for _, tt := range []struct {
		name   string
		events []reflector.Event
		want   string
	}{
		{"a change counts", []reflector.Event{set}, "1"},
		{"each of several changes counts", []reflector.Event{set, set}, "2"},
		{"a change in a list counts", []reflector.Event{all}, "1"},
		{"a change whose time is not known does not count", []reflector.Event{untimed}, "0"},
		{
			"a slice that is deleted before it is applied does not count",
			[]reflector.Event{set, reflector.SliceGone{Name: slice.Name, Service: "web", Family: lb.IPv4}}, "0",
		},
		{
			"a slice of the other family does not take it along",
			[]reflector.Event{set, reflector.SliceGone{Name: slice.Name, Service: "web", Family: lb.IPv6}}, "1",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := count(tt.events...); got != tt.want {
				t.Errorf("counted %s, want %s", got, tt.want)
			}
		})
	}
}

// script is a source that says what it is told to.
type script struct {
	events []reflector.Event
	err    error
}

// Run implements reflector.Source.
func (s script) Run(ctx context.Context, events chan<- reflector.Event) error {
	for _, ev := range s.events {
		select {
		case events <- ev:
		case <-ctx.Done():
			return nil
		}
	}
	if s.err == nil {
		<-ctx.Done()
	}
	return s.err
}

func TestReadStoreReturnsWhenItHasEverything(t *testing.T) {
	web := lb.Service{Name: lb.Name{Namespace: "ns", Name: "web"}, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}}
	all := []reflector.Event{
		reflector.Warning{Text: "odd"}, reflector.ServicesReplaced{Services: []lb.Service{web}}, reflector.SlicesReplaced{},
		reflector.NodeSet{Node: lb.Node{Zone: "a"}}, reflector.ServiceCIDRsReplaced{},
	}
	var warnings []string
	warn := func(w reflector.Warning) { warnings = append(warnings, w.Text) }
	store := lb.NewStore(lb.Config{})
	if err := ReadStore(t.Context(), script{events: all}, store, warn); err != nil {
		t.Fatal(err)
	}
	if e, err := store.Explain(lb.Query{Service: web.Name}); err != nil || e.Zone != "a" || len(warnings) != 1 {
		t.Errorf("%+v, %v, warnings %q", e, err, warnings)
	}

	trouble := errors.New("no such directory")
	if err := ReadStore(t.Context(), script{events: all[:3], err: trouble}, store, warn); !errors.Is(err, trouble) {
		t.Errorf("%v, want the source's error", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := ReadStore(ctx, script{events: all[:3]}, store, warn); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it was cancelled", err)
	}
}
