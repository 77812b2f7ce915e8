package compile

import (
	"iter"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/rule"
)

// leaf is the number of pods up to which a chain of the tree lists them; beyond it, the tree branches by the next digit.
const leaf = 8

// dispatch returns the chains that lead to the chains of the isolated interfaces, which are sorted: the direction's entry, and
// the branches of its tree.
func dispatch(d rule.Direction, isolated []string, f rule.Family) []rule.Chain {
	t := &tree{direction: d, entry: ChainTo}
	dirs := "dst,dst"
	if d == rule.Egress {
		t.entry, dirs = ChainFrom, "src,src"
	}
	t.grow(t.entry, attachment.GuardedPrefix, isolated)
	entry := &t.chains[len(t.chains)-1]
	entry.Rules = slices.Insert(entry.Rules, 0, rule.Rule{
		Matches: []rule.Match{rule.InSet{Name: rule.OpenSet(f, d), Dirs: dirs}}, Action: rule.Return{},
		Comment: "no policy isolates the pod for " + string(d),
	})
	return t.chains
}

// Bridge returns the dispatch chains for the time until some interfaces have joined an open set: they are led to the chains that
// they still have, besides those whose chains are wanted. Nil if none of them has a chain, and there is nothing to bridge.
func Bridge(
	f rule.Family, openSet string, joining []string, wanted iter.Seq[string],
	still func(chain string) bool,
) []rule.Chain {
	d := rule.Ingress
	if openSet == rule.OpenSet(f, rule.Egress) {
		d = rule.Egress
	}
	var links []string
	for _, link := range joining {
		if name := ChainOf(d, link); still(name) {
			links = append(links, link)
		}
	}
	if len(links) == 0 {
		return nil
	}
	for name := range wanted {
		if hex, ours := strings.CutPrefix(name, ChainOf(d, attachment.GuardedPrefix)); ours {
			links = append(links, attachment.GuardedPrefix+hex)
		}
	}
	slices.Sort(links)
	return dispatch(d, slices.Compact(links), f)
}

// tree finds an interface's chain in a number of steps that grows with the logarithm of the number of pods.
type tree struct {
	direction rule.Direction
	entry     string       // POSTERN-FROM or POSTERN-TO
	chains    []rule.Chain // a branch's chain comes after those it leads to
}

// grow makes the chain that dispatches the interfaces, all of which begin with a prefix. Whoever is not among them is dropped.
func (t *tree) grow(name, prefix string, interfaces []string) {
	chain := rule.Chain{Name: name}
	if len(interfaces) <= leaf {
		for _, i := range interfaces {
			chain.Rules = append(chain.Rules, rule.Rule{Matches: t.match(i), Action: rule.Goto{Chain: ChainOf(t.direction, i)}})
		}
	} else {
		for len(interfaces) > 0 {
			branch := interfaces[0][:len(prefix)+1]
			n := slices.IndexFunc(interfaces, func(i string) bool { return i[:len(branch)] != branch })
			if n < 0 {
				n = len(interfaces)
			}
			to := t.entry + "-" + branch[len(attachment.GuardedPrefix):]
			t.grow(to, branch, interfaces[:n])
			chain.Rules = append(chain.Rules, rule.Rule{Matches: t.match(branch + "+"), Action: rule.Goto{Chain: to}})
			interfaces = interfaces[n:]
		}
	}
	chain.Rules = append(chain.Rules, rule.Rule{Action: rule.Drop{}})
	t.chains = append(t.chains, chain)
}

func (t *tree) match(link string) []rule.Match {
	if t.direction == rule.Egress {
		return []rule.Match{rule.In{Name: link}}
	}
	return []rule.Match{rule.Out{Name: link}}
}
