package nodenet

import (
	"crypto/sha256"
	"encoding/hex"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/rule"
)

// The chains that this package owns.
const (
	ChainMasquerade = "POSTERN-MASQ"       // nat, from POSTROUTING
	ChainTunnel     = "POSTERN-TUNNEL"     // mangle, from FORWARD
	ChainTunnelIn   = "POSTERN-TUNNEL-IN"  // mangle, from INPUT
	ChainOrigin     = "POSTERN-TUNNEL-SRC" // raw, from PREROUTING
)

// MembersSet holds the other nodes' addresses, InsideSet the destinations that see pods' own addresses.
func MembersSet(f rule.Family) string { return setName("nodes", f) }
func InsideSet(f rule.Family) string  { return setName("inside", f) }

func setName(what string, f rule.Family) string {
	return rule.NodeSetPrefix + what + "-" + string("0123456789"[f])
}

// State returns everything of ours that a family's tables and sets should hold.
func State(p *Plan, f rule.Family) *rule.State {
	s := &rule.State{Family: f, Chains: map[rule.Table][]rule.Chain{}}
	s.Sets = append(s.Sets, rule.Set{Name: InsideSet(f), Type: rule.HashNet, Family: f, Entries: entries(p.Inside, f),
		Definition: "destinations that see pods' own addresses"})
	masquerade(s, p)
	if p.options.Tunnel == TunnelNever {
		return s
	}
	var members []netip.Prefix
	for _, a := range p.Members {
		members = append(members, single(a))
	}
	s.Sets = append(s.Sets, rule.Set{Name: MembersSet(f), Type: rule.HashIP, Family: f, Entries: entries(members, f),
		Definition: "addresses of the other nodes"})
	guard(s, p.options.Port)
	origins(s, p)
	return s
}

func entries(list []netip.Prefix, f rule.Family) (out []rule.Entry) {
	for _, p := range list {
		if rule.FamilyOf(p.Addr()) == f {
			out = append(out, rule.Entry{Prefix: p})
		}
	}
	slices.SortFunc(out, rule.Entry.Compare)
	return slices.Compact(out)
}

// masquerade stands last in nat POSTROUTING, so that an administrator's rule before it decides.
func masquerade(s *rule.State, p *Plan) {
	chain := rule.Chain{Name: ChainMasquerade}
	for _, cidr := range p.Node.PodCIDRs {
		if rule.FamilyOf(cidr.Addr()) == s.Family {
			chain.Rules = append(chain.Rules, rule.Rule{
				Matches: []rule.Match{rule.Source{Prefix: cidr}, rule.InSet{Name: InsideSet(s.Family), Dirs: "dst", Not: true}},
				Action:  rule.Masquerade{}, Comment: "from a pod to outside of the cluster"})
		}
	}
	s.Chains[rule.NAT] = []rule.Chain{chain}
	s.Hooks = append(s.Hooks, rule.Hook{Table: rule.NAT, Chain: "POSTROUTING", Rule: rule.Rule{Action: rule.Jump{Chain: ChainMasquerade}},
		Last: true})
}

// guard closes the tunnel's port to all but nodes.
func guard(s *rule.State, port uint16) {
	drop := func(comment string, m rule.Match) rule.Rule {
		return rule.Rule{Matches: []rule.Match{m}, Action: rule.Drop{}, Comment: comment}
	}
	s.Chains[rule.Mangle] = []rule.Chain{
		{Name: ChainTunnel, Rules: []rule.Rule{
			drop("pods do not speak for nodes", rule.In{Name: attachment.GuardedPrefix + "+"}),
			drop("pods do not speak for nodes", rule.In{Name: attachment.UnguardedPrefix + "+"}),
			drop("a Service does not lead here", rule.CTState{States: "DNAT"}),
		}},
		{Name: ChainTunnelIn, Rules: []rule.Rule{
			{Action: rule.Jump{Chain: ChainTunnel}},
			drop("not from a node", rule.InSet{Name: MembersSet(s.Family), Dirs: "src", Not: true}),
		}},
	}
	tunnel := []rule.Match{rule.Protocol{Proto: rule.UDP}, rule.DestPorts{Proto: rule.UDP, From: port, To: port}}
	s.Hooks = append(s.Hooks,
		rule.Hook{Table: rule.Mangle, Chain: "FORWARD", Rule: rule.Rule{Matches: tunnel, Action: rule.Jump{Chain: ChainTunnel}}},
		rule.Hook{Table: rule.Mangle, Chain: "INPUT", Rule: rule.Rule{Matches: tunnel, Action: rule.Jump{Chain: ChainTunnelIn}}})
}

// origins drops what comes out of the tunnel with a source that is not of the node that sent it. With many nodes the rules
// form a tree, so that a packet passes few of them.
func origins(s *rule.State, p *Plan) {
	list := slices.DeleteFunc(slices.Clone(p.Origins), func(o Origin) bool { return rule.FamilyOf(o.Prefix.Addr()) != s.Family })
	chains := originTree(ChainOrigin, list)
	slices.SortFunc(chains, func(a, b rule.Chain) int { return strings.Compare(a.Name, b.Name) })
	s.Chains[rule.Raw] = chains
	s.Hooks = append(s.Hooks, rule.Hook{Table: rule.Raw, Chain: "PREROUTING", Rule: rule.Rule{
		Matches: []rule.Match{rule.In{Name: DevicePrefix + "+"}}, Action: rule.Jump{Chain: ChainOrigin}}})
}

// branches is how many rules a chain of the tree has at most, besides its last.
const branches = 16

// originTree returns a chain for origins, which are sorted and disjoint, and those that it leads to.
func originTree(name string, list []Origin) []rule.Chain {
	chain := rule.Chain{Name: name}
	var below []rule.Chain
	for _, group := range split(list) {
		if len(group) == 1 {
			chain.Rules = append(chain.Rules, rule.Rule{
				Matches: []rule.Match{rule.Source{Prefix: group[0].Prefix}, rule.SourceMAC{MAC: group[0].MAC}}, Action: rule.Return{}})
			continue
		}
		prefix := cover(group)
		sum := sha256.Sum256([]byte(prefix.String()))
		next := ChainTunnel + "-" + hex.EncodeToString(sum[:6])
		chain.Rules = append(chain.Rules, rule.Rule{Matches: []rule.Match{rule.Source{Prefix: prefix}}, Action: rule.Goto{Chain: next}})
		below = append(below, originTree(next, group)...)
	}
	chain.Rules = append(chain.Rules, rule.Rule{Action: rule.Drop{}, Comment: "a source that is not of the sending node's pods"})
	return append([]rule.Chain{chain}, below...)
}

// split divides origins into groups whose covers are disjoint: one each if that is few enough, else at most so many.
func split(list []Origin) (groups [][]Origin) {
	if len(list) <= branches {
		for i := range list {
			groups = append(groups, list[i:i+1])
		}
		return groups
	}
	groups = [][]Origin{list}
	for len(groups) < branches {
		largest := 0
		for i, g := range groups {
			if len(g) > len(groups[largest]) {
				largest = i
			}
		}
		a, b := halve(groups[largest])
		groups = slices.Replace(groups, largest, largest+1, a, b)
	}
	return groups
}

// halve divides two or more origins at the first bit in which they differ.
func halve(list []Origin) (a, b []Origin) {
	bit := cover(list).Bits()
	at := slices.IndexFunc(list, func(o Origin) bool { return o.Prefix.Addr().AsSlice()[bit/8]>>(7-bit%8)&1 == 1 })
	return list[:at], list[at:]
}

// cover is the longest prefix that all of some sorted origins are in.
func cover(list []Origin) netip.Prefix {
	first, last := list[0].Prefix.Addr().AsSlice(), list[len(list)-1].Prefix.Addr().AsSlice()
	same := 0
	for i := range first {
		if x := first[i] ^ last[i]; x != 0 {
			same += bits.LeadingZeros8(x)
			break
		}
		same += 8
	}
	return netip.PrefixFrom(list[0].Prefix.Addr(), same).Masked()
}
