package policy

import (
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/postern-cni/postern/pkg/addrmap"
	"github.com/postern-cni/postern/pkg/object"
)

// Index keeps the meaning of policies up to date at a cost in proportion to what changes: a pod elsewhere touches the groups that
// its labels can lead to, a policy the local pods of its namespace. What it holds after any row of updates is what one update
// with the same objects makes. It is not safe for concurrent use.
type Index struct {
	pods       map[string]*pod
	namespaces map[string]*namespace
	local      map[string]*Guarded // by interface
	isolated   map[bool][]string   // of these, the isolated ones, sorted, by whether it is for egress
	having     map[bool]int        // how many addresses these have, by whether they are IPv4
	ranges     []netip.Prefix      // sorted
	policies   int
	problems   map[string]Problem // by policy
	// claims are who says that an address is his.
	claims addrmap.Map[[]claim]

	// What the policies share that select a local pod.
	groups  map[string]*Group
	anchors map[anchor]map[*Group]bool
	asking  map[string]map[*Group]bool // by a key of labels that their selectors ask for
	blocks  map[string]*Blocks
}

// pod is a known pod with what it claims.
type pod struct {
	*object.Pod
	addresses []netip.Addr // by its status
	links     []string     // its interfaces on this node
}

// namespace is one that was declared, or that only has something in it.
type namespace struct {
	labels   labels.Set
	known    bool
	pods     map[string]*pod
	policies []*policy // sorted by name
}

// claim is one of an address: by a pod's status, or by the record of an interface of this node, whose pod may be unknown.
type claim struct {
	pod  *pod
	link string // empty: by status
}

// policy is one with the local pods that it selects, and what it shares with others as long as there are any.
type policy struct {
	*parsed
	uses              int
	held              bool
	rulesIn, rulesOut []Rule
}

// Changes are what an [Index] takes in.
type Changes struct {
	object.Changes
	// Locals are interfaces of this node that may be others now, by their names; nil if one is not there any more.
	Locals map[string]*Local
	// Ranges are all prefixes of this node, if NewRanges says so.
	Ranges    []netip.Prefix
	NewRanges bool
}

// Delta is what an update has changed.
type Delta struct {
	// Interfaces are those whose guard is another one now.
	Interfaces []Replaced
	Groups     map[*Group]*GroupChange
	// Blocks are true if they are needed now and were not, false if they are not needed any more.
	Blocks map[*Blocks]bool
	// served are the families of [Index.Serves] before, by whether they are IPv4.
	served map[bool]bool
	// NewRanges are this node's prefixes that were not before, OldRanges those that are not any more.
	NewRanges, OldRanges []netip.Prefix
}

// created are the groups that are needed now and were not.
func (d Delta) created() (list []*Group) {
	for g, c := range d.Groups {
		if c.Created {
			list = append(list, g)
		}
	}
	return list
}

// Served is what [Index.Serves] said before the update.
func (d Delta) Served(v4 bool) bool { return d.served[v4] }

// Replaced is an interface before and after; nil where it is not there.
type Replaced struct{ Old, New *Guarded }

// GroupChange is what happened to a group. Created or Dropped, nothing more is said of its members.
type GroupChange struct {
	Created, Dropped bool
	Joined, Left     []netip.AddrPort
}

// NewIndex returns an index of an empty cluster.
func NewIndex() *Index {
	return &Index{
		pods: map[string]*pod{}, namespaces: map[string]*namespace{}, local: map[string]*Guarded{}, problems: map[string]Problem{},
		isolated: map[bool][]string{}, having: map[bool]int{},
		groups: map[string]*Group{}, anchors: map[anchor]map[*Group]bool{}, asking: map[string]map[*Group]bool{},
		blocks: map[string]*Blocks{},
	}
}

// Pod returns a known pod by "namespace/name", nil if there is none.
func (x *Index) Pod(key string) *object.Pod {
	if p := x.pods[key]; p != nil {
		return p.Pod
	}
	return nil
}

// Policies returns how many policies there are.
func (x *Index) Policies() int { return x.policies }

// Local returns an interface of this node, nil if there is none of that name.
func (x *Index) Local(link string) *Guarded { return x.local[link] }

// Interfaces lists the interfaces of this node that are isolated in a direction, sorted. The list is good until the next update.
func (x *Index) Interfaces(egress bool) []string { return x.isolated[egress] }

// Ranges lists the prefixes whose addresses only this node's pods have, sorted.
func (x *Index) Ranges() []netip.Prefix { return x.ranges }

// Serves reports whether an interface of this node has an address of a family, or can be given one: what the pods of a node
// without IPv6 may do over IPv6 need not be worked out, for none of them is ready there.
func (x *Index) Serves(v4 bool) bool { return x.having[v4] > 0 || inFamily(x.ranges, v4) }

func inFamily(ranges []netip.Prefix, v4 bool) bool {
	return slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Addr().Is4() == v4 })
}

// Groups and Blocks list what the rules of this node's pods refer to.
func (x *Index) Groups() iter.Seq[*Group]  { return maps.Values(x.groups) }
func (x *Index) Blocks() iter.Seq[*Blocks] { return maps.Values(x.blocks) }

// Addresses lists the addresses of this node's interfaces.
func (x *Index) Addresses() []netip.Addr {
	var list []netip.Addr
	for _, g := range x.local {
		list = append(list, g.Addresses...)
	}
	return list
}

// Links lists the interfaces of this node that have an address.
func (x *Index) Links(a netip.Addr) (links []string) {
	claims, _ := x.claims.Get(a)
	for _, c := range claims {
		if c.link != "" {
			links = append(links, c.link)
		}
	}
	return links
}

// At returns the interface of this node that has an address, nil if none has. Of several, one that is ready.
func (x *Index) At(a netip.Addr) *Guarded {
	var best *Guarded
	claims, _ := x.claims.Get(a)
	for _, c := range claims {
		g := x.local[c.link]
		switch {
		case g == nil:
		case best == nil, g.Ready && !best.Ready,
			g.Ready == best.Ready && (g.Interface > best.Interface) == g.Ready: // one of them, whatever the order of events
			best = g
		}
	}
	return best
}

// Allowed is [Model.Allowed], of what the policies mean now.
func (x *Index) Allowed(src, dst netip.Addr, protocol corev1.Protocol, port uint16, own func(netip.Addr) bool) bool {
	return allowed(x.At, src, dst, protocol, port, own)
}

// Update takes in what has changed and returns what follows from it.
func (x *Index) Update(c Changes) Delta {
	u := &update{Index: x, delta: Delta{Groups: map[*Group]*GroupChange{}, Blocks: map[*Blocks]bool{},
		served: map[bool]bool{true: x.Serves(true), false: x.Serves(false)}},
		touched: map[netip.Addr]map[*Group]bool{}, asked: map[netip.Addr]map[*Group]bool{}, before: map[string]*Guarded{},
		reclaim: map[*pod]bool{}}
	for name, ns := range c.Namespaces {
		u.namespace(name, ns)
	}
	for key, p := range c.Pods {
		u.pod(key, p)
	}
	u.locals(c.Locals)
	if c.NewRanges {
		u.rangesAre(c.Ranges)
	}
	for p := range u.reclaim {
		u.claimByStatus(p)
	}
	u.regroup()
	for key, np := range c.Policies {
		u.policy(key, np)
	}
	for _, link := range slices.Sorted(maps.Keys(u.before)) {
		u.guard(link)
	}
	u.sweep()
	u.fill(u.delta.created())
	return u.delta
}

func (x *Index) inNamespace(name string) *namespace {
	ns := x.namespaces[name]
	if ns == nil {
		ns = &namespace{pods: map[string]*pod{}}
		x.namespaces[name] = ns
	}
	return ns
}

// forget drops a namespace of which nothing is left.
func (x *Index) forget(name string) {
	if ns := x.namespaces[name]; ns != nil && !ns.known && len(ns.pods)+len(ns.policies) == 0 {
		delete(x.namespaces, name)
	}
}

// owners are the pods that an address belongs to. Only what holds for all of them holds for the address. A record of this node
// beats any status. Nobody is an owner where a claim is made for somebody who is no peer: an attached pod that is not known, one
// that has ended or that uses its node's network.
func (x *Index) owners(a netip.Addr) []*pod {
	claims, _ := x.claims.Get(a)
	recorded := slices.ContainsFunc(claims, func(c claim) bool { return c.link != "" })
	owners := make([]*pod, 0, len(claims))
	for _, c := range claims {
		if recorded && c.link == "" {
			continue
		}
		if c.pod == nil || c.pod.Ended || c.pod.HostNetwork {
			return nil
		}
		owners = append(owners, c.pod)
	}
	return owners
}

// addressesOf calls each for every address that a pod claims.
func (x *Index) addressesOf(p *pod, each func(netip.Addr)) {
	for _, a := range p.addresses {
		each(a)
	}
	for _, link := range p.links {
		for _, a := range x.local[link].Addresses {
			each(a)
		}
	}
}

// update is one Update under way. An address is touched before anything that its membership in groups depends on is changed;
// regroup then decides anew for the groups that its owners lead to, those before and those after.
type update struct {
	*Index
	delta   Delta
	touched map[netip.Addr]map[*Group]bool
	asked   map[netip.Addr]map[*Group]bool // groups to decide for, of addresses whose owners stay and have other labels
	reclaim map[*pod]bool                  // whose claims by status may be others
	before  map[string]*Guarded            // the interfaces to be worked out again, as they were; nil for a new one
	idle    []*policy                      // that may have lost their last use
}

func (u *update) touch(a netip.Addr) {
	if u.touched[a] == nil && len(u.groups) > 0 { // new groups look for their members by themselves
		u.touched[a] = map[*Group]bool{}
		u.leadTo(a)
	}
}

// leadTo notes the groups that an address may be a member of, by the labels and the namespaces of its owners.
func (u *update) leadTo(a netip.Addr) {
	groups := u.touched[a]
	for _, p := range u.owners(a) {
		u.candidates(p, func(g *Group) { groups[g] = true })
	}
}

// again has an interface worked out again.
func (u *update) again(link string) {
	if _, noted := u.before[link]; !noted {
		u.before[link] = u.local[link]
	}
}

func (u *update) namespace(name string, ns *object.Namespace) {
	is := u.inNamespace(name)
	for _, p := range is.pods {
		u.addressesOf(p, u.touch)
	}
	is.known, is.labels = ns != nil, nil
	if ns != nil {
		is.labels = ns.Labels
	}
	u.forget(name)
}

func (u *update) pod(key string, now *object.Pod) {
	is := u.pods[key]
	if is != nil && now != nil && len(is.links) == 0 && samePeer(is.Pod, now) {
		u.relabel(is, now)
		return
	}
	if is != nil {
		u.addressesOf(is, u.touch)
		for _, link := range is.links {
			u.again(link)
		}
	}
	switch {
	case is == nil && now == nil:
	case now == nil:
		u.gone(key, is)
	case is == nil:
		is = &pod{Pod: now}
		u.pods[key], u.inNamespace(now.Namespace).pods[key] = is, is
		u.reclaim[is] = true
	default:
		is.Pod = now
		u.reclaim[is] = true
	}
}

// samePeer reports whether two versions of a pod are the same to all groups but for their labels.
func samePeer(a, b *object.Pod) bool {
	return a.HostNetwork == b.HostNetwork && a.Ended == b.Ended && slices.Equal(a.IPs, b.IPs) && slices.Equal(a.Ports, b.Ports)
}

// relabel gives a pod elsewhere other labels. Only groups that ask for one of those that differ can have other members.
func (u *update) relabel(is *pod, now *object.Pod) {
	for _, key := range differing(is.Labels, now.Labels) {
		for _, a := range is.addresses {
			if u.asked[a] == nil {
				u.asked[a] = map[*Group]bool{}
			}
			maps.Copy(u.asked[a], u.asking[key])
		}
	}
	is.Pod = now
}

// differing are the keys of labels whose values differ.
func differing(a, b object.Labels) (keys []string) {
	for key, value := range a.All() {
		if now, has := b.Lookup(key); !has || now != value {
			keys = append(keys, key)
		}
	}
	for key := range b.All() {
		if !a.Has(key) {
			keys = append(keys, key)
		}
	}
	return keys
}

// gone takes a pod away. Interfaces that are still here are those of somebody unknown, until the caller says otherwise.
func (u *update) gone(key string, p *pod) {
	for _, link := range slices.Clone(p.links) {
		g := u.local[link]
		u.unlink(g)
		u.link(Local{Interface: link, Addresses: g.Addresses})
	}
	for _, a := range p.addresses {
		u.unclaim(a, func(c claim) bool { return c.pod == p })
	}
	p.addresses = nil
	delete(u.reclaim, p)
	delete(u.pods, key)
	delete(u.inNamespace(p.Namespace).pods, key)
	u.forget(p.Namespace)
}

// locals replaces interfaces of this node.
func (u *update) locals(now map[string]*Local) {
	for link, l := range now {
		if was := u.local[link]; was != nil && (l == nil || !same(was.Local, *l)) {
			u.unlink(was)
		}
	}
	for link, l := range now {
		if l != nil && u.local[link] == nil {
			u.link(*l)
		}
	}
}

// rangesAre replaces this node's prefixes.
func (u *update) rangesAre(now []netip.Prefix) {
	before := u.ranges
	u.ranges = slices.Compact(slices.SortedFunc(slices.Values(now), netip.Prefix.Compare))
	for _, p := range u.ranges {
		if !slices.Contains(before, p) {
			u.delta.NewRanges = append(u.delta.NewRanges, p)
		}
	}
	for _, p := range before {
		if !slices.Contains(u.ranges, p) {
			u.delta.OldRanges = append(u.delta.OldRanges, p)
		}
	}
}

func same(a, b Local) bool {
	return a.Ready == b.Ready && keyOf(a.Pod) == keyOf(b.Pod) && slices.Equal(a.Addresses, b.Addresses)
}

func keyOf(p *object.Pod) string {
	if p == nil {
		return ""
	}
	return p.Key()
}

// unlink takes an interface away.
func (u *update) unlink(g *Guarded) {
	u.again(g.Interface)
	for _, a := range g.Addresses {
		u.touch(a)
		u.unclaim(a, func(c claim) bool { return c.link == g.Interface })
		u.having[a.Is4()]--
	}
	delete(u.local, g.Interface)
	if p := u.pods[keyOf(g.Pod)]; p != nil {
		p.links = slices.DeleteFunc(p.links, func(l string) bool { return l == g.Interface })
		u.reclaim[p] = true
	}
}

// link puts an interface in.
func (u *update) link(l Local) {
	u.again(l.Interface)
	u.local[l.Interface] = &Guarded{Local: l}
	owner := u.pods[keyOf(l.Pod)]
	if owner != nil {
		owner.links = append(owner.links, l.Interface)
		slices.Sort(owner.links)
		u.reclaim[owner] = true
	}
	for _, a := range l.Addresses {
		u.touch(a)
		u.claim(a, claim{owner, l.Interface})
		u.having[a.Is4()]++
	}
}

func (u *update) claim(a netip.Addr, c claim) {
	claims, _ := u.claims.Get(a)
	u.claims.Put(a, append(claims, c))
}

func (u *update) unclaim(a netip.Addr, which func(claim) bool) {
	claims, _ := u.claims.Get(a)
	if rest := slices.DeleteFunc(claims, which); len(rest) > 0 {
		u.claims.Put(a, rest)
	} else {
		u.claims.Delete(a)
	}
}

// claimByStatus brings a pod's claims to what its status says now. One that has a record here claims nothing by its status.
func (u *update) claimByStatus(p *pod) {
	var now []netip.Addr
	recorded := slices.ContainsFunc(p.links, func(link string) bool { return len(u.local[link].Addresses) > 0 })
	if !p.Ended && !recorded {
		now = p.IPs
	}
	if slices.Equal(p.addresses, now) {
		return
	}
	for _, a := range p.addresses {
		u.touch(a)
		u.unclaim(a, func(c claim) bool { return c.pod == p && c.link == "" })
	}
	for _, a := range now {
		u.touch(a)
		u.claim(a, claim{pod: p})
	}
	p.addresses = now
}

// regroup decides for every touched address which groups it is a member of, and for others about the groups that may ask for them.
func (u *update) regroup() {
	for a := range u.touched {
		u.leadTo(a)
	}
	for _, by := range []map[netip.Addr]map[*Group]bool{u.touched, u.asked} {
		for a, groups := range by {
			if len(groups) == 0 {
				continue
			}
			owners := u.owners(a)
			for g := range groups {
				u.decide(g, a, owners)
			}
		}
	}
	for _, c := range u.delta.Groups {
		slices.SortFunc(c.Joined, netip.AddrPort.Compare)
		slices.SortFunc(c.Left, netip.AddrPort.Compare)
	}
}

func (u *update) decide(g *Group, a netip.Addr, owners []*pod) {
	was, in := g.members.Get(a)
	now, wanted := u.member(g, owners)
	if in == wanted && was == now {
		return
	}
	c := u.change(g)
	if in {
		g.members.Delete(a)
		c.Left = append(c.Left, netip.AddrPortFrom(a, was))
	}
	if wanted {
		g.members.Put(a, now)
		c.Joined = append(c.Joined, netip.AddrPortFrom(a, now))
	}
}

func (u *update) change(g *Group) *GroupChange {
	c := u.delta.Groups[g]
	if c == nil {
		c = &GroupChange{}
		u.delta.Groups[g] = c
	}
	return c
}

// policy replaces one. Local pods that it selected or selects are worked out again.
func (u *update) policy(key string, np *networkingv1.NetworkPolicy) {
	in, _, _ := strings.Cut(key, "/")
	ns := u.inNamespace(in)
	i, there := slices.BinarySearchFunc(ns.policies, key, func(p *policy, key string) int { return strings.Compare(p.name, key) })
	if there {
		u.reguard(ns.policies[i])
		ns.policies = slices.Delete(ns.policies, i, i+1)
		u.policies--
	}
	delete(u.problems, key)
	if np == nil {
		u.forget(in)
		return
	}
	parsed, problems := read(np)
	if len(problems) > 0 {
		u.problems[key] = Problem{key, strings.Join(problems, "; ")}
	}
	p := &policy{parsed: parsed}
	ns.policies = slices.Insert(ns.policies, i, p)
	u.policies++
	u.reguard(p)
}

func (u *update) reguard(p *policy) {
	for link, g := range u.local {
		if p.selects(g.Pod) {
			u.again(link)
		}
	}
}

// guard works out what an interface's policies say.
func (u *update) guard(link string) {
	was, is := u.before[link], u.local[link]
	if is != nil {
		is = u.guarded(is.Local)
		u.local[link] = is
	}
	if was != nil {
		for _, p := range was.policies {
			if p.uses--; p.uses == 0 {
				u.idle = append(u.idle, p)
			}
		}
	}
	if was != nil || is != nil {
		u.delta.Interfaces = append(u.delta.Interfaces, Replaced{was, is})
	}
	for _, egress := range []bool{false, true} {
		u.isolated[egress] = Listed(u.isolated[egress], link, is != nil && is.Side(egress).Isolated)
	}
}

// Listed puts a name into a sorted list, or takes it out.
func Listed(list []string, name string, in bool) []string {
	i, there := slices.BinarySearch(list, name)
	switch {
	case in && !there:
		return slices.Insert(list, i, name)
	case there && !in:
		return slices.Delete(list, i, i+1)
	}
	return list
}

// guarded gives an interface the rules of the policies that select its pod.
func (u *update) guarded(l Local) *Guarded {
	g := &Guarded{Local: l}
	p := u.pods[keyOf(l.Pod)]
	if p == nil {
		g.Pod = nil
		return g
	}
	g.Pod = p.Pod
	for _, np := range u.inNamespace(p.Namespace).policies {
		if !np.selects(g.Pod) {
			continue
		}
		u.use(np)
		g.policies = append(g.policies, np)
		if np.ingress {
			g.Ingress.Isolated = true
			for i, rule := range np.rulesIn {
				if n := np.in[i].on.named; n != (namedPort{}) {
					rule.Port = Port{n.protocol, 1, 0}
					if number, has := portOf(g.Pod, n.name, n.protocol); has {
						rule.Port = Port{n.protocol, number, number}
					}
				}
				g.Ingress.Rules = append(g.Ingress.Rules, rule)
			}
		}
		if np.egress {
			g.Egress.Isolated = true
			g.Egress.Rules = append(g.Egress.Rules, np.rulesOut...)
		}
	}
	return g
}
