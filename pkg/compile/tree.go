package compile

import (
	"iter"
	"slices"
	"sort"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/rule"
)

// leaf is the number of pods up to which a chain of the tree lists them; beyond it, the tree branches by the next digit.
const leaf = 8

// dispatch returns the chains that lead to the chains of the isolated interfaces, which are sorted: the direction's entry, and
// the branches of its tree.
func dispatch(d rule.Direction, isolated []string, f rule.Family) []rule.Chain {
	return newTree(d, f).grow(attachment.GuardedPrefix, isolated)
}

func entryOf(d rule.Direction) string {
	if d == rule.Egress {
		return ChainFrom
	}
	return ChainTo
}

// notIsolated lets pass whoever is in the open set.
func notIsolated(d rule.Direction, f rule.Family) rule.Rule {
	dirs := "dst,dst"
	if d == rule.Egress {
		dirs = "src,src"
	}
	return rule.Rule{
		Matches: []rule.Match{rule.InSet{Name: rule.OpenSet(f, d), Dirs: dirs}}, Action: rule.Return{},
		Comment: "no policy isolates the pod for " + string(d),
	}
}

// Bridge returns the dispatch chains for the time until some interfaces have joined an open set: they are led to the chains that
// they still have, besides those whose chains are wanted, and so that they are let pass once they have joined, the set comes
// first. Others may leave it at that time. They are led to their chains at once, as without a bridge, if chains of the other
// direction are rewritten: or for a moment one end of a packet would be judged as before and the other as after, and it would
// pass where neither lets it. Nil if nobody joins.
//
// wanted are the chains that are wanted, with whether the kernel holds other rules under that name; still says which others it
// holds.
func Bridge(
	f rule.Family, openSet string, joining, leaving []string, wanted iter.Seq2[string, bool],
	still func(chain string) bool,
) []rule.Chain {
	d, opposite := rule.Ingress, rule.Egress
	if openSet == rule.OpenSet(f, rule.Egress) {
		d, opposite = opposite, d
	}
	joining = slices.DeleteFunc(slices.Clone(joining), func(link string) bool { return !still(ChainOf(d, link)) })
	if len(joining) == 0 {
		return nil
	}
	var isolated []string
	apart := false // the other end may be let pass what it was not
	for name, rewritten := range wanted {
		if hex, ours := strings.CutPrefix(name, ChainOf(d, attachment.GuardedPrefix)); ours {
			isolated = append(isolated, attachment.GuardedPrefix+hex)
		}
		apart = apart || rewritten && strings.HasPrefix(name, ChainOf(opposite, attachment.GuardedPrefix))
	}
	leaving = slices.DeleteFunc(slices.Clone(leaving), func(link string) bool { return !apart || !slices.Contains(isolated, link) })
	links := slices.Concat(joining, isolated)
	slices.Sort(links)
	slices.Sort(leaving)
	chains := dispatch(d, slices.Compact(links), f)
	t, entry := &tree{direction: d}, &chains[len(chains)-1]
	entry.Rules = slices.Insert(entry.Rules, 0, notIsolated(d, f))
	for i, link := range slices.Compact(leaving) {
		entry.Rules = slices.Insert(entry.Rules, i, rule.Rule{Matches: t.match(link), Action: rule.Goto{Chain: ChainOf(d, link)}})
	}
	return chains
}

// tree finds an interface's chain in a number of steps that grows with the logarithm of the number of pods.
type tree struct {
	direction rule.Direction
	family    rule.Family
	entry     string // POSTERN-FROM or POSTERN-TO
}

func newTree(d rule.Direction, f rule.Family) *tree {
	return &tree{direction: d, family: f, entry: entryOf(d)}
}

// branch are the interfaces that begin with a prefix.
type branch struct {
	prefix     string
	interfaces []string
}

// branches are those that the chain of a prefix leads to; none if it lists its interfaces.
func branches(prefix string, interfaces []string) (list []branch) {
	if len(interfaces) <= leaf {
		return nil
	}
	for len(interfaces) > 0 {
		b := interfaces[0][:len(prefix)+1]
		n := sort.Search(len(interfaces), func(i int) bool { return !strings.HasPrefix(interfaces[i], b) })
		list = append(list, branch{b, interfaces[:n]})
		interfaces = interfaces[n:]
	}
	return list
}

// grow makes the chains that dispatch the interfaces, all of which begin with a prefix; a branch's comes after those it leads to.
func (t *tree) grow(prefix string, interfaces []string) (chains []rule.Chain) {
	for _, b := range branches(prefix, interfaces) {
		chains = append(chains, t.grow(b.prefix, b.interfaces)...)
	}
	return append(chains, rule.Chain{Name: t.name(prefix), Rules: t.rules(prefix, interfaces)})
}

// regrow puts into a patch what it takes to have the tree lead to other interfaces than it did. The chain of a prefix that no
// interface begins with goes, but for the entry.
func (t *tree) regrow(prefix string, were, are []string, p *rule.Patch) {
	if slices.Equal(were, are) {
		return
	}
	if len(are) > 0 || prefix == attachment.GuardedPrefix {
		p.SetChain(rule.Mangle, t.name(prefix), t.rules(prefix, are))
	} else {
		p.SetChain(rule.Mangle, t.name(prefix), nil)
	}
	before := map[string][]string{}
	for _, b := range branches(prefix, were) {
		before[b.prefix] = b.interfaces
	}
	for _, b := range branches(prefix, are) {
		t.regrow(b.prefix, before[b.prefix], b.interfaces, p)
		delete(before, b.prefix)
	}
	for gone, interfaces := range before {
		t.regrow(gone, interfaces, nil, p)
	}
}

func (t *tree) name(prefix string) string {
	if prefix == attachment.GuardedPrefix {
		return t.entry
	}
	return t.entry + "-" + prefix[len(attachment.GuardedPrefix):]
}

// rules are those of the chain of a prefix. Whoever is not among its interfaces is dropped, unless the open set has it: so who is
// isolated needs no look into that set, which costs as much as ten steps of the tree.
func (t *tree) rules(prefix string, interfaces []string) (rules []rule.Rule) {
	further := branches(prefix, interfaces)
	for _, b := range further {
		rules = append(rules, rule.Rule{Matches: t.match(b.prefix + "+"), Action: rule.Goto{Chain: t.name(b.prefix)}})
	}
	if further == nil {
		for _, i := range interfaces {
			rules = append(rules, rule.Rule{Matches: t.match(i), Action: rule.Goto{Chain: ChainOf(t.direction, i)}})
		}
	}
	return append(rules, notIsolated(t.direction, t.family), rule.Rule{Action: rule.Drop{}})
}

func (t *tree) match(link string) []rule.Match {
	if t.direction == rule.Egress {
		return []rule.Match{rule.In{Name: link}}
	}
	return []rule.Match{rule.Out{Name: link}}
}
