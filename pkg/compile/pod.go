package compile

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// podChain returns an isolated pod's chain of one direction: itself, then what each rule allows, then a drop.
func podChain(g *policy.Guarded, d rule.Direction, f rule.Family) rule.Chain {
	dirs := "src"
	self := rule.Match(rule.In{Name: g.Interface})
	if d == rule.Egress {
		dirs, self = "dst", rule.Out{Name: g.Interface}
	}
	chain := rule.Chain{Name: ChainOf(d, g.Interface), Rules: []rule.Rule{
		{Matches: []rule.Match{self}, Action: rule.Return{}, Comment: "the pod itself"},
	}}
	for _, r := range g.Side(d == rule.Egress).Rules {
		for _, matches := range allowed(&r, dirs, f) {
			same := func(o rule.Rule) bool { return slices.Equal(o.Matches, matches) }
			if !slices.ContainsFunc(chain.Rules, same) {
				chain.Rules = append(chain.Rules, rule.Rule{Matches: matches, Action: rule.Return{}, Comment: r.Origin})
			}
		}
	}
	// The last rule names the pod for people who read the tables.
	name := "nobody that policyd knows"
	if g.Pod != nil {
		name = g.Pod.Key()
	}
	chain.Rules = append(chain.Rules, rule.Rule{Action: rule.Drop{}, Comment: name})
	return chain
}

// allowed returns the conditions under which a rule lets a packet pass, each a list of matches. Ports come first because they cost
// a packet of another port next to nothing, and a look into a set does.
func allowed(r *policy.Rule, dirs string, f rule.Family) (out [][]rule.Match) {
	if g := r.Named; g != nil {
		return [][]rule.Match{{rule.Protocol{Proto: protocol(g.Protocol)}, rule.InSet{Name: groupSet(g, f), Dirs: "dst,dst"}}}
	}
	if r.Port.From > r.Port.To {
		return nil
	}
	for _, peers := range peerMatches(r.Peers, dirs, f) {
		out = append(out, slices.Concat(portMatches(r.Port), peers))
	}
	return out
}

func portMatches(p policy.Port) []rule.Match {
	if p == (policy.Port{}) {
		return nil
	}
	proto := protocol(p.Protocol)
	if p.From == 0 && p.To == 65535 {
		return []rule.Match{rule.Protocol{Proto: proto}}
	}
	return []rule.Match{rule.Protocol{Proto: proto}, rule.DestPorts{Proto: proto, From: p.From, To: p.To}}
}

func protocol(p corev1.Protocol) rule.Proto { return rule.Proto(strings.ToLower(string(p))) }

// peerMatches returns the alternatives for a list of peers: everyone, one of the pods, one of the blocks. A list that is empty in
// this family has none: it never becomes everyone.
func peerMatches(p *policy.Peers, dirs string, f rule.Family) [][]rule.Match {
	if p == nil {
		return [][]rule.Match{nil}
	}
	var out [][]rule.Match
	if p.Pods != nil {
		out = append(out, []rule.Match{rule.InSet{Name: groupSet(p.Pods, f), Dirs: dirs}})
	}
	if p.Blocks != nil && len(prefixes(p.Blocks, f)) > 0 {
		out = append(out, []rule.Match{rule.InSet{Name: blockSet(p.Blocks, f), Dirs: dirs}})
	}
	return out
}
