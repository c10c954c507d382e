// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"strings"

	"k8s.io/kube-proxy/config/v1alpha1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// parser collects what is to be said about one file.
type parser struct {
	warnings []Warning
	// unknown are the paths of members that no version of the format has.
	unknown []string
	// idle are the paths of what is set and has no effect.
	idle []string
	// unreadable says by path what is wrong with values of another type than
	// their field. Who has a better meaning for such a field than its default
	// takes it from here.
	unreadable map[string]string
}

// duplicates warns of fields that are given twice, as strict decoding would.
func (p *parser) duplicates(data []byte) {
	var err error
	if json.Valid(data) {
		var discard any
		var twice []error
		twice, err = kjson.UnmarshalStrict(data, &discard, kjson.DisallowDuplicateFields)
		err = errors.Join(append(twice, err)...)
	} else {
		_, err = yaml.YAMLToJSONStrict(data)
	}
	if err != nil {
		p.warn("%s: the last one counts", strings.TrimPrefix(oneLine(err), "yaml: unmarshal errors:; "))
	}
}

// decode reads JSON field by field, so that a field which cannot be read (it is
// as if it was not set, then) does not take the others with it.
func (p *parser) decode(text []byte, in *v1alpha1.KubeProxyConfiguration) {
	p.unreadable = map[string]string{}
	p.object("", text, reflect.ValueOf(in).Elem())
	if len(p.unknown) > 0 {
		p.warn("%s: unknown, and ignored like kube-proxy does", list(p.unknown))
	}
}

// object reads a JSON object into a struct or a map.
func (p *parser) object(path string, text []byte, into reflect.Value) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(text, &members); err != nil {
		p.unfit(path, text, into.Type())
		return
	}
	fields := maps.Collect(fields(into))
	for _, name := range sortedKeys(members) {
		at := join(path, name)
		field, known := fields[name]
		switch {
		case into.Kind() == reflect.Map:
			p.element(at, name, members[name], into)
		case !known:
			p.stranger(at, members[name])
		case isObject(field.Type()):
			p.object(at, members[name], field)
		default:
			p.leaf(at, members[name], field)
		}
	}
}

// element reads a value of a map. One that cannot be read is left out.
func (p *parser) element(path, name string, text []byte, into reflect.Value) {
	value := reflect.New(into.Type().Elem()).Elem()
	if !p.leaf(path, text, value) {
		return
	}
	if into.IsNil() {
		into.Set(reflect.MakeMap(into.Type()))
	}
	into.SetMapIndex(reflect.ValueOf(name), value)
}

// leaf reads a value that is no object. One that cannot be read is left zero.
func (p *parser) leaf(path string, text []byte, into reflect.Value) bool {
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, into.Addr().Interface()); err != nil {
		into.SetZero()
		p.unfit(path, text, into.Type())
		return false
	}
	return true
}

// unfit takes note of a value that is not what the field holds.
func (p *parser) unfit(path string, text []byte, want reflect.Type) {
	var compact bytes.Buffer
	if err := json.Compact(&compact, text); err == nil {
		text = compact.Bytes()
	}
	p.unreadable[path] = fmt.Sprintf("%s is not %s", printable(string(text)), describe(want))
}

// unread warns of the values that could not be read and that nobody took.
func (p *parser) unread() {
	for _, path := range sortedKeys(p.unreadable) {
		p.warn("%s: %s: taken as not set", printable(path), p.unreadable[path])
	}
}

// stranger takes note of a member that the format does not have, or no longer.
func (p *parser) stranger(path string, text []byte) {
	usual, ok := retired[path]
	if !ok {
		p.unknown = append(p.unknown, path)
		return
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, text); err != nil || !isUnset(compact.String(), usual) {
		p.idle = append(p.idle, path)
	}
}

// fields yields the fields of a struct with the names they have in JSON, those
// of embedded structs among them. A map has none.
func fields(v reflect.Value) iter.Seq2[string, reflect.Value] {
	return func(yield func(string, reflect.Value) bool) {
		if v.Kind() != reflect.Struct {
			return
		}
		for i := range v.NumField() {
			f := v.Type().Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if !f.Anonymous || name != "" {
				if !yield(name, v.Field(i)) {
					return
				}
				continue
			}
			for name, field := range fields(v.Field(i)) {
				if !yield(name, field) {
					return
				}
			}
		}
	}
}

// isObject tells whether the members of a value are fields of their own, rather
// than the value being one.
func isObject(t reflect.Type) bool {
	if reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) {
		return false
	}
	return t.Kind() == reflect.Struct || t.Kind() == reflect.Map
}

// describe says what a field of this type holds.
func describe(t reflect.Type) string {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a text"
	case reflect.Int32:
		return "a whole number of 32 bits"
	case reflect.Uint32:
		return "a whole number of 32 bits from 0"
	case reflect.Float32:
		return "a number"
	case reflect.Slice:
		return "a list"
	}
	switch {
	case isObject(t):
		return "a mapping"
	case strings.Contains(t.Name(), "Duration"):
		return "a duration such as 30s"
	default:
		return "a quantity such as 64Ki"
	}
}

// join returns the path of a member.
func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}
