package cluster

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"unique"

	"github.com/postern-cni/postern/pkg/object"
)

// A cluster has many pods and few different label sets, nodes and port names: each is kept once.

// labelTable shares equal label sets among the pods that are kept.
type labelTable struct {
	mu   sync.Mutex
	sets map[string]*shared
}

type shared struct {
	labels map[string]string
	users  int
}

func newLabelTable() *labelTable { return &labelTable{sets: map[string]*shared{}} }

func keyOf(labels map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		b.WriteString(k)
		b.WriteByte(0)
		b.WriteString(labels[k])
		b.WriteByte(0)
	}
	return b.String()
}

// use returns the one map with these labels, and counts a user more.
func (t *labelTable) use(labels map[string]string) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	key := keyOf(labels)
	s := t.sets[key]
	if s == nil {
		s = &shared{labels: labels}
		t.sets[key] = s
	}
	s.users++
	return s.labels
}

// release counts a user less.
func (t *labelTable) release(labels map[string]string) {
	if len(labels) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	key := keyOf(labels)
	if s := t.sets[key]; s.users > 1 {
		s.users--
	} else {
		delete(t.sets, key)
	}
}

// intern shares what a pod has in common with others, its labels excepted.
func intern(p *object.Pod) {
	once := func(s *string) { *s = unique.Make(*s).Value() }
	once(&p.Namespace)
	once(&p.Node)
	for i := range p.Ports {
		once(&p.Ports[i].Name)
		p.Ports[i].Protocol = unique.Make(p.Ports[i].Protocol).Value()
	}
}
