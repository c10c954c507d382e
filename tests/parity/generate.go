// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The universe is small so that objects meet: the same addresses, names and
// numbers come up again and again.
var (
	serviceNames = []types.NamespacedName{
		{Namespace: "shop", Name: "cart"},
		{Namespace: "shop", Name: "pay"},
		{Namespace: "blog", Name: "cart"},
	}
	portNames     = []string{"web", "dns", ""}
	protocols     = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}
	zones         = []string{"zone-a", "zone-b"}
	nodeAddresses = [2]netip.Addr{netip.MustParseAddr("172.18.0.2"), netip.MustParseAddr("fd00:18::2")}
)

const (
	slicesPerService  = 3
	addressesPerSlice = 4
)

// choices says what to generate: pick returns a number from 0 up to n-1. The
// first alternative is the plainest one everywhere.
type choices interface {
	pick(n int) int
}

// seeded makes the choices that belong to a seed.
type seeded struct{ *rand.Rand }

func newSeeded(seed uint64) seeded { return seeded{rand.New(rand.NewPCG(seed, 0))} }

func (s seeded) pick(n int) int { return s.IntN(n) }

// recorded makes the choices a string of bytes says, and the first alternative
// after its end.
type recorded struct{ bytes []byte }

func (r *recorded) pick(n int) int {
	if len(r.bytes) == 0 {
		return 0
	}
	b := r.bytes[0]
	r.bytes = r.bytes[1:]
	return int(b) % n
}

// recording makes somebody else's choices and writes them down for recorded.
type recording struct {
	choices
	bytes []byte
}

func (r *recording) pick(n int) int {
	i := r.choices.pick(n)
	r.bytes = append(r.bytes, byte(i))
	return i
}

// generator makes the steps of one history.
type generator struct {
	choices
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
	habit    habit
}

// habit is what most objects of a history have in common: without it few
// endpoints would ever be a Service's, and rules about all endpoints would never
// apply.
type habit struct {
	families   []discoveryv1.AddressType
	ports      []portKey
	hints      int // see generator.hints
	conditions int // see generator.conditions
}

// portKey is what a port of a Service and that of a slice have in common.
type portKey struct {
	name     string
	protocol corev1.Protocol
}

// Generate makes a history of at most 14 steps.
func Generate(c choices) History {
	g := &generator{
		choices:  c,
		services: map[types.NamespacedName]*corev1.Service{},
		slices:   map[types.NamespacedName]*discoveryv1.EndpointSlice{},
	}
	const v4, v6 = discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6
	g.habit = habit{
		families:   oneOf(g, []discoveryv1.AddressType{v4}, []discoveryv1.AddressType{v6}, []discoveryv1.AddressType{v4, v6}),
		ports:      []portKey{g.anyPort(), g.anyPort()}[:1+g.pick(2)],
		hints:      g.pick(5),
		conditions: g.pick(4),
	}
	h := make(History, 4+g.pick(11))
	for i := range h {
		h[i] = g.step()
		h[i].Quiet = g.oneIn(4)
	}
	return h
}

func (g *generator) anyPort() portKey { return portKey{oneOf(g, portNames...), oneOf(g, protocols...)} }

// port returns the port that most objects have at place i, now and then another.
func (g *generator) port(i int) portKey {
	if g.oneIn(12) {
		return g.anyPort()
	}
	return g.habit.ports[i%len(g.habit.ports)]
}

// oneIn is true once in n times; the plain choice is false.
func (g *generator) oneIn(n int) bool { return g.pick(n) == n-1 }

// oneOf returns one of the values.
func oneOf[T any](g *generator, values ...T) T { return values[g.pick(len(values))] }

func (g *generator) step() Step {
	// Mostly it is about the first Service, so that its objects meet.
	service := max(0, g.pick(14)-11)
	name := serviceNames[service]
	slice := types.NamespacedName{
		Namespace: name.Namespace,
		Name:      fmt.Sprintf("%s-%d", name.Name, g.pick(slicesPerService)),
	}
	switch what := g.pick(20); {
	case what < 5:
		s := g.service(service)
		g.services[name] = s
		return Step{Service: s}
	case what < 15:
		s := g.slice(slice, service)
		g.slices[slice] = s
		return Step{Slice: s}
	case what < 18:
		return Step{Node: g.node()}
	case what == 18:
		delete(g.slices, slice)
		return Step{DeleteSlice: &slice}
	default:
		delete(g.services, name)
		return Step{DeleteService: &name}
	}
}

// node returns this node in one of the zones, in none, or in one without a name.
func (g *generator) node() *corev1.Node {
	n := baseNode()
	if i := g.pick(6) % 4; i < len(zones) {
		n.Labels = map[string]string{corev1.LabelTopologyZone: zones[i]}
	} else if i > len(zones) {
		n.Labels = map[string]string{corev1.LabelTopologyZone: ""}
	}
	return n
}

// baseNode returns this node without labels: what both sides start from.
func baseNode() *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}
	for _, a := range nodeAddresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{
			Type: corev1.NodeInternalIP, Address: a.String(),
		})
	}
	return n
}
