package compile

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// Sets are named after what they mean, so that all rules with the same peers share one, and a set is the same one after a
// restart: "pst-p4-" and a hash for pods, "pst-n4-" for blocks, "pst-t4-" for pods with a named port.

func setName(kind string, f rule.Family, key string) string {
	sum := sha256.Sum256([]byte(key))
	return fmt.Sprintf("%s%s%d-%s", rule.SetPrefix, kind, f, hex.EncodeToString(sum[:8]))
}

func groupSet(g *policy.Group, f rule.Family) string {
	if g.Protocol == "" {
		return setName("p", f, g.Key)
	}
	return setName("t", f, g.Key)
}

func blockSet(b *policy.Blocks, f rule.Family) string { return setName("n", f, b.Key) }

// ofGroup returns the set of a group with its members of the family.
func ofGroup(g *policy.Group, f rule.Family) rule.Set {
	typ := rule.HashIP
	if g.Protocol != "" {
		typ = rule.HashIPPort
	}
	return set(groupSet(g, f), typ, rule.Peers, f, g.Key, memberEntries(g, g.Members(), f))
}

func memberEntries(g *policy.Group, members []netip.AddrPort, f rule.Family) []rule.Entry {
	var entries []rule.Entry
	for _, m := range members {
		if rule.FamilyOf(m.Addr()) == f {
			entries = append(entries, rule.Entry{Prefix: single(m.Addr()), Proto: protocol(g.Protocol), Port: m.Port()})
		}
	}
	return entries
}

// ofBlocks returns the set of blocks of the family; without any, there is none.
func ofBlocks(b *policy.Blocks, f rule.Family) (rule.Set, bool) {
	var entries []rule.Entry
	var words []string
	for _, p := range prefixes(b, f) {
		words = append(words, p.String())
		for _, half := range policy.Halves(p) {
			entries = append(entries, rule.Entry{Prefix: half})
		}
	}
	return set(blockSet(b, f), rule.HashNet, rule.Peers, f, "blocks "+strings.Join(words, " "), entries), len(entries) > 0
}

func prefixes(b *policy.Blocks, f rule.Family) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(b.Prefixes), func(p netip.Prefix) bool { return rule.FamilyOf(p.Addr()) != f })
}

func set(name string, typ rule.SetType, role rule.Role, f rule.Family, definition string, entries []rule.Entry) rule.Set {
	slices.SortFunc(entries, rule.Entry.Compare)
	return rule.Set{Name: name, Type: typ, Family: f, Role: role, Entries: slices.Compact(entries), Definition: definition}
}

// own are the sets with a role of their own: who is here, whose guard stands, and who is not isolated.
func own(f rule.Family) []rule.Set {
	return []rule.Set{
		set(rule.LocalSet(f), rule.HashIP, rule.Local, f, "addresses of this node's pods", nil),
		set(rule.RangeSet(f), rule.HashNet, rule.Local, f, "what this node's pods get their addresses from", nil),
		set(rule.ReadySet(f), rule.HashNetIface, rule.Ready, f, "pods whose guard stands", nil),
		set(rule.OpenSet(f, rule.Ingress), rule.HashNetIface, rule.Open, f, "pods that no policy isolates for ingress", nil),
		set(rule.OpenSet(f, rule.Egress), rule.HashNetIface, rule.Open, f, "pods that no policy isolates for egress", nil),
	}
}

// entriesOf calls each for every entry that an interface has in these sets; nil has none.
func entriesOf(g *policy.Guarded, f rule.Family, each func(set string, e rule.Entry)) {
	if g == nil {
		return
	}
	for _, a := range g.Addresses {
		if rule.FamilyOf(a) != f {
			continue
		}
		each(rule.LocalSet(f), rule.Entry{Prefix: single(a)})
		if !g.Ready {
			continue
		}
		pair := rule.Entry{Prefix: single(a), Iface: g.Interface}
		each(rule.ReadySet(f), pair)
		for _, d := range directions {
			if !g.Side(d == rule.Egress).Isolated {
				each(rule.OpenSet(f, d), pair)
			}
		}
	}
}

// rangeEntries are a family's entries of the range set.
func rangeEntries(ranges []netip.Prefix, f rule.Family) (entries []rule.Entry) {
	for _, p := range ranges {
		if rule.FamilyOf(p.Addr()) != f {
			continue
		}
		for _, half := range policy.Halves(p) {
			entries = append(entries, rule.Entry{Prefix: half})
		}
	}
	return entries
}

var directions = [...]rule.Direction{rule.Ingress, rule.Egress}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
