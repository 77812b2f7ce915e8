package compile_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/postern-cni/postern/pkg/rule"
)

// packet is a packet on its way through the node, after any translation.
type packet struct {
	in, out  string
	src, dst netip.Addr
	proto    rule.Proto
	port     uint16 // destination's, for TCP, UDP and SCTP
	state    string // conntrack's
	syn      bool   // TCP: asks for a connection
}

func (p packet) String() string {
	return fmt.Sprintf("%s -> %s %s %d, %s -> %s, %s, syn %v", p.src, p.dst, p.proto, p.port, p.in, p.out, p.state, p.syn)
}

// kernel does with table mangle what netfilter does, at hook FORWARD.
type kernel struct {
	t      testing.TB
	chains map[string][]rule.Rule
	sets   map[string]rule.Set
	longest,
	steps int // rules looked at: at most for one packet so far, and for this one
}

const hook = " FORWARD" // no chain of ours has a name with a space

func load(t testing.TB, s *rule.State) *kernel {
	t.Helper()
	k := &kernel{t: t, chains: map[string][]rule.Rule{}, sets: map[string]rule.Set{}}
	for _, set := range s.Sets {
		k.sets[set.Name] = set
	}
	for _, c := range s.Chains[rule.Mangle] {
		if k.chains[c.Name] != nil {
			t.Fatalf("chain %s stands there twice", c.Name)
		}
		k.chains[c.Name] = c.Rules
	}
	for _, h := range s.Hooks {
		if h.Table == rule.Mangle && h.Chain == "FORWARD" {
			k.chains[hook] = append(k.chains[hook], h.Rule)
		}
	}
	return k
}

type verdict int

const (
	returned verdict = iota // to the chain that jumped here
	accepted
	dropped
)

// passes reports whether a packet leaves the table alive.
func (k *kernel) passes(p packet) bool {
	k.t.Helper()
	k.steps = 0
	v := k.walk(hook, p)
	k.longest = max(k.longest, k.steps)
	return v != dropped
}

func (k *kernel) walk(chain string, p packet) verdict {
	rules, there := k.chains[chain]
	if !there {
		k.t.Fatalf("no chain %s", chain)
	}
	for _, r := range rules {
		if k.steps++; k.steps > 10000 {
			k.t.Fatalf("%s: no end in chain %s", p, chain)
		}
		if slices.ContainsFunc(r.Matches, func(m rule.Match) bool { return !k.match(m, p) }) {
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
			return k.walk(a.Chain, p)
		case rule.Jump:
			if v := k.walk(a.Chain, p); v != returned {
				return v
			}
		default:
			k.t.Fatalf("chain %s: action %#v is not known here", chain, a)
		}
	}
	return returned
}

func (k *kernel) match(m rule.Match, p packet) bool {
	switch m := m.(type) {
	case rule.In:
		return link(m.Name, p.in) != m.Not
	case rule.Out:
		return link(m.Name, p.out) != m.Not
	case rule.Protocol:
		return p.proto == m.Proto
	case rule.DestPorts:
		return p.proto == m.Proto && m.From <= p.port && p.port <= m.To
	case rule.CTState:
		return slices.Contains(strings.Split(m.States, ","), p.state) != m.Not
	case rule.Syn:
		return p.syn != m.Not
	case rule.InSet:
		return k.lookup(m, p) != m.Not
	}
	k.t.Fatalf("match %#v is not known here", m)
	return false
}

func link(pattern, name string) bool {
	if stem, wild := strings.CutSuffix(pattern, "+"); wild {
		return strings.HasPrefix(name, stem)
	}
	return pattern == name
}

func (k *kernel) lookup(m rule.InSet, p packet) bool {
	set, there := k.sets[m.Name]
	if !there {
		k.t.Fatalf("no set %s", m.Name)
	}
	first, _, two := strings.Cut(m.Dirs, ",")
	address, iface := p.src, p.in
	if first == "dst" {
		address, iface = p.dst, p.out
	}
	if wanted := set.Type == rule.HashIPPort || set.Type == rule.HashNetIface; two != wanted {
		k.t.Fatalf("set %s of type %s is looked up by %q", set.Name, set.Type, m.Dirs)
	}
	return slices.ContainsFunc(set.Entries, func(e rule.Entry) bool {
		switch {
		case !e.Prefix.Contains(address):
			return false
		case set.Type == rule.HashNetIface:
			return e.Iface == iface
		case set.Type == rule.HashIPPort:
			return e.Proto == p.proto && e.Port == p.port && m.Dirs == "dst,dst"
		}
		return true
	})
}
