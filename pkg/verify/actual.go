package verify

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/dataplane"
	"github.com/postern-cni/postern/pkg/ipset"
	"github.com/postern-cni/postern/pkg/iptables"
	"github.com/postern-cni/postern/pkg/rule"
)

// kernel reads what of ours this network namespace holds, with eyes of its own.
type kernel struct {
	tables map[rule.Family]*iptables.Tables
	sets   *ipset.Sets
}

func openKernel(backend iptables.Backend) (*kernel, error) {
	k := &kernel{tables: map[rule.Family]*iptables.Tables{}}
	for _, f := range rule.Families {
		var err error
		if k.tables[f], err = iptables.New(backend, f); err != nil {
			return nil, err
		}
	}
	var err error
	k.sets, err = ipset.Open()
	return k, err
}

// clean leaves nothing of ours, and nothing of the foreign edits that a walk made.
func (k *kernel) clean(ctx context.Context) error {
	if err := dataplane.Cleanup(ctx); err != nil {
		return err
	}
	for _, t := range k.tables {
		if err := t.Restore(ctx, "*mangle\n-F\nCOMMIT\n"); err != nil {
			return err
		}
	}
	return nil
}

// read returns the sets of a family and some of its tables as a state, without what only people read.
func (k *kernel) read(ctx context.Context, f rule.Family, of ...rule.Table) (*rule.State, error) {
	s := &rule.State{Family: f, Chains: map[rule.Table][]rule.Chain{}}
	for _, table := range of {
		a, err := k.tables[f].Save(ctx, table)
		if err != nil {
			return nil, err
		}
		for name, rules := range a.Chains {
			s.Chains[table] = append(s.Chains[table], rule.Chain{Name: name, Rules: rules})
		}
		for _, h := range a.Hooks {
			s.Hooks = append(s.Hooks, rule.Hook{Table: table, Chain: h.Chain, Rule: h.Rule, Last: !h.First})
		}
	}
	all, err := k.sets.List(rule.SetPrefix)
	for _, set := range all {
		if set.Family == f {
			s.Sets = append(s.Sets, set)
		}
	}
	return s, err
}

// differs tells in words what of ours the kernel holds otherwise than wanted; empty if nothing.
func (k *kernel) differs(ctx context.Context, want *rule.State) (string, error) {
	is, err := k.read(ctx, want.Family, rule.Mangle, rule.Filter)
	if err != nil {
		return "", err
	}
	var list []string
	got, wanted := hold(is), hold(want)
	for table := range want.Chains {
		differences(&list, fmt.Sprintf("%s chain", table), got.chains[table], wanted.chains[table], func(a, b []rule.Rule) bool {
			return slices.EqualFunc(a, b, iptables.Equal)
		})
	}
	differences(&list, "set", got.sets, wanted.sets, heldSet.equal)
	for _, h := range want.Hooks {
		there := slices.DeleteFunc(slices.Clone(is.Hooks), func(a rule.Hook) bool { return a.Table != h.Table || a.Chain != h.Chain })
		if len(there) != 1 || !iptables.Equal(there[0].Rule, h.Rule) || there[0].Last && !h.Last {
			list = append(list, fmt.Sprintf("%s: %d hooks in %s, want one: %v", h.Table, len(there), h.Chain, there))
		}
	}
	slices.Sort(list)
	return strings.Join(list, "\n"), nil
}

// text is everything in the tables and all sets of ours, for a comparison byte by byte: without counters, and with sets' entries
// in order.
func (k *kernel) text(ctx context.Context) (string, error) {
	var b strings.Builder
	for _, f := range rule.Families {
		name := map[rule.Family]string{rule.IPv4: "iptables", rule.IPv6: "ip6tables"}[f] + "-" + string(k.tables[f].Backend) + "-save"
		out, err := exec.CommandContext(ctx, name).Output()
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(&b, "%s:\n", name)
		for line := range strings.Lines(string(out)) {
			if strings.HasPrefix(line, "#") {
				continue
			}
			if before, _, counted := strings.Cut(line, " ["); counted && strings.HasPrefix(line, ":") {
				line = before + "\n"
			}
			b.WriteString(line)
		}
	}
	all, err := k.sets.List(rule.SetPrefix)
	for _, set := range all {
		fmt.Fprintf(&b, "%s %s %s\n", set.Name, set.Type, set.Family)
		for _, e := range set.Entries {
			fmt.Fprintf(&b, "  %s\n", e)
		}
	}
	return b.String(), err
}

// lineDifference lists the lines that only one of two texts has.
func lineDifference(a, b string) string {
	var list []string
	count := map[string]int{}
	for line := range strings.Lines(a) {
		count[line]++
	}
	for line := range strings.Lines(b) {
		if count[line]--; count[line] < 0 {
			list = append(list, "fresh: "+line)
		}
	}
	for line := range strings.Lines(a) {
		if count[line] > 0 {
			count[line]--
			list = append(list, "after the walk: "+line)
		}
	}
	if len(list) == 0 {
		return "the same lines, in another order\n"
	}
	return strings.Join(list, "")
}
