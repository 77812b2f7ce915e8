package object_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/postern-cni/postern/pkg/object"
)

// Labels are what a map with them is, also to a selector.
func TestLabelsAreThoseOfTheMap(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	words := []string{"", "a", "b", "app", "a\x00b", "app.kubernetes.io/name", "\x01", strings.Repeat("long", 32),
		strings.Repeat("x", 20000)}
	word := func() string { return words[r.IntN(len(words))] }
	selector, err := labels.Parse("app in (a, b), !b")
	if err != nil {
		t.Fatal(err)
	}
	for range 2000 {
		want := map[string]string{}
		var list []object.Label
		for range r.IntN(7) {
			l := object.Label{Key: word(), Value: word()}
			list = append(list, l)
			want[l.Key] = l.Value
		}
		got := object.LabelsOf(want)
		if from := object.LabelsFrom(list); got != from {
			t.Fatalf("of a map %q, of the list %q", got, from)
		}
		if !maps.Equal(got.Map(), want) || (got.Map() == nil) != (len(want) == 0) {
			t.Fatalf("got %q, want %q", got.Map(), want)
		}
		var said []string
		for _, key := range slices.Sorted(maps.Keys(want)) {
			said = append(said, key+"="+want[key])
		}
		if got.String() != strings.Join(said, ",") {
			t.Fatalf("%q of %q", got, want)
		}
		for _, key := range words {
			w, is := want[key]
			if v, has := got.Lookup(key); v != w || has != is || got.Has(key) != is || got.Get(key) != w {
				t.Fatalf("%q of %q: %q, %v", key, want, v, has)
			}
		}
		if selector.Matches(&got) != selector.Matches(labels.Set(want)) {
			t.Fatalf("%s matches %v", selector, !selector.Matches(labels.Set(want)))
		}
	}
}

func TestOtherLabelsAreNotEqual(t *testing.T) {
	all := map[object.Labels]string{}
	for _, m := range []map[string]string{
		nil, {"": ""}, {"a": ""}, {"": "a"}, {"a": "b"}, {"a": "b", "": ""}, {"ab": ""}, {"a\x00b": ""},
	} {
		l := object.LabelsOf(m)
		if other, there := all[l]; there {
			t.Errorf("%v and %s are the same", m, other)
		}
		all[l] = fmt.Sprint(m)
	}
}
