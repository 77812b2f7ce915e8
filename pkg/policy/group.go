package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"github.com/postern-cni/postern/pkg/object"
)

// anchor is a condition that every pod fulfils which a selector matches: its namespace, if the selector is bound to one, and one
// label, if it asks for one by value. A pod leads to the few groups that hang on its own anchors.
type anchor struct{ namespace, key, value string }

func (s selector) anchor() anchor {
	a := anchor{key: s.key, value: s.value}
	if s.namespaces == nil {
		a.namespace = s.namespace
	}
	return a
}

// labelOf is the first label that a selector asks for by value; empty if there is none.
func labelOf(s labels.Selector) (key, value string) {
	requirements, _ := s.Requirements() // those of API selectors can always be listed
	for _, r := range requirements {
		equals := r.Operator() == selection.In || r.Operator() == selection.Equals || r.Operator() == selection.DoubleEquals
		if equals && r.Values().Len() == 1 {
			return r.Key(), r.Values().UnsortedList()[0]
		}
	}
	return "", ""
}

func (g *Group) anchors() []anchor {
	if g.selectors == nil {
		return []anchor{{}}
	}
	list := make([]anchor, 0, len(g.selectors))
	for _, s := range g.selectors {
		list = append(list, s.anchor())
	}
	return list
}

// candidates calls each for the groups that a pod can be in; for some more than once.
func (x *Index) candidates(p *pod, each func(*Group)) {
	visit := func(a anchor) {
		for g := range x.anchors[a] {
			each(g)
		}
	}
	for _, in := range []string{p.Namespace, ""} {
		visit(anchor{namespace: in})
		for key, value := range p.Labels.All() {
			visit(anchor{in, key, value})
		}
	}
}

// member reports whether an address with these owners is in a group, and the number of the group's port there. All owners must
// be selected, and have the same number.
func (x *Index) member(g *Group, owners []*pod) (number uint16, in bool) {
	for i, p := range owners {
		if !x.selects(g, p) {
			return 0, false
		}
		if g.Protocol == "" {
			continue
		}
		port, has := portOf(p.Pod, g.port, g.Protocol)
		if !has || i > 0 && port != number {
			return 0, false
		}
		number = port
	}
	return number, len(owners) > 0
}

func (x *Index) selects(g *Group, p *pod) bool {
	return g.selectors == nil || slices.ContainsFunc(g.selectors, func(s selector) bool {
		return s.matches(p) && s.admits(p.Namespace, x.namespaces[p.Namespace])
	})
}

// admits reports whether pods of a namespace can be selected.
func (s selector) admits(name string, ns *namespace) bool {
	if s.namespaces == nil {
		return name == s.namespace
	}
	return ns.known && s.namespaces.Matches(ns.labels)
}

// matches reports whether a pod's labels are selected. To ask for one label first is several times faster than the selector,
// which most pods of a large cluster do not match.
func (s selector) matches(p *pod) bool {
	return (s.key == "" || p.Labels.Get(s.key) == s.value) && s.pods.Matches(&p.Labels)
}

// some is so many groups that to go through all pods for each takes longer than to ask each pod for its own groups.
const some = 8

// fill finds the members of new groups.
func (x *Index) fill(groups map[*Group]bool) {
	if len(groups) <= some {
		for g := range groups {
			x.search(g)
		}
		return
	}
	for _, p := range x.pods {
		x.addressesOf(p, func(a netip.Addr) {
			owners := x.owners(a)
			x.candidates(p, func(g *Group) {
				if !groups[g] {
					return
				}
				if number, in := x.member(g, owners); in {
					g.members.Put(a, number)
				}
			})
		})
	}
}

// search finds the members of one new group.
func (x *Index) search(g *Group) {
	from := maps.Keys(x.namespaces)
	if g.selectors != nil && !slices.ContainsFunc(g.selectors, func(s selector) bool { return s.namespaces != nil }) {
		from = slices.Values([]string{g.selectors[0].namespace}) // selectors without namespaces are all of their policy's
	}
	for name := range from {
		ns := x.namespaces[name]
		if ns == nil {
			continue
		}
		var here []selector
		for _, s := range g.selectors {
			if s.admits(name, ns) {
				here = append(here, s)
			}
		}
		if g.selectors != nil && here == nil {
			continue
		}
		for _, p := range ns.pods {
			if g.selectors != nil && !slices.ContainsFunc(here, func(s selector) bool { return s.matches(p) }) {
				continue
			}
			x.addressesOf(p, func(a netip.Addr) {
				if number, in := x.member(g, x.owners(a)); in {
					g.members.Put(a, number)
				}
			})
		}
	}
}

// use counts a policy's use by an interface; the first makes what its rules share.
func (u *update) use(p *policy) {
	p.uses++
	if p.held {
		return
	}
	p.held = true
	if p.ingress {
		for i := range p.in {
			r := &p.in[i]
			p.rulesIn = append(p.rulesIn, Rule{Origin: r.origin, Peers: u.peers(r.peers), AnyPort: r.anyPort, Ports: r.ports})
		}
	}
	if p.egress {
		for i := range p.out {
			r := &p.out[i]
			rule := Rule{Origin: r.origin, Peers: u.peers(r.peers), AnyPort: r.anyPort, Ports: r.ports}
			for _, n := range r.named {
				if r.peers == nil || len(r.peers.selectors) > 0 { // blocks have no names
					rule.Named = append(rule.Named, u.group(r.peers, n))
				}
			}
			p.rulesOut = append(p.rulesOut, rule)
		}
	}
}

func (u *update) peers(list *peerList) *Peers {
	if list == nil {
		return nil
	}
	p := &Peers{}
	if len(list.selectors) > 0 {
		p.Pods = u.group(list, namedPort{})
	}
	if len(list.blocks) > 0 {
		key := fmt.Sprint(list.blocks)
		p.Blocks = u.blocks[key]
		if p.Blocks == nil {
			p.Blocks = &Blocks{Key: key, Prefixes: list.blocks}
			u.blocks[key], u.delta.Blocks[p.Blocks] = p.Blocks, true
		}
		p.Blocks.refs++
	}
	return p
}

// group finds or makes the group of a list of peers, or that of a named port among them.
func (u *update) group(list *peerList, port namedPort) *Group {
	key := "every pod"
	if list != nil {
		key = list.selectorKey()
	}
	if port.protocol != "" {
		key = fmt.Sprintf("%s/%s of %s", port.name, port.protocol, key)
	}
	g := u.groups[key]
	if g == nil {
		g = &Group{Key: key, Protocol: port.protocol, port: port.name}
		if list != nil {
			g.selectors = list.selectors
		}
		u.groups[key] = g
		for _, a := range g.anchors() {
			if u.anchors[a] == nil {
				u.anchors[a] = map[*Group]bool{}
			}
			u.anchors[a][g] = true
		}
		u.change(g).Created = true // its members come when all is known
	}
	g.refs++
	return g
}

// sweep gives back what policies shared that select no local pod any more.
func (u *update) sweep() {
	for _, p := range u.idle {
		if p.uses > 0 || !p.held {
			continue
		}
		for _, r := range slices.Concat(p.rulesIn, p.rulesOut) {
			if r.Peers != nil {
				u.dropGroup(r.Peers.Pods)
				u.dropBlocks(r.Peers.Blocks)
			}
			for _, g := range r.Named {
				u.dropGroup(g)
			}
		}
		p.held, p.rulesIn, p.rulesOut = false, nil, nil
	}
}

func (u *update) dropGroup(g *Group) {
	if g == nil {
		return
	}
	if g.refs--; g.refs > 0 {
		return
	}
	delete(u.groups, g.Key)
	for _, a := range g.anchors() {
		delete(u.anchors[a], g)
		if len(u.anchors[a]) == 0 {
			delete(u.anchors, a)
		}
	}
	if c := u.change(g); c.Created {
		delete(u.delta.Groups, g) // nobody has seen it
	} else {
		*c = GroupChange{Dropped: true}
	}
}

func (u *update) dropBlocks(b *Blocks) {
	if b == nil {
		return
	}
	if b.refs--; b.refs > 0 {
		return
	}
	delete(u.blocks, b.Key)
	if u.delta.Blocks[b] {
		delete(u.delta.Blocks, b)
	} else {
		u.delta.Blocks[b] = false
	}
}

// portOf looks a named port up in a pod: the first that has the name and the protocol, as Services do it.
func portOf(pod *object.Pod, name string, protocol corev1.Protocol) (uint16, bool) {
	for _, p := range pod.Ports {
		if p.Name == name && p.Protocol == protocol {
			return p.Number, true
		}
	}
	return 0, false
}

// selects reports whether the policy applies to a pod.
func (p *parsed) selects(pod *object.Pod) bool {
	return pod != nil && !pod.HostNetwork && pod.Namespace == p.namespace && p.pods.Matches(&pod.Labels)
}
