package verify

import (
	"maps"
	"strings"

	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// spoilers are the mistakes in the incremental way that walks must find.
func spoilers() []spoiler {
	now := func(d dice) bool { return d.chance(3) }
	return []spoiler{
		{name: "a patch forgets who leaves peer sets", patch: func(_ dice, p *rule.Patch) { clear(p.Leave) }},
		{name: "a patch forgets one who joins", patch: func(_ dice, p *rule.Patch) {
			for name, entries := range p.Join {
				p.Join[name] = entries[:max(len(entries)-1, 0)]
			}
		}},
		{name: "a patch is lost in one family", patch: func(d dice, p *rule.Patch) {
			if p.Family == rule.IPv6 && now(d) {
				*p = *rule.NewPatch(p.Family)
			}
		}},
		{name: "a set that nobody uses stays", patch: func(_ dice, p *rule.Patch) {
			maps.DeleteFunc(p.Sets, func(_ string, s *rule.Set) bool { return s == nil })
		}},
		{name: "a new set is empty", patch: func(_ dice, p *rule.Patch) {
			for name, s := range p.Sets {
				if s != nil {
					empty := *s
					empty.Entries = nil
					p.Sets[name] = &empty
				}
			}
		}},
		{name: "the chain of a pod that is not isolated any more stays", patch: func(_ dice, p *rule.Patch) {
			maps.DeleteFunc(p.Chains[rule.Mangle], func(name string, r []rule.Rule) bool {
				return r == nil && strings.HasPrefix(name, "PST-")
			})
		}},
		{name: "a branch of the tree stays", patch: func(_ dice, p *rule.Patch) {
			maps.DeleteFunc(p.Chains[rule.Mangle], func(name string, r []rule.Rule) bool {
				return r == nil && strings.HasPrefix(name, "POSTERN-")
			})
		}},
		{name: "the tree is not grown anew", patch: func(_ dice, p *rule.Patch) {
			maps.DeleteFunc(p.Chains[rule.Mangle], func(name string, _ []rule.Rule) bool { return strings.HasPrefix(name, "POSTERN-") })
		}},
		{name: "a policy's change is passed over", changes: func(d dice, c *policy.Changes) {
			if now(d) {
				c.Policies = nil
			}
		}},
		{name: "a namespace's change is passed over", changes: func(d dice, c *policy.Changes) {
			if now(d) {
				c.Namespaces = nil
			}
		}},
		{name: "that a pod has gone is passed over", changes: func(_ dice, c *policy.Changes) {
			c.Pods = maps.Clone(c.Pods)
			for key, p := range c.Pods {
				if p == nil {
					delete(c.Pods, key)
				}
			}
		}},
		{name: "records are passed over", changes: func(d dice, c *policy.Changes) {
			if now(d) {
				c.Locals = nil
			}
		}},
	}
}

// search takes walks until one ends otherwise than it should.
func (b *spoiler) search(o options) (string, bool) {
	taken := 0
	for n := range uint64(o.patchWalks()) {
		more, text := patched(walk(throw(o.seed, n, forSteps), stepsOfAWalk), b)
		if taken += more; text != "" {
			return "found after " + plural(taken, "step"), true
		}
	}
	return notFound + " in " + plural(taken, "step"), false
}
