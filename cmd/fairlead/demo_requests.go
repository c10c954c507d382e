// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

// demoWindow is how many answers in a row must come from the right pods before
// a change counts as in effect. With three pods one of them is missing from so
// many by accident once in 10^10 runs.
const demoWindow = 60

// demoBarWidth is the length of a bar that stands for all requests.
const demoBarWidth = 48

// tally counts requests by who answered.
type tally struct {
	answers map[string]int
	failed  int
	err     error // of the first request that failed
}

func (t *tally) add(pod string, err error) {
	if err != nil {
		t.failed++
		if t.err == nil {
			t.err = err
		}
		return
	}
	if t.answers == nil {
		t.answers = map[string]int{}
	}
	t.answers[pod]++
}

// total returns the number of requests, failed ones included.
func (t *tally) total() int {
	n := t.failed
	for _, count := range t.answers {
		n += count
	}
	return n
}

// failures says in words how many requests have failed and why.
func (t *tally) failures() string {
	if t.failed == 0 {
		return "none failed"
	}
	return fmt.Sprintf("%d FAILED, the first with: %v", t.failed, t.err)
}

// bars draws a line for each pod that has answered, as long as its share.
func (t *tally) bars() string {
	var out strings.Builder
	for _, pod := range slices.Sorted(maps.Keys(t.answers)) {
		count := t.answers[pod]
		bar := strings.Repeat("█", (count*demoBarWidth+t.total()/2)/t.total())
		fmt.Fprintf(&out, "  %s %-11s %4d %s\n", pod, demoPods[pod], count, bar)
	}
	return out.String()
}

// send sends n requests, one after the other. The error is that of ctx.
func (c *demoCluster) send(ctx context.Context, n int) (tally, error) {
	var t tally
	for range n {
		pod, err := c.request(ctx)
		if ctx.Err() != nil {
			return t, ctx.Err()
		}
		t.add(pod, err)
	}
	return t, nil
}

// scale gives the Service the named pods and sends requests until all of them
// answer and nobody else does. Then it takes the other pods off the network.
func (c *demoCluster) scale(ctx context.Context, pods []string) (tally, error) {
	var t tally
	if err := c.write("endpoints.yaml", demoSlice(pods)); err != nil {
		return t, err
	}
	var last []string // the latest answers
	for end := time.Now().Add(demoChangeTimeout); !isSpread(last, pods); {
		pod, err := c.request(ctx)
		if ctx.Err() != nil {
			return t, ctx.Err()
		}
		if time.Now().After(end) {
			return t, fmt.Errorf("the change is not in effect after %s; the agent says: %s",
				demoChangeTimeout, c.agent.lastWords())
		}
		if t.add(pod, err); err == nil {
			last = append(last[max(0, len(last)-demoWindow+1):], pod)
		}
	}
	return t, c.removeOtherPods(pods)
}

// isSpread tells whether the answers are demoWindow many and come from just
// these pods, from each at least once.
func isSpread(answers, pods []string) bool {
	seen := slices.Compact(slices.Sorted(slices.Values(answers)))
	return len(answers) == demoWindow && slices.Equal(seen, pods)
}

// removeOtherPods takes the pods that are not named off the network.
func (c *demoCluster) removeOtherPods(pods []string) error {
	var errs []error
	for name, pod := range c.pods {
		if !slices.Contains(pods, name) {
			errs = append(errs, c.node.RemovePod(pod))
		}
	}
	return errors.Join(errs...)
}

// request sends a request to the Service from the client pod, over a connection
// of its own, and returns the name of the pod that answered.
func (c *demoCluster) request(ctx context.Context) (pod string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+demoVIP+"/", http.NoBody)
	if err != nil {
		return "", err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return "", fmt.Errorf("read answer: %w", err)
	}
	pod, _, _ = strings.Cut(string(answer), " ")
	if _, found := demoPods[pod]; !found {
		return "", fmt.Errorf("answer %q is of no pod of ours", answer)
	}
	return pod, nil
}
