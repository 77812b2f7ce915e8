package compile

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// pod returns an isolated pod's chain of one direction: itself, then what each rule allows, then a drop.
func (c *compiler) pod(g *policy.Guarded, side *policy.Side, d rule.Direction) rule.Chain {
	dirs := "src"
	self := rule.Match(rule.In{Name: g.Interface})
	if d == rule.Egress {
		dirs, self = "dst", rule.Out{Name: g.Interface}
	}
	chain := rule.Chain{Name: ChainOf(d, g.Interface), Rules: []rule.Rule{
		{Matches: []rule.Match{self}, Action: rule.Return{}, Comment: "the pod itself"},
	}}
	for _, r := range side.Rules {
		for _, matches := range c.allowed(&r, dirs) {
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

// allowed returns the conditions under which a rule lets a packet pass, each a list of matches: peers times ports.
func (c *compiler) allowed(r *policy.Rule, dirs string) [][]rule.Match {
	ports := [][]rule.Match{nil}
	if !r.AnyPort {
		ports = nil
		for _, p := range r.Ports {
			ports = append(ports, portMatches(p))
		}
	}
	var out [][]rule.Match
	for _, peers := range c.peers(r.Peers, dirs) {
		for _, port := range ports {
			out = append(out, slices.Concat(peers, port))
		}
	}
	for _, n := range r.Named {
		proto := protocol(string(n.Protocol))
		name := c.named(n, proto)
		out = append(out, []rule.Match{rule.Protocol{Proto: proto}, rule.InSet{Name: name, Dirs: "dst,dst"}})
	}
	return out
}

func portMatches(p policy.Port) []rule.Match {
	proto := protocol(string(p.Protocol))
	if p.From == 0 && p.To == 65535 {
		return []rule.Match{rule.Protocol{Proto: proto}}
	}
	return []rule.Match{rule.Protocol{Proto: proto}, rule.DestPorts{Proto: proto, From: p.From, To: p.To}}
}

func protocol(name string) rule.Proto { return rule.Proto(strings.ToLower(name)) }

// peers returns the alternatives for a list of peers: everyone, one of the pods, one of the blocks. A list that is empty in
// this family has none: it never becomes everyone.
func (c *compiler) peers(p *policy.Peers, dirs string) [][]rule.Match {
	if p == nil {
		return [][]rule.Match{nil}
	}
	var out [][]rule.Match
	if p.Selectors != "" {
		var entries []rule.Entry
		for _, a := range p.Pods {
			if rule.FamilyOf(a) == c.family {
				entries = append(entries, rule.Entry{Prefix: single(a)})
			}
		}
		out = append(out, []rule.Match{c.set("p", rule.HashIP, p.Selectors, entries, dirs)})
	}
	var nets []rule.Entry
	for _, b := range p.Blocks {
		if rule.FamilyOf(b.Addr()) != c.family {
			continue
		}
		for _, half := range policy.Halves(b) {
			nets = append(nets, rule.Entry{Prefix: half})
		}
	}
	if len(nets) > 0 {
		out = append(out, []rule.Match{c.set("n", rule.HashNet, "blocks "+words(nets), nets, dirs)})
	}
	return out
}

func words(entries []rule.Entry) string {
	texts := make([]string, 0, len(entries))
	for _, e := range entries {
		texts = append(texts, e.String())
	}
	return strings.Join(texts, " ")
}

func (c *compiler) named(n policy.Named, proto rule.Proto) string {
	var entries []rule.Entry
	for _, m := range n.Members {
		if rule.FamilyOf(m.Addr()) == c.family {
			entries = append(entries, rule.Entry{Prefix: single(m.Addr()), Proto: proto, Port: m.Port()})
		}
	}
	return c.set("t", rule.HashIPPort, n.Key, entries, "").Name
}

// set makes a set that is named after what it means, so that all rules with the same peers share it.
func (c *compiler) set(kind string, typ rule.SetType, key string, entries []rule.Entry, dirs string) rule.InSet {
	sum := sha256.Sum256([]byte(key))
	name := fmt.Sprintf("%s%s%d-%s", rule.SetPrefix, kind, c.family, hex.EncodeToString(sum[:8]))
	if _, made := c.sets[name]; !made {
		c.add(name, typ, rule.Peers, key, entries)
	}
	return rule.InSet{Name: name, Dirs: dirs}
}
