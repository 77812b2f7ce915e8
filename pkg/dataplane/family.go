package dataplane

import (
	"fmt"
	"slices"

	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// family is one family's part of a Plane. What the kernel holds is not kept a second time: it is what is wanted, but for what is
// still to do.
type family struct {
	tables *iptables.Tables
	// What is wanted.
	chains map[rule.Table]map[string][]rule.Rule
	sets   map[string]*set
	hooks  []rule.Hook

	read bool                    // the kernel was read since it was last in doubt
	held map[string]rule.SetType // the kernel's sets of ours
	// misfits are the entries of those that stand under a wanted name with another type.
	misfits map[string][]rule.Entry
	todo    *todo
	// tails are the rules that chains lack at their ends, where they lack nothing else. They are noted where what was read is
	// written at once; nil elsewhere, for by then somebody may have changed the chain.
	tails map[rule.Table]map[string][]rule.Rule
}

// set is a wanted one; its Entries are in has.
type set struct {
	rule.Set
	has entries
}

// saysWhoIsHere reports whether a set has any of this node's pods.
func (s *set) saysWhoIsHere() bool { return s.Role != rule.Peers && s.has.len() > 0 }

// due are all entries, as something to do.
func (s *set) due() map[rule.Entry]bool {
	due := make(map[rule.Entry]bool, s.has.len())
	for e := range s.has.all() {
		due[e] = true
	}
	return due
}

// todo is what the kernel may not hold as wanted: wanted or not, it is to be looked at by the next Apply.
type todo struct {
	chains  map[rule.Table]map[string]deed
	hooks   map[rule.Table][]iptables.ActualHook // those that are there, of tables where they are not as wanted
	sets    map[string]bool
	entries map[string]map[rule.Entry]bool
}

// deed is what is to be done to a chain: a new one made, or one that the kernel may hold rewritten or removed.
type deed string

const (
	create  deed = "create"
	rewrite deed = "rewrite"
)

func newTodo() *todo {
	return &todo{chains: map[rule.Table]map[string]deed{}, hooks: map[rule.Table][]iptables.ActualHook{},
		sets: map[string]bool{}, entries: map[string]map[rule.Entry]bool{}}
}

// empty reports that there is nothing to do, as far as can be told at once.
func (t *todo) empty() bool {
	for _, chains := range t.chains {
		if len(chains) > 0 {
			return false
		}
	}
	for _, entries := range t.entries {
		if len(entries) > 0 {
			return false
		}
	}
	return len(t.hooks)+len(t.sets) == 0
}

func (t *todo) chain(table rule.Table, name string, do deed) {
	if t.chains[table] == nil {
		t.chains[table] = map[string]deed{}
	}
	t.chains[table][name] = do
}

func (t *todo) entry(set string, e rule.Entry) {
	if t.entries[set] == nil {
		t.entries[set] = map[rule.Entry]bool{}
	}
	t.entries[set][e] = true
}

// take keeps what was to do in a table.
func (t *todo) take(from *todo, table rule.Table) {
	t.chains[table] = from.chains[table]
	if hooks, wrong := from.hooks[table]; wrong {
		t.hooks[table] = hooks
	}
}

func newFamily(t *iptables.Tables) *family {
	f := &family{tables: t}
	f.replace(&rule.State{})
	return f
}

func (f *family) replace(s *rule.State) {
	f.chains, f.sets, f.hooks = map[rule.Table]map[string][]rule.Rule{}, map[string]*set{}, s.Hooks
	for table, chains := range s.Chains {
		f.chains[table] = make(map[string][]rule.Rule, len(chains))
		for _, c := range chains {
			f.chains[table][c.Name] = c.Rules
		}
	}
	for _, s := range s.Sets {
		f.sets[s.Name] = newSet(s)
	}
	f.read, f.held, f.todo = false, map[string]rule.SetType{}, newTodo()
}

func newSet(s rule.Set) *set {
	is := &set{Set: s}
	for _, e := range s.Entries {
		is.has.put(e)
	}
	is.Entries = nil
	return is
}

func (f *family) change(c *rule.Patch) {
	for table, chains := range c.Chains {
		for name, rules := range chains {
			was, wanted := f.chains[table][name]
			switch {
			case rules == nil && !wanted, rules != nil && wanted && slices.EqualFunc(was, rules, sameRule):
				continue
			case rules == nil:
				delete(f.chains[table], name)
			default:
				f.chains[table][name] = rules
			}
			if do := f.todo.chains[table][name]; wanted && do != create || do == rewrite {
				f.todo.chain(table, name, rewrite)
			} else {
				f.todo.chain(table, name, create)
			}
		}
	}
	for name, s := range c.Sets {
		delete(f.todo.entries, name)
		delete(f.sets, name)
		f.todo.sets[name] = true
		if s == nil {
			continue
		}
		f.sets[name] = newSet(*s)
		if f.held[name] != "" {
			f.read = false // it was not needed for a while and is still there: nobody knows with what in it
		}
	}
	for name, entries := range c.Leave {
		f.entries(name, entries, func(s *set, e rule.Entry) { s.has.drop(e) })
	}
	for name, entries := range c.Join {
		f.entries(name, entries, func(s *set, e rule.Entry) { s.has.put(e) })
	}
}

func (f *family) entries(name string, entries []rule.Entry, do func(*set, rule.Entry)) {
	s := f.sets[name]
	for _, e := range entries {
		was := s.has.holds(e)
		if do(s, e); s.has.holds(e) != was {
			f.todo.entry(name, e)
		}
	}
}

func sameRule(a, b rule.Rule) bool {
	return a.Action == b.Action && a.Comment == b.Comment && slices.Equal(a.Matches, b.Matches)
}

// compareTable notes what a table does not hold as wanted, and says what of it was not known to differ.
func (f *family) compareTable(table rule.Table, is *iptables.Actual, known *todo) (found []Difference) {
	differs := func(name, how string, do deed) {
		f.todo.chain(table, name, do)
		if known.chains[table][name] == "" {
			found = append(found, Difference{What: fmt.Sprintf("%s: chain %s of table %s %s", f.tables.Family, name, table, how)})
		}
	}
	for name, rules := range f.chains[table] {
		got, there := is.Chains[name]
		switch {
		case !there:
			differs(name, "is gone", create)
		case !slices.EqualFunc(rules, got, iptables.Equal):
			differs(name, "has other rules", rewrite)
			if n := len(got); f.tails != nil && n < len(rules) && slices.EqualFunc(rules[:n], got, iptables.Equal) {
				if f.tails[table] == nil {
					f.tails[table] = map[string][]rule.Rule{}
				}
				f.tails[table][name] = rules[n:]
			}
		}
	}
	for name := range is.Chains {
		if _, wanted := f.chains[table][name]; !wanted {
			differs(name, "is not one that postern has written", rewrite)
		}
	}
	if f.hooked(table, is.Hooks) {
		return found
	}
	f.todo.hooks[table] = is.Hooks
	if _, before := known.hooks[table]; !before {
		found = append(found, Difference{
			What: fmt.Sprintf("%s: the rules that lead into our chains of table %s have changed or moved", f.tables.Family, table)})
	}
	return found
}

func (f *family) hooksOf(table rule.Table) (hooks []rule.Hook) {
	for _, h := range f.hooks {
		if h.Table == table {
			hooks = append(hooks, h)
		}
	}
	return hooks
}

// hooked reports whether each wanted hook of a table is there once and in its place.
func (f *family) hooked(table rule.Table, actual []iptables.ActualHook) bool {
	want := f.hooksOf(table)
	right := len(want) == len(actual)
	for _, h := range want {
		right = right && slices.ContainsFunc(actual, func(a iptables.ActualHook) bool {
			return a.Chain == h.Chain && iptables.Equal(a.Rule, h.Rule) && (h.Last || a.First)
		})
	}
	return right
}

// compareSets does for sets what compareTable does for a table.
func (f *family) compareSets(list []rule.Set, known *todo) (found []Difference) {
	f.held, f.misfits = map[string]rule.SetType{}, map[string][]rule.Entry{}
	differs := func(name, how string) {
		if !known.sets[name] {
			found = append(found, Difference{What: fmt.Sprintf("%s: set %s %s", f.tables.Family, name, how)})
		}
	}
	for _, is := range list {
		if is.Family != f.tables.Family {
			continue
		}
		f.held[is.Name] = is.Type
		want := f.sets[is.Name]
		if want == nil || want.Type != is.Type {
			f.todo.sets[is.Name], f.misfits[is.Name] = true, is.Entries
			differs(is.Name, "is not one that postern has made")
			continue
		}
		missing, foreign := want.compare(is.Entries)
		unknown := 0
		for _, e := range slices.Concat(missing, foreign) {
			f.todo.entry(is.Name, e)
			if !known.entries[is.Name][e] {
				unknown++
			}
		}
		if unknown == 0 {
			continue
		}
		d := Difference{What: fmt.Sprintf("%s: set %s lacks %d entries and has %d foreign ones", f.tables.Family, is.Name, len(missing),
			len(foreign))}
		if len(foreign) == 0 {
			d.Set, d.Missing = is.Name, missing
		}
		found = append(found, d)
	}
	for _, name := range sortedKeys(f.sets) {
		if f.held[name] == "" {
			f.todo.sets[name] = true
			differs(name, "is gone")
		}
	}
	return found
}

func (s *set) compare(list []rule.Entry) (missing, foreign []rule.Entry) {
	for _, e := range list {
		if !s.has.holds(e) {
			foreign = append(foreign, e)
		}
	}
	if len(list)-len(foreign) == s.has.len() { // the kernel has each once
		slices.SortFunc(foreign, rule.Entry.Compare)
		return nil, foreign
	}
	var there entries
	for _, e := range list {
		there.put(e)
	}
	for e := range s.has.all() {
		if !there.holds(e) {
			missing = append(missing, e)
		}
	}
	slices.SortFunc(missing, rule.Entry.Compare)
	return missing, foreign
}
