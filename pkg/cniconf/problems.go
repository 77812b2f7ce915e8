package cniconf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// problems collects everything that is wrong.
type problems struct {
	code uint
	list []string
}

// add notes that key has a value that is not allowed. Of several codes the gravest stays, see [rank].
func (p *problems) add(code uint, key, value, allowed string) {
	const longest = 120 // bytes of a value in a message
	if len(value) > longest {
		value = strings.ToValidUTF8(value[:longest], "") + "..."
	}
	if p.list == nil || rank(code) < rank(p.code) {
		p.code = code
	}
	p.list = append(p.list, key+": "+value+": "+allowed)
}

// config notes a wrong value of the configuration, as it stands there.
func (p *problems) config(key string, value any, allowed string) {
	p.add(types.ErrInvalidNetworkConfig, key, show(value), allowed)
}

// env notes a wrong environment variable or key of CNI_ARGS.
func (p *problems) env(key, value, allowed string) {
	p.add(types.ErrInvalidEnvironmentVariables, key, strconv.Quote(value), allowed)
}

// rank orders codes by which the whole error gets when several apply.
func rank(code uint) int {
	switch code {
	case types.ErrDecodingFailure:
		return 0
	case types.ErrIncompatibleCNIVersion:
		return 1
	case types.ErrInvalidNetworkConfig:
		return 2
	}
	return 3
}

func (p *problems) err() error {
	if len(p.list) == 0 {
		return nil
	}
	msg := map[uint]string{
		types.ErrDecodingFailure:             "the network configuration cannot be decoded",
		types.ErrIncompatibleCNIVersion:      "incompatible CNI version",
		types.ErrInvalidNetworkConfig:        "invalid network configuration",
		types.ErrInvalidEnvironmentVariables: "invalid environment variables",
	}[p.code]
	return types.NewError(p.code, msg, strings.Join(p.list, "; "))
}

func show(value any) string {
	switch v := value.(type) {
	case nil:
		return "missing"
	case json.RawMessage:
		var b bytes.Buffer
		if err := json.Compact(&b, v); err == nil {
			return b.String()
		}
		return string(v)
	case string:
		return strconv.Quote(v)
	}
	return fmt.Sprint(value)
}

// object is a JSON object whose keys are read one by one, so that one wrong value hides no other.
type object struct {
	path   string // of the object: "ipam.ranges[0]."
	fields map[string]json.RawMessage
	p      *problems
}

// value returns a key's value; ok is false where it is missing or null.
func (o object) value(key string) (json.RawMessage, bool) {
	raw, ok := o.fields[key]
	return raw, ok && string(raw) != "null"
}

// inAnyCase returns the object with the given keys also where it has them in other letters' case, as Go's own decoder reads them and
// so the plugins of the CNI project. A key as it is given here comes first, then the first of the others in order.
func (o object) inAnyCase(keys ...string) object {
	fields := maps.Clone(o.fields)
	for _, name := range slices.Sorted(maps.Keys(o.fields)) {
		for _, key := range keys {
			if _, there := fields[key]; !there && strings.EqualFold(name, key) {
				fields[key] = o.fields[name]
			}
		}
	}
	o.fields = fields
	return o
}

// get decodes a key's value; ok is false where it is missing, or wrong, which is noted.
func get[T any](o object, key, allowed string) (v T, ok bool) {
	raw, ok := o.value(key)
	if !ok {
		return v, false
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		o.bad(key, raw, allowed)
		var zero T
		return zero, false
	}
	return v, true
}

func (o object) bad(key string, value any, allowed string) { o.p.config(o.path+key, value, allowed) }

// child returns the object that is a key's value, with no fields where it is missing or wrong.
func (o object) child(key string) object {
	fields, _ := get[map[string]json.RawMessage](o, key, "an object is allowed")
	return object{path: o.path + key + ".", fields: fields, p: o.p}
}

// children returns the objects of a list; a wrong one is noted and left out.
func (o object) children(key string) []object {
	list, _ := get[[]json.RawMessage](o, key, "a list of objects is allowed")
	var out []object
	for i, raw := range list {
		at := fmt.Sprintf("%s[%d]", key, i)
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(raw, &fields); err != nil || fields == nil {
			o.bad(at, raw, "an object is allowed")
			continue
		}
		out = append(out, object{path: o.path + at + ".", fields: fields, p: o.p})
	}
	return out
}
