package engine

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/rule"
)

// A pod inherits nothing from the former owner of its address, so before an address becomes ready its flows are ended. To find
// them takes a reading of the whole table, milliseconds even of an empty one, which nobody should wait for in an ADD. But from or
// to an address of this node's ranges that nobody has, no flow can begin: the rules drop its first packet. So once the flows of a
// range have been ended (clean), there are only those of addresses whose pods have gone since, and these are ended soon after, as
// those of all pods that go (judge). When the rules were not in force for a while, all ranges are looked at again.

// parted notes the addresses that are not ready any more, and forgets ranges that are not the node's any more. Flows of addresses
// that nobody else can have need no judge: nothing of them passes from now on.
func (e *Engine) parted() {
	for p := range e.unsettled {
		if key, guarded := e.guarded[p]; guarded && e.ready[p] != key && !e.keeps(p.address) {
			e.unjudged.gone[p.address], e.plane.Idle[p.address] = true, e.inClean(p.address)
		}
	}
	maps.DeleteFunc(e.clean, func(p netip.Prefix, _ bool) bool { return !slices.Contains(e.index.Ranges(), p) })
}

// keeps reports whether an address was ready and stays so.
func (e *Engine) keeps(a netip.Addr) bool {
	return slices.ContainsFunc(e.index.Links(a), func(link string) bool {
		key, guarded := e.guarded[pair{a, link}]
		return guarded && e.ready[pair{a, link}] == key
	})
}

func (e *Engine) inClean(a netip.Addr) bool {
	for p := range e.clean {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// inheritNothing ends the flows of addresses that are about to become ready: they are a former owner's. It does that for all free
// addresses of ranges that are new. What the kernel holds as ready when policyd starts was guarded by its predecessor, and keeps
// its flows.
func (e *Engine) inheritNothing(fresh []pair) error {
	taken, doomed := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	var families conntrack.Families
	for _, p := range fresh {
		f := rule.FamilyOf(p.address)
		switch {
		case !e.plane.Known(f): // of a family that could not be read, nobody becomes ready
		case e.untouched[f] && e.plane.Holds(f, rule.ReadySet(f), p.entry()):
			taken[p.address] = true
		case e.unjudged.gone[p.address] || e.judged.gone[p.address] || !e.inClean(p.address):
			doomed[p.address] = true
			families.Add(p.address)
		}
	}
	var ranges []netip.Prefix
	for _, p := range e.index.Ranges() {
		if !e.clean[p] && e.plane.Known(rule.FamilyOf(p.Addr())) {
			ranges = append(ranges, p)
			families.Add(p.Addr())
		}
	}
	if families == (conntrack.Families{}) {
		return nil
	}
	err := conntrack.DeleteTouching(families, func(a netip.Addr) bool {
		return doomed[a] || !taken[a] && slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) }) && !e.keeps(a)
	})
	if err != nil {
		return err
	}
	for a := range doomed {
		delete(e.unjudged.gone, a)
		delete(e.judged.gone, a)
	}
	for _, p := range ranges {
		e.clean[p] = true
	}
	return nil
}
