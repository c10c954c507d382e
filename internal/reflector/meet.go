// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	"github.com/fairlead-lb/fairlead/internal/logfield"
)

// How the server is met at the start.
const (
	// startTimeout is how long a server may fail to answer, or refuse us, before
	// that counts.
	startTimeout = 10 * time.Second
	// tryPause is between two tries at first; it grows to retryAtLeastEvery.
	tryPause = 500 * time.Millisecond
	// Each try may take longer than the one before: a server that needs many
	// seconds for each answer serves us, too.
	tryTimeout  = 15 * time.Second
	tryTimeouts = 4 * tryTimeout
)

// meet returns nil once the server has let us list and watch every resource that
// is not optional, or when ctx ends. A server that does not answer is waited for,
// however long it takes; the log says so once. One that still refuses us after
// answerWithin is not: the error says in one line what is wrong and what to do. It
// is given that time because a server that is just starting refuses everybody until
// it has read its roles.
func (k *kubernetes) meet(ctx context.Context) error {
	w := meeting{k: k, start: time.Now(), pause: tryPause, timeout: tryTimeout}
	for _, r := range k.resources {
		for !r.optional {
			verb, err := try(ctx, r, w.timeout)
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				break
			}
			if err := w.failed(ctx, verb, r, err); err != nil {
				return err
			}
		}
	}
	w.over()
	return nil
}

// meeting is with a server that has not let us in yet.
type meeting struct {
	k              *kubernetes
	start          time.Time
	refused        time.Time // since when it has done nothing but refuse us; zero if it does not answer
	pause, timeout time.Duration
	said           bool
}

// failed takes note of a try that failed with err and pauses. It returns an error
// when it is of no use to go on.
func (w *meeting) failed(ctx context.Context, verb string, r resource, err error) error {
	switch {
	case !isFinal(err):
		w.refused = time.Time{}
	case w.refused.IsZero():
		w.refused = time.Now()
	}
	if !w.refused.IsZero() && time.Since(w.refused) >= w.k.answerWithin {
		return w.k.explain(verb, r, err)
	}
	if !w.said && time.Since(w.start) >= w.k.answerWithin {
		w.said = true
		w.k.options.Log.Warn("api server cannot be reached: trying again until it can", logfield.Error(w.k.explain(verb, r, err)))
	}
	select {
	case <-ctx.Done():
	case <-time.After(w.pause + rand.N(w.pause)): // nodes do not come all at once
	}
	w.pause, w.timeout = min(2*w.pause, retryAtLeastEvery/2), min(2*w.timeout, tryTimeouts)
	return nil
}

// over takes note that the server has let us in.
func (w *meeting) over() {
	if w.said {
		w.k.options.Log.Info("api server answers at last",
			logfield.Server(w.k.address()), logfield.Took(time.Since(w.start)))
	}
}

// await returns true once the server lets us list and watch r, which may be
// never, and false when ctx ends first. While the server has no r, keeps it from
// us, or has failed to answer for startTimeout, there is none, since others wait
// for what it says; the log says so once.
func (k *kubernetes) await(ctx context.Context, r resource, events chan<- Event) bool {
	start, without := time.Now(), false
	for {
		verb, err := try(ctx, r, tryTimeout)
		if err == nil {
			return true
		}
		pause := min(retryAtLeastEvery, k.askAgain)
		if isFinal(err) {
			pause = k.askAgain
		}
		if !without && (isFinal(err) || time.Since(start) >= k.answerWithin) {
			without = true
			k.doWithout(verb, r, err)
			if e := r.digest.replaced(nil); e != nil {
				send(ctx, events, e)
			}
		}
		if !without {
			pause = tryPause
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// doWithout logs why there is no r. A server older than the resource is nothing
// to warn about.
func (k *kubernetes) doWithout(verb string, r resource, err error) {
	log := k.options.Log.With(logfield.Server(k.address()), logfield.Resource(r.name))
	if apierrors.IsNotFound(err) {
		log.Info("api server does not have this resource: going on without")
		return
	}
	if !isFinal(err) {
		log.Warn("api server fails to answer for this resource: going on without",
			logfield.Error(fmt.Errorf("%s: %w", verb, cause(err))))
		return
	}
	log.Warn("api server keeps this resource from us: going on without",
		logfield.Error(fmt.Errorf("%s: %w", verb, cause(err))))
}

// try lists one object of r and opens a watch, since a role may allow the one
// and not the other. verb is the one that failed.
func try(ctx context.Context, r resource, timeout time.Duration) (verb string, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	list, err := r.client.ListWithContext(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return "list", err
	}
	m, err := meta.ListAccessor(list)
	if err != nil {
		return "list", err
	}
	w, err := r.client.WatchWithContext(ctx, metav1.ListOptions{
		ResourceVersion: m.GetResourceVersion(),
		TimeoutSeconds:  new(int64(1)),
	})
	if err != nil {
		return "watch", err
	}
	w.Stop()
	return "", nil
}

// isFinal tells whether asking again within seconds is useless.
func isFinal(err error) bool {
	return isCertificate(err) || errors.Is(err, http.ErrSchemeMismatch) || apierrors.IsBadRequest(err) ||
		apierrors.IsUnauthorized(err) || apierrors.IsForbidden(err) || apierrors.IsNotFound(err)
}

// explain adds to err what it is about and the likely remedy.
func (k *kubernetes) explain(verb string, r resource, err error) error {
	host, origin := k.address(), k.route.origin()
	var remedy string
	switch {
	case isCertificate(err):
		remedy = "the CA or the server name does not match: check the certificate-authority in " + origin
	case errors.Is(err, http.ErrSchemeMismatch):
		remedy = "the address needs http:// in place of https://"
	case apierrors.IsBadRequest(err):
		remedy = "the address may need https:// in place of http://"
	case apierrors.IsUnauthorized(err):
		remedy = "it does not accept the credentials: renew those in " + origin
	case apierrors.IsForbidden(err):
		remedy = "bind a role that may list and watch services, nodes and endpointslices.discovery.k8s.io"
	case apierrors.IsNotFound(err):
		remedy = "this is no API server of Kubernetes 1.21 or later: check the address"
	case utilnet.IsConnectionRefused(err):
		remedy = "nothing listens there: start the API server, or correct the address in " + origin + " or --api-server"
	case isTimeout(err):
		remedy = "no answer: check the address in " + origin + " or --api-server, routes and firewalls"
	default:
		remedy = "check the address in " + origin + " or --api-server"
	}
	return fmt.Errorf("%s %s at API server %s: %w (%s)", verb, r.name, host, cause(err), remedy)
}

func isCertificate(err error) bool {
	var verification *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	return errors.As(err, &verification) || errors.As(err, &authority) ||
		errors.As(err, &name) || errors.As(err, &invalid)
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// cause strips the request's long URL from an error of the HTTP client, and
// puts what is left on one line. It still wraps err.
func cause(err error) error {
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err
	}
	if !strings.Contains(err.Error(), "\n") {
		return err
	}
	return oneLine{err}
}

// oneLine is an error whose text has its line breaks removed.
type oneLine struct{ error }

// Error returns the message with all white space folded to single blanks.
func (e oneLine) Error() string { return strings.Join(strings.Fields(e.error.Error()), " ") }

// Unwrap returns the error itself.
func (e oneLine) Unwrap() error { return e.error }
