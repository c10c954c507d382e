// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package parity

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/proxy"
	"k8s.io/kubernetes/pkg/proxy/apis"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// upstream is kube-proxy: what its informers let through, its trackers, one set
// for each family, and what its nftables proxier reads out of them.
type upstream struct {
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
	topology map[string]string
	families [2]*family
}

// family is the state of the proxier of one family.
type family struct {
	family         lb.Family
	nodeIP         net.IP
	serviceChanges *proxy.ServiceChangeTracker
	sliceChanges   *proxy.EndpointsChangeTracker
	ports          proxy.ServicePortMap
	endpoints      proxy.EndpointsMap
}

func newUpstream() *upstream {
	return &upstream{
		services: map[types.NamespacedName]*corev1.Service{},
		slices:   map[types.NamespacedName]*discoveryv1.EndpointSlice{},
		topology: map[string]string{},
		families: [2]*family{newFamily(corev1.IPv4Protocol), newFamily(corev1.IPv6Protocol)},
	}
}

func newFamily(name corev1.IPFamily) *family {
	f := &family{
		family:         lb.IPv4,
		nodeIP:         nodeAddresses[0].AsSlice(),
		serviceChanges: proxy.NewServiceChangeTracker(name, nil, nil),
		sliceChanges:   proxy.NewEndpointsChangeTracker(name, nodeName, nil, nil),
		ports:          proxy.ServicePortMap{},
		endpoints:      proxy.EndpointsMap{},
	}
	if name == corev1.IPv6Protocol {
		f.family, f.nodeIP = lb.IPv6, nodeAddresses[1].AsSlice()
	}
	return f
}

// apply does what kube-proxy's informers and handlers do.
func (u *upstream) apply(s Step) {
	switch {
	case s.Service != nil:
		u.setService(namespacedName(s.Service), s.Service)
	case s.DeleteService != nil:
		u.setService(*s.DeleteService, nil)
	case s.Slice != nil:
		u.setSlice(namespacedName(s.Slice), s.Slice)
	case s.DeleteSlice != nil:
		u.setSlice(*s.DeleteSlice, nil)
	case s.Node != nil:
		u.topology = map[string]string{}
		if zone, ok := s.Node.Labels[corev1.LabelTopologyZone]; ok {
			u.topology[corev1.LabelTopologyZone] = zone
		}
	}
}

// setService hands on a Service; now is nil when it is gone. A Service that the
// informer's selectors exclude is gone as well.
func (u *upstream) setService(name types.NamespacedName, now *corev1.Service) {
	if now != nil {
		_, other := now.Labels[apis.LabelServiceProxyName]
		if other || now.Spec.ClusterIP == corev1.ClusterIPNone {
			now = nil
		}
	}
	before := u.services[name]
	if now == nil {
		delete(u.services, name)
	} else {
		u.services[name] = now
	}
	for _, f := range u.families {
		f.serviceChanges.Update(before, now)
	}
}

// setSlice hands on a slice; now is nil when it is gone. kube-proxy's handlers
// know a slice by its name, Service and family, and never take away one whose
// Service changes; such a slice is deleted first, as the API prescribes for a
// change of its family.
func (u *upstream) setSlice(name types.NamespacedName, now *discoveryv1.EndpointSlice) {
	if now != nil {
		if _, headless := now.Labels[corev1.IsHeadlessService]; headless {
			now = nil
		}
	}
	before := u.slices[name]
	moved := before != nil && now != nil && (before.AddressType != now.AddressType ||
		before.Labels[discoveryv1.LabelServiceName] != now.Labels[discoveryv1.LabelServiceName])
	if now == nil {
		delete(u.slices, name)
	} else {
		u.slices[name] = now
	}
	for _, f := range u.families {
		if before != nil && (now == nil || moved) {
			f.sliceChanges.EndpointSliceUpdate(before, true)
		}
		if now != nil {
			f.sliceChanges.EndpointSliceUpdate(now, false)
		}
	}
}

// answer does what a sync of the nftables proxier does.
func (u *upstream) answer() Answer {
	a := Answer{
		Frontends: map[lb.FrontendKey]lb.Owner{},
		Ports:     map[lb.ServicePort]Port{},
		Health:    map[lb.ServiceFamily]lb.Health{},
	}
	for _, f := range u.families {
		f.ports.Update(f.serviceChanges)
		f.endpoints.Update(f.sliceChanges)
		for name, info := range f.ports {
			sp := f.servicePort(name)
			f.addFrontends(a.Frontends, sp, info)
			a.Ports[sp] = f.port(name, info, u.topology)
		}
		f.addHealth(a.Health)
	}
	return a
}

func (f *family) servicePort(name proxy.ServicePortName) lb.ServicePort {
	return lb.ServicePort{
		Service:  lb.Name{Namespace: name.Namespace, Name: name.Name},
		Port:     name.Port,
		Protocol: protocolNumber(name.Protocol),
		Family:   f.family,
	}
}

// addFrontends adds the elements of the maps service-ips and no-endpoint-services,
// of their counterparts for NodePorts, and of the set cluster-ips.
func (f *family) addFrontends(to map[lb.FrontendKey]lb.Owner, sp lb.ServicePort, info proxy.ServicePort) {
	add := func(ip net.IP, port int, kind lb.FrontendKind) {
		key := lb.FrontendKey{VIP: mustAddr(ip), Port: uint16(port), Protocol: sp.Protocol}
		to[key] = lb.Owner{Service: sp, Kind: kind}
	}
	to[lb.FrontendKey{VIP: mustAddr(info.ClusterIP())}] = lb.Owner{
		Service: lb.ServicePort{Service: sp.Service, Family: sp.Family},
		Kind:    lb.KindClusterIP,
	}
	add(info.ClusterIP(), info.Port(), lb.KindClusterIP)
	if info.NodePort() != 0 {
		add(f.unspecified(), info.NodePort(), lb.KindNodePort)
	}
	for _, ip := range info.ExternalIPs() {
		add(ip, info.Port(), lb.KindExternalIP)
	}
	for _, ip := range info.LoadBalancerVIPs() {
		add(ip, info.Port(), lb.KindLoadBalancer)
	}
}

func (f *family) unspecified() net.IP {
	if f.family == lb.IPv6 {
		return net.IPv6unspecified
	}
	return net.IPv4zero
}

// port works out what clients of a service port get.
func (f *family) port(name proxy.ServicePortName, info proxy.ServicePort, topology map[string]string) Port {
	all := f.endpoints[name]
	cluster, local, _, usable := proxy.CategorizeEndpoints(all, info, nodeName, topology)
	var p Port
	p.Sets[lb.SideClusterIP] = set(cluster, local, info.InternalPolicyLocal(), usable)
	if info.ExternallyAccessible() {
		// Pods and processes of the node never go to the chain of the external
		// policy: they are short-circuited to the one of policy Cluster.
		p.Sets[lb.SideInside] = set(cluster, local, false, usable)
		p.Sets[lb.SideOutside] = set(cluster, local, info.ExternalPolicyLocal(), usable)
	}
	for _, e := range all {
		switch {
		case e.IsServing():
			p.Serving = append(p.Serving, backend(e))
		case e.IsReady():
			p.unready = append(p.unready, backend(e))
		}
	}
	slices.SortFunc(p.Serving, lb.Backend.Compare)
	if info.SessionAffinityType() == corev1.ServiceAffinityClientIP {
		p.Affinity = uint32(info.StickyMaxAgeSeconds())
	}
	if len(info.LoadBalancerVIPs()) > 0 {
		p.Sources, p.NodeAllowed = f.sources(info)
	}
	return p
}

// set says what the clients get that a traffic policy applies to.
func set(cluster, local []proxy.Endpoint, policyLocal, usable bool) Set {
	chosen := cluster
	if policyLocal {
		chosen = local
	}
	switch {
	case !usable:
		return Set{Verdict: VerdictRefuse}
	case len(chosen) == 0:
		return Set{Verdict: VerdictDrop}
	}
	out := make([]lb.Backend, 0, len(chosen))
	for _, e := range chosen {
		out = append(out, backend(e))
	}
	slices.SortFunc(out, lb.Backend.Compare)
	return Set{Backends: out}
}

// sources returns the elements of the rule in the firewall chain.
func (f *family) sources(info proxy.ServicePort) (sources []netip.Prefix, node bool) {
	for _, cidr := range info.LoadBalancerSourceRanges() {
		// The text is what the rule holds: an IPv4 range written as IPv6 becomes
		// IPv4 only here.
		sources = append(sources, netip.MustParsePrefix(cidr.String()).Masked())
		node = node || cidr.Contains(f.nodeIP)
	}
	if node {
		for _, ip := range info.LoadBalancerVIPs() {
			addr := mustAddr(ip)
			sources = append(sources, netip.PrefixFrom(addr, addr.BitLen()))
		}
	}
	return outermost(sources), node
}

// addHealth adds what the health check server of this family answers.
func (f *family) addHealth(to map[lb.ServiceFamily]lb.Health) {
	local := f.endpoints.LocalReadyEndpoints()
	for name, port := range f.ports.HealthCheckNodePorts() {
		service := lb.Name{Namespace: name.Namespace, Name: name.Name}
		to[lb.ServiceFamily{Service: service, Family: f.family}] = lb.Health{Port: port, Local: local[name]}
	}
}

func backend(e proxy.Endpoint) lb.Backend {
	return lb.Backend{Addr: netip.MustParseAddr(e.IP()), Port: uint16(e.Port())}
}

// mustAddr is for addresses that kube-proxy has read itself.
func mustAddr(ip net.IP) netip.Addr {
	addr, ok := netip.AddrFromSlice(ip)
	if !ok {
		panic(fmt.Sprintf("kube-proxy has an address of %d bytes", len(ip)))
	}
	return addr.Unmap()
}

func protocolNumber(p corev1.Protocol) lb.Protocol {
	n, _ := lb.ParseProtocol(string(p))
	return n
}

func namespacedName(o interface {
	GetNamespace() string
	GetName() string
}) types.NamespacedName {
	return types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}
}
