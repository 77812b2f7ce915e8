package dataplane

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

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
	// SetPrefix begins the names of the scope's sets and of no other scope's; empty for a scope whose rules use none.
	SetPrefix string
}

// Plane is one scope of the kernel's state in the network namespace in which it was opened: what is wanted there, and what of
// that the kernel may not hold yet. It is not safe for concurrent use.
type Plane struct {
	// Fail, in tests, is asked before each step, by its name, and makes it fail.
	Fail func(step string) error

	// Bridge, which may be nil, returns chains of table mangle for the time until some interfaces have joined an open set, or left
	// it. wanted are the chains that are wanted, with whether the kernel holds other rules under that name; still says which others
	// it may hold.
	Bridge func(f rule.Family, openSet string, joining, leaving []string, wanted iter.Seq2[string, bool],
		still func(chain string) bool) []rule.Chain

	// Idle are addresses that have no flows to lose: that they leave a set tightens nothing.
	Idle map[netip.Addr]bool

	scope  Scope
	family map[rule.Family]*family
	sets   *ipset.Sets // nil: not open
}

// Open finds the backend's programs. Nothing is wanted, read or written yet.
func Open(backend iptables.Backend, scope Scope) (*Plane, error) {
	p := &Plane{scope: scope, family: map[rule.Family]*family{}}
	for _, f := range rule.Families {
		t, err := iptables.New(backend, f)
		if err != nil {
			return nil, err
		}
		p.family[f] = newFamily(t)
	}
	return p, nil
}

// Close closes the connection to the kernel.
func (p *Plane) Close() {
	if p.sets != nil {
		p.sets.Close()
		p.sets = nil
	}
}

// Want makes this state the wanted one, whatever was before. The kernel is read before the next write.
func (p *Plane) Want(s *rule.State) { p.family[s.Family].replace(s) }

// Change changes what is wanted.
func (p *Plane) Change(c *rule.Patch) { p.family[c.Family].change(c) }

// Reread has the kernel read before the next write.
func (p *Plane) Reread() {
	for _, f := range p.family {
		f.read = false
	}
}

// Result counts what an Apply did.
type Result struct {
	Restores    int // iptables-restore processes
	Chains      int // chains written or removed
	SetMessages int // netlink messages that changed a set
	// Tightened says that something may be denied now which was allowed before: a chain was written, a peer left a set.
	Tightened bool
	// Reread says that a family was read before it was written to: what was put right may have been open for somebody.
	Reread bool
	// Refused are chains whose rules iptables did not take; they are closed, and the next Apply tries them again.
	Refused []error
}

// Wrote reports whether anything was written.
func (r Result) Wrote() bool { return r.Restores+r.SetMessages > 0 }

// Apply brings the kernel to what is wanted. judge, which may be nil, is called between the rules and the ready sets, once, after
// the rules of every family that could be written, with what was done so far; if it fails, no pod becomes ready.
//
// A family that fails is closed or as it was where it failed, is read again before the next write, and holds nobody up in the
// other one; [Plane.Holds] tells what came about. The error joins what went wrong in each; the same call again goes on from
// there.
func (p *Plane) Apply(ctx context.Context, judge func(Result) error) (result Result, err error) {
	if err := p.open(); err != nil {
		return result, err
	}
	if sets := p.sets; sets != nil {
		defer func(before int) { result.SetMessages = sets.Sent() - before }(sets.Sent())
	}
	var works []*work
	var errs []error
	failed := func(w *work, err error) {
		if err != nil {
			w.f.read = false
			errs = append(errs, fmt.Errorf("%s: %w", w.f.tables.Family, err))
		}
	}
	list := sync.OnceValues(p.list) // both families' at once, before the first is written
	for _, v := range rule.Families {
		w := newWork(ctx, p, p.family[v], &result)
		err := w.read(list)
		failed(w, err)
		if err == nil {
			works = append(works, w)
		}
	}
	works = slices.DeleteFunc(works, func(w *work) bool {
		err := w.untilRules()
		failed(w, err)
		return err != nil
	})
	if judge != nil {
		if err := judge(result); err != nil {
			return result, errors.Join(append(errs, err)...)
		}
	}
	for _, w := range works {
		failed(w, w.fromReady())
	}
	if len(errs) > 0 {
		p.Close() // in case it is the connection that fails
	}
	return result, errors.Join(errs...)
}

func (p *Plane) open() (err error) {
	if p.sets == nil && p.scope.SetPrefix != "" {
		p.sets, err = ipset.Open()
	}
	return err
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

// Known reports whether a family could be read since something last went wrong.
func (p *Plane) Known(f rule.Family) bool { return p.family[f].read }

// Holds reports whether the kernel's set has a wanted entry, as far as is known.
func (p *Plane) Holds(f rule.Family, set string, e rule.Entry) bool {
	is := p.family[f]
	s := is.sets[set]
	return is.read && s != nil && s.has.holds(e) && !is.todo.entries[set][e]
}

// Doubt makes the next Apply write an entry, whatever is known of the kernel: somebody else may have taken it out.
func (p *Plane) Doubt(f rule.Family, set string, e rule.Entry) {
	if is := p.family[f]; is.sets[set] != nil {
		is.todo.entry(set, e)
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

// Part is one table of one family, or, without a table, the family's sets.
type Part struct {
	Family rule.Family
	Table  rule.Table
}

// Refresh reads parts of the kernel, all without any named, and returns what differs from what is wanted and was not known to
// differ; the next Apply repairs it. Parts of another scope's tables alone are passed over.
func (p *Plane) Refresh(ctx context.Context, parts ...Part) (found []Difference, err error) {
	if err := p.open(); err != nil {
		return nil, err
	}
	var errs []error
	list := sync.OnceValues(p.list) // both families' at once
	for _, v := range rule.Families {
		f := p.family[v]
		if len(parts) > 0 && !slices.ContainsFunc(parts, func(part Part) bool { return part.Family == v }) {
			continue
		}
		known := f.read
		differences, err := p.readFamily(ctx, f, parts, list)
		if err != nil {
			errs = append(errs, err)
		} else if known {
			found = append(found, differences...)
		}
	}
	slices.SortFunc(found, func(a, b Difference) int { return strings.Compare(a.What, b.What) })
	return found, errors.Join(errs...)
}

func (p *Plane) list() ([]rule.Set, error) { return p.sets.List(p.scope.SetPrefix) }

// readFamily finds out what the kernel does not hold as wanted, in some parts if the others are known. List returns the sets.
func (p *Plane) readFamily(
	ctx context.Context, f *family, parts []Part, list func() ([]rule.Set, error),
) (found []Difference, err error) {
	known, all := f.todo, !f.read || len(parts) == 0
	asked := func(t rule.Table) bool { return all || slices.Contains(parts, Part{f.tables.Family, t}) }
	f.read, f.todo = false, newTodo()
	for _, table := range p.scope.Tables {
		if !asked(table) {
			f.todo.take(known, table)
			continue
		}
		if err := p.fail("read"); err != nil {
			return nil, err
		}
		a, err := f.tables.Save(ctx, table)
		if err != nil {
			return nil, err
		}
		found = append(found, f.compareTable(table, p.scope.within(a), known)...)
	}
	switch {
	case p.scope.SetPrefix == "":
	case asked(""):
		sets, err := list()
		if err != nil {
			return nil, err
		}
		found = append(found, f.compareSets(sets, known)...)
	default:
		f.todo.sets, f.todo.entries = known.sets, known.entries
	}
	f.read = true
	return found, nil
}

// Glance compares the numbers of entries of the sets with those that are wanted, and returns the parts in which they differ. An
// entry in the place of another does not show. Without peers, only the few sets are looked at that say who is here, and of those
// only such as have somebody to lose: it costs the same however large the cluster is.
func (p *Plane) Glance(peers bool) (differ []Part, err error) {
	if err := p.open(); err != nil {
		return nil, err
	}
	counts, err := p.counts(peers)
	if err != nil {
		return nil, err
	}
	for _, v := range rule.Families {
		f := p.family[v]
		for name, s := range f.sets {
			if !peers && !s.saysWhoIsHere() {
				continue
			}
			n, there := counts[name]
			if todo := f.todo.sets[name] || len(f.todo.entries[name]) > 0; !todo && (!there || n != s.has.len()) {
				differ = append(differ, Part{Family: v})
				break
			}
		}
	}
	return differ, nil
}

func (p *Plane) counts(peers bool) (map[string]int, error) {
	if peers {
		return p.sets.Counts(p.scope.SetPrefix)
	}
	counts := map[string]int{}
	for _, f := range p.family {
		for name, s := range f.sets {
			if !s.saysWhoIsHere() {
				continue
			}
			n, err := p.sets.Count(name)
			if err == nil {
				counts[name] = n
			} else if !errors.Is(err, ipset.ErrNotExist) {
				return nil, err
			}
		}
	}
	return counts, nil
}

// Watched has a watcher told of what is written here.
func (p *Plane) Watched(by *iptables.Watcher) {
	for _, f := range p.family {
		f.tables.Watcher = by
	}
}

func (p *Plane) fail(step string) error {
	if p.Fail == nil {
		return nil
	}
	return p.Fail(step)
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

// HostPorts is the scope of hostPort's rules, which the plugin writes too.
var HostPorts = Scope{
	Tables: []rule.Table{rule.Raw, rule.NAT},
	Owns: func(chain string) bool {
		return chain == "POSTERN-HOSTPORT" || chain == "POSTERN-SNAT" || chain == "POSTERN-LOOPBACK"
	},
}

// Nodes is the scope of node networking: what leaves the cluster, and the tunnel between nodes.
var Nodes = Scope{
	Tables:    []rule.Table{rule.Raw, rule.Mangle, rule.NAT},
	Owns:      func(chain string) bool { return chain == "POSTERN-MASQ" || strings.HasPrefix(chain, "POSTERN-TUNNEL") },
	SetPrefix: rule.NodeSetPrefix,
}

// Policies is the scope of everything else. In table raw are only chains of older versions; it is the last, so that they go when
// what has taken their place is there.
var Policies = Scope{
	Tables:    []rule.Table{rule.Mangle, rule.Filter, rule.Raw},
	Owns:      func(chain string) bool { return iptables.Ours(chain) && !HostPorts.Owns(chain) && !Nodes.Owns(chain) },
	SetPrefix: rule.SetPrefix,
}

// WriteRules makes one family's chains and hooks of a scope what the state says, with at most one restore, whatever they were.
// The scope has no sets. To chains that lack rules at their ends alone these are added: on nft, a commit that removes nothing
// takes a sixth of the time.
func WriteRules(ctx context.Context, t *iptables.Tables, scope Scope, want *rule.State) error {
	p := &Plane{scope: scope}
	w := newWork(ctx, p, newFamily(t), &Result{})
	w.f.replace(want)
	w.f.tails = map[rule.Table]map[string][]rule.Rule{}
	if _, err := p.readFamily(ctx, w.f, nil, p.list); err != nil {
		return err
	}
	if err := w.writeRules(); err != nil {
		return err
	}
	return errors.Join(w.result.Refused...)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
