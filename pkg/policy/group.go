package policy

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/postern-cni/postern/pkg/object"
)

// anchor is a condition that every pod fulfils which a selector matches: its namespace, if the selector is bound to one, and one
// label, if it asks for one by value. A pod leads to the few groups that hang on its own anchors.
type anchor struct{ namespace, key, value string }

func (s selector) anchor() anchor {
	a := anchor{key: s.pods.key, value: s.pods.value}
	if s.namespaces == nil {
		a.namespace = s.namespace
	}
	return a
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

// keys are the labels that selectors of the group ask for.
func (g *Group) keys() (keys []string) {
	for _, s := range g.selectors {
		requirements, _ := s.pods.Requirements()
		for _, r := range requirements {
			keys = append(keys, r.Key())
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// hang puts a group where those are found that a pod leads to, and those that ask for a label.
func (x *Index) hang(g *Group) {
	for _, a := range g.anchors() {
		include(x.anchors, a, g)
	}
	for _, key := range g.keys() {
		include(x.asking, key, g)
	}
}

func (x *Index) unhang(g *Group) {
	for _, a := range g.anchors() {
		exclude(x.anchors, a, g)
	}
	for _, key := range g.keys() {
		exclude(x.asking, key, g)
	}
}

func include[K comparable](in map[K]map[*Group]bool, key K, g *Group) {
	if in[key] == nil {
		in[key] = map[*Group]bool{}
	}
	in[key][g] = true
}

func exclude[K comparable](in map[K]map[*Group]bool, key K, g *Group) {
	if delete(in[key], g); len(in[key]) == 0 {
		delete(in, key)
	}
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
// be selected by one rule, and have the same number.
func (x *Index) member(g *Group, owners []*pod) (number uint16, in bool) {
	for i, p := range owners {
		port, has := g.number(p)
		if !has || i > 0 && port != number {
			return 0, false
		}
		number = port
	}
	return number, len(owners) > 0 && x.selects(g, owners)
}

// number is what a selected pod is a member with: 0, or the number of its port.
func (g *Group) number(p *pod) (number uint16, has bool) {
	if g.Protocol == "" {
		return 0, true
	}
	return portOf(p.Pod, g.port, g.Protocol)
}

// bound is the namespace that all members are in; empty if there is none. Selectors without namespaces are all of their policy's.
func (g *Group) bound() string {
	if g.selectors == nil || slices.ContainsFunc(g.selectors, func(s selector) bool { return s.namespaces != nil }) {
		return ""
	}
	return g.selectors[0].namespace
}

// selects reports whether one rule's selectors select all of these pods.
func (x *Index) selects(g *Group, pods []*pod) bool {
	return g.selectors == nil || slices.ContainsFunc(g.selectors, func(s selector) bool {
		if !x.picks(s, pods[0]) {
			return false
		}
		return !slices.ContainsFunc(pods[1:], func(p *pod) bool {
			return !slices.ContainsFunc(g.selectors, func(o selector) bool { return o.rule == s.rule && x.picks(o, p) })
		})
	})
}

func (x *Index) picks(s selector, p *pod) bool {
	return s.matches(p) && s.admits(p.Namespace, x.namespaces[p.Namespace])
}

// admits reports whether pods of a namespace can be selected.
func (s selector) admits(name string, ns *namespace) bool {
	if s.namespaces == nil {
		return name == s.namespace
	}
	return ns.known && s.namespaces.matches(ns.labels)
}

// matches reports whether a pod's labels are selected.
func (s selector) matches(p *pod) bool { return s.pods.matches(&p.Labels) }

// fill finds the members of new groups, all in one walk: in each namespace, only pods of groups that have selectors for it are
// looked at, and only by these selectors.
func (x *Index) fill(groups []*Group) {
	bound, wide := map[string][]*Group{}, []*Group(nil)
	for _, g := range groups {
		if in := g.bound(); in != "" {
			bound[in] = append(bound[in], g)
		} else {
			wide = append(wide, g)
		}
	}
	type pick struct {
		group *Group
		selector
	}
	var here []pick
	everybody := selector{pods: asking(labels.Everything())}
	for name, ns := range x.namespaces {
		here = here[:0]
		for _, g := range bound[name] {
			for _, s := range g.selectors {
				here = append(here, pick{g, s})
			}
		}
		for _, g := range wide {
			for _, s := range g.selectors {
				if s.admits(name, ns) {
					here = append(here, pick{g, s})
				}
			}
			if g.selectors == nil {
				here = append(here, pick{g, everybody})
			}
		}
		if len(here) == 0 {
			continue
		}
		for _, p := range ns.pods {
			x.addressesOf(p, func(a netip.Addr) {
				owners := x.owners(a)
				alone := len(owners) == 1 && owners[0] == p
				for _, by := range here {
					if !by.matches(p) {
						continue
					}
					number, in := by.group.number(p)
					if !alone {
						number, in = x.member(by.group, owners)
					}
					if in {
						by.group.members.Put(a, number)
					}
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
			p.rulesIn = append(p.rulesIn, Rule{Origin: r.origin, Peers: u.peers(r.peers), Port: r.on.number})
		}
	}
	if p.egress {
		for i := range p.out {
			r := &p.out[i]
			switch {
			case r.on.named == namedPort{}:
				p.rulesOut = append(p.rulesOut, Rule{Origin: r.origin, Peers: u.peers(r.peers), Port: r.on.number})
			case r.peers == nil || len(r.peers.selectors) > 0: // blocks have no names
				p.rulesOut = append(p.rulesOut, Rule{Origin: r.origin, Named: u.group(r.peers, r.on.named)})
			}
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
		u.hang(g)
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
			u.dropGroup(r.Named)
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
	u.unhang(g)
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
