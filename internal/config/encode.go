// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"fmt"
	"net/netip"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
)

// Encode returns c as a KubeProxyConfiguration, which encodes as JSON like
// kube-proxy's own: what means nothing here is not in it.
func (c Config) Encode() any {
	score := int32(c.OOMScoreAdj)
	out := v1alpha1.KubeProxyConfiguration{
		TypeMeta:            metav1.TypeMeta{APIVersion: v1alpha1.SchemeGroupVersion.String(), Kind: "KubeProxyConfiguration"},
		HostnameOverride:    c.HostnameOverride,
		BindAddress:         c.BindAddress.String(),
		HealthzBindAddress:  c.HealthzBindAddress,
		MetricsBindAddress:  c.MetricsBindAddress,
		BindAddressHardFail: c.BindAddressHardFail,
		EnableProfiling:     c.EnableProfiling,
		NodePortAddresses:   c.NodePortAddresses,
		FeatureGates:        map[string]bool{externalIPsGate: c.AllowExternalIPs},
		OOMScoreAdj:         &score,
		DetectLocalMode:     v1alpha1.LocalMode(c.DetectLocal.Mode),
		ClusterCIDR:         joinPrefixes(c.DetectLocal.ClusterCIDRs),
	}
	out.DetectLocal.BridgeInterface = c.DetectLocal.BridgeInterface
	out.DetectLocal.InterfaceNamePrefix = c.DetectLocal.InterfaceNamePrefix
	out.ClientConnection.Kubeconfig = c.Client.Kubeconfig
	out.ClientConnection.QPS = c.Client.QPS
	out.ClientConnection.Burst = int32(c.Client.Burst)
	out.IPTables.LocalhostNodePorts = &c.LocalhostNodePorts
	out.IPTables.SyncPeriod.Duration = c.SyncPeriod
	out.Conntrack = c.Conntrack.encode()
	out.Logging.Format = c.LogFormat
	return &out
}

func (c Conntrack) encode() v1alpha1.KubeProxyConntrackConfiguration {
	perCore, least := int32(c.MaxPerCore), int32(c.Min)
	return v1alpha1.KubeProxyConntrackConfiguration{
		MaxPerCore: &perCore, Min: &least, TCPBeLiberal: c.TCPBeLiberal,
		TCPEstablishedTimeout: &metav1.Duration{Duration: c.TCPEstablishedTimeout},
		TCPCloseWaitTimeout:   &metav1.Duration{Duration: c.TCPCloseWaitTimeout},
		UDPTimeout:            metav1.Duration{Duration: c.UDPTimeout},
		UDPStreamTimeout:      metav1.Duration{Duration: c.UDPStreamTimeout},
	}
}

func joinPrefixes(prefixes []netip.Prefix) string {
	texts := make([]string, 0, len(prefixes))
	for _, p := range prefixes {
		texts = append(texts, fmt.Sprint(p))
	}
	return strings.Join(texts, ",")
}
