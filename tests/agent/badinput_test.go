// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// Each object is absurd in its own way. What it says that can be understood is
// done, the rest has its safest meaning and a warning.
func TestAbsurdObjectsGetAWarningAndTheirSafestMeaning(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.manifests("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: node}\nstatus: {addresses: [{type: InternalIP, address: nonsense}]}\n")
	absurd := []struct{ name, spec, want string }{
		{"internal", "internalTrafficPolicy: Nearby, " + webPort, `internalTrafficPolicy "Nearby" is unknown`},
		{"external", "externalTrafficPolicy: Far, " + nodePorts, `externalTrafficPolicy "Far" is unknown`},
		{"kind", "type: Teapot, " + webPort, `type "Teapot" is unknown`},
		{"zero", affinity + ", sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}", "timeout of 0 s is not above 0"},
		{"below", affinity + ", sessionAffinityConfig: {clientIP: {timeoutSeconds: -7}}", "timeout of -7 s is not above 0"},
		{"huge", affinity + ", sessionAffinityConfig: {clientIP: {timeoutSeconds: 2147483647}}", "timeout of 2147483647 s is too long"},
		{"sticky", "sessionAffinity: Cookie, " + webPort, `sessionAffinity "Cookie" is unknown`},
		{"ports", "ports: [{name: web, port: 80}, {name: b, port: 99999}, {name: c, port: 81, protocol: CARRIER}]", `unknown protocol "CARRIER"`},
	}
	for i, a := range absurd {
		c.manifests(a.name+".yaml", service(a.name, 10+i, a.spec), slice(a.name, endpoint(11, "")))
	}
	agent := c.start()
	// Quotes are escaped in the log.
	logs := func() string { return strings.ReplaceAll(agent.Logs(), `\"`, `"`) }
	for i, a := range absurd {
		c.answers(vip(10+i, 80), 11)
		saysOnce(t, logs, a.want)
		says(t, logs, "Service test/"+a.name)
	}
	for name, want := range map[string]uint32{"zero": 10800, "below": 10800, "huge": 86400, "sticky": 0} {
		if got := c.explainJSON("test/" + name).Ports[0].AffinitySeconds; got != want {
			t.Errorf("%s: affinity of %d s, want %d", name, got, want)
		}
	}
	for _, want := range []string{"topology hints for zones have no effect here", "which address is its own is unknown"} {
		says(t, agent.Logs, want)
	}
	c.answersTo(c.node.Namespace(), "127.0.0.1:30080", 11)
	c.answers("10.244.0.1:30080", 11) // as of all local addresses
	if n := metric(t, agent, "fairlead_invalid_objects_total"); n < float64(len(absurd)+2) {
		t.Errorf("fairlead_invalid_objects_total is %v", n)
	}
}

func TestAThousandSourceRangesAreKept(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	ranges := make([]string, 0, 1001)
	for i := range 1000 {
		ranges = append(ranges, fmt.Sprintf("172.%d.%d.0/24", 16+i/256, i%256))
	}
	write := func() {
		c.manifests("lb.yaml", loadBalancer("lb", 10,
			webPort+", loadBalancerSourceRanges: ["+strings.Join(append(ranges, "nonsense"), ", ")+"]", "203.0.113.10"),
			slice("lb", endpoint(11, "")))
	}
	write()
	agent := c.start()
	c.answers(vip(10, 80), 11)
	c.fails(c.client, "203.0.113.10:80", syscall.EHOSTUNREACH)
	out, err := c.fairlead("inspect", "services", "-o", "json", "--bpf-root", c.bpfRoot)
	var rows []struct{ SourceRanges []string }
	if err != nil || json.Unmarshal([]byte(out), &rows) != nil || len(rows) != 1 || len(rows[0].SourceRanges) != 1000 {
		t.Errorf("inspect services: %v, %.500s", err, out)
	}
	saysOnce(t, agent.Logs, "nonsense")
	ranges = append(ranges, "10.244.0.2/32")
	write()
	c.answers("203.0.113.10:80", 11)

	ranges = ranges[:0]
	write() // only what is no range: everybody may
	says(t, agent.Logs, "none is left, so every source may connect")
	c.answersTo(c.node.Namespace(), "203.0.113.10:80", 11)
}
