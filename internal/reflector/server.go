// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"errors"
	"fmt"
	"net/http"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// server is an API server and how to reach it.
type server struct {
	config *rest.Config
	origin string // where address and credentials come from, for error messages
}

// newServer finds the server that o describes.
func newServer(o KubernetesOptions) (server, error) {
	s, err := configured(o)
	if err != nil {
		return server{}, err
	}
	if o.APIServer != "" {
		s.config.Host = o.APIServer
	}
	s.config.UserAgent = "fairlead/" + o.Version
	s.config.QPS, s.config.Burst = o.QPS, o.Burst
	s.config.ContentType = runtime.ContentTypeProtobuf
	s.config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	return s, nil
}

func configured(o KubernetesOptions) (server, error) {
	if o.Kubeconfig != "" {
		return fromKubeconfig(o.Kubeconfig)
	}
	config, err := rest.InClusterConfig()
	switch {
	case err == nil:
		return server{config, "the service account of this pod"}, nil
	case errors.Is(err, rest.ErrNotInCluster) && o.APIServer != "":
		return server{&rest.Config{}, "--api-server, without credentials"}, nil
	case errors.Is(err, rest.ErrNotInCluster):
		return server{}, errors.New("no API server to watch: not running in a pod and no kubeconfig given " +
			"(pass --kubeconfig PATH, or --source file:DIR to do without a server)")
	default:
		return server{}, fmt.Errorf("use the service account of this pod: %w "+
			"(set automountServiceAccountToken: true or pass --kubeconfig PATH)", err)
	}
}

// fromKubeconfig takes the current context of a kubeconfig file.
func fromKubeconfig(path string) (server, error) {
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: path}
	file, err := rules.Load()
	if err != nil {
		return server{}, fmt.Errorf("read kubeconfig %s: %w (check --kubeconfig)", path, cause(err))
	}
	if file.CurrentContext == "" {
		return server{}, fmt.Errorf("kubeconfig %s has no current-context "+
			"(set one: kubectl --kubeconfig %s config use-context NAME)", path, path)
	}
	origin := fmt.Sprintf("context %q of kubeconfig %s", file.CurrentContext, path)
	config, err := clientcmd.NewNonInteractiveClientConfig(
		*file, file.CurrentContext, &clientcmd.ConfigOverrides{}, rules).ClientConfig()
	if err != nil {
		return server{}, fmt.Errorf("use %s: %w", origin, cause(err))
	}
	return server{config, origin}, nil
}

// groupClient makes a client for one API group and version.
type groupClient func(schema.GroupVersion) (rest.Interface, error)

// clients returns what makes clients whose requests go by r. They know the
// types that add registers and no others: the scheme of client-go's clientset
// would cost every node the memory of all groups.
func (r *route) clients(add ...func(*runtime.Scheme) error) (groupClient, error) {
	r.mu.Lock()
	s := r.server
	r.mu.Unlock()
	scheme := runtime.NewScheme()
	for _, register := range add {
		if err := register(scheme); err != nil {
			return nil, fmt.Errorf("build scheme: %w", err)
		}
	}
	codecs := serializer.NewCodecFactory(scheme)
	return func(group schema.GroupVersion) (rest.Interface, error) {
		config := rest.CopyConfig(s.config)
		config.APIPath = "/apis"
		if group.Group == "" {
			config.APIPath = "/api"
		}
		config.GroupVersion = &group
		config.NegotiatedSerializer = codecs.WithoutConversion()
		client, err := rest.RESTClientForConfigAndClient(config, &http.Client{Transport: r})
		if err != nil {
			return nil, fmt.Errorf("use API server %q from %s: %w", s.config.Host, s.origin, cause(err))
		}
		return client, nil
	}, nil
}
