// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

const shopManifest = `# A Deployment next to its Service must not matter.
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec: {replicas: 3}
--- # the Service
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.0.0.1
  ports: [{port: 80, targetPort: 8080}]
---

---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.1.0.1]}]
`

// serviceYAML is a Service named name in the default namespace.
func serviceYAML(name, ip string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {clusterIP: %s, ports: [{port: 80}]}\n", name, ip)
}

// heard gathers what a source says.
type heard struct {
	t      *testing.T
	events chan Event
	done   chan error
}

// start runs source until the test ends.
func start(t *testing.T, source Source) *heard {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	h := &heard{t: t, events: make(chan Event, 100), done: make(chan error, 1)}
	go func() { h.done <- source.Run(ctx, h.events) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-h.done:
			if err != nil {
				t.Errorf("run: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run did not return when its context ended")
		}
	})
	return h
}

// next returns the next event.
func (h *heard) next() Event {
	h.t.Helper()
	select {
	case e := <-h.events:
		return e
	case <-time.After(15 * time.Second):
		h.t.Fatal("no event within 15 s")
		return nil
	}
}

// first expects the first events of a source of files without Node and
// ServiceCIDRs.
func (h *heard) first(services, slices string) {
	h.t.Helper()
	h.expect(services, slices, "no node", "cidrs:")
}

// expect reads as many events as want has and compares their summaries.
func (h *heard) expect(want ...string) {
	h.t.Helper()
	var got []string
	for range want {
		got = append(got, summary(h.next()))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		h.t.Fatalf("events (-want +got):\n%s", diff)
	}
}

// summary is an event in one line: what it is about, and a warning's text.
func summary(e Event) string {
	switch e := e.(type) {
	case ServicesReplaced:
		text := "services:"
		for _, s := range e.Services {
			text += fmt.Sprintf(" %s=%s", s.Name, s.ClusterIPs[0])
		}
		return text
	case SlicesReplaced:
		list := slices.SortedFunc(slices.Values(e.Slices), func(a, b lb.Slice) int { return a.Name.Compare(b.Name) })
		text := "slices:"
		for _, s := range list {
			text += fmt.Sprintf(" %s(%d)%s", s.Name, len(s.Endpoints), at(e.Triggers[s.Name]))
		}
		return text
	case ServiceSet:
		return fmt.Sprintf("set %s=%s", e.Service.Name, e.Service.ClusterIPs[0])
	case SliceSet:
		return fmt.Sprintf("set %s(%d)%s", e.Slice.Name, len(e.Slice.Endpoints), at(e.Trigger))
	case ServiceGone:
		return "gone " + e.Name.String()
	case SliceGone:
		return "gone slice " + e.Name.String()
	case NodeSet:
		return fmt.Sprintf("node zone=%s %v eligible=%v", e.Node.Zone, e.Node.Addresses, e.Node.Eligible)
	case NodeGone:
		return "no node"
	case ServiceCIDRsReplaced:
		text := "cidrs:"
		for _, p := range e.Prefixes {
			text += " " + p.String()
		}
		return text
	case Warning:
		return "warning: " + filepath.Base(e.Object) + ": " + e.Text
	default:
		return fmt.Sprintf("%#v", e)
	}
}

// at is a trigger as an annotation has it, empty for none.
func at(trigger time.Time) string {
	if trigger.IsZero() {
		return ""
	}
	return "@" + trigger.Format(time.RFC3339Nano)
}

func startFiles(t *testing.T, dir string) *heard {
	t.Helper()
	source, err := NewFile(dir, Options{NodeName: "n1"}, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	return start(t, source)
}

// write replaces a file in one step, as editors do.
func write(t *testing.T, dir, name, text string) {
	t.Helper()
	temporary := filepath.Join(dir, "."+name+".tmp")
	if err := os.WriteFile(temporary, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temporary, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func TestFilesAreReadAgainWhenTheyChange(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "shop.yaml", shopManifest)
	h := startFiles(t, dir)
	h.first("services: shop/web=10.0.0.1", "slices: shop/web-1(1)")

	write(t, dir, "more.yml", serviceYAML("more", "10.0.0.2"))
	h.expect("services: default/more=10.0.0.2 shop/web=10.0.0.1", "slices: shop/web-1(1)")

	// Written in place.
	if err := os.WriteFile(filepath.Join(dir, "more.yml"), []byte(serviceYAML("more", "10.0.0.3")), 0o600); err != nil {
		t.Fatal(err)
	}
	h.expect("services: default/more=10.0.0.3 shop/web=10.0.0.1", "slices: shop/web-1(1)")

	if err := os.Remove(filepath.Join(dir, "shop.yaml")); err != nil {
		t.Fatal(err)
	}
	h.expect("services: default/more=10.0.0.3", "slices:")
}

func TestAnEmptyDirectoryIsSynced(t *testing.T) {
	startFiles(t, t.TempDir()).first("services:", "slices:")
}

func TestNothingIsSentWhenNothingChanged(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", serviceYAML("a", "10.0.0.1"))
	h := startFiles(t, dir)
	h.first("services: default/a=10.0.0.1", "slices:")

	write(t, dir, "a.yaml", "# a comment\n"+serviceYAML("a", "10.0.0.1"))
	write(t, dir, "readme.txt", serviceYAML("b", "10.0.0.2"))
	write(t, dir, ".hidden.yaml", serviceYAML("b", "10.0.0.2"))
	// Whatever the first three would have caused comes before this, or with it.
	waitRead(t, h, dir)
}

// waitRead changes the directory and expects the events of this change to be
// the next ones.
func waitRead(t *testing.T, h *heard, dir string) {
	t.Helper()
	write(t, dir, "zz.yaml", "not: [closed\n")
	got := summary(h.next())
	if want := "warning: zz.yaml: document 1: left out: "; !strings.HasPrefix(got, want) {
		t.Fatalf("event = %q, want %q first", got, want)
	}
}

func TestConfigMapVolumesAreFollowed(t *testing.T) {
	dir := t.TempDir()
	// A kubelet keeps the files in a directory of their own, ..data leads to
	// it, and is replaced to change all files at once.
	publish := func(version, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, version), "a.yaml", text)
		if err := os.Symlink(version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	publish("..2024_1", serviceYAML("a", "10.0.0.1"))
	if err := os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	h := startFiles(t, dir)
	h.first("services: default/a=10.0.0.1", "slices:")
	publish("..2024_2", serviceYAML("a", "10.0.0.2"))
	h.expect("services: default/a=10.0.0.2", "slices:")
}

func TestADirectoryBehindASymlinkMayBeSwapped(t *testing.T) {
	top := t.TempDir()
	for version, ip := range map[string]string{"1": "10.0.0.1", "2": "10.0.0.2"} {
		if err := os.Mkdir(filepath.Join(top, version), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(top, version), "a.yaml", serviceYAML("a", ip))
	}
	current := filepath.Join(top, "current")
	if err := os.Symlink("1", current); err != nil {
		t.Fatal(err)
	}
	h := startFiles(t, current)
	h.first("services: default/a=10.0.0.1", "slices:")
	if err := os.Symlink("2", current+".tmp"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(current+".tmp", current); err != nil {
		t.Fatal(err)
	}
	h.expect("services: default/a=10.0.0.2", "slices:")
}

func TestABrokenFileDeletesNothing(t *testing.T) {
	dir := t.TempDir()
	both := serviceYAML("a", "10.0.0.1") + "---\n" + serviceYAML("b", "10.0.0.2")
	write(t, dir, "both.yaml", both)
	h := startFiles(t, dir)
	h.first("services: default/a=10.0.0.1 default/b=10.0.0.2", "slices:")

	// b is cut off and a has changed: the change counts, b is kept.
	write(t, dir, "both.yaml", serviceYAML("a", "10.0.0.9")+"---\napiVersion: v1\nkind: Service\nmetadata: {na")
	if got, want := summary(h.next()), "warning: both.yaml: document 2: left out: "; !strings.HasPrefix(got, want) {
		t.Fatalf("event = %q, want %q…", got, want)
	}
	h.expect("services: default/a=10.0.0.9 default/b=10.0.0.2", "slices:")

	write(t, dir, "both.yaml", serviceYAML("a", "10.0.0.9"))
	h.expect("services: default/a=10.0.0.9", "slices:")
}

func TestADirectoryThatDisappearsIsServedOn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "a.yaml", serviceYAML("a", "10.0.0.1"))
	h := startFiles(t, dir)
	h.first("services: default/a=10.0.0.1", "slices:")

	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	got := summary(h.next())
	if !strings.HasPrefix(got, "warning: manifests: ") || !strings.Contains(got, "going on with what was read before") {
		t.Fatalf("event = %q, want a warning that the directory is gone", got)
	}
	// Empty at first, as when somebody copies files into it.
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "b.yaml", serviceYAML("b", "10.0.0.2"))
	h.expect("services: default/b=10.0.0.2", "slices:")
}

func TestNewFileSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", "")
	tests := []struct {
		name, dir, want string
	}{
		{name: "a missing directory", dir: filepath.Join(dir, "none"), want: "does not exist (create it"},
		{name: "a file", dir: filepath.Join(dir, "a.yaml"), want: "is not a directory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewFile(tt.dir, Options{}, zaptest.NewLogger(t))
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.dir) {
				t.Errorf("error = %v, want %q and the path", err, tt.want)
			}
		})
	}
}

func TestTheSameObjectInTwoFiles(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "1.yaml", serviceYAML("a", "10.0.0.1"))
	write(t, dir, "2.yaml", serviceYAML("a", "10.0.0.2"))
	h := startFiles(t, dir)
	h.expect("warning: 2.yaml: Service default/a left out: already in " + filepath.Join(dir, "1.yaml"))
	h.first("services: default/a=10.0.0.1", "slices:")
	if err := os.Remove(filepath.Join(dir, "1.yaml")); err != nil {
		t.Fatal(err)
	}
	h.expect("services: default/a=10.0.0.2", "slices:")
}

func TestWhatIsNotAFileIsPassedOver(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "below.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "dangling.yaml")); err != nil {
		t.Fatal(err)
	}
	startFiles(t, dir).first("services:", "slices:")
}

const nodeManifest = `apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/12, "fd00::/112"]}
---
apiVersion: networking.k8s.io/v1beta1
kind: ServiceCIDR
metadata: {name: more}
spec: {cidrs: [10.0.0.0/16]}
`

func TestFilesMayGiveOurNodeAndServiceCIDRs(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "node.yaml", nodeManifest)
	h := startFiles(t, dir)
	h.expect("services:", "slices:", "node zone=z1 [192.0.2.1] eligible=true", "cidrs: 10.0.0.0/16 10.96.0.0/12 fd00::/112")

	write(t, dir, "node.yaml", strings.Replace(nodeManifest, "z1", "z2", 1))
	h.expect("node zone=z2 [192.0.2.1] eligible=true")
	write(t, dir, "shop.yaml", shopManifest)
	h.expect("services: shop/web=10.0.0.1", "slices: shop/web-1(1)")
	write(t, dir, "node.yaml", strings.Replace(nodeManifest, "n1", "n3", 1))
	h.expect("no node")
	if err := os.Remove(filepath.Join(dir, "node.yaml")); err != nil {
		t.Fatal(err)
	}
	h.expect("cidrs:")
}

func TestRefreshReadsTheFilesAgain(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", serviceYAML("a", "10.0.0.1"))
	source, err := NewFile(dir, Options{}, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	h := start(t, source)
	h.first("services: default/a=10.0.0.1", "slices:")
	ticket := source.(Refresher).Refresh()
	services, slices := h.next().(ServicesReplaced), h.next().(SlicesReplaced)
	if len(services.Services) != 1 || services.Ticket != ticket || slices.Ticket != ticket {
		t.Errorf("%d Services with ticket %d, slices with %d, want 1 with %d", len(services.Services), services.Ticket, slices.Ticket, ticket)
	}
}
