// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// page is what a server answers.
type page struct {
	code   int
	header http.Header
	body   string
}

// fetch asks for a page from within a namespace.
func fetch(from *sandbox.Namespace, url string) (page, error) {
	client := http.Client{
		Transport: &http.Transport{DialContext: from.Dial, DisableKeepAlives: true}, Timeout: 5 * time.Second,
	}
	response, err := client.Get("http://" + url)
	if err != nil {
		return page{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return page{response.StatusCode, response.Header, string(body)}, err
}

// probed has a Service whose health check node port is 32000.
func (c *cluster) probed(policy string, endpoints ...string) {
	c.t.Helper()
	c.manifests("lb.yaml", loadBalancer("lb", 10,
		"externalTrafficPolicy: "+policy+", healthCheckNodePort: 32000, "+webPort, "203.0.113.10"), slice("lb", endpoints...))
}

const probe = "10.244.0.1:32000"

// probes waits until the health check node port answers like this.
func (c *cluster) probes(code, local int) {
	c.t.Helper()
	want := fmt.Sprintf("{\n\t\"service\": {\n\t\t\"namespace\": \"test\",\n\t\t\"name\": \"lb\"\n\t},\n"+
		"\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": true\n}", local)
	testutil.Eventually(c.t, 10*time.Second, fmt.Sprintf("health check says %d", code), func() error {
		got, err := fetch(c.client, probe+"/whatever")
		if err != nil {
			return err
		}
		if got.code != code || got.body != want {
			return fmt.Errorf("%d: %s, want %d: %s", got.code, got.body, code, want)
		}
		if weight := got.header.Get("X-Load-Balancing-Endpoint-Weight"); weight != fmt.Sprint(local) {
			return fmt.Errorf("the weight is %q, want %d", weight, local)
		}
		return nil
	})
}

// closed waits until nobody listens at an address.
func (c *cluster) closed(addr string) {
	c.t.Helper()
	testutil.Eventually(c.t, 10*time.Second, addr+" is closed", func() error {
		if got, err := fetch(c.client, addr); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("answers %d, %w", got.code, err)
		}
		return nil
	})
}

func TestHealthCheckNodePortsTellLoadBalancersAboutThisNode(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	here, too, elsewhere := endpoint(11, "nodeName: node"), endpoint(12, "nodeName: node"), endpoint(13, "nodeName: other")
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	c.probed("Local", here, too, elsewhere)
	c.start()
	c.probes(http.StatusOK, 2)
	c.probed("Local", elsewhere)
	c.probes(http.StatusServiceUnavailable, 0)
	c.probed("Cluster", here)
	c.closed(probe)
	c.probed("Local", here)
	c.probes(http.StatusOK, 1)
	// It is where NodePorts are.
	if _, err := fetch(c.node.Namespace(), "127.0.0.1:32000"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("at an address that is no NodePort address: %v", err)
	}
	c.write("lb.yaml", "")
	c.closed(probe)
}

func TestPortsThatAreTakenAreTriedAgain(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	c.probed("Local", endpoint(11, "nodeName: node"))
	var squatters []io.Closer
	for _, addr := range []string{probe, testutil.MetricsAddress} {
		l, err := c.node.Namespace().Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		squatters = append(squatters, l)
	}
	agent := c.start()
	for _, want := range []string{"health check node port cannot be opened; trying again", "cannot listen; trying again"} {
		saysOnce(t, agent.Logs, want)
	}
	for _, l := range squatters {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	c.probes(http.StatusOK, 1)
	testutil.Eventually(t, 10*time.Second, "metrics", func() error {
		_, err := agent.Get(testutil.MetricsAddress, "/metrics")
		return err
	})
	for _, want := range []string{"no trouble any more", "listening at last"} {
		says(t, agent.Logs, want)
	}
}

// healthBody is the body of /healthz and /livez.
type healthBody struct {
	LastUpdated, CurrentTime time.Time
	NodeEligible             *bool
	Healthy                  bool
	Status                   map[string]struct {
		LastUpdated time.Time
		Healthy     bool
	}
}

func TestHealthzAndLivezAnswerAsKubeProxyDoes(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	c.manifests("node.yaml", thisNode("a", "10.244.0.1"))
	agent := c.start()
	host := c.node.Namespace()
	read := func(path string) (int, healthBody) {
		t.Helper()
		got, err := fetch(host, testutil.HealthzAddress+path)
		if err != nil {
			t.Fatal(err)
		}
		var b healthBody
		if err := json.Unmarshal([]byte(got.body), &b); err != nil {
			t.Fatalf("%s: %v in %s", path, err, got.body)
		}
		if b.CurrentTime.IsZero() || b.LastUpdated.IsZero() || !b.Status["IPv4"].Healthy || !b.Status["IPv6"].Healthy {
			t.Errorf("%s: %s", path, got.body)
		}
		return got.code, b
	}
	if code, b := read("/healthz"); code != http.StatusOK || !b.Healthy || b.NodeEligible == nil || !*b.NodeEligible ||
		!b.LastUpdated.Equal(b.CurrentTime) {
		t.Errorf("/healthz of a healthy node: %d, %+v", code, b)
	}
	if code, b := read("/livez"); code != http.StatusOK || !b.Healthy || b.NodeEligible != nil {
		t.Errorf("/livez of a healthy node: %d, %+v", code, b)
	}

	c.manifests("node.yaml", thisNode("a", "10.244.0.1")+"spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}\n")
	testutil.Eventually(t, 10*time.Second, "a node that is to go is not healthy", func() error {
		if code, b := read("/healthz"); code != http.StatusServiceUnavailable || !b.Healthy || b.NodeEligible == nil || *b.NodeEligible {
			return fmt.Errorf("%d, %+v", code, b)
		}
		return nil
	})
	if code, _ := read("/livez"); code != http.StatusOK {
		t.Errorf("/livez of a node that is to go: %d", code)
	}
	for _, tt := range []struct {
		name, code string
		some       bool
	}{
		{"healthz", "200", true}, {"healthz", "503", true}, {"livez", "200", true}, {"livez", "503", false},
	} {
		n := metric(t, agent, "kubeproxy_proxy_"+tt.name+"_total", `code="`+tt.code+`"`)
		if (n > 0) != tt.some {
			t.Errorf("%v answers of %s were %s", n, tt.name, tt.code)
		}
	}
}

func TestPagesBesideTheMetrics(t *testing.T) {
	t.Parallel()
	c := newQuietCluster(t)
	agent := c.start()
	for _, tt := range []struct{ path, want string }{
		{"/proxyMode", "ebpf"},
		{"/healthz", "ok"},
		{"/metrics/slis", `kubernetes_healthcheck{name="ping",type="healthz"} 1`},
		{"/configz", `{"kubeproxy.config.k8s.io":{`},
	} {
		got, err := agent.Get(testutil.MetricsAddress, tt.path)
		if err != nil || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q, %v; want %q", tt.path, got, err, tt.want)
		}
	}
	if got, err := fetch(c.node.Namespace(), testutil.MetricsAddress+"/debug/pprof/"); err != nil || got.code != http.StatusNotFound {
		t.Errorf("profiles without enableProfiling: %d, %v", got.code, err)
	}
	page, err := agent.Get(testutil.MetricsAddress, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	var missing []string
	for _, name := range []string{
		"sync_proxy_rules_duration_seconds_count", "sync_full_proxy_rules_duration_seconds_count",
		"sync_partial_proxy_rules_duration_seconds_count", "network_programming_duration_seconds_count",
		"sync_proxy_rules_last_timestamp_seconds", "sync_proxy_rules_last_queued_timestamp_seconds",
		"sync_proxy_rules_no_local_endpoints_total",
	} {
		for _, family := range []string{"IPv4", "IPv6"} {
			if !strings.Contains(page, "kubeproxy_"+name+`{ip_family="`+family+`"`) {
				missing = append(missing, name+" "+family)
			}
		}
	}
	if diff := cmp.Diff([]string(nil), missing); diff != "" {
		t.Errorf("metrics that are missing:\n%s", diff)
	}
}
