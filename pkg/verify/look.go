package verify

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/compile"
	"github.com/postern-cni/postern/pkg/policy"
	"github.com/postern-cni/postern/pkg/rule"
)

// sides are the two judgements that a first packet needs: that of the pod of this node that it comes from, and that of the one it
// goes to. An end that is elsewhere judges nothing here.
type sides struct{ from, to bool }

// sides asks rules and sets about each end by itself. Both together are what [tables.passes] says of a packet.
func (t *tables) sides(p flight, f rule.Family) sides {
	pod := func(link string) bool { return strings.HasPrefix(link, attachment.GuardedPrefix) }
	in := func(set, dirs string) bool { return t.lookup(rule.InSet{Name: set, Dirs: dirs}, p) }
	t.steps = 0
	s := sides{true, true}
	if pod(p.in) {
		s.from = in(rule.ReadySet(f), "src,src") && t.walk(compile.ChainFrom, p) != dropped
	} else {
		s.from = !in(rule.LocalSet(f), "src") && !in(rule.RangeSet(f), "src")
	}
	if pod(p.out) {
		s.to = in(rule.ReadySet(f), "dst,dst") && t.walk(compile.ChainTo, p) != dropped
	} else {
		s.to = !in(rule.RangeSet(f), "dst")
	}
	return s
}

// packetsOfALook are as many as a look at a family between two steps of a pass asks about.
const packetsOfALook = 250

// leak asks rules and sets, as they are in the kernel at some moment of a pass, about packets: who passes must be let pass by the
// objects and records of one of these moments. If there are no more than two, before and after a change, both ends must be of
// the same one; of several changes that came together, each end may be of another, as if the changes had come one by one.
func leak(is *rule.State, moments []moment, d dice) (asked int, found string) {
	f := is.Family
	actual := load(is)
	var allowed []*tables
	for _, m := range moments {
		allowed = append(allowed, load(compile.State(policy.Resolve(m.input()), f)))
	}
	ends := endsOf(moments, f)
	for range packetsOfALook {
		p, ok := anyFlight(d, ends, f)
		if !ok {
			continue
		}
		asked++
		passes, err := actual.passes(p)
		if err != nil {
			return asked, "the kernel's rules are none: " + err.Error()
		}
		if !passes {
			continue
		}
		var either sides
		both := false
		text := ""
		for i, t := range allowed {
			s := t.sides(p, f)
			either.from, either.to = either.from || s.from, either.to || s.to
			both = both || s.from && s.to
			text += fmt.Sprintf("; in moment %d the sender's end says %s, the receiver's %s", i, pass(s.from), pass(s.to))
		}
		if !both && (len(moments) <= 2 || !either.from || !either.to) {
			return asked, fmt.Sprintf("the kernel lets %s pass, in by %s, out by %s%s", p.Packet, p.in, p.out, text)
		}
	}
	return asked, ""
}

// end is an address and the link that leads to it.
type end struct {
	address netip.Addr
	link    string
}

// endsOf lists what packets of a family can come from and go to: this node's pods first, and the number of them.
func endsOf(moments []moment, f rule.Family) (list []end) {
	here := map[end]bool{}
	away := map[end]bool{{netip.MustParseAddr("192.0.2.1"), uplink}: true, {netip.MustParseAddr("2001:db8::1"), uplink}: true}
	for _, m := range moments {
		for _, a := range m.records {
			for _, address := range a.Addresses {
				here[end{address, a.HostInterface}] = true
			}
		}
		for _, p := range m.pods {
			for _, address := range p.IPs {
				away[end{address, uplink}] = true
			}
		}
	}
	for _, all := range []map[end]bool{here, away} {
		part := slices.SortedFunc(maps.Keys(all), func(a, b end) int {
			if c := a.address.Compare(b.address); c != 0 {
				return c
			}
			return strings.Compare(a.link, b.link)
		})
		for _, e := range part {
			if rule.FamilyOf(e.address) == f {
				list = append(list, e)
			}
		}
	}
	return list
}

// anyFlight draws a packet from or to a pod of this node; not ok where there is none.
func anyFlight(d dice, ends []end, f rule.Family) (p flight, ok bool) {
	pods := slices.DeleteFunc(slices.Clone(ends), func(e end) bool { return e.link == uplink })
	if len(pods) == 0 {
		return p, false
	}
	from, to := one(d, pods...), one(d, one(d, pods, ends)...)
	if d.chance(2) {
		from, to = to, from
	}
	p = flight{Packet{From: from.address, To: to.address, State: stateNew}, from.link, to.link}
	p.Protocol = one(d, rule.TCP, rule.TCP, rule.TCP, rule.UDP, rule.SCTP, rule.ICMP)
	if p.Protocol == rule.ICMP {
		if f == rule.IPv6 {
			p.Protocol = rule.ICMPv6
		}
		return p, true
	}
	p.Port = one(d, numbers...)
	return p, true
}
