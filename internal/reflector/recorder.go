// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/fairlead-lb/fairlead/internal/lb"
	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// Notice is what an Event of the Kubernetes API tells people about an object
// (kubectl describe shows it). The API has bounds: 128 bytes for Reason and
// Action, which must not be empty, and 1,024 for Note, which is cut.
type Notice struct {
	Warning bool   // in place of Normal
	Reason  string // why, one word in CamelCase
	Action  string // what was being done, one word in CamelCase
	Note    string // for people; may be empty
}

// Recorder writes Events of the Kubernetes API. Its methods may be called from
// any goroutine; the first two never block.
type Recorder interface {
	// Node takes note of something about the node we run on.
	Node(Notice)
	// Service takes note of something about a Service.
	Service(lb.Name, Notice)
	// Run sends notices until ctx ends. Each is tried once: while the server is
	// away, or when too many wait, they are lost. So are those that say what
	// another said in the last half hour. Call it once.
	Run(ctx context.Context)
}

// NoRecorder returns a Recorder for where there is no API server. Notices given
// to it are lost.
func NoRecorder() Recorder { return silent{} }

type silent struct{}

func (silent) Node(Notice)             {}
func (silent) Service(lb.Name, Notice) {}
func (silent) Run(context.Context)     {}

const (
	reporter     = "fairlead"
	maxWaiting   = 100              // notices that wait to be sent
	recordWithin = 10 * time.Second // for each try
	repeatAfter  = 30 * time.Minute // an Event lives for an hour by default
	maxNote      = 1024             // the API's bounds, in bytes
	maxInstance  = 128
	maxEventBase = 230 // of the 253 of a name; the time takes 17
)

// recorder writes to an API server. A broadcaster of client-go would bring the
// clients of all API groups along.
type recorder struct {
	client rest.Interface
	log    *zap.Logger
	node   string
	queue  chan *eventsv1.Event
	sent   map[statement]time.Time // what was said lately; of Run
}

// statement is what makes two Events say the same.
type statement struct {
	about                      corev1.ObjectReference
	kind, reason, action, note string
}

// recording returns a recorder that writes, in the name of o.NodeName, to the server
// that route leads to. A server that refuses us is logged.
func recording(route *route, o KubernetesOptions) (*recorder, error) {
	group, err := route.clients(eventsv1.AddToScheme)
	if err != nil {
		return nil, err
	}
	client, err := group(eventsv1.SchemeGroupVersion)
	if err != nil {
		return nil, err
	}
	return &recorder{
		client: client, log: o.Log, node: o.NodeName,
		queue: make(chan *eventsv1.Event, maxWaiting), sent: map[statement]time.Time{},
	}, nil
}

// Node implements Recorder.
func (r *recorder) Node(n Notice) {
	r.note(corev1.ObjectReference{APIVersion: "v1", Kind: kindNode, Name: r.node}, n)
}

// Service implements Recorder.
func (r *recorder) Service(name lb.Name, n Notice) {
	r.note(corev1.ObjectReference{APIVersion: "v1", Kind: kindService, Namespace: name.Namespace, Name: name.Name}, n)
}

func (r *recorder) note(about corev1.ObjectReference, n Notice) {
	select {
	case r.queue <- newEvent(about, n, r.node, time.Now()):
	default:
		r.log.Debug("event lost: too many wait", logfield.Reason(n.Reason))
	}
}

func newEvent(about corev1.ObjectReference, n Notice, node string, now time.Time) *eventsv1.Event {
	e := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Name:      fmt.Sprintf("%s.%x", strings.TrimRight(cut(about.Name, maxEventBase), ".-"), now.UnixNano()),
			Namespace: about.Namespace,
		},
		EventTime:           metav1.NewMicroTime(now),
		ReportingController: reporter,
		ReportingInstance:   cut(reporter+"-"+node, maxInstance),
		Type:                corev1.EventTypeNormal,
		Reason:              n.Reason,
		Action:              n.Action,
		Note:                cut(n.Note, maxNote),
		Regarding:           about,
	}
	if e.Namespace == "" { // the API wants this one for what has none
		e.Namespace = metav1.NamespaceDefault
	}
	if n.Warning {
		e.Type = corev1.EventTypeWarning
	}
	return e
}

// cut returns as much of s as is valid UTF-8 and not longer than limit bytes.
func cut(s string, limit int) string { return strings.ToValidUTF8(s[:min(len(s), limit)], "") }

// Run implements Recorder.
func (r *recorder) Run(ctx context.Context) {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-r.queue:
			if r.repeats(e) {
				continue
			}
			err := r.send(ctx, e)
			switch {
			case err == nil:
				r.remember(e)
			case ctx.Err() == nil && !failing:
				r.log.Warn("event not recorded, as may be others", logfield.Resource("events.events.k8s.io"),
					logfield.Reason(e.Reason), logfield.Error(cause(err)))
			}
			failing = err != nil
		}
	}
}

func (r *recorder) send(ctx context.Context, e *eventsv1.Event) error {
	ctx, cancel := context.WithTimeout(ctx, recordWithin)
	defer cancel()
	return r.client.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Error()
}

// repeats tells whether e says what was said lately.
func (r *recorder) repeats(e *eventsv1.Event) bool {
	said, ok := r.sent[statementOf(e)]
	return ok && e.EventTime.Sub(said) < repeatAfter
}

func (r *recorder) remember(e *eventsv1.Event) {
	for s, said := range r.sent {
		if e.EventTime.Sub(said) >= repeatAfter {
			delete(r.sent, s)
		}
	}
	r.sent[statementOf(e)] = e.EventTime.Time
}

func statementOf(e *eventsv1.Event) statement {
	return statement{about: e.Regarding, kind: e.Type, reason: e.Reason, action: e.Action, note: e.Note}
}
