// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package reflector

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// manifest is what one file says.
type manifest struct {
	path     string
	objects  []converted
	warnings []Warning // about the file; those about an object are with it
	// broken tells that some document could not be read, so that an object
	// which is missing may only be missing for now.
	broken bool
	// passedOver names the documents of other kinds, and Nodes that are not ours.
	passedOver []string
}

// parseManifest reads every Service, EndpointSlice and ServiceCIDR and our own
// Node in a file of YAML or JSON documents, those inside a List too. Other
// documents are passed over. A document that cannot be read costs a warning, and
// nothing but itself.
func parseManifest(path string, data []byte, o Options) manifest {
	m := manifest{path: path}
	cut, toJSON := splitYAML, yaml.YAMLToJSON
	if filepath.Ext(path) == ".json" {
		cut, toJSON = splitJSON, func(text []byte) ([]byte, error) { return text, nil }
	}
	documents, err := cut(data)
	for i, document := range documents {
		place := fmt.Sprintf("document %d", i+1)
		text, err := toJSON(document)
		if err != nil {
			m.unreadable(place, "", err)
			continue
		}
		m.document(place, text, o)
	}
	if err != nil {
		m.unreadable(fmt.Sprintf("document %d", len(documents)+1), "", err)
	}
	return m
}

// splitJSON cuts a file into its JSON values. The error is about what comes
// after those returned.
func splitJSON(data []byte) ([][]byte, error) {
	var documents [][]byte
	for d := json.NewDecoder(bytes.NewReader(data)); ; {
		var document json.RawMessage
		err := d.Decode(&document)
		if errors.Is(err, io.EOF) {
			return documents, nil
		}
		if err != nil {
			return documents, err
		}
		documents = append(documents, document)
	}
}

// splitYAML cuts a file at the lines that start with "---" and leaves out empty
// documents. YAML allows no such line inside a document, not even in a block of
// text. What follows on it (a comment most often) belongs to the next document.
// The error is always nil.
func splitYAML(data []byte) ([][]byte, error) {
	var documents [][]byte
	var document []byte
	empty := true // nothing but comments and directives so far
	flush := func() {
		if !empty {
			documents = append(documents, document)
		}
		document, empty = nil, true
	}
	for line := range bytes.Lines(data) {
		if rest, ok := bytes.CutPrefix(line, []byte("---")); ok && startsBlank(rest) {
			flush()
			line = rest
		}
		text := bytes.TrimSpace(line)
		if len(text) > 0 && text[0] != '#' && line[0] != '%' {
			empty = false
		}
		document = append(document, line...)
	}
	flush()
	return documents, nil
}

func startsBlank(b []byte) bool { return len(b) == 0 || bytes.IndexByte([]byte(" \t\r\n"), b[0]) >= 0 }

// document takes in one document, or one item of a List.
func (m *manifest) document(place string, text []byte, o Options) {
	var head metav1.TypeMeta
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &head); err != nil {
		m.unreadable(place, "", err)
		return
	}
	switch kind := head.APIVersion + " " + head.Kind; {
	case string(text) == "null":
	case kind == "v1 List":
		m.list(place, text, o)
	case kind == "v1 Service":
		m.service(place, text, o)
	case kind == "discovery.k8s.io/v1 EndpointSlice":
		m.slice(place, text)
	case kind == "v1 Node":
		m.node(place, text, o)
	case kind == "networking.k8s.io/v1 ServiceCIDR", kind == "networking.k8s.io/v1beta1 ServiceCIDR":
		m.serviceCIDR(place, text)
	case head.APIVersion == "" || head.Kind == "":
		m.unreadable(place, "", errors.New("apiVersion or kind is missing"))
	default:
		m.passedOver = append(m.passedOver, place+": "+kind)
	}
}

func (m *manifest) list(place string, text []byte, o Options) {
	var list struct {
		Items []json.RawMessage `json:"items"`
	}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &list); err != nil {
		m.unreadable(place, "", err)
		return
	}
	for i, item := range list.Items {
		m.document(fmt.Sprintf("%s, item %d", place, i+1), item, o)
	}
}

func (m *manifest) service(place string, text []byte, o Options) {
	name := nameIn(text)
	about := title(kindService, name)
	// The name of a Service becomes a DNS label.
	if err := checkName(name, validation.IsDNS1123Label); err != nil {
		m.unreadable(place, about, err)
		return
	}
	var s corev1.Service
	if !m.decode(place, about, text, &s) {
		return
	}
	defaultService(&s)
	c := convertService(&s, o)
	if s.Spec.ClusterIP == "" && s.Spec.Type != corev1.ServiceTypeExternalName {
		c.warnings = append(c.warnings, Warning{
			Object: about,
			Text:   "left out: it has no clusterIP, and without an API server nobody allocates one (set spec.clusterIP)",
		})
	}
	m.objects = append(m.objects, c)
}

func (m *manifest) slice(place string, text []byte) {
	name := nameIn(text)
	about := title(kindSlice, name)
	if err := checkName(name, validation.IsDNS1123Subdomain); err != nil {
		m.unreadable(place, about, err)
		return
	}
	var s discoveryv1.EndpointSlice
	if !m.decode(place, about, text, &s) {
		return
	}
	defaultSlice(&s)
	m.objects = append(m.objects, convertSlice(&s))
}

func (m *manifest) node(place string, text []byte, o Options) {
	name := lb.Name{Name: nameIn(text).Name}
	if name.Name != o.NodeName {
		m.passedOver = append(m.passedOver, place+": "+title(kindNode, name))
		return
	}
	about := title(kindNode, name)
	if err := checkName(name, validation.IsDNS1123Subdomain); err != nil {
		m.unreadable(place, about, err)
		return
	}
	var n corev1.Node
	if m.decode(place, about, text, &n) {
		m.objects = append(m.objects, convertNode(&n, o))
	}
}

// serviceCIDR takes v1beta1, which has the same fields, for v1.
func (m *manifest) serviceCIDR(place string, text []byte) {
	name := lb.Name{Name: nameIn(text).Name}
	about := title(kindServiceCIDR, name)
	if err := checkName(name, validation.IsDNS1123Subdomain); err != nil {
		m.unreadable(place, about, err)
		return
	}
	var s networkingv1.ServiceCIDR
	if m.decode(place, about, text, &s) {
		m.objects = append(m.objects, convertServiceCIDR(&s))
	}
}

// nameIn returns the name of an object, as far as it can be read.
func nameIn(text []byte) lb.Name {
	var object struct {
		Metadata struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
		} `json:"metadata"`
	}
	// Whoever decodes the whole object meets the same error.
	_ = kjson.UnmarshalCaseSensitivePreserveInts(text, &object)
	return lb.Name{
		Namespace: cmp.Or(object.Metadata.Namespace, metav1.NamespaceDefault),
		Name:      object.Metadata.Name,
	}
}

// decode reads an object strictly enough to notice a misspelled field, which
// the API server's clients would refuse: it is passed over with a warning.
func (m *manifest) decode(place, about string, text []byte, into any) bool {
	ignored, err := kjson.UnmarshalStrict(text, into)
	if err != nil {
		m.unreadable(place, about, err)
		return false
	}
	for _, e := range ignored {
		m.warn(place, about, e.Error()+": ignored")
	}
	return true
}

// unreadable takes note that a document was left out. about is the object it
// holds, empty when unknown.
func (m *manifest) unreadable(place, about string, err error) {
	m.broken = true
	m.warn(place, about, "left out: "+cause(err).Error())
}

func (m *manifest) warn(place, about, text string) {
	if about != "" {
		place += " (" + about + ")"
	}
	m.warnings = append(m.warnings, Warning{Object: m.path, Text: place + ": " + text})
}

// checkName applies the API's rules for names, which the tables of the datapath
// rely on. Objects of some kinds have no namespace.
func checkName(n lb.Name, valid func(string) []string) error {
	if n.Name == "" {
		return errors.New("metadata.name is missing")
	}
	if problems := valid(n.Name); len(problems) > 0 {
		return fmt.Errorf("metadata.name %q is invalid: %s", n.Name, strings.Join(problems, "; "))
	}
	if problems := validation.IsDNS1123Label(n.Namespace); n.Namespace != "" && len(problems) > 0 {
		return fmt.Errorf("metadata.namespace %q is invalid: %s", n.Namespace, strings.Join(problems, "; "))
	}
	return nil
}

// keep takes over from an earlier version of the file what this one does not
// give, when this one is broken: to be deleted, an object must be missing from
// a file that can be read.
func (m *manifest) keep(before manifest) {
	if !m.broken {
		return
	}
	given := map[identity]bool{}
	for _, o := range m.objects {
		given[o.identity()] = true
	}
	for _, o := range before.objects {
		if !given[o.identity()] {
			m.objects = append(m.objects, o)
		}
	}
}
