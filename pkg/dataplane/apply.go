package dataplane

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// work is one Apply of one family.
type work struct {
	ctx    context.Context
	plane  *Plane
	f      *family
	sets   *ipset.Sets
	want   *rule.State
	result *Result
	left   int // entries taken out of sets
}

// untilRules does everything up to the rules and what joins open and peer sets.
func (w *work) untilRules() error {
	if !w.f.known {
		if err := w.plane.read(w.ctx, w.f); err != nil {
			return err
		}
	}
	if err := w.clearMisfits(); err != nil {
		return err
	}
	for _, s := range w.want.Sets {
		if err := w.prepare(s); err != nil {
			return err
		}
	}
	if err := w.writeRules(); err != nil {
		return err
	}
	for _, s := range w.want.Sets {
		if s.Role == rule.Peers || s.Role == rule.Open {
			if err := w.join(s); err != nil {
				return err
			}
		}
	}
	return nil
}

// fromReady lets pods become ready and clears away what nobody uses.
func (w *work) fromReady() error {
	for _, s := range w.want.Sets {
		if s.Role == rule.Ready {
			if err := w.join(s); err != nil {
				return err
			}
		}
	}
	if err := w.dropChains(); err != nil {
		return err
	}
	for _, s := range w.want.Sets {
		if s.Role == rule.Local {
			if err := w.leave(s); err != nil {
				return err
			}
		}
	}
	return w.dropSets()
}

// prepare creates a set that is missing, filled unless it is a ready set, and takes out of an existing one what leaves.
func (w *work) prepare(s rule.Set) error {
	if s.Role == rule.Peers || s.Role == rule.Open {
		defer func(before int) { w.result.Tightened = w.result.Tightened || w.left > before }(w.left)
	}
	if w.f.sets[s.Name] == nil {
		if err := w.create(s, s.Name); err != nil {
			return err
		}
		if s.Role == rule.Ready {
			return nil
		}
		return w.join(s)
	}
	if s.Role == rule.Local {
		return w.join(s)
	}
	return w.leave(s)
}

func (w *work) create(s rule.Set, name string) error {
	s.Name = name
	w.result.SetMessages++
	if err := w.sets.Create(s); err != nil {
		return err
	}
	w.f.sets[name] = &set{Set: s, has: map[rule.Entry]bool{}}
	return nil
}

// join adds what is wanted and not there. A set without room for it is replaced by a larger one at once.
func (w *work) join(s rule.Set) error {
	has := w.f.sets[s.Name].has
	for _, e := range s.Entries {
		if has[e] {
			continue
		}
		w.result.SetMessages++
		err := w.sets.Add(s.Name, e)
		if errors.Is(err, ipset.ErrFull) {
			return w.grow(s)
		}
		if err != nil {
			return err
		}
		has[e] = true
	}
	return nil
}

// growing is the name of the set that is about to take another one's place.
const growing = rule.SetPrefix + "growing-"

func (w *work) grow(s rule.Set) error {
	name := growing + string("0123456789"[w.want.Family])
	if err := w.sets.Destroy(name); err != nil {
		return err
	}
	if err := w.create(s, name); err != nil {
		return err
	}
	w.result.SetMessages += len(s.Entries) + 2
	if err := errors.Join(w.sets.Add(name, s.Entries...), w.sets.Swap(name, s.Name), w.sets.Destroy(name)); err != nil {
		return err
	}
	delete(w.f.sets, name)
	w.f.sets[s.Name].has = entrySet(s.Entries)
	return nil
}

// leave takes out what is there and not wanted.
func (w *work) leave(s rule.Set) error {
	has, want := w.f.sets[s.Name].has, entrySet(s.Entries)
	for _, e := range sorted(has) {
		if want[e] {
			continue
		}
		w.result.SetMessages++
		if err := w.sets.Del(s.Name, e); err != nil {
			return err
		}
		w.left++
		delete(has, e)
	}
	return nil
}

// clearMisfits removes sets that stand under a wanted name with another type: an older layout of ours. A set in use cannot be
// removed, so every chain of ours that leads to one is closed first; the rules that follow open what is allowed again.
func (w *work) clearMisfits() error {
	var misfits []string
	for _, s := range w.want.Sets {
		if is := w.f.sets[s.Name]; is != nil && is.Type != s.Type {
			misfits = append(misfits, s.Name)
		}
	}
	if len(misfits) == 0 {
		return nil
	}
	var changes []iptables.Change
	for table, a := range w.f.actual {
		c := iptables.Change{Table: table}
		for _, name := range slices.Sorted(maps.Keys(a.Chains)) {
			closed := []rule.Rule{{Action: rule.Drop{}, Comment: "closed while the layout of the sets changes"}}
			c.Replace = append(c.Replace, rule.Chain{Name: name, Rules: closed})
			a.Chains[name] = closed
		}
		changes = append(changes, c)
	}
	if err := w.restore(changes...); err != nil {
		return err
	}
	for _, name := range misfits {
		if err := w.sets.Destroy(name); err != nil {
			return err
		}
		delete(w.f.sets, name)
	}
	return nil
}

// writeRules writes the chains that differ and puts the hooks into place, all tables in one restore.
func (w *work) writeRules() error {
	var changes []iptables.Change
	for _, table := range w.plane.scope.Tables {
		actual := w.f.actual[table]
		c := iptables.Change{Table: table}
		for _, chain := range w.want.Chains[table] {
			rules, there := actual.Chains[chain.Name]
			if !there || !slices.EqualFunc(rules, chain.Rules, iptables.Equal) {
				c.Replace = append(c.Replace, chain)
			}
		}
		w.placeHooks(&c, actual.Hooks)
		changes = append(changes, c)
	}
	if err := w.restore(changes...); err != nil {
		return err
	}
	for _, c := range changes {
		actual := w.f.actual[c.Table]
		w.result.Tightened = w.result.Tightened || len(c.Replace) > 0
		for _, chain := range c.Replace {
			actual.Chains[chain.Name] = chain.Rules
		}
		if len(c.Hook)+len(c.Unhook) > 0 {
			// The place among foreign rules is the kernel's to say.
			a, err := w.f.tables.Save(w.ctx, c.Table)
			if err != nil {
				return err
			}
			actual.Hooks = w.plane.scope.within(a).Hooks
		}
	}
	return nil
}

// placeHooks leaves a table's hooks alone if each wanted one is there once and in its place, and else sets them all anew.
func (w *work) placeHooks(c *iptables.Change, actual []iptables.ActualHook) {
	var want []rule.Hook
	for _, h := range w.want.Hooks {
		if h.Table == c.Table {
			want = append(want, h)
		}
	}
	right := len(want) == len(actual)
	for _, h := range want {
		right = right && slices.ContainsFunc(actual, func(a iptables.ActualHook) bool {
			return a.Chain == h.Chain && iptables.Equal(a.Rule, h.Rule) && (h.Last || a.First)
		})
	}
	if right {
		return
	}
	for _, a := range actual {
		c.Unhook = append(c.Unhook, rule.Hook{Table: c.Table, Chain: a.Chain, Rule: a.Rule})
	}
	c.Hook = want
}

// dropChains removes the chains of ours that are not wanted; by now no rule leads to one.
func (w *work) dropChains() error {
	var changes []iptables.Change
	for _, table := range w.plane.scope.Tables {
		c := iptables.Change{Table: table}
		wanted := map[string]bool{}
		for _, chain := range w.want.Chains[table] {
			wanted[chain.Name] = true
		}
		for _, name := range slices.Sorted(maps.Keys(w.f.actual[table].Chains)) {
			if !wanted[name] {
				c.Delete = append(c.Delete, name)
			}
		}
		changes = append(changes, c)
	}
	if err := w.restore(changes...); err != nil {
		return err
	}
	for _, c := range changes {
		for _, name := range c.Delete {
			delete(w.f.actual[c.Table].Chains, name)
		}
	}
	return nil
}

func (w *work) dropSets() error {
	wanted := map[string]bool{}
	for _, s := range w.want.Sets {
		wanted[s.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(w.f.sets)) {
		if wanted[name] {
			continue
		}
		w.result.SetMessages++
		if err := w.sets.Destroy(name); err != nil {
			return err
		}
		delete(w.f.sets, name)
	}
	return nil
}

func (w *work) restore(changes ...iptables.Change) error {
	text := iptables.Render(changes...)
	if text == "" {
		return nil
	}
	w.result.Restores++
	for _, c := range changes {
		w.result.Chains += len(c.Replace) + len(c.Delete)
	}
	return w.f.tables.Restore(w.ctx, text)
}
