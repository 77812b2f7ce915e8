package cluster

import (
	"hash/maphash"
	"slices"

	"github.com/postern-cni/postern/pkg/object"
)

// lately shares what a pod has in common with those that came before it: a cluster has many pods, and few namespaces, nodes and
// lists of ports. It remembers a fixed number of them, so it needs no account of who still uses which, and what it has forgotten
// is only kept once more.
type lately struct {
	seed  maphash.Seed
	words [4096]string
	ports [512][]object.Port
}

func newLately() *lately { return &lately{seed: maphash.MakeSeed()} }

func (l *lately) word(s string) string {
	w := &l.words[maphash.String(l.seed, s)%uint64(len(l.words))]
	if *w != s {
		*w = s
	}
	return *w
}

// share gives a pod the strings and lists that others have, but its labels, which share themselves.
func (l *lately) share(p *object.Pod) {
	p.Namespace, p.Node = l.word(p.Namespace), l.word(p.Node)
	if len(p.Ports) == 0 {
		return
	}
	var h maphash.Hash
	h.SetSeed(l.seed)
	for _, port := range p.Ports {
		maphash.WriteComparable(&h, port)
	}
	ports := &l.ports[h.Sum64()%uint64(len(l.ports))]
	if !slices.Equal(*ports, p.Ports) {
		*ports = slices.Clip(p.Ports)
	}
	p.Ports = *ports
}
