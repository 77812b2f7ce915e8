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
	ChainRaw     = "POSTERN-PREROUTING" // raw
	ChainForward = "POSTERN-FORWARD"    // mangle
	ChainFrom    = "POSTERN-FROM"       // mangle, egress
	ChainTo      = "POSTERN-TO"         // mangle, ingress
	ChainAccept  = "POSTERN-ACCEPT"     // filter
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
func State(m *policy.Model, family rule.Family) *rule.State {
	c := &compiler{family: family, sets: map[string]rule.Set{}}
	c.own(m)
	mangle := []rule.Chain{c.forward()}
	for _, d := range []rule.Direction{rule.Ingress, rule.Egress} {
		mangle = append(mangle, c.direction(m, d)...)
	}
	slices.SortFunc(mangle, func(a, b rule.Chain) int { return strings.Compare(a.Name, b.Name) })
	state := &rule.State{
		Family: family,
		Chains: map[rule.Table][]rule.Chain{rule.Raw: {c.raw()}, rule.Mangle: mangle, rule.Filter: {accept()}},
		Hooks: []rule.Hook{
			{Table: rule.Raw, Chain: "PREROUTING", Rule: rule.Rule{Action: rule.Jump{Chain: ChainRaw}}},
			{Table: rule.Mangle, Chain: "FORWARD", Rule: rule.Rule{Action: rule.Jump{Chain: ChainForward}}},
			{Table: rule.Filter, Chain: "FORWARD", Rule: rule.Rule{Action: rule.Jump{Chain: ChainAccept}}, Last: true},
		},
	}
	for _, name := range slices.Sorted(maps.Keys(c.sets)) {
		state.Sets = append(state.Sets, c.sets[name])
	}
	return state
}

type compiler struct {
	family rule.Family
	sets   map[string]rule.Set
}

// own makes the sets with a role of their own: who is here, whose guard stands, and who is not isolated.
func (c *compiler) own(m *policy.Model) {
	var ready, local, openIn, openOut []rule.Entry
	for i := range m.Pods {
		g := &m.Pods[i]
		for _, a := range g.Addresses {
			if rule.FamilyOf(a) != c.family {
				continue
			}
			local = append(local, rule.Entry{Prefix: single(a)})
			if !g.Ready {
				continue
			}
			pair := rule.Entry{Prefix: single(a), Iface: g.Interface}
			ready = append(ready, pair)
			if !g.Ingress.Isolated {
				openIn = append(openIn, pair)
			}
			if !g.Egress.Isolated {
				openOut = append(openOut, pair)
			}
		}
	}
	c.add(rule.LocalSet(c.family), rule.HashIP, rule.Local, "addresses of this node's pods", local)
	c.add(rule.ReadySet(c.family), rule.HashNetIface, rule.Ready, "pods whose guard stands", ready)
	c.add(rule.OpenSet(c.family, rule.Ingress), rule.HashNetIface, rule.Open, "pods that no policy isolates for ingress", openIn)
	c.add(rule.OpenSet(c.family, rule.Egress), rule.HashNetIface, rule.Open, "pods that no policy isolates for egress", openOut)
}

func (c *compiler) add(name string, typ rule.SetType, role rule.Role, definition string, entries []rule.Entry) {
	slices.SortFunc(entries, rule.Entry.Compare)
	c.sets[name] = rule.Set{Name: name, Type: typ, Family: c.family, Role: role, Entries: slices.Compact(entries), Definition: definition}
}

// raw drops what a pod's link may never send: a source that is not routed back to it, and packets for the node's loopback,
// which route_localnet would let in (CVE-2020-8558).
func (c *compiler) raw() rule.Chain {
	chain := rule.Chain{Name: ChainRaw, Rules: []rule.Rule{{
		Matches: []rule.Match{rule.In{Name: podLinks}, rule.RPFilter{Invert: true}},
		Action:  rule.Drop{},
		Comment: "a source that is not the pod's",
	}}}
	if c.family == rule.IPv4 {
		chain.Rules = append(chain.Rules, rule.Rule{
			Matches: []rule.Match{rule.In{Name: podLinks}, rule.Dest{Prefix: netip.MustParsePrefix("127.0.0.0/8")}},
			Action:  rule.Drop{},
			Comment: "the node's loopback is closed to pods",
		})
	}
	return chain
}

func (c *compiler) forward() rule.Chain {
	from, to := rule.In{Name: podLinks}, rule.Out{Name: podLinks}
	icmp := rule.ICMP
	if c.family == rule.IPv6 {
		icmp = rule.ICMPv6
	}
	ready := rule.ReadySet(c.family)
	notAFlow := []rule.Match{rule.Protocol{Proto: rule.TCP}, rule.Syn{Not: true}, rule.CTState{States: "INVALID,NEW"}}
	return rule.Chain{Name: ChainForward, Rules: []rule.Rule{
		{Matches: []rule.Match{from, rule.InSet{Name: ready, Dirs: "src,src", Not: true}}, Action: rule.Drop{},
			Comment: "from a pod that is not guarded yet"},
		{Matches: []rule.Match{to, rule.InSet{Name: ready, Dirs: "dst,dst", Not: true}}, Action: rule.Drop{},
			Comment: "to a pod that is not guarded yet"},
		{Matches: []rule.Match{rule.In{Name: podLinks, Not: true}, rule.InSet{Name: rule.LocalSet(c.family), Dirs: "src"}},
			Action: rule.Drop{}, Comment: "a local pod's address from elsewhere"},
		{Matches: []rule.Match{rule.CTState{States: "ESTABLISHED"}}, Action: rule.Return{}},
		{Matches: []rule.Match{rule.Protocol{Proto: icmp}, rule.CTState{States: "RELATED"}}, Action: rule.Return{},
			Comment: "errors of a flow"},
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

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
