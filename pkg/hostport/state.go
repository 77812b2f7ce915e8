package hostport

import (
	"net/netip"
	"slices"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/rule"
)

// The chains that this package owns.
const (
	ChainDNAT     = "POSTERN-HOSTPORT" // nat, from PREROUTING and OUTPUT
	ChainSNAT     = "POSTERN-SNAT"     // nat, from POSTROUTING
	ChainLoopback = "POSTERN-LOOPBACK" // raw, from PREROUTING; IPv4 only
)

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
)

// State returns everything that a family's tables should hold for these attachments; those without port mappings may be
// among them. The result does not depend on their order. Where two attachments have one host interface, the newer counts:
// the other is an older sandbox of the same pod, whose DEL is still to come.
func State(family rule.Family, attachments []*attachment.Attachment) *rule.State {
	dnat, snat := rule.Chain{Name: ChainDNAT}, rule.Chain{Name: ChainSNAT}
	for _, a := range current(attachments) {
		d, s := rules(family, a)
		dnat.Rules = append(dnat.Rules, d...)
		snat.Rules = append(snat.Rules, s...)
	}
	state := &rule.State{
		Family: family,
		Chains: map[rule.Table][]rule.Chain{rule.NAT: {dnat, snat}},
		Hooks: []rule.Hook{
			hook(rule.NAT, "PREROUTING", ChainDNAT, rule.AddrType{DstType: "LOCAL"}),
			hook(rule.NAT, "OUTPUT", ChainDNAT, rule.AddrType{DstType: "LOCAL"}),
			hook(rule.NAT, "POSTROUTING", ChainSNAT),
		},
	}
	if family == rule.IPv6 {
		state.Hooks[1].Rule.Matches = append([]rule.Match{rule.Source{Prefix: loopback6, Not: true}}, state.Hooks[1].Rule.Matches...)
		return state
	}
	state.Chains[rule.Raw] = []rule.Chain{loopbackChain()}
	state.Hooks = append(state.Hooks, hook(rule.Raw, "PREROUTING", ChainLoopback))
	return state
}

func hook(table rule.Table, from, to string, matches ...rule.Match) rule.Hook {
	return rule.Hook{Table: table, Chain: from, Rule: rule.Rule{Matches: matches, Action: rule.Jump{Chain: to}}}
}

func loopbackChain() rule.Chain {
	c := rule.Chain{Name: ChainLoopback}
	for _, prefix := range []string{attachment.GuardedPrefix, attachment.UnguardedPrefix} {
		c.Rules = append(c.Rules, rule.Rule{
			Matches: []rule.Match{rule.In{Name: prefix + "+"}, rule.Dest{Prefix: loopback4}},
			Action:  rule.Drop{},
			Comment: "the node's loopback is closed to pods",
		})
	}
	return c
}

// current returns the attachments with port mappings, older before newer (so that what an ADD appends is last here as well),
// without those that a newer one on the same host interface has superseded.
func current(attachments []*attachment.Attachment) []*attachment.Attachment {
	sorted := slices.SortedFunc(slices.Values(attachments), attachment.Older)
	newest := map[string]*attachment.Attachment{}
	for _, a := range sorted {
		newest[a.HostInterface] = a
	}
	return slices.DeleteFunc(sorted, func(a *attachment.Attachment) bool {
		return len(a.PortMappings) == 0 || newest[a.HostInterface] != a
	})
}

// rules returns an attachment's rules for ChainDNAT and ChainSNAT in one family; none where nothing is mapped in it.
func rules(family rule.Family, a *attachment.Attachment) (dnat, snat []rule.Rule) {
	pod, ok := addressOf(family, a.Addresses)
	if !ok {
		return nil, nil
	}
	comment := owner(a)
	for _, m := range a.PortMappings {
		if !m.HostIP.IsValid() || rule.FamilyOf(m.HostIP) == family {
			dnat = append(dnat, mappingRule(m, pod, comment))
		}
	}
	if len(dnat) == 0 {
		return nil, nil
	}
	var source rule.Action = rule.Masquerade{}
	if node, ok := addressOf(family, a.NodeAddresses); ok {
		source = rule.SNAT{To: node}
	}
	out, translated := rule.Out{Name: a.HostInterface}, rule.CTState{States: "DNAT"}
	self := netip.PrefixFrom(pod, pod.BitLen())
	snat = append(snat, rule.Rule{
		Matches: []rule.Match{rule.Source{Prefix: self}, rule.Dest{Prefix: self}, out, translated},
		Action:  source,
		Comment: comment + " to itself",
	})
	if family == rule.IPv4 {
		snat = append(snat, rule.Rule{
			Matches: []rule.Match{rule.Source{Prefix: loopback4}, rule.Dest{Prefix: self}, out, translated},
			Action:  source,
			Comment: comment + " from the loopback",
		})
	}
	return dnat, snat
}

func mappingRule(m attachment.PortMapping, pod netip.Addr, comment string) rule.Rule {
	proto := rule.Proto(m.Protocol)
	var matches []rule.Match
	if m.HostIP.IsValid() && !m.HostIP.IsUnspecified() {
		matches = append(matches, rule.Dest{Prefix: netip.PrefixFrom(m.HostIP, m.HostIP.BitLen())})
	}
	matches = append(matches, rule.Protocol{Proto: proto}, rule.DestPorts{Proto: proto, From: m.HostPort, To: m.HostPort})
	return rule.Rule{Matches: matches, Action: rule.DNAT{To: netip.AddrPortFrom(pod, m.ContainerPort)}, Comment: comment}
}

func addressOf(family rule.Family, addrs []netip.Addr) (netip.Addr, bool) {
	i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return rule.FamilyOf(a) == family })
	if i < 0 {
		return netip.Addr{}, false
	}
	return addrs[i], true
}

// owner names an attachment for people: the pod, else the container.
func owner(a *attachment.Attachment) string {
	if a.Pod.Name != "" {
		return "pod " + a.Pod.Namespace + "/" + a.Pod.Name
	}
	return "container " + a.ContainerID
}
