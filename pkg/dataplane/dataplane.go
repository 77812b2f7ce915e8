package dataplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// tables are those that postern writes to, in the order of a restore: what closes comes first.
var tables = []rule.Table{rule.Raw, rule.Mangle, rule.Filter, rule.NAT}

// Scope says which of our chains a Plane owns. Chains of another scope are neither read nor written nor removed.
type Scope struct {
	Tables []rule.Table
	Owns   func(chain string) bool
	// Sets is false for a scope whose rules use none.
	Sets bool
}

// Plane is one scope of the kernel's state in the network namespace in which it was opened. It is not safe for concurrent
// use.
type Plane struct {
	backend iptables.Backend
	scope   Scope
	family  map[rule.Family]*family
}

// family is what a Plane believes the kernel holds of one family.
type family struct {
	tables *iptables.Tables
	known  bool // false: read before the next write
	actual map[rule.Table]*iptables.Actual
	sets   map[string]*set
}

type set struct {
	rule.Set
	has map[rule.Entry]bool
}

// Open finds the backend's programs. Nothing is read or written yet.
func Open(backend iptables.Backend, scope Scope) (*Plane, error) {
	p := &Plane{backend: backend, scope: scope, family: map[rule.Family]*family{}}
	for _, f := range rule.Families {
		t, err := iptables.New(backend, f)
		if err != nil {
			return nil, err
		}
		p.family[f] = &family{tables: t}
	}
	return p, nil
}

// Result counts what an Apply did.
type Result struct {
	Restores    int // iptables-restore processes
	Chains      int // chains written or removed
	SetMessages int // netlink messages that changed a set
	// Tightened says that something may be denied now which was allowed before: a chain was written, a peer left a set.
	Tightened bool
}

// Wrote reports whether anything was written.
func (r Result) Wrote() bool { return r.Restores+r.SetMessages > 0 }

// Apply brings the kernel to these states, one for each family. judge, which may be nil, is called between the rules and the
// ready sets, once, after the rules of every family that could be written, with what was done so far; if it fails, no pod
// becomes ready. The error joins what went wrong in each family; the same call again goes on where this one stopped.
func (p *Plane) Apply(ctx context.Context, want []*rule.State, judge func(Result) error) (Result, error) {
	var result Result
	sets, err := ipset.Open()
	if err != nil {
		return result, err
	}
	defer sets.Close()
	var works []*work
	var errs []error
	for _, state := range want {
		w := &work{ctx: ctx, plane: p, f: p.family[state.Family], sets: sets, want: state, result: &result}
		if err := w.untilRules(); err != nil {
			w.f.known = false
			errs = append(errs, fmt.Errorf("%s: %w", state.Family, err))
			continue
		}
		works = append(works, w)
	}
	if judge != nil {
		if err := judge(result); err != nil {
			return result, errors.Join(append(errs, err)...)
		}
	}
	for _, w := range works {
		if err := w.fromReady(); err != nil {
			w.f.known = false
			errs = append(errs, fmt.Errorf("%s: %w", w.want.Family, err))
		}
	}
	return result, errors.Join(errs...)
}

// Inherit makes the programs that are run keep a file open: a lock that must not be free before they have ended; nil for none.
func (p *Plane) Inherit(lock *os.File) {
	for _, f := range p.family {
		f.tables.Inherit = nil
		if lock != nil {
			f.tables.Inherit = []*os.File{lock}
		}
	}
}

// Holds reports whether the kernel's set had an entry when it was last read or written.
func (p *Plane) Holds(f rule.Family, set string, e rule.Entry) bool {
	s := p.family[f].sets[set]
	return s != nil && s.has[e]
}

// Doubt makes the next Apply write an entry that it wants, whatever it believes the kernel holds: somebody else may have taken
// it out.
func (p *Plane) Doubt(f rule.Family, set string, e rule.Entry) {
	if s := p.family[f].sets[set]; s != nil {
		delete(s.has, e)
	}
}

// Difference is one that [Plane.Refresh] found.
type Difference struct {
	What string // in words
	// Set and Missing are filled where a set lacks entries and nothing else about it differs: somebody may have taken them out
	// lawfully.
	Set     string
	Missing []rule.Entry
}

// Refresh reads the kernel and returns what differs from what this Plane has written; the next Apply repairs it.
func (p *Plane) Refresh(ctx context.Context) (found []Difference, err error) {
	var errs []error
	for _, v := range rule.Families {
		f := p.family[v]
		before, beforeSets, known := f.actual, f.sets, f.known
		if err := p.read(ctx, f); err != nil {
			errs = append(errs, err)
			continue
		}
		if known {
			found = append(found, differences(v, before, f.actual, beforeSets, f.sets)...)
		}
	}
	return found, errors.Join(errs...)
}

// read fills in what the kernel holds of a family.
func (p *Plane) read(ctx context.Context, f *family) error {
	f.known = false
	actual := map[rule.Table]*iptables.Actual{}
	for _, table := range p.scope.Tables {
		a, err := f.tables.Save(ctx, table)
		if err != nil {
			return err
		}
		actual[table] = p.scope.within(a)
	}
	held := map[string]*set{}
	if p.scope.Sets {
		sets, err := ipset.Open()
		if err != nil {
			return err
		}
		defer sets.Close()
		list, err := sets.List(rule.SetPrefix)
		if err != nil {
			return err
		}
		for _, s := range list {
			if s.Family != f.tables.Family {
				continue
			}
			held[s.Name] = &set{Set: s, has: entrySet(s.Entries)}
		}
	}
	f.actual, f.sets, f.known = actual, held, true
	return nil
}

func (s Scope) within(a *iptables.Actual) *iptables.Actual {
	out := &iptables.Actual{Chains: map[string][]rule.Rule{}}
	for name, rules := range a.Chains {
		if s.Owns(name) {
			out.Chains[name] = rules
		}
	}
	for _, h := range a.Hooks {
		if s.Owns(leadsTo(h.Rule)) {
			out.Hooks = append(out.Hooks, h)
		}
	}
	return out
}

// leadsTo is the chain that a hook jumps to.
func leadsTo(r rule.Rule) string {
	switch a := r.Action.(type) {
	case rule.Jump:
		return a.Chain
	case rule.Goto:
		return a.Chain
	case iptables.Foreign:
		words := strings.Fields(a.Line)
		for i, w := range words[:len(words)-1] {
			if w == "-j" || w == "-g" {
				return words[i+1]
			}
		}
	}
	return ""
}

func entrySet(list []rule.Entry) map[rule.Entry]bool {
	has := make(map[rule.Entry]bool, len(list))
	for _, e := range list {
		has[e] = true
	}
	return has
}

// differences tells where two readings of the kernel differ.
func differences(
	v rule.Family, before, after map[rule.Table]*iptables.Actual, setsBefore, setsAfter map[string]*set,
) (found []Difference) {
	note := func(format string, args ...any) {
		found = append(found, Difference{What: v.String() + ": " + fmt.Sprintf(format, args...)})
	}
	for table, was := range before {
		is := after[table]
		for name, rules := range was.Chains {
			got, there := is.Chains[name]
			switch {
			case !there:
				note("chain %s of table %s is gone", name, table)
			case !slices.EqualFunc(rules, got, iptables.Equal):
				note("chain %s of table %s has other rules", name, table)
			}
		}
		if !slices.EqualFunc(was.Hooks, is.Hooks, sameHook) {
			note("the rules that lead into our chains of table %s have changed or moved", table)
		}
	}
	for name, was := range setsBefore {
		is := setsAfter[name]
		if is == nil {
			note("set %s is gone", name)
			continue
		}
		missing, foreign := without(was.has, is.has), without(is.has, was.has)
		if len(missing)+len(foreign) == 0 {
			continue
		}
		note("set %s lacks %d entries and has %d foreign ones", name, len(missing), len(foreign))
		if len(foreign) == 0 {
			found[len(found)-1].Set, found[len(found)-1].Missing = name, missing
		}
	}
	slices.SortFunc(found, func(a, b Difference) int { return strings.Compare(a.What, b.What) })
	return found
}

// without lists what the one has and the other has not.
func without(has, other map[rule.Entry]bool) []rule.Entry {
	var list []rule.Entry
	for e := range has {
		if !other[e] {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, rule.Entry.Compare)
	return list
}

func sameHook(a, b iptables.ActualHook) bool {
	return a.Chain == b.Chain && a.First == b.First && iptables.Equal(a.Rule, b.Rule)
}

func sorted(has map[rule.Entry]bool) []rule.Entry {
	list := make([]rule.Entry, 0, len(has))
	for e := range has {
		list = append(list, e)
	}
	slices.SortFunc(list, rule.Entry.Compare)
	return list
}

// HostPorts is the scope of hostPort's rules, which the plugin writes too.
var HostPorts = Scope{
	Tables: []rule.Table{rule.Raw, rule.NAT},
	Owns: func(chain string) bool {
		return chain == "POSTERN-HOSTPORT" || chain == "POSTERN-SNAT" || chain == "POSTERN-LOOPBACK"
	},
}

// Policies is the scope of everything else.
var Policies = Scope{
	Tables: []rule.Table{rule.Raw, rule.Mangle, rule.Filter},
	Owns:   func(chain string) bool { return iptables.Ours(chain) && !HostPorts.Owns(chain) },
	Sets:   true,
}

// WriteRules makes one family's chains and hooks of a scope what the state says, with at most one restore, whatever they were.
// The scope has no sets.
func WriteRules(ctx context.Context, t *iptables.Tables, scope Scope, want *rule.State) error {
	p := &Plane{scope: scope}
	w := &work{ctx: ctx, plane: p, f: &family{tables: t}, want: want, result: &Result{}}
	if err := p.read(ctx, w.f); err != nil {
		return err
	}
	return w.writeRules()
}
