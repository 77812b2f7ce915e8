package object

import (
	"encoding/binary"
	"iter"
	"maps"
	"slices"
	"strings"
	"unique"
)

// Labels are the labels of a pod, kept once for all pods that have the same: the zero value has none. Their pointer is what
// selectors of k8s.io/apimachinery match.
type Labels struct {
	// text is each key and its value, sorted by key, each with its length before it (unsigned varint).
	text unique.Handle[string]
}

// Label is one of them.
type Label struct{ Key, Value string }

// LabelsOf returns the labels of a map.
func LabelsOf(m map[string]string) Labels {
	list := make([]Label, 0, len(m))
	for key, value := range m {
		list = append(list, Label{key, value})
	}
	return LabelsFrom(list)
}

// LabelsFrom returns the labels of a list, which it sorts. Of several with the same key the last counts.
func LabelsFrom(list []Label) Labels {
	if len(list) == 0 {
		return Labels{}
	}
	slices.SortStableFunc(list, func(a, b Label) int { return strings.Compare(a.Key, b.Key) })
	text := make([]byte, 0, 256)
	for i, l := range list {
		if i+1 < len(list) && list[i+1].Key == l.Key {
			continue
		}
		for _, word := range []string{l.Key, l.Value} {
			text = append(binary.AppendUvarint(text, uint64(len(word))), word...)
		}
	}
	return Labels{unique.Make(string(text))}
}

// All goes through the labels, sorted by key.
func (l Labels) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		if l == (Labels{}) {
			return
		}
		for rest := l.text.Value(); rest != ""; {
			var key, value string
			key, rest = word(rest)
			value, rest = word(rest)
			if !yield(key, value) {
				return
			}
		}
	}
}

// word cuts off the first word of a text that begins with its length.
func word(text string) (first, rest string) {
	if n := int(text[0]); n < 0x80 {
		return text[1 : 1+n], text[1+n:]
	}
	return longWord(text)
}

func longWord(text string) (first, rest string) {
	length, shift := 0, 0
	for i := 0; ; i++ {
		length |= int(text[i]&0x7f) << shift
		if shift += 7; text[i] < 0x80 {
			text = text[i+1:]
			return text[:length], text[length:]
		}
	}
}

// Lookup returns the value of a key, and whether there is one.
func (l Labels) Lookup(key string) (value string, exists bool) {
	if l == (Labels{}) {
		return "", false
	}
	for rest := l.text.Value(); rest != ""; {
		var k, v string
		k, rest = word(rest)
		if v, rest = word(rest); k == key {
			return v, true
		}
	}
	return "", false
}

// Get returns the value of a key, empty if there is none.
func (l Labels) Get(key string) string {
	value, _ := l.Lookup(key)
	return value
}

// Has reports whether there is a label with a key.
func (l Labels) Has(key string) bool {
	_, exists := l.Lookup(key)
	return exists
}

// Map returns the labels as the API has them; nil if there are none.
func (l Labels) Map() map[string]string {
	if l == (Labels{}) {
		return nil
	}
	return maps.Collect(l.All())
}

// String is "app=web,tier=cache".
func (l Labels) String() string {
	var b strings.Builder
	for key, value := range l.All() {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(key + "=" + value)
	}
	return b.String()
}
