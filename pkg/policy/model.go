package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/postern-cni/postern/pkg/addrmap"
	"github.com/postern-cni/postern/pkg/object"
)

// Input is all that the meaning of policies depends on.
type Input struct {
	Cluster object.Cluster
	// Local are the pod interfaces of this node, attached or expected.
	Local []Local
	// Ranges are the prefixes whose addresses only this node's pods have.
	Ranges []netip.Prefix
}

// Local is one interface of a pod on this node.
type Local struct {
	// Pod is nil where the attached pod is not known (yet, or any more): then the interface is closed, and its addresses belong
	// to nobody.
	Pod       *object.Pod
	Interface string // the host end
	// Addresses are those of the record, which beats any pod's status; empty for a pod that is only expected.
	Addresses []netip.Addr
	// Ready lets packets through, as far as policies allow; false closes both directions.
	Ready bool
}

// Model is what the policies mean for this node at one moment.
type Model struct {
	// Pods has one element for each of [Input.Local], sorted by interface.
	Pods []*Guarded
	// Ranges are those of the input, sorted.
	Ranges []netip.Prefix
	// Problems are the policies that cannot be used as written, sorted by policy.
	Problems []Problem

	at map[netip.Addr]*Guarded
}

// Problem is a policy that cannot be used as written. The pods that it selects are closed in its directions.
type Problem struct {
	Policy string // namespace/name
	Reason string // all that is wrong with it
}

// Guarded is an interface with what its pod's policies say. It is not changed once it is handed out, but for the members of the
// groups that its rules share.
type Guarded struct {
	Local
	Ingress, Egress Side

	policies []*policy // that select the pod
}

// Side is one direction of a pod: not isolated, everything passes; isolated, only what a rule allows does.
type Side struct {
	Isolated bool
	Rules    []Rule
}

// Side returns the side of one direction, "Ingress" or "Egress".
func (g *Guarded) Side(egress bool) *Side {
	if egress {
		return &g.Egress
	}
	return &g.Ingress
}

// Rule is what the rules of one policy say of a port, or of any port, for one pod: what matches a peer and the port is allowed.
type Rule struct {
	Origin string // "namespace/name ingress 0", or "namespace/name ingress 0,2,3", for people
	// Peers is nil where the rule speaks of everyone.
	Peers *Peers
	Port  Port
	// Named, if it is not nil, stands in for both, in an egress rule: the peers with a port that each has under its own number.
	Named *Group
}

// Port is a range of ports of one protocol; 0 to 65535 is the whole protocol, and the zero value every port of every protocol.
// Where a pod has no port of a rule's name, the range is empty: From is greater than To.
type Port struct {
	Protocol corev1.Protocol
	From, To uint16
}

// Peers is a list of peers: pods, blocks, or both.
type Peers struct {
	Pods   *Group  // nil: no selector is among them
	Blocks *Blocks // nil: no block is
}

// contains reports whether an address is a peer.
func (p *Peers) contains(a netip.Addr) bool {
	return p == nil || p.Pods != nil && p.Pods.Has(a) || p.Blocks != nil && p.Blocks.contains(a)
}

// Blocks are address blocks, shared by all rules that name the same addresses.
type Blocks struct {
	Key      string         // the same for the same addresses
	Prefixes []netip.Prefix // disjoint, sorted, exceptions taken away; /0 possible

	refs int
}

func (b *Blocks) contains(a netip.Addr) bool {
	return slices.ContainsFunc(b.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Group is a set of pod addresses that rules share. Without a protocol it holds the pods that a list of selectors picks. With
// one it stands for a named port of an egress rule: it holds those that have the port, each with its own number.
type Group struct {
	Key      string // what it means, in words that are the same for the same meaning
	Protocol corev1.Protocol

	selectors []selector // nil: every pod
	port      string     // the port's name
	members   addrmap.Map[uint16]
	refs      int
}

// Has reports whether an address is a member.
func (g *Group) Has(a netip.Addr) bool { return g.members.Has(a) }

// Members returns the addresses in order, with the port's number, or 0 in a group without a protocol.
func (g *Group) Members() []netip.AddrPort {
	list := make([]netip.AddrPort, 0, g.members.Len())
	for a, port := range g.members.All() {
		list = append(list, netip.AddrPortFrom(a, port))
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return list
}

// At returns the guarded interface that has an address, nil if none has.
func (m *Model) At(a netip.Addr) *Guarded { return m.at[a] }

// Allowed reports whether the first packet of a flow may pass on this node: from src to the real destination dst, after any
// translation. protocol is "" for one that policies cannot name (ICMP). own says which addresses are the node's own:
// between a node and its own pods everything passes.
func (m *Model) Allowed(src, dst netip.Addr, protocol corev1.Protocol, port uint16, own func(netip.Addr) bool) bool {
	return allowed(m.At, src, dst, protocol, port, own)
}

func allowed(
	at func(netip.Addr) *Guarded, src, dst netip.Addr, protocol corev1.Protocol, port uint16, own func(netip.Addr) bool,
) bool {
	from, to := at(src), at(dst)
	if from == nil && to == nil || src == dst || own(src) || own(dst) {
		return true
	}
	if from != nil && !from.Ready || to != nil && !to.Ready {
		return false
	}
	return (from == nil || from.Egress.allows(dst, dst, protocol, port)) &&
		(to == nil || to.Ingress.allows(src, dst, protocol, port))
}

// allows reports whether one direction lets a packet pass whose other end is peer and whose destination is (dst, port).
func (s *Side) allows(peer, dst netip.Addr, protocol corev1.Protocol, port uint16) bool {
	return !s.Isolated || slices.ContainsFunc(s.Rules, func(r Rule) bool { return r.allows(peer, dst, protocol, port) })
}

func (r *Rule) allows(peer, dst netip.Addr, protocol corev1.Protocol, port uint16) bool {
	if r.Named != nil {
		number, in := r.Named.members.Get(dst)
		return in && r.Named.Protocol == protocol && number == port
	}
	return r.Peers.contains(peer) &&
		(r.Port == Port{} || r.Port.Protocol == protocol && r.Port.From <= port && port <= r.Port.To)
}

// Resolve works out the model from nothing.
func Resolve(in Input) *Model {
	x := NewIndex()
	locals := make(map[string]*Local, len(in.Local))
	for i := range in.Local {
		locals[in.Local[i].Interface] = &in.Local[i]
	}
	x.Update(Changes{Changes: object.Diff(object.Cluster{}, in.Cluster), Locals: locals, Ranges: in.Ranges, NewRanges: true})
	return x.Model()
}

// Model returns what the policies mean now. Its groups go on changing with the index.
func (x *Index) Model() *Model {
	m := &Model{at: map[netip.Addr]*Guarded{}}
	m.Pods = slices.SortedFunc(maps.Values(x.local), func(a, b *Guarded) int { return strings.Compare(a.Interface, b.Interface) })
	m.Ranges, m.Problems = x.ranges, x.Problems()
	for a := range x.claims.All() {
		if g := x.At(a); g != nil {
			m.at[a] = g
		}
	}
	return m
}

// Serves is [Index.Serves].
func (m *Model) Serves(v4 bool) bool {
	return inFamily(m.Ranges, v4) || slices.ContainsFunc(m.Pods, func(g *Guarded) bool {
		return slices.ContainsFunc(g.Addresses, func(a netip.Addr) bool { return a.Is4() == v4 })
	})
}

// Problems returns the policies that cannot be used as written, sorted by policy.
func (x *Index) Problems() []Problem {
	return slices.SortedFunc(maps.Values(x.problems), func(a, b Problem) int { return cmp.Compare(a.Policy, b.Policy) })
}
