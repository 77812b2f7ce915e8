package verify

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/rule"
)

// flight is a packet with the links it comes in on and goes out of.
type flight struct {
	Packet
	in, out string
}

// tables does with table mangle of a state what netfilter does, at hook FORWARD.
type tables struct {
	chains map[string][]rule.Rule
	sets   map[string]rule.Set
	steps  int   // rules looked at for this packet
	err    error // the first thing in the state that netfilter would not take
}

const hook = " FORWARD" // no chain of ours has a name with a space

func load(s *rule.State) *tables {
	t := &tables{chains: map[string][]rule.Rule{}, sets: map[string]rule.Set{}}
	for _, set := range s.Sets {
		t.sets[set.Name] = set
	}
	for _, c := range s.Chains[rule.Mangle] {
		if t.chains[c.Name] != nil {
			t.fail("chain %s stands there twice", c.Name)
		}
		t.chains[c.Name] = c.Rules
	}
	for _, h := range s.Hooks {
		if h.Table == rule.Mangle && h.Chain == "FORWARD" {
			t.chains[hook] = append(t.chains[hook], h.Rule)
		}
	}
	return t
}

func (t *tables) fail(format string, args ...any) {
	if t.err == nil {
		t.err = fmt.Errorf(format, args...)
	}
}

type verdict int

const (
	returned verdict = iota // to the chain that jumped here
	accepted
	dropped
)

// passes reports whether a packet leaves the table alive. The error says what about the state is no rule of netfilter's.
func (t *tables) passes(p flight) (bool, error) {
	t.steps = 0
	v := t.walk(hook, p)
	return v != dropped, t.err
}

func (t *tables) walk(chain string, p flight) verdict {
	rules, there := t.chains[chain]
	if !there {
		t.fail("no chain %s", chain)
	}
	for _, r := range rules {
		if t.steps++; t.steps > 10000 {
			t.fail("%s: no end in chain %s", p, chain)
			return dropped
		}
		if slices.ContainsFunc(r.Matches, func(m rule.Match) bool { return !t.match(m, p) }) {
			continue
		}
		switch a := r.Action.(type) {
		case rule.Drop:
			return dropped
		case rule.Accept:
			return accepted
		case rule.Return:
			return returned
		case rule.Goto:
			return t.walk(a.Chain, p)
		case rule.Jump:
			if v := t.walk(a.Chain, p); v != returned {
				return v
			}
		default:
			t.fail("chain %s: action %#v is not known here", chain, a)
		}
	}
	return returned
}

func (t *tables) match(m rule.Match, p flight) bool {
	switch m := m.(type) {
	case rule.In:
		return link(m.Name, p.in) != m.Not
	case rule.Out:
		return link(m.Name, p.out) != m.Not
	case rule.Protocol:
		return p.Protocol == m.Proto
	case rule.DestPorts:
		return p.Protocol == m.Proto && m.From <= p.Port && p.Port <= m.To
	case rule.CTState:
		return slices.Contains(strings.Split(m.States, ","), p.State) != m.Not
	case rule.Syn:
		return p.syn() != m.Not
	case rule.InSet:
		return t.lookup(m, p) != m.Not
	}
	t.fail("match %#v is not known here", m)
	return false
}

func link(pattern, name string) bool {
	if stem, wild := strings.CutSuffix(pattern, "+"); wild {
		return strings.HasPrefix(name, stem)
	}
	return pattern == name
}

func (t *tables) lookup(m rule.InSet, p flight) bool {
	set, there := t.sets[m.Name]
	if !there {
		t.fail("no set %s", m.Name)
	}
	first, _, two := strings.Cut(m.Dirs, ",")
	address, iface := p.From, p.in
	if first == "dst" {
		address, iface = p.To, p.out
	}
	if wanted := set.Type == rule.HashIPPort || set.Type == rule.HashNetIface; two != wanted {
		t.fail("set %s of type %s is looked up by %q", set.Name, set.Type, m.Dirs)
	}
	return slices.ContainsFunc(set.Entries, func(e rule.Entry) bool { return holds(set.Type, m.Dirs, e, address, iface, p.Packet) })
}

func holds(typ rule.SetType, dirs string, e rule.Entry, address netip.Addr, iface string, p Packet) bool {
	switch {
	case !e.Prefix.Contains(address):
		return false
	case typ == rule.HashNetIface:
		return e.Iface == iface
	case typ == rule.HashIPPort:
		return e.Proto == p.Protocol && e.Port == p.Port && dirs == "dst,dst"
	}
	return true
}
