// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

const (
	kind = "KubeProxyConfiguration"
	// configMapKey is where kubeadm keeps the configuration in its ConfigMap.
	configMapKey = "config.conf"
)

// Warning is one line that names a field, or several, and says what happens
// instead of what the file asks for.
type Warning string

// Load reads a configuration file; see Parse. The error names the file.
func Load(path string) (Config, []Warning, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, syscall.EISDIR) {
		err = fmt.Errorf("%w (name the file in it, such as %s)", err, configMapKey)
	}
	if err != nil {
		return Config{}, nil, fmt.Errorf("read kube-proxy configuration: %w", err)
	}
	c, warnings, err := Parse(data)
	if err != nil {
		return Config{}, nil, fmt.Errorf("read kube-proxy configuration %s: %w", path, err)
	}
	return c, warnings, nil
}

// Parse reads a KubeProxyConfiguration, or a ConfigMap that holds one, in YAML
// or JSON. Like kube-proxy it reads the first document of several.
//
// The error, one line, says why the text is neither; then nothing else is
// returned. Whatever is wrong with single fields is in the warnings.
func Parse(data []byte) (Config, []Warning, error) {
	text, head, err := document(data)
	if err != nil {
		return Config{}, nil, err
	}
	var p parser
	if head.APIVersion == "v1" && head.Kind == "ConfigMap" {
		m, err := newConfigMap(text)
		if err != nil {
			return Config{}, nil, err
		}
		key, err := m.key()
		if err != nil {
			return Config{}, nil, err
		}
		data = []byte(m.Data[key])
		if text, head, err = document(data); err != nil {
			return Config{}, nil, fmt.Errorf("key %s of %s: %w", printable(key), m.name(), err)
		}
		p.beside(m, key)
	}
	if err := checkKind(head); err != nil {
		return Config{}, nil, err
	}
	p.duplicates(data)
	var in v1alpha1.KubeProxyConfiguration
	p.decode(text, &in)
	return p.config(&in), p.warnings, nil
}

// document returns the first document of data as JSON, and of which kind it is.
func document(data []byte) (text []byte, head metav1.TypeMeta, err error) {
	text = data
	if !json.Valid(data) {
		if text, err = yaml.YAMLToJSON(data); err != nil {
			return nil, head, fmt.Errorf("neither YAML nor JSON: %s", oneLine(err))
		}
	}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &head); err != nil {
		return nil, head, fmt.Errorf("not a %s: it is no mapping with apiVersion and kind", kind)
	}
	return text, head, nil
}

// checkKind refuses what is no KubeProxyConfiguration of the version we know.
func checkKind(head metav1.TypeMeta) error {
	want := v1alpha1.SchemeGroupVersion.String()
	switch {
	case head.APIVersion == want && head.Kind == kind:
		return nil
	case head.APIVersion == "" && head.Kind == "":
		return fmt.Errorf("not a %s: apiVersion and kind are missing (want apiVersion: %s, kind: %s)", kind, want, kind)
	case head.Kind == kind:
		return fmt.Errorf("apiVersion %s of %s is not known (want %s)", quote(head.APIVersion), kind, want)
	default:
		return fmt.Errorf("kind %s of apiVersion %s is not a %s of %s, nor a ConfigMap that holds one",
			quote(head.Kind), quote(head.APIVersion), kind, want)
	}
}

// configMap is a v1 ConfigMap, as far as it concerns us.
type configMap struct {
	Metadata struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"metadata"`
	Data map[string]string `json:"data"`
}

func newConfigMap(text []byte) (configMap, error) {
	var m configMap
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &m); err != nil {
		return m, fmt.Errorf("the ConfigMap cannot be read: %s", oneLine(err))
	}
	return m, nil
}

// name names the object for messages.
func (m configMap) name() string {
	return printable(strings.TrimSpace("ConfigMap " + strings.Trim(m.Metadata.Namespace+"/"+m.Metadata.Name, "/")))
}

// key returns where in the ConfigMap the configuration is: under kubeadm's name
// or, as others call it otherwise, under the only name that leads to one.
func (m configMap) key() (string, error) {
	if _, ok := m.Data[configMapKey]; ok {
		return configMapKey, nil
	}
	var found []string
	for key, value := range m.Data {
		if _, head, err := document([]byte(value)); err == nil && checkKind(head) == nil {
			found = append(found, key)
		}
	}
	slices.Sort(found)
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%s has no key %s, nor another with a %s", m.name(), configMapKey, kind)
	case 1:
		return found[0], nil
	default:
		return "", fmt.Errorf("%s has a %s under each of %s (keep one, or call it %s)",
			m.name(), kind, list(found), configMapKey)
	}
}

// beside warns of what is in the ConfigMap beside the configuration.
func (p *parser) beside(m configMap, key string) {
	others := sortedKeys(m.Data)
	others = slices.DeleteFunc(others, func(other string) bool { return other == key })
	if len(others) > 0 {
		p.warn("%s: %s is read, %s is not (a kubeconfig has to be a file, named by clientConnection.kubeconfig)",
			m.name(), printable(key), list(others))
	}
}
