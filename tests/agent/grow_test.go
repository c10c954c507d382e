// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// wide returns the manifest of a Service called name with n ports of a protocol from
// 1000 on, more of its spec, and that of a slice with endpoints for all ports.
func wide(name string, vip, n int, protocol, spec string, endpoints int) string {
	var ports, targets, addrs strings.Builder
	for i := range n {
		fmt.Fprintf(&ports, "{name: p%d, port: %d, protocol: %s}, ", i, 1000+i, protocol)
		fmt.Fprintf(&targets, "{name: p%d, port: %d, protocol: %s}, ", i, 10000+i, protocol)
	}
	for i := range endpoints {
		fmt.Fprintf(&addrs, "{addresses: [10.244.%d.%d]}, ", 100+i/200, 1+i%200)
	}
	return service(name, vip, spec+"ports: ["+ports.String()+"]") + fmt.Sprintf(`---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, namespace: test, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [%[2]s]
endpoints: [%[3]s]
`, name, targets.String(), addrs.String())
}

// numberedList returns n texts made from a format, in YAML's flow style.
func numberedList(n int, format string) string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf(format, i/200, 1+i%200)
	}
	return "[" + strings.Join(out, ", ") + "]"
}

var hasGrown = regexp.MustCompile(`table has grown.*"table": "(\w+)", "old": (\d+), "new": (\d+)`)

// Each table that can grow does so, while clients connect and send: nothing they do may
// fail.
func TestTablesGrowUnderTraffic(t *testing.T) {
	c := newCluster(t)
	c.backend(11)
	c.backend(12)
	c.service("web", 10, 11, 12)
	agent := c.start()
	c.answers(vip(10, 80), 11, 12)
	kept := c.dialUDP(vip(10, 53))
	// The agent is to have time for what it does.
	pace := time.NewTicker(2 * time.Millisecond)
	defer pace.Stop()
	stopTCP := load(func() error { <-pace.C; _, err := c.get(vip(10, 80)); return err })
	stopUDP := load(func() error {
		<-pace.C
		conn, err := c.client.Dial(t.Context(), "udp", vip(10, 53))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = exchange(conn)
		return err
	})
	grown := func(tables ...string) {
		t.Helper()
		testutil.Eventually(t, 90*time.Second, fmt.Sprintf("%v grow", tables), func() error {
			got := map[string]bool{}
			for _, match := range hasGrown.FindAllStringSubmatch(agent.Logs(), -1) {
				got[match[1]] = true
			}
			for _, table := range tables {
				if !got[table] {
					return fmt.Errorf("%s has not, of %v", table, got)
				}
			}
			if n := metric(t, agent, "fairlead_services_failed"); n != 0 {
				return fmt.Errorf("%v Services have no room", n)
			}
			return nil
		})
	}
	c.write("sources.yaml", loadBalancer("sources", 20, "loadBalancerSourceRanges: "+numberedList(4500, "198.51.%d.%d/32")+
		", ports: [{name: web, port: 80}]", "203.0.113.20")+"---\n"+slice("sources", endpoint(11, "")))
	grown("source_ranges")
	c.write("frontends.yaml", wide("frontends", 21, 150, "TCP", "externalIPs: "+numberedList(120, "198.18.%d.%d")+", ", 0))
	grown("frontends")
	c.write("members.yaml", wide("members1", 22, 140, "UDP", "", 250)+"---\n"+wide("members2", 23, 140, "UDP", "", 250))
	grown("members", "slots")
	var many strings.Builder
	for i := range 60 {
		many.WriteString(wide(fmt.Sprint("many", i), 100+i, 140, "TCP", "", 0) + "---\n")
	}
	c.write("many.yaml", many.String())
	grown("services")

	// A change of what was there reaches clients by the programs of today.
	c.backend(13)
	c.service("web", 10, 11, 12, 13)
	c.answers(vip(10, 80), 11, 12, 13)
	if _, err := exchange(kept); err != nil {
		t.Errorf("a UDP socket that was connected all the time: %v", err)
	}
	for _, table := range []string{"frontends", "services", "slots", "members", "source_ranges"} {
		label := `table="` + table + `"`
		rows, size := metric(t, agent, "fairlead_table_rows", label), metric(t, agent, "fairlead_table_size_rows", label)
		if most := metric(t, agent, "fairlead_table_max_rows", label); rows < size/4 || rows > size || size > most {
			t.Errorf("%s: %v rows of %v, at most %v", table, rows, size, most)
		}
	}
	if err := agent.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	agent = c.start()
	if n := metric(t, agent, "fairlead_table_writes_total"); n != 0 {
		t.Errorf("%v rows were written after a restart with an unchanged cluster, want 0", n)
	}
	if strings.Contains(agent.Logs(), "pinned maps keep their size") {
		t.Error("the next agent complains of tables that have grown")
	}
	for name, stop := range map[string]func() (int64, []error){"TCP": stopTCP, "UDP": stopUDP} {
		n, failed := stop()
		if len(failed) > 0 {
			t.Errorf("%d of %d %s exchanges failed, the first with: %v", len(failed), n, name, failed[0])
		}
		t.Logf("%s: %d exchanges, %d failed", name, n, len(failed))
	}
}
