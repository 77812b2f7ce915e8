package dataplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// work is one Apply of one family.
type work struct {
	ctx    context.Context
	plane  *Plane
	f      *family
	result *Result
	// interim are chains of table mangle with other rules than the wanted ones, until open sets are complete.
	interim map[string][]rule.Rule
	// instead are sets that stand in, until the end, for those whose names are taken.
	instead map[string]string
	// nobody is ready, so nothing passes, whatever is in the other sets.
	nobody bool
	// late are new sets of peers that are filled while the rules are written.
	late []*set
}

func newWork(ctx context.Context, p *Plane, f *family, r *Result) *work {
	return &work{ctx: ctx, plane: p, f: f, result: r, interim: map[string][]rule.Rule{},
		instead: map[string]string{}}
}

// read finds out what the kernel holds, unless that is known. List returns the sets.
func (w *work) read(list func() ([]rule.Set, error)) error {
	if w.f.read {
		return nil
	}
	_, err := w.plane.readFamily(w.ctx, w.f, nil, list)
	w.result.Reread = w.result.Reread || err == nil
	return err
}

// untilRules does everything up to the rules and what joins open and peer sets.
func (w *work) untilRules() error {
	if w.f.todo.empty() {
		return nil
	}
	if err := w.standIn(); err != nil {
		return err
	}
	w.nobody = w.nobodyReady()
	if err := w.eachSet(w.prepare); err != nil {
		return err
	}
	w.bridge()
	filled := w.fillLate()
	if err := errors.Join(w.writeRules(), <-filled); err != nil {
		return err
	}
	if err := w.eachSet(w.leave, rule.Open); err != nil { // their chains stand by now
		return err
	}
	return w.eachSet(w.join, rule.Peers, rule.Open)
}

// fromReady lets pods become ready and clears away what nobody uses.
func (w *work) fromReady() error {
	if w.f.todo.empty() {
		return nil
	}
	if err := w.eachSet(w.join, rule.Ready); err != nil {
		return err
	}
	if err := w.finishChains(); err != nil {
		return err
	}
	if err := w.eachSet(w.leave, rule.Local); err != nil {
		return err
	}
	if err := w.standDown(); err != nil {
		return err
	}
	return w.dropSets()
}

// eachSet calls do for the wanted sets with something to do, of these roles or of all.
func (w *work) eachSet(do func(*set) error, roles ...rule.Role) error {
	names := maps.Clone(w.f.todo.sets)
	for name, entries := range w.f.todo.entries {
		if len(entries) == 0 {
			delete(w.f.todo.entries, name)
			continue
		}
		names[name] = true
	}
	for _, name := range sortedKeys(names) {
		s := w.f.sets[name]
		if s == nil || len(roles) > 0 && !slices.Contains(roles, s.Role) {
			continue
		}
		if err := do(s); err != nil {
			return err
		}
	}
	return nil
}

// nobodyReady reports that ready sets are wanted, and that the kernel has none.
func (w *work) nobodyReady() bool {
	wanted := false
	for name, s := range w.f.sets {
		if s.Role == rule.Ready {
			wanted = true
			if w.f.held[name] != "" {
				return false
			}
		}
	}
	return wanted
}

// prepare creates a set that is missing, filled unless it is a ready set, and takes out of an existing ready or peer set what
// leaves.
func (w *work) prepare(s *set) error {
	if w.instead[s.Name] != "" {
		return nil
	}
	if w.f.held[s.Name] == "" {
		if err := w.create(s.Set, s.Name, s.has.len()); err != nil {
			return err
		}
		w.f.held[s.Name] = s.Type
		if s.Role == rule.Peers && w.nobody {
			w.late = append(w.late, s)
			w.filled(s)
			return nil
		}
		if s.Role != rule.Ready {
			return w.fill(s)
		}
		w.f.todo.entries[s.Name] = s.due()
	}
	delete(w.f.todo.sets, s.Name)
	if s.Role == rule.Local {
		return w.join(s)
	}
	if s.Role == rule.Open {
		return nil // as it was, until the chains stand that its members are led to
	}
	return w.leave(s)
}

func (w *work) create(s rule.Set, name string, room int) error {
	if err := w.plane.fail("set"); err != nil {
		return err
	}
	s.Name = name
	return w.plane.sets.Create(s, room)
}

// fill puts everything into a set that has just been created. Without the list of what is to be done that other sets have: peers
// can be tens of thousands.
func (w *work) fill(s *set) error {
	err := w.plane.fail("join")
	if err == nil {
		err = w.addAll(s)
	}
	if err == nil {
		w.filled(s)
	}
	return err
}

func (w *work) addAll(s *set) error {
	entries := slices.Collect(s.has.all())
	if len(entries) == 0 {
		return nil
	}
	return w.plane.sets.Add(s.Name, entries...)
}

// filled notes that a set has its entries, or will have: a failure has the family read again.
func (w *work) filled(s *set) {
	delete(w.f.todo.sets, s.Name)
	delete(w.f.todo.entries, s.Name)
}

// fillLate fills the late sets on the side: with a large cluster that takes as long as the rules, which another process writes.
// The socket has its network namespace; a process gets that of the thread that starts it, which is the caller's.
func (w *work) fillLate() <-chan error {
	done := make(chan error, 1)
	if len(w.late) == 0 {
		done <- nil
		return done
	}
	if err := w.plane.fail("join"); err != nil {
		done <- err
		return done
	}
	go func() {
		var err error
		for _, s := range w.late {
			if err = w.addAll(s); err != nil {
				break
			}
		}
		done <- err
	}()
	return done
}

// join adds what is wanted and may not be there. A set without room for it is replaced by a larger one at once.
func (w *work) join(s *set) error {
	entries := w.due(s, true)
	if len(entries) == 0 {
		return nil
	}
	err := w.plane.fail("join")
	if err == nil {
		err = w.plane.sets.Add(w.nameOf(s), entries...)
	}
	if errors.Is(err, ipset.ErrFull) && w.instead[s.Name] == "" {
		return w.grow(s)
	}
	return w.done(s, entries, err)
}

// due are the entries of a set that are to be put in, or taken out.
func (w *work) due(s *set, in bool) (entries []rule.Entry) {
	for e := range w.f.todo.entries[s.Name] {
		if s.has.holds(e) == in {
			entries = append(entries, e)
		}
	}
	return entries
}

func (w *work) done(s *set, entries []rule.Entry, err error) error {
	if err != nil {
		return err
	}
	for _, e := range entries {
		delete(w.f.todo.entries[s.Name], e)
	}
	return nil
}

// growing, after the prefix, begins the name of the set that is about to take another one's place.
const growing = "growing-"

func (w *work) grow(s *set) error {
	name := w.plane.scope.SetPrefix + growing + string("0123456789"[w.f.tables.Family])
	if err := w.plane.sets.Destroy(name); err != nil {
		return err
	}
	if err := w.create(s.Set, name, s.has.len()); err != nil {
		return err
	}
	entries := slices.Collect(s.has.all())
	err := w.plane.sets.Add(name, entries...)
	if err == nil {
		err = w.plane.sets.Swap(name, s.Name)
	}
	if err := errors.Join(err, w.plane.sets.Destroy(name)); err != nil {
		return err
	}
	delete(w.f.todo.entries, s.Name)
	return nil
}

// leave takes out what may be there and is not wanted.
func (w *work) leave(s *set) error {
	entries := w.due(s, false)
	if len(entries) == 0 || w.instead[s.Name] != "" { // who stands in has only what is wanted
		return nil
	}
	if s.Role == rule.Peers || s.Role == rule.Open {
		lost := func(e rule.Entry) bool { return !e.Prefix.IsSingleIP() || !w.plane.Idle[e.Prefix.Addr()] }
		w.result.Tightened = w.result.Tightened || slices.ContainsFunc(entries, lost)
	}
	err := w.plane.fail("leave")
	if err == nil {
		err = w.plane.sets.Del(s.Name, entries...)
	}
	return w.done(s, entries, err)
}

// standing, after the prefix, begins the names of sets that stand in for others.
const standing = "instead-"

// standIn makes room for sets whose names are taken by ones of another type: an older layout of ours. Such a set can be neither
// swapped nor, as long as rules look into it, removed. So other sets stand in for the wanted ones: everything goes its way with
// their names in the rules, and in the end standDown removes the old sets, makes the wanted ones, and writes the rules once more.
//
// What stands in for peers has all of them, as a new set has. What stands in for a ready or an open set begins with those that
// the old set had, and the others join when it is time.
func (w *work) standIn() error {
	for _, name := range sortedKeys(w.f.todo.sets) {
		s, held := w.f.sets[name], w.f.held[name]
		if s == nil || held == "" || held == s.Type {
			continue
		}
		copied := ""
		for n := 0; copied == "" || w.f.held[copied] != ""; n++ { // one that was left by a process killed here is in use
			copied = fmt.Sprintf("%s%s%d-%d", w.plane.scope.SetPrefix, standing, w.f.tables.Family, n)
		}
		if err := w.create(s.Set, copied, s.has.len()); err != nil {
			return err
		}
		w.f.held[copied], w.f.todo.sets[copied] = s.Type, true // it goes in the end
		w.instead[name] = copied
		w.f.todo.entries[name] = s.due()
		if s.Role == rule.Ready || s.Role == rule.Open {
			maps.DeleteFunc(w.f.todo.entries[name], func(e rule.Entry, _ bool) bool { return !former(w.f.misfits[name], e) })
		}
		first := w.due(s, true)
		if err := w.plane.sets.Add(copied, first...); err != nil {
			return err
		}
		w.f.todo.entries[name] = s.due()
		if err := w.done(s, first, nil); err != nil {
			return err
		}
	}
	if len(w.instead) == 0 {
		return nil
	}
	for _, table := range w.plane.scope.Tables {
		for name := range w.f.chains[table] {
			w.f.todo.chain(table, name, rewrite)
		}
	}
	return nil
}

// former reports whether a set of another type had an entry, as far as it can tell.
func former(entries []rule.Entry, e rule.Entry) bool {
	return slices.ContainsFunc(entries, func(f rule.Entry) bool {
		return f.Prefix == e.Prefix && (f.Iface == "" || f.Iface == e.Iface)
	})
}

// nameOf is where a set's entries go.
func (w *work) nameOf(s *set) string { return cmp.Or(w.instead[s.Name], s.Name) }

// standDown puts the wanted sets into the places of those that stood in for them.
func (w *work) standDown() error {
	if len(w.instead) == 0 {
		return nil
	}
	for _, name := range sortedKeys(w.instead) {
		s := w.f.sets[name]
		if err := w.plane.sets.Destroy(name); err != nil {
			return err
		}
		delete(w.f.held, name)
		if err := w.create(s.Set, name, s.has.len()); err != nil {
			return err
		}
		w.f.held[name] = s.Type
		if err := w.plane.sets.Add(name, slices.Collect(s.has.all())...); err != nil {
			return err
		}
		delete(w.f.todo.sets, name)
	}
	clear(w.instead)
	clear(w.interim)
	return w.writeRules()
}

// closed are the rules of a chain whose own cannot be written. Table nat, where a drop is refused, does not filter.
func closed(table rule.Table, why string) []rule.Rule {
	if table == rule.NAT {
		return []rule.Rule{{Action: rule.Return{}, Comment: "empty " + why}}
	}
	return []rule.Rule{{Action: rule.Drop{}, Comment: "closed " + why}}
}

// writeRules writes the chains that differ and puts the hooks into place, all tables in one restore. A chain that iptables does
// not take is closed and tried again later; it stops no other.
func (w *work) writeRules() error {
	refused := map[string]bool{}
	for {
		changes := w.ruleChanges(refused)
		// Also a restore that is said to have failed may have closed something.
		replaces := func(c iptables.Change) bool { return len(c.Replace) > 0 }
		w.result.Tightened = w.result.Tightened || slices.ContainsFunc(changes, replaces)
		err := w.restore(changes...)
		if err == nil {
			w.noteWritten(changes, refused)
			return nil
		}
		chain := w.culprit(err, changes, refused)
		if chain == "" {
			return err
		}
		refused[chain] = true
		w.result.Refused = append(w.result.Refused,
			fmt.Errorf("%s: chain %s is closed, for its rules were refused: %w", w.f.tables.Family, chain, err))
	}
}

// culprit finds the chain that a restore was refused for: iptables names a line of it, or, where the kernel refuses the whole
// commit, it is searched for by closing half of those that it may be. Empty if it is no chain's fault.
func (w *work) culprit(err error, changes []iptables.Change, refused map[string]bool) string {
	if !errors.Is(err, iptables.ErrRefused) {
		return ""
	}
	var suspects []string
	for _, c := range changes {
		for _, chain := range c.Replace {
			if !refused[chain.Name] {
				suspects = append(suspects, chain.Name)
			}
		}
	}
	if chain := blamed(err); chain != "" {
		if slices.Contains(suspects, chain) {
			return chain
		}
		return ""
	}
	works := func(without []string) bool {
		all := maps.Clone(refused)
		for _, name := range without {
			all[name] = true
		}
		return w.restore(w.ruleChanges(all)...) == nil
	}
	if !works(suspects) {
		return ""
	}
	for len(suspects) > 1 {
		half := suspects[:len(suspects)/2]
		if works(half) {
			suspects = half
		} else {
			suspects = suspects[len(half):]
		}
	}
	return suspects[0]
}

func (w *work) ruleChanges(refused map[string]bool) (changes []iptables.Change) {
	for _, table := range w.plane.scope.Tables {
		c := iptables.Change{Table: table}
		for _, name := range sortedKeys(w.f.todo.chains[table]) {
			if tail := w.f.tails[table][name]; tail != nil {
				c.Append = append(c.Append, rule.Chain{Name: name, Rules: tail})
				continue
			}
			if rules, wanted := w.rulesNow(table, name); wanted {
				if refused[name] {
					rules = closed(table, "because iptables refused its rules")
				}
				c.Replace = append(c.Replace, rule.Chain{Name: name, Rules: rules})
			}
		}
		if there, wrong := w.f.todo.hooks[table]; wrong {
			for _, a := range there {
				c.Unhook = append(c.Unhook, rule.Hook{Table: table, Chain: a.Chain, Rule: a.Rule})
			}
			c.Hook = w.f.hooksOf(table)
		}
		changes = append(changes, c)
	}
	return changes
}

// rulesNow are the rules that a chain is to have in the meantime, or, mostly, the wanted ones.
func (w *work) rulesNow(table rule.Table, name string) ([]rule.Rule, bool) {
	rules, wanted := w.f.chains[table][name]
	if interim, bridge := w.interim[name]; bridge && table == rule.Mangle {
		rules, wanted = interim, true
	}
	return w.substituted(rules), wanted
}

// substituted has rules look into the sets that stand in for others.
func (w *work) substituted(rules []rule.Rule) []rule.Rule {
	if len(w.instead) == 0 {
		return rules
	}
	rules = slices.Clone(rules)
	for i := range rules {
		rules[i].Matches = slices.Clone(rules[i].Matches)
		for j, m := range rules[i].Matches {
			if in, is := m.(rule.InSet); is && w.instead[in.Name] != "" {
				in.Name = w.instead[in.Name]
				rules[i].Matches[j] = in
			}
		}
	}
	return rules
}

func (w *work) noteWritten(changes []iptables.Change, refused map[string]bool) {
	for _, c := range changes {
		for _, chain := range c.Replace {
			_, interim := w.interim[chain.Name]
			if !interim && !refused[chain.Name] && len(w.instead) == 0 {
				delete(w.f.todo.chains[c.Table], chain.Name)
			}
		}
		delete(w.f.todo.hooks, c.Table)
	}
}

// bridge has those who are about to join open sets led to the chains that they still have, or between the rules and the sets they
// would be neither here nor there; and those who are about to leave led to theirs at once, where other pods' rules change too.
func (w *work) bridge() {
	if w.plane.Bridge == nil {
		return
	}
	chains, todo := w.f.chains[rule.Mangle], w.f.todo.chains[rule.Mangle]
	still := func(name string) bool {
		_, wanted := chains[name]
		return !wanted && todo[name] == rewrite
	}
	wanted := func(yield func(string, bool) bool) {
		for name := range chains {
			if !yield(name, todo[name] == rewrite) {
				return
			}
		}
	}
	for name, entries := range w.f.todo.entries {
		s := w.f.sets[name]
		if s == nil || s.Role != rule.Open {
			continue
		}
		var joining, leaving []string
		for e := range entries {
			if s.has.holds(e) {
				joining = append(joining, e.Iface)
			} else {
				leaving = append(leaving, e.Iface)
			}
		}
		for _, chain := range w.plane.Bridge(w.f.tables.Family, name, joining, leaving, wanted, still) {
			w.interim[chain.Name] = chain.Rules
			w.f.todo.chain(rule.Mangle, chain.Name, rewrite)
		}
	}
}

// blamed is the chain whose line a restore was refused for.
func blamed(err error) string {
	var line *iptables.LineError
	if !errors.As(err, &line) {
		return ""
	}
	words := strings.Fields(line.Text)
	if len(words) < 2 || words[0] != "-A" {
		return ""
	}
	return words[1]
}

// finishChains removes the chains of ours that are not wanted, and gives those their rules that had others in the meantime.
func (w *work) finishChains() error {
	var changes []iptables.Change
	for _, table := range w.plane.scope.Tables {
		c := iptables.Change{Table: table}
		for _, name := range sortedKeys(w.f.todo.chains[table]) {
			rules, wanted := w.f.chains[table][name]
			switch {
			case !wanted:
				c.Delete = append(c.Delete, name)
			case w.interim[name] != nil:
				c.Replace = append(c.Replace, rule.Chain{Name: name, Rules: w.substituted(rules)})
			}
		}
		changes = append(changes, c)
	}
	if err := w.restore(changes...); err != nil {
		return err
	}
	for _, c := range changes {
		for _, chain := range c.Replace {
			if len(w.instead) == 0 {
				delete(w.f.todo.chains[c.Table], chain.Name)
			}
		}
		for _, name := range c.Delete {
			delete(w.f.todo.chains[c.Table], name)
		}
	}
	return nil
}

func (w *work) dropSets() error {
	for _, name := range sortedKeys(w.f.todo.sets) {
		if w.f.sets[name] != nil {
			continue
		}
		if w.f.held[name] != "" {
			if err := w.plane.fail("destroy"); err != nil {
				return err
			}
			if err := w.plane.sets.Destroy(name); err != nil {
				return err
			}
		}
		delete(w.f.held, name)
		delete(w.f.todo.sets, name)
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
	if err := w.plane.fail("restore"); err != nil {
		return err
	}
	return w.f.tables.Restore(w.ctx, text)
}
