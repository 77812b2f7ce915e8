package compile

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// Chains that do not depend on pods.
const (
	ChainInput   = "POSTERN-INPUT"   // mangle
	ChainForward = "POSTERN-FORWARD" // mangle
	ChainFrom    = "POSTERN-FROM"    // mangle, egress
	ChainTo      = "POSTERN-TO"      // mangle, ingress
	ChainAccept  = "POSTERN-ACCEPT"  // filter
)

const podLinks = attachment.GuardedPrefix + "+"

// ChainOf returns the name of an isolated pod's chain: "PST-E-" (egress) or "PST-I-" and the 12 hex digits of its interface.
func ChainOf(d rule.Direction, hostInterface string) string {
	letter := "I"
	if d == rule.Egress {
		letter = "E"
	}
	return "PST-" + letter + "-" + strings.TrimPrefix(hostInterface, attachment.GuardedPrefix)
}

// State returns everything that a family's tables and sets should hold for a model.
func State(m *policy.Model, f rule.Family) *rule.State {
	sets := map[string]rule.Set{}
	for _, s := range own(f) {
		sets[s.Name] = s
	}
	for _, g := range m.Pods {
		entriesOf(g, f, func(name string, e rule.Entry) {
			s := sets[name]
			s.Entries = append(s.Entries, e)
			sets[name] = s
		})
	}
	ranges := sets[rule.RangeSet(f)]
	ranges.Entries = rangeEntries(m.Ranges, f)
	sets[ranges.Name] = ranges
	mangle := []rule.Chain{forward(f), input(f)}
	for _, d := range directions {
		var isolated []string
		for _, g := range m.Pods {
			if side := g.Side(d == rule.Egress); side.Isolated && m.Serves(f == rule.IPv4) {
				isolated = append(isolated, g.Interface)
				mangle = append(mangle, podChain(g, d, f))
				needs(side, f, sets)
			}
		}
		mangle = append(mangle, dispatch(d, isolated, f)...)
	}
	slices.SortFunc(mangle, func(a, b rule.Chain) int { return strings.Compare(a.Name, b.Name) })
	state := &rule.State{
		Family: f,
		Chains: map[rule.Table][]rule.Chain{rule.Mangle: mangle, rule.Filter: {accept()}},
		Hooks: []rule.Hook{
			{Table: rule.Mangle, Chain: "INPUT", Rule: rule.Rule{Action: rule.Jump{Chain: ChainInput}}},
			{Table: rule.Mangle, Chain: "FORWARD", Rule: rule.Rule{Action: rule.Jump{Chain: ChainForward}}},
			{Table: rule.Filter, Chain: "FORWARD", Rule: rule.Rule{Action: rule.Jump{Chain: ChainAccept}}, Last: true},
		},
	}
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		s := sets[name]
		slices.SortFunc(s.Entries, rule.Entry.Compare)
		s.Entries = slices.Compact(s.Entries)
		state.Sets = append(state.Sets, s)
	}
	return state
}

// needs adds the sets that a side's rules look peers up in.
func needs(side *policy.Side, f rule.Family, sets map[string]rule.Set) {
	group := func(g *policy.Group) {
		if name := groupSet(g, f); sets[name].Name == "" {
			sets[name] = ofGroup(g, f)
		}
	}
	for _, r := range side.Rules {
		if r.Peers != nil && r.Peers.Pods != nil {
			group(r.Peers.Pods)
		}
		if r.Peers != nil && r.Peers.Blocks != nil {
			if s, any := ofBlocks(r.Peers.Blocks, f); any {
				sets[s.Name] = s
			}
		}
		if r.Named != nil {
			group(r.Named)
		}
	}
}

// Patch returns what has changed in the state since the index was as before the delta. What it leads to is what [State] makes
// of the index's model.
func Patch(x *policy.Index, d policy.Delta, f rule.Family) *rule.Patch {
	p := rule.NewPatch(f)
	before, now := d.Served(f == rule.IPv4), x.Serves(f == rule.IPv4)
	regroup(p, x, d, before, now)
	p.Join[rule.RangeSet(f)] = append(p.Join[rule.RangeSet(f)], rangeEntries(d.NewRanges, f)...)
	p.Leave[rule.RangeSet(f)] = append(p.Leave[rule.RangeSet(f)], rangeEntries(d.OldRanges, f)...)
	for _, i := range d.Interfaces {
		reenter(p, x, i)
	}
	for _, direction := range directions {
		rechain(p, x, d, direction, before, now)
	}
	return p
}

// regroup has the sets of peers follow, in a family that is served: before, or now, or both.
func regroup(p *rule.Patch, x *policy.Index, d policy.Delta, before, now bool) {
	if !before && !now {
		return
	}
	f := p.Family
	if before != now { // all come, or all go
		for g := range x.Groups() {
			s := ofGroup(g, f)
			p.Sets[s.Name] = only(now, &s)
		}
		for b := range x.Blocks() {
			if s, any := ofBlocks(b, f); any {
				p.Sets[s.Name] = only(now, &s)
			}
		}
	}
	for g, c := range d.Groups {
		switch name := groupSet(g, f); {
		case c.Dropped:
			p.Sets[name] = nil
		case before != now:
		case c.Created:
			s := ofGroup(g, f)
			p.Sets[name] = &s
		default:
			p.Join[name] = memberEntries(g, c.Joined, f)
			p.Leave[name] = memberEntries(g, c.Left, f)
		}
	}
	for b, needed := range d.Blocks {
		if s, any := ofBlocks(b, f); any && (!needed || before == now) {
			p.Sets[s.Name] = only(needed, &s)
		}
	}
}

func only[T any](wanted bool, v *T) *T {
	if wanted {
		return v
	}
	return nil
}

// reenter adds what follows from an interface's new guard for the sets that interfaces are in.
func reenter(p *rule.Patch, x *policy.Index, i policy.Replaced) {
	has := map[string]map[rule.Entry]bool{}
	entriesOf(i.New, p.Family, func(set string, e rule.Entry) {
		if has[set] == nil {
			has[set] = map[rule.Entry]bool{}
		}
		has[set][e] = true
		p.Join[set] = append(p.Join[set], e)
	})
	entriesOf(i.Old, p.Family, func(set string, e rule.Entry) {
		// Another interface may have the address too.
		if !has[set][e] && (e.Iface != "" || x.At(e.Prefix.Addr()) == nil) {
			p.Leave[set] = append(p.Leave[set], e)
		}
	})
}

// rechain writes the chains of the interfaces that have another guard, or all if the family is served now and was not, and has
// the tree follow if others are isolated now. A family that is not served has none of them.
func rechain(p *rule.Patch, x *policy.Index, delta policy.Delta, d rule.Direction, before, now bool) {
	isolated := func(g *policy.Guarded) bool { return g != nil && g.Side(d == rule.Egress).Isolated }
	write := func(g *policy.Guarded) {
		chain := podChain(g, d, p.Family)
		p.SetChain(rule.Mangle, chain.Name, chain.Rules)
	}
	others := before != now
	for _, i := range delta.Interfaces {
		if now && isolated(i.New) {
			write(i.New)
		}
		others = others || now && isolated(i.Old) != isolated(i.New)
	}
	if !others {
		return
	}
	were, are := isolatedBefore(x, delta, d), x.Interfaces(d == rule.Egress)
	gone := were
	switch {
	case !before:
		were, gone = nil, nil
		for _, link := range are {
			write(x.Local(link))
		}
	case !now:
		are = nil
	default:
		gone = nil
		for _, i := range delta.Interfaces {
			if isolated(i.Old) && !isolated(i.New) {
				gone = append(gone, i.Old.Interface)
			}
		}
	}
	for _, link := range gone {
		p.SetChain(rule.Mangle, ChainOf(d, link), nil)
	}
	newTree(d, p.Family).regrow(attachment.GuardedPrefix, were, are, p)
}

// isolatedBefore are the interfaces that were isolated before the delta, sorted.
func isolatedBefore(x *policy.Index, delta policy.Delta, d rule.Direction) []string {
	were := slices.Clone(x.Interfaces(d == rule.Egress))
	for _, i := range delta.Interfaces {
		if i.New != nil {
			were = policy.Listed(were, i.New.Interface, false)
		}
		if i.Old != nil {
			were = policy.Listed(were, i.Old.Interface, i.Old.Side(d == rule.Egress).Isolated)
		}
	}
	return were
}

// input drops what a pod's link may not send to the node itself: what is for the node's loopback, which route_localnet would let
// in (CVE-2020-8558; what hostPort would lead elsewhere is dropped before that), and a source that is not the pod's. What is
// forwarded has its source checked there. Over IPv6 two kinds of sources are anybody's, and good on their link alone: those of
// neighbour discovery (RFC 4861).
func input(f rule.Family) rule.Chain {
	from := rule.In{Name: podLinks}
	forged := rule.Rule{Matches: []rule.Match{from, rule.InSet{Name: rule.ReadySet(f), Dirs: "src,src", Not: true}},
		Action: rule.Drop{}, Comment: "a source that is not the pod's"}
	if f == rule.IPv4 {
		return rule.Chain{Name: ChainInput, Rules: []rule.Rule{
			{Matches: []rule.Match{from, rule.Dest{Prefix: netip.MustParsePrefix("127.0.0.0/8")}}, Action: rule.Drop{},
				Comment: "the node's loopback is closed to pods"},
			forged,
		}}
	}
	return rule.Chain{Name: ChainInput, Rules: []rule.Rule{
		{Matches: []rule.Match{from, rule.Source{Prefix: netip.MustParsePrefix("fe80::/10")}}, Action: rule.Return{}},
		{Matches: []rule.Match{from, rule.Source{Prefix: netip.MustParsePrefix("::/128")}}, Action: rule.Return{}},
		forged,
	}}
}

func forward(f rule.Family) rule.Chain {
	from, to := rule.In{Name: podLinks}, rule.Out{Name: podLinks}
	icmp := rule.ICMP
	if f == rule.IPv6 {
		icmp = rule.ICMPv6
	}
	ready := rule.ReadySet(f)
	notAFlow := []rule.Match{rule.Protocol{Proto: rule.TCP}, rule.Syn{Not: true}, rule.CTState{States: "INVALID,NEW"}}
	return rule.Chain{Name: ChainForward, Rules: []rule.Rule{
		{Matches: []rule.Match{from, rule.InSet{Name: ready, Dirs: "src,src", Not: true}}, Action: rule.Drop{},
			Comment: "from a pod that is not guarded yet"},
		{Matches: []rule.Match{to, rule.InSet{Name: ready, Dirs: "dst,dst", Not: true}}, Action: rule.Drop{},
			Comment: "to a pod that is not guarded yet"},
		{Matches: []rule.Match{rule.In{Name: podLinks, Not: true}, rule.InSet{Name: rule.LocalSet(f), Dirs: "src"}},
			Action: rule.Drop{}, Comment: "a local pod's address from elsewhere"},
		{Matches: []rule.Match{rule.CTState{States: "ESTABLISHED"}}, Action: rule.Return{}},
		{Matches: []rule.Match{rule.Protocol{Proto: icmp}, rule.CTState{States: "RELATED"}}, Action: rule.Return{},
			Comment: "errors of a flow"},
		{Matches: []rule.Match{rule.In{Name: podLinks, Not: true}, rule.InSet{Name: rule.RangeSet(f), Dirs: "src"}},
			Action: rule.Drop{}, Comment: "an address of this node's range from elsewhere"},
		{Matches: []rule.Match{rule.Out{Name: podLinks, Not: true}, rule.InSet{Name: rule.RangeSet(f), Dirs: "dst"}},
			Action: rule.Drop{}, Comment: "to an address of this node's range that no pod has"},
		{Matches: append([]rule.Match{from}, notAFlow...), Action: rule.Drop{}, Comment: "from the middle of no known flow"},
		{Matches: append([]rule.Match{to}, notAFlow...), Action: rule.Drop{}, Comment: "from the middle of no known flow"},
		{Matches: []rule.Match{from}, Action: rule.Jump{Chain: ChainFrom}},
		{Matches: []rule.Match{to}, Action: rule.Jump{Chain: ChainTo}},
	}}
}

func accept() rule.Chain {
	return rule.Chain{Name: ChainAccept, Rules: []rule.Rule{
		{Matches: []rule.Match{rule.In{Name: podLinks}}, Action: rule.Accept{}},
		{Matches: []rule.Match{rule.Out{Name: podLinks}}, Action: rule.Accept{}},
	}}
}
