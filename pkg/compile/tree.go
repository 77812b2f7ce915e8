package compile

import (
	"slices"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// leaf is the number of pods up to which a chain of the tree lists them; beyond it, the tree branches by the next digit.
const leaf = 8

// direction returns the chains of one direction: its entry with the dispatch tree, and the isolated pods' own.
func (c *compiler) direction(m *policy.Model, d rule.Direction) []rule.Chain {
	t := &tree{direction: d, entry: ChainTo, dirs: "dst,dst"}
	if d == rule.Egress {
		t.entry, t.dirs = ChainFrom, "src,src"
	}
	var isolated []string
	var chains []rule.Chain
	for i := range m.Pods {
		g := &m.Pods[i]
		side := &g.Ingress
		if d == rule.Egress {
			side = &g.Egress
		}
		if !side.Isolated {
			continue
		}
		isolated = append(isolated, g.Interface)
		chains = append(chains, c.pod(g, side, d))
	}
	t.grow(t.entry, attachment.GuardedPrefix, slices.Compact(isolated)) // the model's pods are sorted
	t.chains[len(t.chains)-1].Rules = slices.Insert(t.chains[len(t.chains)-1].Rules, 0, rule.Rule{
		Matches: []rule.Match{rule.InSet{Name: rule.OpenSet(c.family, d), Dirs: t.dirs}}, Action: rule.Return{},
		Comment: "no policy isolates the pod for " + string(d),
	})
	return append(chains, t.chains...)
}

// tree finds an interface's chain in a number of steps that grows with the logarithm of the number of pods.
type tree struct {
	direction rule.Direction
	entry     string // POSTERN-FROM or POSTERN-TO
	dirs      string
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
