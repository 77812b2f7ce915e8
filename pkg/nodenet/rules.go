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
				Action:  rule.Masquerade{RandomPorts: true}, Comment: "from a pod to outside of the cluster"})
		}
	}
	s.Chains[rule.NAT] = []rule.Chain{chain}
	s.Hooks = append(s.Hooks, rule.Hook{Table: rule.NAT, Chain: "POSTROUTING",
		Rule: rule.Rule{Action: rule.Jump{Chain: ChainMasquerade}}, Last: true})
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

// branches is how many rules a chain of the tree has at most, besides its last: four bits of the address tell them apart. So a
// node that comes or goes changes one chain, or the few around it.
const (
	branches = 16
	stride   = 4
)

// originTree returns a chain for origins, which are sorted and disjoint, and those that it leads to.
func originTree(name string, list []Origin) []rule.Chain {
	chain := rule.Chain{Name: name}
	var below []rule.Chain
	for _, g := range branch(list) {
		if len(g.origins) == 1 {
			chain.Rules = append(chain.Rules, rule.Rule{
				Matches: []rule.Match{rule.Source{Prefix: g.origins[0].Prefix}, rule.SourceMAC{MAC: g.origins[0].MAC}},
				Action:  rule.Return{}})
			continue
		}
		sum := sha256.Sum256([]byte(g.prefix.String()))
		next := ChainTunnel + "-" + hex.EncodeToString(sum[:6])
		chain.Rules = append(chain.Rules, rule.Rule{Matches: []rule.Match{rule.Source{Prefix: g.prefix}},
			Action: rule.Goto{Chain: next}})
		below = append(below, originTree(next, g.origins)...)
	}
	chain.Rules = append(chain.Rules, rule.Rule{Action: rule.Drop{}, Comment: "a source that is not of the sending node's pods"})
	return append([]rule.Chain{chain}, below...)
}

// group is a branch: all origins in a prefix.
type group struct {
	prefix  netip.Prefix
	origins []Origin
}

// branch divides origins into groups: one each if that is few enough, else by the next bits in which they differ.
func branch(list []Origin) (groups []group) {
	length := 128
	if len(list) > branches {
		length = cover(list)/stride*stride + stride
	}
	for _, o := range list {
		prefix := netip.PrefixFrom(o.Prefix.Addr(), min(length, o.Prefix.Bits())).Masked()
		if last := len(groups) - 1; last >= 0 && groups[last].prefix == prefix {
			groups[last].origins = append(groups[last].origins, o)
		} else {
			groups = append(groups, group{prefix, []Origin{o}})
		}
	}
	return groups
}

// cover is the length of the longest prefix that all of some sorted origins are in.
func cover(list []Origin) (length int) {
	first, last := list[0].Prefix.Addr().AsSlice(), list[len(list)-1].Prefix.Addr().AsSlice()
	for i := range first {
		if x := first[i] ^ last[i]; x != 0 {
			return length + bits.LeadingZeros8(x)
		}
		length += 8
	}
	return length
}

// Patch returns what leads from one state to another of the same family and with the same hooks.
func Patch(was, is *rule.State) *rule.Patch {
	p := rule.NewPatch(is.Family)
	for table, chains := range was.Chains {
		for _, c := range chains {
			p.SetChain(table, c.Name, nil)
		}
	}
	for table, chains := range is.Chains {
		for _, c := range chains {
			p.SetChain(table, c.Name, append([]rule.Rule{}, c.Rules...))
		}
	}
	for i, s := range is.Sets { // the same sets as before
		before, now := map[rule.Entry]bool{}, map[rule.Entry]bool{}
		for _, e := range s.Entries {
			now[e] = true
		}
		for _, e := range was.Sets[i].Entries {
			if before[e] = true; !now[e] {
				p.Leave[s.Name] = append(p.Leave[s.Name], e)
			}
		}
		for _, e := range s.Entries {
			if !before[e] {
				p.Join[s.Name] = append(p.Join[s.Name], e)
			}
		}
	}
	return p
}
